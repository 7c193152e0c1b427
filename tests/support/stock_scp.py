"""pynetdicom as it comes, as Storage SCP: the other side of the differential test, and of `scripts/bench receive`.

    stock_scp.py naive|bytes PORT FOLDER

naive: what its documentation shows: decode, `save_as`. bytes: the data set as it came, PDUs as long as the node takes
them. Neither is durable, neither looks at what it stores.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any


def serve(kind: str, port: int, folder: Path) -> None:
    """Until killed."""
    from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, StoragePresentationContexts, evt
    from pynetdicom.sop_class import Verification

    def naive(event: Any) -> int:
        ds = event.dataset
        ds.file_meta = event.file_meta
        ds.save_as(folder / uuid.uuid4().hex, enforce_file_format=True)
        return 0

    def as_it_came(event: Any) -> int:
        (folder / uuid.uuid4().hex).write_bytes(event.encoded_dataset())
        return 0

    ae = AE("DICOM_NODE")
    ae.require_called_aet = True
    ae.maximum_associations = 200
    if kind == "bytes":
        ae.maximum_pdu_size = 131072
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 5
    for context in StoragePresentationContexts:
        ae.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
    ae.add_supported_context(Verification)
    handler = naive if kind == "naive" else as_it_came
    ae.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, handler)])


class StockScp:
    """It as a child process."""

    def __init__(self, folder: Path, kind: str = "bytes") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port: int = s.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind, str(self.port), str(folder)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < deadline, "stock pynetdicom does not come up"
            time.sleep(0.05)

    def __enter__(self) -> StockScp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
