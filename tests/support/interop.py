"""Senders of other makers, driven as their users do, and a receiver that writes what they really send.

Every sender is a function of port, files, folder for its own papers, and its TLS files (None = plain). It skips the
test by name where the program is absent, and raises CalledProcessError where a file was not taken.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from e2e_node import free_port, peer, wait_for

from dicom_node.config import Tls
from dicom_node.store.part10 import read_meta

CALLED = "DICOM_NODE"
SECONDS = 120
Send = Callable[[int, list[Path], Path, Tls | None], None]

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
BASELINE = "1.2.840.10008.1.2.4.50"
_STORESCU = {EXPLICIT: "-xe", IMPLICIT: "-xi", BASELINE: "-xy"}


def data_set(path: Path) -> bytes:
    """What stands behind the file meta information."""
    return path.read_bytes()[read_meta(path).dataset_offset :]


def digests(paths: Iterable[Path]) -> Counter[str]:
    return Counter(hashlib.sha256(data_set(p)).hexdigest() for p in paths)


def by_syntax(files: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(read_meta(path).transfer_syntax_uid, []).append(path)
    return groups


class Reference:
    """DCMTK's storescp, writing what it receives bit by bit: what a sender really sends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        # +xa accepts every transfer syntax, +B writes as received, +uf keeps duplicates.
        command = [peer("storescp"), "+B", "+uf", "+xa", "-aet", CALLED, "-od", str(folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(c) for c in command], check=True, capture_output=True, timeout=SECONDS, cwd=cwd)


def storescu(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    secure = ["+tls", tls.key, tls.cert, "+cf", tls.ca] if tls else []
    for syntax, group in by_syntax(files).items():
        run(peer("storescu"), *secure, "-R", _STORESCU[syntax], "-aec", CALLED, "127.0.0.1", port, *group)


def dcmsend(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    # It proposes what its files are; -dn: nothing is decoded and sent otherwise than it is.
    run(peer("dcmsend"), "-dn", "-aec", CALLED, "127.0.0.1", port, *files)


def odil(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    for path in files:
        run(peer("odil"), "store", "127.0.0.1", port, "ODIL", CALLED, path)


def send_image(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    """Of the Central Test Node."""
    for path in files:
        syntax = read_meta(path).transfer_syntax_uid
        run(peer("send_image"), "-q", "-r", "-Z", "-a", "CTN", "-c", CALLED, "-X", syntax, "127.0.0.1", port, path)


def gdcmscu(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    for path in files:
        command = [peer("gdcmscu"), "--store", "--aetitle", "GDCM", "--call", CALLED, "127.0.0.1", str(port), str(path)]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS)
        # 3.0.21 aborts itself at its own release, after storing, whoever the peer is. What arrived says how it went.
        if done.returncode and b"ProtocolStream as nullptr" not in done.stderr:
            raise subprocess.CalledProcessError(done.returncode, command)


def pynetdicom(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    from pydicom import dcmread
    from pynetdicom import AE

    context = None
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(tls.ca))
        context.check_hostname = False
        context.load_cert_chain(tls.cert, tls.key)
    ae = AE("PYNETDICOM")
    for syntax, group in by_syntax(files).items():
        for sop_class in {read_meta(path).sop_class_uid for path in group}:
            ae.add_requested_context(sop_class, syntax)
    association = ae.associate(
        "127.0.0.1", port, ae_title=CALLED, tls_args=(context, "127.0.0.1") if context is not None else None
    )
    assert association.is_established
    for path in files:
        # Given a path, it sends the bytes as they lie or makes new ones, by a switch of the library that our own sender
        # sets for the whole process.
        status = association.send_c_store(dcmread(path)).Status
        assert status == 0, f"{path.name}: {status:#06x}"
    association.release()


ORTHANC_SECONDS = 30


def orthanc(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    """Stores the files, and sends them on from there."""
    program = peer("Orthanc")
    http = free_port()
    where = Path(tempfile.mkdtemp(prefix="orthanc-", dir=folder))
    settings = {
        "Name": "SENDER", "DicomAet": "ORTHANC", "DicomPort": free_port(), "HttpPort": http, "Plugins": [],
        "StorageDirectory": str(where / "db"), "IndexDirectory": str(where / "db"), "OverwriteInstances": True,
        "DicomModalities": {"node": {"AET": CALLED, "Host": "127.0.0.1", "Port": port, "UseDicomTls": tls is not None}},
    }  # fmt: skip
    if tls is not None:
        settings |= {
            "DicomTlsCertificate": str(tls.cert), "DicomTlsPrivateKey": str(tls.key),
            "DicomTlsTrustedCertificates": str(tls.ca),
        }  # fmt: skip
    (where / "orthanc.json").write_text(json.dumps(settings))
    with (where / "log").open("wb") as log:
        process = subprocess.Popen([program, str(where / "orthanc.json")], stdout=log, stderr=log)
    try:
        wait_for(lambda: _listens(http), ORTHANC_SECONDS)
        held = [json.loads(_post(http, "instances", path.read_bytes()))["ID"] for path in files]
        answer = json.loads(_post(http, "modalities/node/store", json.dumps({"Resources": held}).encode()))
        assert answer["FailedInstancesCount"] == 0, answer
    finally:
        process.kill()  # in order it takes seconds, and what it holds is thrown away
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _post(port: int, path: str, body: bytes) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data=body, method="POST")
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
        return bytes(answer.read())


DCMJS = """
const fs = require('fs');
const {Client, requests, constants} = require('dcmjs-dimse');
const [port, key, cert, ca, ...files] = process.argv.slice(2);
const failed = [];
const client = new Client();
for (const file of files) {
  const request = new requests.CStoreRequest(file);
  request.on('response', r => { if (r.getStatus() !== constants.Status.Success) failed.push([file, r.getStatus()]); });
  client.addRequest(request);
}
client.on('networkError', e => { console.error(String(e)); process.exit(2); });
client.on('closed', () => { console.error(JSON.stringify(failed)); process.exit(failed.length ? 1 : 0); });
const options = key === '-' ? {} : {securityOptions: {
  key: fs.readFileSync(key), cert: fs.readFileSync(cert), ca: fs.readFileSync(ca),
  rejectUnauthorized: true}};
client.send('127.0.0.1', Number(port), 'DCMJS', 'DICOM_NODE', options);
"""


def dcmjs(port: int, files: list[Path], folder: Path, tls: Tls | None) -> None:
    """dcmjs-dimse, from the npm registry."""
    where = folder / "js"
    if not where.exists():
        where.mkdir()
        (where / "send.js").write_text(DCMJS)
        command = [
            peer("npm"),
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "dcmjs-dimse@0.3.3",
        ]
        if subprocess.run(command, cwd=where, capture_output=True, timeout=240).returncode:
            shutil.rmtree(where)
            pytest.skip("npm package dcmjs-dimse cannot be installed here")
    papers = (tls.key, tls.cert, tls.ca) if tls else ("-", "-", "-")
    run(peer("node"), "send.js", port, *papers, *files, cwd=where)
    time.sleep(0.1)
