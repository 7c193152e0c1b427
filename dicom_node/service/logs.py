"""One log a process: opened here, then passed by constructor."""

from __future__ import annotations

from pathlib import Path

from dicom_node.config import Log as LogSection
from dicom_node.log import Log, load_secret, quiet_libraries
from dicom_node.pixels.decode import quiet_values


def open_log(section: LogSection, root: Path, process: str) -> Log:
    """JSON lines on stderr, and the libraries' own logging made quiet (pynetdicom prints data sets at debug level)."""
    log = Log.open(level=section.level, format=section.format, secret=load_secret(root)).bind(process=process)
    quiet_values()
    quiet_libraries(log)
    return log
