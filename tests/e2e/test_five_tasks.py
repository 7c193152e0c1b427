"""Every task through the network: unseen phantoms sent by storescu come back with the right category, and validate."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml
from e2e_node import REPOSITORY, peer

from engines.training.__main__ import main as training

SR = "1.2.840.10008.5.1.4.1.1.88.34"
TASKS = sorted(p.parents[1].name for p in REPOSITORY.glob("engines/*/model/manifest.yaml"))
SEEDS = range(870_001, 870_021)
"""No training has seen them (training.yaml of each task)."""


def categories(report: pydicom.Dataset, concept: str) -> dict[str, str]:
    """Tracking identifier to the code of the qualitative evaluation."""
    found: dict[str, str] = {}

    def look(item: Any, name: str) -> None:
        for child in item.get("ContentSequence", []):
            key = child.ConceptNameCodeSequence[0].CodeValue if "ConceptNameCodeSequence" in child else ""
            if key == "112039":
                name = str(child.TextValue)
            elif key == concept:
                found[name] = str(child.ConceptCodeSequence[0].CodeValue)
            look(child, name)

    look(report, "")
    return found


def send(port: int, folder: Path) -> None:
    """One association for the study, as a modality does; every file proposed as it is encoded."""
    command = [peer("storescu"), "+sd", "-R", "-xy", "-aec", "DICOM_NODE", "127.0.0.1", str(port), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("task", TASKS)
def test_twenty_unseen_phantoms_come_back_right_and_valid(task: str, make_node: Any, pacs: Any, tmp_path: Path) -> None:
    """At least 17 labels right; indeterminate, refused and lost count as wrong. Validators find no error."""
    said = yaml.safe_load((REPOSITORY / "engines" / task / "engine.yaml").read_text("utf-8"))["categories"]
    node = make_node(pacs.port)
    node.settings["routes"] = [r for r in node.settings["routes"] if r["engine"] == task]
    node.write_config()
    node.start()
    expected = {}
    for number, seed in enumerate(SEEDS):
        label = number % 2
        folder = tmp_path / "sent" / str(seed)
        command = ["phantom", task, "--seed", str(seed), "--label", str(label), "--roi", "--out", str(folder)]
        assert training(command) == 0
        uid = str(pydicom.dcmread(next(folder.glob("*.dcm")), stop_before_pixels=True).StudyInstanceUID)
        expected[uid] = said["high" if label else "low"]["value"]
        send(node.port, folder)
    for uid in expected:
        node.wait_state(uid, "DONE", seconds=120)
    called = {
        str(o.StudyInstanceUID): categories(o, said["name"]["value"]) for o in pacs.objects() if o.SOPClassUID == SR
    }
    right = 0
    for uid, value in expected.items():
        found = called.get(uid, {})
        right += (found.get("Patient") or next(iter(found.values()), "")) == value
    assert right >= 17, f"{right} of {len(expected)}: {called}"
    _validate(pacs, next(iter(expected)))


def _validate(pacs: Any, uid: str) -> None:
    paths = [p for p in sorted(pacs.folder.iterdir()) if str(pydicom.dcmread(p).StudyInstanceUID) == uid]
    assert len(paths) >= 2
    for path in paths:
        done = subprocess.run([peer("dciodvfy"), "-new", str(path)], capture_output=True, text=True)
        assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
