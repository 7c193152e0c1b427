"""`dicom-node demo`: the whole line once, as a user would run it, on this machine and nothing else.

A real `dicom-node run` (its own process, the shipped config.yaml on free ports), a receiving PACS, a phantom study of
every task that has a package, and one real ultrasound clip. Each phantom must come back as SR and heatmap; the real
clip must get no number.
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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pydicom
import yaml
from PIL import Image

from dicom_node import config as configuration
from dicom_node import packages
from dicom_node.config import Config, Destination
from dicom_node.dimse.pacs import Received, ReceivingPacs
from dicom_node.dimse.sender import Sender
from dicom_node.errors import NodeError
from dicom_node.packages import Task
from dicom_node.pixels.decode import decode_file
from dicom_node.report.tree import readable_tree
from dicom_node.service import operate

SEED, LABEL = "20261", "1"
QUIET_SECONDS = 2.0
PATIENCE_SECONDS = 120.0
NO_NUMBER = {"UNROUTED", "REFUSED"}
CELL_MS = 60.0
"""An animated picture shows no frame for less: some viewers take a shorter time for "as slow as you like"."""


class DemoError(NodeError):
    """The demo did not show what it must show."""


@dataclass
class Sent:
    """One study on its way; `task` is None for the real clip."""

    title: str
    files: list[Path]
    task: Task | None = None
    study_uid: str = field(init=False)
    sent_at: float = 0.0
    answer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.study_uid = str(pydicom.dcmread(self.files[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)

    @property
    def megabytes(self) -> float:
        return sum(path.stat().st_size for path in self.files) / 1e6


def demo(keep: Path | None) -> int:
    """Run it. Exit code 0 only when every phantom came back as SR and heatmap and the real clip got no number."""
    started = time.monotonic()
    kept = keep or Path(tempfile.mkdtemp(prefix="dicom-node-demo-"))
    kept.mkdir(parents=True, exist_ok=True)
    if any(kept.iterdir()):
        raise DemoError(f"--keep {kept}: an empty folder is needed, or one that is not there yet")

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    with contextlib.ExitStack() as stack:
        work = kept if keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dicom-node-")))
        pacs = stack.enter_context(ReceivingPacs(work / "pacs", ae_title="PACS"))
        config, missing = _configure(work, pacs.port)
        say(f"making phantom studies (simulated physics, no patient) of {', '.join(_engines(config))}")
        with ThreadPoolExecutor(2) as pool:  # while the node loads its engines
            phantoms = [pool.submit(_phantom, config, name, work / "sent" / name) for name in _engines(config)]
            port = stack.enter_context(_node(work, say))
            studies = [phantom.result() for phantom in phantoms]
        studies.append(Sent("real ultrasound clip", [_real_clip(work / "sent")]))
        for study in studies:
            _send(config, port, study)
            say(f"sent by C-STORE: {study.title}, {len(study.files)} instances, {study.megabytes:.1f} MB")
        _wait(config, studies, say)
        results = {s.study_uid: [r for r in pacs.received if r.study_instance_uid == s.study_uid] for s in studies}
        _show(studies, results, missing, kept / "pictures")
        _must(studies, results, len(pacs.received))
        _summary(studies, results, kept / "pictures")
        say("done")
    return 0


# -- before


def _configure(work: Path, pacs_port: int) -> tuple[Config, dict[str, str]]:
    """The shipped config.yaml on free ports and a root of its own, with the routes that can run; why others cannot."""
    shipped = configuration.shipped()
    data = yaml.safe_load((shipped / "config.yaml").read_text(encoding="utf-8"))
    data["receive"]["port"] = data["metrics"]["port"] = 0
    data["store"] |= {"root": str(work / "root"), "min_free_gb": 0.2}
    data["engines"]["path"] = [str(shipped / "engines")]
    data["assemble"]["quiet_seconds"] = QUIET_SECONDS
    data["deliver"]["destinations"]["pacs"]["port"] = pacs_port
    data["log"]["level"] = "warning"
    routed = {route["engine"] for route in data["routes"]}
    missing = {}
    for engine in operate.engines_list(configuration.parse(data, file="config.yaml", base=work)):
        if not engine["available"]:
            missing[engine["task"]] = engine["reason"].removeprefix("not available: ")
        elif engine["task"] not in routed:
            missing[engine["task"]] = "no route of config.yaml asks for it"
    data["routes"] = [route for route in data["routes"] if route["engine"] not in missing]
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return configuration.load(path), missing


def _engines(config: Config) -> list[str]:
    return list(dict.fromkeys(route.engine for route in config.routes))


def _phantom(config: Config, task: str, folder: Path) -> Sent:
    """A phantom as a modality would send it, made by the task's own generator in a process of its own."""
    folder.mkdir(parents=True)
    home = configuration.shipped()
    arguments = ["phantom", task, "--seed", SEED, "--label", LABEL, "--roi", "--out", str(folder)]
    done = subprocess.run(  # noqa: S603  our own interpreter, our own arguments
        [sys.executable, "-m", "engines.training", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(home)},
    )
    files = sorted(folder.rglob("*.dcm"))
    if done.returncode != 0 or not files:
        raise DemoError(f"the phantom of {task} cannot be made: {(done.stderr.splitlines() or ['no file'])[-1]}")
    return Sent(f"phantom {task}", files, packages.task_of(config.engines.path, task))


def _real_clip(folder: Path) -> Path:
    """A real clip: from deid-data (MIT) where the extra `demo` is installed, else one that comes with pydicom (MIT)."""
    spec = find_spec("deid_data")
    home = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
    for archive in sorted(home.rglob("ultrasound-multiframe*.zip")) if home else ():
        with zipfile.ZipFile(archive) as z:
            name = next(n for n in z.namelist() if n.endswith(".dcm") and "__MACOSX" not in n)
            (folder / "real.dcm").write_bytes(z.read(name))
        return folder / "real.dcm"
    for file in sorted(home.rglob("ultrasound-multiframe*.dcm")) if home else ():
        return Path(shutil.copy(file, folder / "real.dcm"))
    return Path(shutil.copy(pydicom.examples.get_path("ybr_color"), folder / "real.dcm"))


@contextlib.contextmanager
def _node(work: Path, say: Any) -> Iterator[int]:
    """`dicom-node run`; its port."""
    command = [sys.executable, "-m", "dicom_node", "run", "--config", str(work / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  as above
    try:
        assert process.stdout is not None  # noqa: S101  it is a pipe
        line = process.stdout.readline().strip()
        if not line.startswith("listening "):
            raise DemoError("the node did not start")
        say(f"dicom-node run: {line}")
        yield int(line.rpartition(":")[2])
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


# -- the line


def _send(config: Config, port: int, study: Sent) -> None:
    """All instances of a study in one association, as a modality does."""
    node = Destination(ae_title=config.receive.ae_title, host="127.0.0.1", port=port)
    sender = Sender("DEMO_MODALITY", objects_per_association=len(study.files))
    batch = {_kind(path) for path in study.files}
    for path in study.files:
        outcome = sender.send_file(node, path, batch=batch)
        if outcome.status != 0:
            raise DemoError(f"the node did not take the {study.title}: {outcome.reason}")
    sender.close()
    study.sent_at = time.time()


def _kind(path: Path) -> tuple[str, str]:
    meta = pydicom.filereader.read_file_meta_info(path)
    return str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)


def _wait(config: Config, studies: list[Sent], say: Any) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    waiting = list(studies)
    while waiting and time.monotonic() < deadline:
        for study in list(waiting):
            with contextlib.suppress(NodeError):  # not in the ledger yet
                study.answer = operate.explain(config, study.study_uid)
            if study.answer.get("state") in ("DONE", "DEAD", "HELD"):
                waiting.remove(study)
                say(f"{study.title}: {study.answer['state']}")
        time.sleep(0.2)
    if waiting:
        states = ", ".join(f"{s.title}: {s.answer.get('state', 'unknown')}" for s in waiting)
        raise DemoError(f"after {PATIENCE_SECONDS:.0f} s still: {states}")


# -- what came out


def _show(studies: list[Sent], results: dict[str, list[Received]], missing: dict[str, str], pictures: Path) -> None:
    pictures.mkdir()
    reports = [(s, r) for s in studies for r in results[s.study_uid] if r.modality == "SR"]
    for _, report in reports[:1]:
        print(f"\n=== a Structured Report, as the PACS received it\n{readable_tree(pydicom.dcmread(report.path))}")
    rows: list[tuple[str, ...]] = [("task", "outcome", "what", "probability", "category", "seconds")]
    for study in studies:
        rows += _rows(study, results[study.study_uid])
        _save(study, results[study.study_uid], pictures)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("=== all studies")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for task, reason in sorted(missing.items()):
        print(f"{task}: not available: {reason}")


def _rows(study: Sent, received: list[Received]) -> list[tuple[str, ...]]:
    """One line for each unit of result; a study without a number has one line that says why."""
    name = study.task.task if study.task else study.title
    found = [row for r in received if r.modality == "SR" for row in _scores(study.task, pydicom.dcmread(r.path))]
    if not found:
        codes = [f"{o['outcome'] or o['state']}" + (f" ({o['code']})" if o["code"] else "") for o in _outcomes(study)]
        return [(name, "; ".join(dict.fromkeys(codes)), "", "no number", "", "")]
    seconds = f"{max(r.at for r in received) - study.sent_at:.1f}"
    return [(name, "RESULT", what, number, category, seconds) for what, number, category in found]


def _scores(task: Task | None, sr: pydicom.Dataset) -> list[tuple[str, str, str]]:
    """Tracking identifier, probability and category of each Measurement Group (TID 1501)."""
    if task is None:
        return []
    wanted = {"what": "112039", "number": task.outcome.value, "category": task.categories.name.value}
    found = []
    for group in _groups(sr):
        said = {code: _said(item) for item in group.ContentSequence for code in _code(item)}
        if wanted["number"] in said:
            found.append((said.get(wanted["what"], ""), said[wanted["number"]], said.get(wanted["category"], "")))
    return found


def _groups(item: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    for child in item.get("ContentSequence", []):
        if "125007" in _code(child):
            yield child
        yield from _groups(child)


def _code(item: pydicom.Dataset) -> list[str]:
    return [str(code.get("CodeValue", "")) for code in item.get("ConceptNameCodeSequence", [])]


def _said(item: pydicom.Dataset) -> str:
    if item.get("MeasuredValueSequence"):
        return f"{float(item.MeasuredValueSequence[0].NumericValue):.4f}"
    if item.get("ConceptCodeSequence"):
        return str(item.ConceptCodeSequence[0].CodeMeaning)
    return str(item.get("TextValue", ""))


def _save(study: Sent, received: list[Received], pictures: Path) -> None:
    """Every frame of every capture as PNG, and a moving picture of those with several."""
    task = study.task.task if study.task else "real"
    counts: Counter[str] = Counter()
    for capture in (r for r in received if r.modality != "SR"):
        dataset, kind = pydicom.dcmread(capture.path, stop_before_pixels=True), _kind_of(capture)
        counts[kind] += 1
        name = f"{task}-{kind}-{counts[kind]}"
        frames = [Image.fromarray(frame) for frame in decode_file(capture.path)]
        for number, frame in enumerate(frames, 1):
            frame.save(pictures / f"{name}-{number:02d}.png")
        if len(frames) > 1:
            duration = max(float(dataset.get("FrameTime") or 200.0), CELL_MS)
            moving = pictures / f"{name}.webp"
            frames[0].save(moving, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _outcomes(study: Sent) -> list[dict[str, Any]]:
    return list(study.answer["outcomes"])


# -- the claims of this demo, checked


def _must(studies: list[Sent], results: dict[str, list[Received]], total: int) -> None:
    for study in studies:
        received = results[study.study_uid]
        given = [o["engine"] for o in _outcomes(study) if o["outcome"] not in NO_NUMBER]
        if study.task is None:
            if given or not _outcomes(study) or received:
                raise DemoError(f"the {study.title} must get no number, but {given or received} answered")
            continue
        if given != [study.task.task] or study.answer["state"] != "DONE":
            raise DemoError(
                f"the {study.title} must get one result, of {study.task.task}; {operate.explain_text(study.answer)}"
            )
        kinds = [_kind_of(r) for r in received]
        if kinds.count("sr") != 1 or "heatmap" not in kinds:
            raise DemoError(f"the PACS must hold one SR and a heatmap of the {study.title}, but holds {kinds}")
    if total != sum(len(received) for received in results.values()):
        raise DemoError("the PACS holds objects of other studies")
    if len(studies) < 2:  # the real clip alone shows nothing
        raise DemoError("no task has a package")


def _kind_of(received: Received) -> str:
    if received.modality == "SR":
        return "sr"
    series = pydicom.dcmread(received.path, stop_before_pixels=True).get("SeriesDescription", "")
    return "nomogram" if "nomogram" in str(series).lower() else "heatmap"


def _summary(studies: list[Sent], results: dict[str, list[Received]], pictures: Path) -> None:
    kinds = [_kind_of(r) for received in results.values() for r in received]
    count = len(studies) - 1
    print(
        f"\n{count} phantom studies came back as {kinds.count('sr')} SRs, {kinds.count('heatmap')} heatmap and "
        f"{kinds.count('nomogram')} nomogram captures; the real clip got no number. Pictures: {pictures}"
    )
