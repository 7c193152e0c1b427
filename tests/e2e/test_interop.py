"""Senders of eight makers: what each of them sends is what is stored, byte for byte, over plain TCP and over TLS."""

from __future__ import annotations

import ipaddress
import subprocess
import urllib.error
from pathlib import Path

import interop
import pytest
from certificates import Authority
from interop import BASELINE, EXPLICIT, IMPLICIT, Reference, Send, by_syntax, digests
from listener_process import ListenerProcess

from dicom_node.config import Tls

MAX_BYTES = 3_000_000
UNCOMPRESSED, ALL = (EXPLICIT, IMPLICIT), (EXPLICIT, IMPLICIT, BASELINE)
SENDERS = [
    (interop.storescu, ALL), (interop.dcmsend, ALL), (interop.odil, UNCOMPRESSED), (interop.send_image, (EXPLICIT,)),
    (interop.gdcmscu, UNCOMPRESSED), (interop.orthanc, ALL), (interop.pynetdicom, ALL),
]  # fmt: skip
BY_TLS = [(interop.storescu, ALL), (interop.orthanc, ALL), (interop.pynetdicom, ALL)]
"""dcmsend (3.6.7), odil, CTN and gdcmscu know no TLS."""


def name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.fixture(scope="module")
def real_files(tmp_path_factory) -> list[Path]:
    """Real ultrasound and MR, not too large, a few of each transfer syntax."""
    data = Path(__file__).parents[3] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("needs the real DICOM samples (../shared/data)")
    files = [*sorted(data.glob("us/*.dcm")), *sorted(data.glob("mr/**/*.dcm"))]
    broken = {"acuson_echo_65f_jpegbaseline.dcm"}  # closes its fragments twice; no library but pydicom reads it
    small = [p for p in files if p.stat().st_size < MAX_BYTES and p.name not in broken]
    groups = by_syntax(small)
    return [path for syntax in ALL for path in groups.get(syntax, [])[:3]]


def sent(send: Send, files: list[Path], folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Those that the sender can read and send, and the digests of what it then sends: some write data sets anew."""
    with Reference(folder / "reference") as reference:

        def able(some: list[Path]) -> bool:
            before = set(reference.folder.iterdir())
            try:
                send(reference.port, some, folder, None)
                assert len(set(reference.folder.iterdir()) - before) == len(some)
            except (subprocess.CalledProcessError, urllib.error.HTTPError, AssertionError):
                for path in set(reference.folder.iterdir()) - before:
                    path.unlink()
                return False
            return True

        takes = files if able(files) else [path for path in files if able([path])]
        return takes, digests(reference.folder.iterdir())


@pytest.mark.parametrize(("send", "syntaxes"), SENDERS, ids=name)
def test_what_is_sent_is_what_is_stored(tmp_path, real_files, send, syntaxes):
    groups = by_syntax(real_files)
    files = [path for syntax in syntaxes for path in groups.get(syntax, [])]
    able, expected = sent(send, files, tmp_path)
    assert len(able) > len(files) // 2, f"{send.__name__} sends only {[p.name for p in able]}"
    with ListenerProcess(tmp_path / "root") as node:
        send(node.port, able, tmp_path, None)
        assert digests(node.files()) == expected


@pytest.mark.parametrize(("send", "syntaxes"), BY_TLS, ids=name)
def test_the_same_over_tls(tmp_path, real_files, send, syntaxes):
    groups = by_syntax(real_files)
    files = [path for syntax in syntaxes for path in groups.get(syntax, [])[:2]]
    able, expected = sent(send, files, tmp_path)
    _over_tls(tmp_path, send, able, expected)


@pytest.mark.long
def test_dcmjs_dimse_plain_and_over_tls(tmp_path, real_files):
    files = [path for group in by_syntax(real_files).values() for path in group[:2]]
    able, expected = sent(interop.dcmjs, files, tmp_path)
    assert able
    with ListenerProcess(tmp_path / "plain") as node:
        interop.dcmjs(node.port, able, tmp_path, None)
        assert digests(node.files()) == expected
    _over_tls(tmp_path, interop.dcmjs, able, expected)


def _over_tls(tmp_path: Path, send: Send, files: list[Path], expected: dict[str, int]) -> None:
    assert files
    folder = tmp_path / "pki"
    folder.mkdir()
    authority = Authority(folder)
    sections = {}
    for who in ("node", "sender"):
        cert, key = authority.issue(who, f"{who}.hospital", [ipaddress.IPv4Address("127.0.0.1")])
        sections[who] = Tls(cert=cert, key=key, ca=authority.pem)
    with ListenerProcess(tmp_path / "root", tls=sections["node"].model_dump(mode="json")) as node:
        send(node.port, files, tmp_path, sections["sender"])
        assert digests(node.files()) == expected
