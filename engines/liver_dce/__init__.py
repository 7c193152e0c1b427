"""liver_dce: proliferative hepatocellular carcinoma on multi-phase contrast-enhanced MRI."""
