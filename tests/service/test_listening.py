"""The listener's own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


def test_the_process_that_faces_the_network_has_no_decoder_in_it():
    code = (
        "import sys\n"
        "import dicom_node.cli, dicom_node.service.listening as listening\n"
        "def run_listener(config, fd):\n"
        "    import dicom_node.receive\n"
        "    print([m for m in sys.argv[1:] if sys.modules.get(m)])\n"
        "    return 0\n"
        "listening.run_listener = run_listener\n"
        "dicom_node.cli.main(['run', '--only', 'listen', '--config', 'config.yaml'])\n"
    )
    modules = ["pydicom", "numpy", "gdcm", "PIL", "pylibjpeg", "openjpeg", "rle", "jpeg_ls"]
    run = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "['pydicom']"
