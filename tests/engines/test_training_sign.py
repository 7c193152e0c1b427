"""A package signed by its author is taken by a site that knows the key, and by no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dicom_node.errors import PackageError
from dicom_node.packages import load_package

pytest.importorskip("onnx", reason="onnx is not installed (pip install 'dicom-node[train]')")

from engines.training.__main__ import main

MODEL = Path(__file__).parents[2] / "engines/testis_tumour/model"
PEM = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "package"))


def _sign(package: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    key = package.with_name(f"{name}.pem")
    key.write_bytes(Ed25519PrivateKey.generate().private_bytes(*PEM))
    assert main(["sign", str(package), "--key", str(key)]) == 0
    said, public = capsys.readouterr().out.split(": ")
    assert said == f"{name}.pub"
    return public.strip()


def test_the_printed_key_lets_a_site_take_the_package(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = package.with_name("keys")
    keys.mkdir()
    public = _sign(package, "radiology-ai", capsys)
    with pytest.raises(PackageError, match="not among the site's keys"):
        load_package(package, keys=keys)
    (keys / "radiology-ai.pub").write_text(public)
    signed = load_package(package, keys=keys)
    assert signed.manifest.signature is not None
    assert signed.manifest.signature.key_id == "radiology-ai"


def test_signing_again_replaces_the_signature(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = package.with_name("keys")
    keys.mkdir()
    _sign(package, "old", capsys)
    (keys / "new.pub").write_text(_sign(package, "new", capsys))
    assert (package / "manifest.yaml").read_text().count("\nsignature:") == 1
    load_package(package, keys=keys)


def test_a_changed_manifest_no_longer_fits(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = package.with_name("keys")
    keys.mkdir()
    (keys / "site.pub").write_text(_sign(package, "site", capsys))
    manifest = package / "manifest.yaml"
    manifest.write_text(manifest.read_text().replace("intended_use: demonstration", "intended_use: clinical", 1))
    with pytest.raises(PackageError, match="does not fit the manifest"):
        load_package(package, keys=keys)


def test_a_key_of_another_kind_is_refused(package: Path) -> None:
    key = package.with_name("ec.pem")
    key.write_bytes(generate_private_key(SECP256R1()).private_bytes(*PEM))
    before = (package / "manifest.yaml").read_bytes()
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        main(["sign", str(package), "--key", str(key)])
    assert (package / "manifest.yaml").read_bytes() == before
