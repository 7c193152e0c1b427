"""dicom-node: the inference node that hospitals plug into their PACS. Start reading at `service.py`."""

__version__ = "0.1.0"
