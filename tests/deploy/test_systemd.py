"""The units: hardened as promised, alike in their sandbox, and sound to systemd."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).parent.parent.parent / "deploy" / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))
DROP_INS = sorted((SYSTEMD / "drop-ins").glob("*.conf"))
EXPOSURE_LIMIT = 20  # tenths: 2.0 of 10


def settings(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE)


def exposure(path: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian systemd)")
    return subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_LIMIT}", str(path)],
        capture_output=True,
        text=True,
    )


def test_there_are_three_units() -> None:
    assert [p.name for p in UNITS] == ["dicom-node-listen.service", "dicom-node-work.service", "dicom-node.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_the_exposure_stays_under_the_limit(unit: Path) -> None:
    done = exposure(unit)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


@pytest.mark.parametrize("drop_in", DROP_INS, ids=lambda p: p.name)
def test_a_drop_in_keeps_the_exposure_under_the_limit(drop_in: Path, tmp_path: Path) -> None:
    unit = tmp_path / "dicom-node.service"
    unit.write_text((SYSTEMD / "dicom-node.service").read_text() + drop_in.read_text())
    done = exposure(unit)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_the_limit_can_fail(tmp_path: Path) -> None:
    unit = tmp_path / "bare.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert exposure(unit).returncode == 1


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_systemd_understands_every_line(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian systemd)")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/dicom-node/venv/bin/dicom-node", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    about_us = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, about_us) == (0, [])


def test_the_halves_have_the_sandbox_of_the_whole() -> None:
    """What differs between the three is what they run and how much memory they may use, nothing else."""
    own = {"Description", "ExecStart", "MemoryMax", "TasksMax", "Conflicts"}
    first, *others = [[s for s in settings(unit) if s[0] not in own] for unit in UNITS]
    assert all(other == first for other in others)


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_supervision_is_as_documented(unit: Path) -> None:
    said = dict(settings(unit))
    assert said["Type"] == "notify"
    assert int(said["WatchdogSec"]) <= 30
    assert said["Restart"] == "always"
    assert said["RestartPreventExitStatus"] == "78"  # a wrong configuration does not get better by restarting
    assert said["StartLimitIntervalSec"] == "0"
    assert said["OOMPolicy"] == "continue"
    assert said["UMask"] == "0077"


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_the_worker_may_read_what_the_processor_can_do(unit: Path) -> None:
    """With ProcSubset=pid ONNX Runtime warns "cpuinfo_initialize failed. May cause CPU EP performance degradation"."""
    assert dict(settings(unit))["ProcSubset"] == "all"


def test_the_figure_in_the_documents_is_the_measured_one() -> None:
    done = exposure(SYSTEMD / "dicom-node.service")
    figure = re.search(r"exposure level for dicom-node\.service: (\S+)", done.stdout)
    assert figure is not None
    repository = SYSTEMD.parent.parent
    assert f"(`systemd-analyze security`: {figure[1]})" in (repository / "deploy" / "README.md").read_text()
    assert f"`systemd-analyze security` gives {figure[1]} " in (repository / "docs" / "security.md").read_text()


def test_each_unit_runs_its_part() -> None:
    parts = {p.name: re.search(r"ExecStart=.* run ?(.*) --config", p.read_text())[1] for p in UNITS}  # type: ignore[index]
    assert parts == {
        "dicom-node.service": "",
        "dicom-node-listen.service": "--only listen",
        "dicom-node-work.service": "--only work",
    }


def test_drop_ins_hold_service_settings_only() -> None:
    for path in DROP_INS:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read_string(path.read_text())
        assert parser.sections() == ["Service"], path.name
