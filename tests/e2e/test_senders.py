"""Other people's senders: what each stores here is, byte for byte, what it stores at DCMTK's storescp.

Plain and, where the sender can, over TLS with certificates on both sides. (dcmjs-dimse: test_listener.py.)
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from e2e_node import free_port, peer
from listener_process import listening, wait_for

from dicom_node.config import Tls
from dicom_node.dimse.tls import client_context
from dicom_node.store.part10 import read_meta

FILES = (
    "mr/MR-SIEMENS-DICOM-WithOverlays.dcm",
    "mr/emri_small.dcm",
    "us/OBXXXX1A.dcm",
    "us/philips_kidney_still_gray.dcm",
)
"""Explicit and implicit VR little endian, which every sender can send: private elements, sequences, overlays."""

Send = Callable[[int, list[Path], "Tls | None"], None]


def run(*command: object, codes: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    assert done.returncode in codes, (command[0], done.stdout[-400:], done.stderr[-400:])


def by_storescu(port: int, files: list[Path], tls: Tls | None) -> None:
    secure = ["+tls", tls.key, tls.cert, "+cf", tls.ca] if tls else []
    run(peer("storescu"), *secure, "-aec", "DICOM_NODE", "127.0.0.1", port, *files)


def by_dcmsend(port: int, files: list[Path], _tls: Tls | None) -> None:
    run(peer("dcmsend"), "-aec", "DICOM_NODE", "127.0.0.1", port, *files)


def by_odil(port: int, files: list[Path], _tls: Tls | None) -> None:
    for path in files:
        run(peer("odil"), "store", "127.0.0.1", port, "ODIL", "DICOM_NODE", path)


def by_ctn(port: int, files: list[Path], _tls: Tls | None) -> None:
    run(peer("send_image"), "-r", "-q", "-Z", "-a", "CTN", "-c", "DICOM_NODE", "127.0.0.1", port, *files)


def by_gdcmscu(port: int, files: list[Path], _tls: Tls | None) -> None:
    for path in files:
        # Debian's 3.0.21 dies by an exception of its own in its last line, with any peer: SIGABRT after the release.
        command = (peer("gdcmscu"), "--store", "--call", "DICOM_NODE", "-H", "127.0.0.1", "-p", port, "-i", path)
        run(*command, codes=(0, -6))


def by_pynetdicom(port: int, files: list[Path], tls: Tls | None) -> None:
    from pydicom import dcmread
    from pynetdicom import AE

    ae = AE("PYNETDICOM")
    for data_set in map(dcmread, files):
        ae.add_requested_context(data_set.SOPClassUID, data_set.file_meta.TransferSyntaxUID)
    secure = (client_context(tls), "127.0.0.1") if tls else None
    association = ae.associate("127.0.0.1", port, ae_title="DICOM_NODE", tls_args=secure)
    assert association.is_established
    statuses = [association.send_c_store(dcmread(path)).Status for path in files]
    association.release()
    assert statuses == [0] * len(files)


class Orthanc:
    """One that sends: uploads by HTTP, then stores at a modality."""

    def __init__(self, folder: Path, port: int, tls: Tls | None) -> None:
        self._http = free_port()
        modality: dict[str, Any] = {"AET": "DICOM_NODE", "Host": "127.0.0.1", "Port": port}
        settings: dict[str, Any] = {
            "DicomAet": "ORTHANC", "DicomPort": free_port(), "HttpPort": self._http, "Plugins": [],
            "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        }  # fmt: skip
        if tls:
            modality["UseDicomTls"] = True
            settings |= {
                "DicomTlsCertificate": str(tls.cert),
                "DicomTlsPrivateKey": str(tls.key),
                "DicomTlsTrustedCertificates": str(tls.ca),
            }
        folder.mkdir()
        (folder / "orthanc.json").write_text(json.dumps(settings | {"DicomModalities": {"node": modality}}))
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen([peer("Orthanc"), str(folder / "orthanc.json")], stdout=log, stderr=log)
        wait_for(self._answers, 30)

    def _answers(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self._http)) == 0

    def post(self, path: str, body: bytes) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._http, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            answer = connection.getresponse()
            assert answer.status == 200
            return json.loads(answer.read())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def by_orthanc(port: int, files: list[Path], tls: Tls | None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        orthanc = Orthanc(Path(folder) / "orthanc", port, tls)
        try:
            ids = [orthanc.post("/instances", path.read_bytes())["ID"] for path in files]
            assert orthanc.post("/modalities/node/store", json.dumps(ids).encode())["FailedInstancesCount"] == 0
        finally:
            orthanc.stop()


PLAIN: list[Send] = [by_storescu, by_dcmsend, by_odil, by_ctn, by_gdcmscu, by_pynetdicom, by_orthanc]
SECURE: list[Send] = [by_storescu, by_pynetdicom, by_orthanc]


@pytest.fixture
def files(shared_data) -> list[Path]:
    return [shared_data / name for name in FILES]


@pytest.fixture
def reference(tmp_path) -> Iterator[tuple[int, Path]]:
    """DCMTK's storescp, writing what it receives bit by bit."""
    folder, port = tmp_path / "reference", free_port()
    folder.mkdir()
    # +B writes as received, +uf keeps duplicates, +xa accepts every transfer syntax.
    command = [peer("storescp"), "+B", "+uf", "+xa", "-aet", "DICOM_NODE", "-od", str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers)
    yield port, folder
    process.kill()
    process.wait()


def digests(folder: Path) -> Counter[str]:
    """Of the data sets, by transfer syntax."""
    found: Counter[str] = Counter()
    for path in folder.iterdir():
        meta = read_meta(path)
        digest = hashlib.sha256(path.read_bytes()[meta.dataset_offset :]).hexdigest()
        found[f"{meta.transfer_syntax_uid} {digest}"] += 1
    return found


def compare(
    root: Path, reference: tuple[int, Path], files: list[Path], send: Send, *, theirs: Tls | None = None, **receive
) -> None:
    port, folder = reference
    send(port, files, None)
    with listening(root, **receive) as node:
        send(node.port, files, theirs)
        stored = digests(root / "incoming")
        wait_for(lambda: not node.listener._server.open_associations)
        aborted = node.messages.counts("dicom_node_associations_aborted_total")
    assert stored == digests(folder)
    assert sum(stored.values()) == len(files)
    assert aborted == 0


@pytest.mark.parametrize("send", PLAIN, ids=lambda s: s.__name__)
def test_plain(tmp_path, reference, files, send):
    compare(tmp_path / "root", reference, files, send)


@pytest.mark.parametrize("send", SECURE, ids=lambda s: s.__name__)
def test_tls(tmp_path, reference, files, send):
    pki = tmp_path / "pki"
    pki.mkdir()
    authority = Authority(pki)
    mine, theirs = (
        Tls(cert=cert, key=key, ca=authority.pem)
        for cert, key in (authority.issue(name, name) for name in ("node", "scanner"))
    )
    compare(tmp_path / "root", reference, files, send, theirs=theirs, tls=mine.model_dump(mode="json"))
