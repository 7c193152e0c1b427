"""install.sh in a temporary root: what it lays down, and that running it again changes nothing of yours."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPT = REPOSITORY / "deploy" / "install.sh"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `pip wheel` would make it, zipped here because building one downloads the build backend."""
    path = tmp_path_factory.mktemp("wheel") / "dicom_node-0.1.0-py3-none-any.whl"
    files = {
        f"dicom_node/{p.relative_to(REPOSITORY / 'dicom_node')}": p for p in (REPOSITORY / "dicom_node").rglob("*.py")
    }
    files |= {
        f"dicom_node/_shipped/{p.relative_to(REPOSITORY)}": p
        for p in [*(REPOSITORY / "engines").rglob("*.yaml"), REPOSITORY / "config.yaml"]
    }
    info = "dicom_node-0.1.0.dist-info"
    texts = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: dicom-node\nVersion: 0.1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ndicom-node = dicom_node.cli:main\n",
    }
    record = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {
            **{n: p.read_bytes() for n, p in files.items()},
            **{n: t.encode() for n, t in texts.items()},
        }.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
    return path


def install(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPT), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_dry_run_says_everything_and_touches_nothing(tmp_path: Path) -> None:
    done = install("--prefix", str(tmp_path / "root"), "--dry-run", "--split")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "root").exists()
    for said in ("dicom-node-listen.service", "dicom-node-work.service", "/etc/dicom-node/config.yaml", "releases"):
        assert said in done.stdout


def test_an_unknown_option_is_a_usage_error() -> None:
    done = install("--prefixx", "x")
    assert done.returncode == 2
    assert "usage: install.sh" in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    root = tmp_path_factory.mktemp("root")
    done = install("--source", str(wheel), "--prefix", str(root), "--pip-args", "--no-deps --no-index")
    assert done.returncode == 0, done.stderr
    return root


def test_what_an_installation_lays_down(installed: Path) -> None:
    opt, etc = installed / "opt/dicom-node", installed / "etc/dicom-node"
    interpreter = (opt / "venv/bin/dicom-node").read_text().splitlines()[0].removeprefix("#!").strip()
    assert Path(interpreter).exists()
    assert (opt / "engines/renal_ceus/engine.yaml").is_file()
    assert [p.name for p in (installed / "etc/systemd/system").iterdir()] == ["dicom-node.service"]
    assert (installed / "var/lib/dicom-node").stat().st_mode & 0o777 == 0o700
    assert etc.stat().st_mode & 0o777 == 0o750
    config = (etc / "config.yaml").read_text()
    assert "\n  root: /var/lib/dicom-node " in config
    assert "\n  path: [/opt/dicom-node/engines] " in config
    assert len(config.splitlines()) == len((REPOSITORY / "config.yaml").read_text().splitlines())


@pytest.mark.long
def test_installing_again_keeps_your_configuration_and_the_way_back(installed: Path, wheel: Path) -> None:
    opt, etc, units = installed / "opt/dicom-node", installed / "etc/dicom-node", installed / "etc/systemd/system"
    (etc / "config.yaml").write_text("receive: {ae_title: OURS}\n")
    old = (opt / "venv").resolve()
    time.sleep(1.1)  # releases are named by the second
    arguments = ("--source", str(wheel), "--prefix", str(installed), "--pip-args", "--no-deps --no-index")
    done = install(*arguments, "--split")
    assert done.returncode == 0, done.stderr
    assert (etc / "config.yaml").read_text() == "receive: {ae_title: OURS}\n"
    assert (etc / "config.yaml.shipped").read_text() == (REPOSITORY / "config.yaml").read_text()
    assert sorted(p.name for p in units.iterdir()) == ["dicom-node-listen.service", "dicom-node-work.service"]
    assert old.is_dir()
    assert (opt / "venv").resolve() != old


@pytest.mark.long
def test_a_failed_download_leaves_the_release_in_use(tmp_path: Path, wheel: Path) -> None:
    root = tmp_path / "root"
    broken = tmp_path / wheel.name
    broken.write_bytes(b"not a wheel")
    done = install("--source", str(broken), "--prefix", str(root), "--pip-args", "--no-deps --no-index")
    assert done.returncode != 0
    assert not (root / "opt/dicom-node/venv").exists()
    assert list((root / "opt/dicom-node/releases").iterdir()) == []


def test_shellcheck_finds_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian shellcheck)")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_may_be_run_as_it_lies() -> None:
    assert os.access(SCRIPT, os.X_OK)
