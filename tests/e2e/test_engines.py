"""Engines and packages of a running node: another package is put to use and taken back, a sixth engine is added."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tiny_engine
import yaml
from e2e_node import REPOSITORY, Node, make_phantom, storescu, study_uid, wait_for

SR, CAPTURE = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.7.4"

ENGINE = """
import time
import numpy as np
from dicom_node.engine import Prediction, Selection, UnitPrediction
from dicom_node.result import FrameRef, Refusal, RefusalCode

def select(study, clinical):
    clips = [i for i in study.instances if i.number_of_frames == 2]
    return Selection((clips[0],), "") if clips else Refusal(RefusalCode.TOO_FEW_FRAMES, "no clip of two frames")

def predict(selection, pixels, run):
    clip = selection.instances[0]
    if clip.header.text("SeriesDescription") == "slow":
        time.sleep(6)
    frames = np.stack(list(pixels.frames(clip)))
    x = frames.reshape(2, 1, 4, 4, 4, 4).mean(axis=(3, 5)).astype(np.float32) / 255
    out = run("classifier", {"x": x})
    refs = tuple(FrameRef(clip.header.text("SOPClassUID"), clip.sop_instance_uid, n, 2) for n in (1, 2))
    unit = UnitPrediction("Lesion 1", out["logits"].mean(axis=0), out["features"], frames, refs, (0, 0, 15, 15))
    return Prediction((unit,))
"""
ROUTE = {
    "name": "tiny-route",
    "when": {"modality": "US", "StudyDescription": {"regex": "tiny"}},
    "indication": {"any": [{"StudyDescription": {"regex": "tiny"}}]},
    "engine": "tiny",
    "deliver": ["pacs"],
}


def clip(path: Path, description: str = "quick") -> Path:
    """Two frames of 16 x 16 as an ultrasound multi-frame image."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = "Tiny^Test", "T1", "", "O"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260101", "120000", "1"
    dataset.AccessionNumber, dataset.ReferringPhysicianName = "", ""
    dataset.StudyDescription, dataset.SeriesDescription, dataset.Modality = "tiny", description, "US"
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.NumberOfFrames, dataset.FrameTime, dataset.FrameIncrementPointer = 2, 40.0, 0x00181063
    dataset.Rows = dataset.Columns = 16
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = np.linspace(0, 255, 512).astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def fresh(path: Path, target: Path) -> Path:
    """The same images as a study of its own."""
    dataset = pydicom.dcmread(path)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, keyword, pydicom.uid.generate_uid())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(target)
    return target


def numbers(item: pydicom.Dataset) -> dict[str, str]:
    """Every text and number of an SR by its concept; what stands there twice, one below the other."""
    found: dict[str, str] = {}

    def add(key: str, value: str) -> None:
        found[key] = f"{found[key]}\n{value}" if key in found else value

    for child in item.get("ContentSequence", []):
        if "ConceptNameCodeSequence" in child:
            value = child.get("TextValue")
            if "MeasuredValueSequence" in child and child.MeasuredValueSequence:
                value = child.MeasuredValueSequence[0].NumericValue
            if value is not None:
                add(child.ConceptNameCodeSequence[0].CodeValue, str(value))
        for key, value in numbers(child).items():
            add(key, value)
    return found


def add_tiny(node: Node) -> None:
    """One folder and one route: all that a further engine needs."""
    tiny_engine.write_task(node.folder / "engines", ENGINE)
    node.settings["engines"]["path"].append(str(node.folder / "engines"))
    node.settings["routes"].append(ROUTE)
    node.write_config()


def site_package(folder: Path) -> Path:
    """The shipped network with another calibration: a package a site would bring, which says other numbers."""
    shutil.copytree(REPOSITORY / "engines/renal_ceus/model", folder)
    content = yaml.safe_load((folder / "manifest.yaml").read_text())
    content |= {"version": "site-7", "calibration": {"method": "temperature", "T": 5.0, "fitted_on": "test"}}
    content.pop("files")
    tiny_engine.write_manifest(folder, json.loads(json.dumps(content)))
    return folder


def result(node: Node, pacs: Any, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Send a study; the recorded outcome, and what the SR at the PACS says."""
    assert storescu(node.port, path) == 0
    uid = study_uid(path)
    (outcome,) = node.wait_state(uid, "DONE")["outcomes"]
    assert outcome["outcome"] == "RESULT", outcome
    (sr,) = [o for o in pacs.objects() if o.SOPClassUID == SR and uid == o.StudyInstanceUID]
    return outcome, numbers(sr)


def test_another_package_is_installed_put_to_use_and_taken_back_while_the_node_runs(make_node, pacs, tmp_path):
    node = make_node(pacs.port).start()
    phantom = make_phantom(tmp_path / "sent", seed=501, label=1)
    shipped, before = result(node, pacs, phantom)
    done = node.cli("engines", "install", str(site_package(tmp_path / "brought")))
    assert "installed; `engines activate renal_ceus site-7` puts it to use" in done.stdout
    still, same = result(node, pacs, fresh(phantom, tmp_path / "b.dcm"))
    assert still["digest"] == shipped["digest"] and same["PROB-HIGHGRADE"] == before["PROB-HIGHGRADE"]

    worker = node.child("dicom_node.worker").pid
    assert "site-7" in node.cli("engines", "activate", "renal_ceus", "site-7").stdout
    site, after = result(node, pacs, fresh(phantom, tmp_path / "c.dcm"))
    assert (site["package"], after["111003"]) == ("site-7", "site-7")  # 111003: Algorithm Version
    assert site["digest"] != shipped["digest"] and site["digest"] in "\n".join(after.values())
    assert after["PROB-HIGHGRADE"] != before["PROB-HIGHGRADE"]
    assert node.child("dicom_node.worker").pid == worker

    assert "before: site-7" in node.cli("engines", "rollback", "renal_ceus").stdout
    again, back = result(node, pacs, fresh(phantom, tmp_path / "d.dcm"))
    assert again["digest"] == shipped["digest"] and back["111003"] == before["111003"] == shipped["package"]
    assert back["PROB-HIGHGRADE"] == before["PROB-HIGHGRADE"]

    text = urllib.request.urlopen(f"http://127.0.0.1:{node.settings['metrics']['port']}/metrics").read().decode()
    for outcome in ("activated", "rolled_back"):
        assert f'package_switches_total{{engine="renal_ceus",outcome="{outcome}"}} 1.0' in text
    assert node.stop() == 0
    assert "package_activated" in node.log.read_text()


@pytest.mark.long
def test_a_bad_package_changes_nothing_on_a_running_node(make_node, pacs, tmp_path):
    node = make_node(pacs.port).start()
    bad = site_package(tmp_path / "bad")
    (bad / "head.npz").write_bytes(b"changed")
    done = node.cli("engines", "install", str(bad), check=False)
    assert done.returncode == 1 and "head.npz" in done.stderr
    phantom = make_phantom(tmp_path / "sent", seed=501, label=1)
    outcome, _ = result(node, pacs, phantom)
    assert outcome["package"] != "site-7"


@pytest.fixture
def halves(make_node, pacs):
    """Listener and stages as two services, with the tiny engine."""
    node = make_node(pacs.port)
    add_tiny(node)
    command = [sys.executable, "-m", "dicom_node", "run", "--config", str(node.config), "--only"]
    with node.log.open("a") as log:
        started = [subprocess.Popen([*command, half], stdout=log, stderr=log) for half in ("listen", "work")]
    ready = f"http://127.0.0.1:{node.settings['metrics']['port']}/readyz"

    def is_ready() -> bool:
        try:
            return bool(urllib.request.urlopen(ready).status == 200)
        except OSError:
            return False

    wait_for(is_ready, 60)
    yield node
    for process in started:
        process.terminate()
        process.wait(30)


@pytest.mark.long
def test_the_job_in_hand_ends_with_the_package_it_began_with(halves, pacs, tmp_path):
    """Also where listener and stages are supervised apart."""
    package = tiny_engine.write_package(tmp_path / "2", {"version": "2", "task": "tiny"})
    halves.cli("engines", "install", str(package))
    slow = clip(tmp_path / "slow.dcm", "slow")
    assert storescu(halves.port, slow) == 0
    running = f"http://127.0.0.1:{halves.settings['metrics']['port']}/metrics"

    def in_hand() -> bool:
        text = urllib.request.urlopen(running).read().decode()
        return 'stage="infer"' in text and "ROUTED" in json.dumps(halves.explain(study_uid(slow)).get("events", []))

    wait_for(in_hand)
    time.sleep(0.5)
    said: list[str] = []
    order = threading.Thread(target=lambda: said.append(halves.cli("engines", "activate", "tiny", "2").stdout))
    order.start()
    quick = clip(tmp_path / "quick.dcm")
    first = halves.wait_state(study_uid(slow), "DONE")["outcomes"]
    order.join(60)
    assert said and "tiny: 2 (demonstration)" in said[0]
    assert storescu(halves.port, quick) == 0
    second = halves.wait_state(study_uid(quick), "DONE")["outcomes"]
    assert [(o["outcome"], o["package"]) for o in (*first, *second)] == [("RESULT", "1"), ("RESULT", "2")]
    assert first[0]["digest"] != second[0]["digest"]


def test_a_further_engine_is_one_folder_and_one_route(make_node, pacs, tmp_path):
    node = make_node(pacs.port)
    before = node.cli("engines", "list").stdout
    add_tiny(node)
    assert "tiny: Tiny task" in node.cli("engines", "list").stdout and "tiny" not in before
    node.start()
    study = clip(tmp_path / "study.dcm")
    outcome, said = result(node, pacs, study)
    assert (outcome["route"], outcome["engine"], outcome["package"]) == ("tiny-route", "tiny", "1")
    x = np.linspace(0, 255, 512).astype(np.uint8).reshape(2, 1, 4, 4, 4, 4).mean(axis=(3, 5)).astype(np.float32) / 255
    logits = tiny_engine.answers(x)[0].mean(axis=0)
    expected = 1 / (1 + np.exp(-(logits[1] - logits[0]) / tiny_engine.MANIFEST["calibration"]["T"]))
    assert float(said["PROB"]) == pytest.approx(expected, abs=1e-3)
    (capture,) = [o for o in pacs.objects() if o.SOPClassUID == CAPTURE]
    assert capture.StudyInstanceUID == study_uid(study) and capture.NumberOfFrames == 2
    assert node.stop() == 0


@pytest.mark.long
def test_the_demo_shows_every_task_that_has_a_package(tmp_path):
    command = [sys.executable, "-m", "dicom_node", "demo", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = {path.parent.parent.name for path in (REPOSITORY / "engines").glob("*/model/manifest.yaml")}
    pictures = [path.name for path in (tmp_path / "kept/pictures").iterdir()]
    for name in names:
        row = next(line for line in done.stdout.splitlines() if line.startswith((f"{name} ", f"{name}: not")))
        assert "RESULT" in row or "not available: install" in row
        assert "not available" in row or any(picture.startswith(f"{name}-heatmap-1") for picture in pictures)
    assert "the real clip got no number" in done.stdout
