"""`dicom-node demo`: the whole line once, as a user would run it, on this machine and nothing else.

A real `dicom-node run` (its own process, the shipped config.yaml on free ports), a receiving PACS, one phantom renal
CEUS study and one real ultrasound clip. The phantom must come back as SR and heatmap; the real clip must get no number.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pydicom
import yaml
from PIL import Image

from dicom_node import config as configuration
from dicom_node.config import Config, Destination
from dicom_node.dimse.pacs import ReceivingPacs
from dicom_node.dimse.sender import Sender
from dicom_node.errors import NodeError
from dicom_node.pixels.decode import decode_file
from dicom_node.report.tree import readable_tree
from dicom_node.service import operate

QUIET_SECONDS = 2.0
PATIENCE_SECONDS = 50.0
NO_NUMBER = {"UNROUTED", "REFUSED"}


@dataclass(frozen=True, slots=True)
class Sent:
    """One study on its way."""

    title: str
    study_uid: str
    path: Path


class DemoError(NodeError):
    """The demo did not show what it must show."""


def demo(keep: Path | None) -> int:
    """Run it. Exit code 0 only when the phantom came back as SR and heatmap and the real clip got no number."""
    started = time.monotonic()
    pictures = keep or Path(tempfile.mkdtemp(prefix="dicom-node-demo-"))
    pictures.mkdir(parents=True, exist_ok=True)
    if any(pictures.iterdir()):
        raise DemoError(f"--keep {pictures}: an empty folder is needed, or one that is not there yet")

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    with contextlib.ExitStack() as stack:
        work = pictures if keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dicom-node-")))
        say("making a phantom renal CEUS study (simulated physics, no patient)")
        phantom = Sent("phantom renal CEUS", *_study_uid(_phantom(work / "sent")))
        real = Sent("real ultrasound clip", *_study_uid(_real_clip(work / "sent")))
        pacs = stack.enter_context(ReceivingPacs(work / "pacs", ae_title="PACS"))
        config, node = stack.enter_context(_node(work, pacs.port, say))
        for study in (phantom, real):
            _send(config, node, study)
            say(f"sent by C-STORE: {study.title} ({study.path.stat().st_size / 1e6:.1f} MB)")
        answers = {study.study_uid: _wait(config, study, say) for study in (phantom, real)}
        say("done; what follows is what an operator sees with `dicom-node explain STUDY_UID`")
        for study in (phantom, real):
            print(f"\n=== {study.title}\n{operate.explain_text(answers[study.study_uid])}")
        _show_results(pacs.folder, phantom, pictures)
        _must(answers, phantom, real, pacs)
    print(f"\nThe phantom study came back as SR and heatmap; the real clip got no number. Pictures: {pictures}")
    return 0


def _phantom(folder: Path) -> Path:
    """A phantom as a modality would send it, made by the task's own generator in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    home = configuration.shipped()
    arguments = ["phantom", "renal_ceus", "--seed", "20261", "--label", "1", "--out", str(folder)]
    subprocess.run(  # noqa: S603  our own interpreter, our own arguments
        [sys.executable, "-m", "engines.training", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(home)},
    )
    return next(folder.rglob("*.dcm"))


def _real_clip(folder: Path) -> Path:
    """A real clip: from deid-data (MIT) where the extra `demo` is installed, else one that comes with pydicom (MIT)."""
    if find_spec("deid_data") is not None:
        spec = find_spec("deid_data")
        home = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path()
        for archive in sorted(home.rglob("ultrasound-multiframe*.zip")):
            with zipfile.ZipFile(archive) as z:
                name = next(n for n in z.namelist() if n.endswith(".dcm") and "__MACOSX" not in n)
                (folder / "real.dcm").write_bytes(z.read(name))
            return folder / "real.dcm"
        for file in sorted(home.rglob("ultrasound-multiframe*.dcm")):
            return Path(shutil.copy(file, folder / "real.dcm"))
    return Path(shutil.copy(pydicom.examples.get_path("ybr_color"), folder / "real.dcm"))


def _study_uid(path: Path) -> tuple[str, Path]:
    return str(pydicom.dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID), path


@contextlib.contextmanager
def _node(work: Path, pacs_port: int, say: Any) -> Iterator[tuple[Config, int]]:
    """`dicom-node run` with the shipped config.yaml, moved to free ports and a temporary root."""
    shipped = configuration.shipped()
    data = yaml.safe_load((shipped / "config.yaml").read_text(encoding="utf-8"))
    data["receive"]["port"] = data["metrics"]["port"] = 0
    data["store"] |= {"root": str(work / "root"), "min_free_gb": 0.2}
    data["engines"]["path"] = [str(shipped / "engines")]
    data["assemble"]["quiet_seconds"] = QUIET_SECONDS
    data["deliver"]["destinations"]["pacs"]["port"] = pacs_port
    data["log"]["level"] = "warning"
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "dicom_node", "run", "--config", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  as above
    try:
        assert process.stdout is not None  # noqa: S101  it is a pipe
        line = process.stdout.readline().strip()
        if not line.startswith("listening "):
            raise DemoError("the node did not start")
        say(f"dicom-node run: {line}")
        yield configuration.load(path), int(line.rpartition(":")[2])
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


def _send(config: Config, port: int, study: Sent) -> None:
    node = Destination(ae_title=config.receive.ae_title, host="127.0.0.1", port=port)
    sender = Sender("DEMO_MODALITY")
    outcome = sender.send_file(node, study.path)
    sender.close()
    if outcome.status != 0:
        raise DemoError(f"the node did not take the {study.title}: {outcome.reason}")


def _wait(config: Config, study: Sent, say: Any) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    state = ""
    while time.monotonic() < deadline:
        with contextlib.suppress(NodeError):
            answer = operate.explain(config, study.study_uid)
            if answer["state"] != state:
                state = answer["state"]
                say(f"{study.title}: {state}")
            if state in ("DONE", "DEAD", "HELD"):
                return answer
        time.sleep(0.1)
    raise DemoError(f"{study.title}: still {state} after {PATIENCE_SECONDS:.0f} s")


def _show_results(received: Path, phantom: Sent, pictures: Path) -> None:
    for path in sorted(received.glob("*.dcm")):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        if dataset.StudyInstanceUID != phantom.study_uid:
            continue
        if dataset.Modality == "SR":
            print(f"\n=== what the PACS received: {path.name}\n{readable_tree(dataset)}")
        else:
            frames = [Image.fromarray(frame) for frame in decode_file(path)]
            for number, frame in enumerate(frames, 1):
                frame.save(pictures / f"heatmap-{number:02d}.png")
            duration = float(dataset.get("FrameTime", 200.0))
            frames[0].save(
                pictures / "heatmap.webp", save_all=True, append_images=frames[1:], duration=max(duration, 60.0), loop=0
            )
            print(f"\n=== heatmap capture: {len(frames)} frames as {pictures}/heatmap-NN.png, animated: heatmap.webp")


def _must(answers: dict[str, dict[str, Any]], phantom: Sent, real: Sent, pacs: ReceivingPacs) -> None:
    """The claims of this demo, checked."""
    outcomes = {o["outcome"] for o in answers[real.study_uid]["outcomes"]}
    if not outcomes or not outcomes <= NO_NUMBER or answers[real.study_uid]["deliveries"]:
        raise DemoError(f"the real clip must get no number, but got {sorted(outcomes)}")
    if {o["outcome"] for o in answers[phantom.study_uid]["outcomes"]} != {"RESULT"}:
        raise DemoError("the phantom study must get a result")
    studies = {r.study_instance_uid for r in pacs.received}
    if studies != {phantom.study_uid} or {r.modality for r in pacs.received} != {"SR", "US"}:
        raise DemoError("the PACS must hold one SR and one capture of the phantom study, nothing else")
