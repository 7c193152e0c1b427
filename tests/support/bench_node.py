"""What `scripts/bench` measures of a whole node with its five engines: memory of the tree, idle processor time, what
the node itself takes of a study's time, and whether the first study is as quick as the tenth.

Every figure is of a real `dicom-node run` with the shipped routes, from outside: processes, sockets, files, the ledger.
"""

from __future__ import annotations

import json
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pydicom
from e2e_node import Node, wait_for

from dicom_node.config import Destination
from dicom_node.dimse.pacs import ReceivingPacs
from dicom_node.dimse.sender import Sender
from dicom_node.service.bench_child import phantom
from dicom_node.store.ledger import open_read_only
from dicom_node.store.schema import job

TASKS = ("liver_dce", "renal_ceus", "testis_noa", "testis_tumour", "thyroid_cine")
QUIET = 1.0
PATIENCE = 120.0
TREE_MB, IDLE_SHARE, OVERHEAD_MS = 500.0, 0.01, 300.0
MakeNode = Callable[..., Node]


def ready(node: Node) -> Node:
    """Started, and every engine loaded."""
    node.start()
    address = f"http://127.0.0.1:{node.settings['metrics']['port']}/readyz"

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    wait_for(is_ready, PATIENCE)
    return node


# -- memory and idle time


def by_role(processes: Iterable[psutil.Process], value: Callable[[psutil.Process], float]) -> dict[str, float]:
    """Summed over the processes of each role."""
    found: dict[str, float] = {}
    for process in processes:
        words = process.cmdline()
        role = "worker" if "dicom_node.worker" in words else "listener" if "listen" in words else "stages"
        found[role] = found.get(role, 0.0) + value(process)
    return found


def pss_mb(processes: Iterable[psutil.Process]) -> dict[str, float]:
    """Proportional set size: what is shared counts once in the sum."""
    return by_role(processes, lambda process: process.memory_full_info().pss / 1e6)


def processor_seconds(processes: Iterable[psutil.Process]) -> dict[str, float]:
    return by_role(processes, lambda process: sum(process.cpu_times()[:2]))


def tree(work: Path, a_node: MakeNode, *, idle_seconds: float = 30.0) -> list[str]:
    """Five engines on the reference backend; after the first studies as well, because engines load libraries then."""
    node = a_node(work / "tree", 9, runtime="onnx")
    try:
        ready(node)
        loaded = pss_mb(node.tree())
        time.sleep(3)  # what follows the start is no idle time
        before, begun = processor_seconds(node.tree()), time.monotonic()
        time.sleep(idle_seconds)
        lasted, after = time.monotonic() - begun, processor_seconds(node.tree())
        shares = {role: (after[role] - seconds) / lasted for role, seconds in before.items()}
    finally:
        node.stop()
    total, share = sum(loaded.values()), sum(shares.values())
    parts = ", ".join(f"{role} {mb:.0f}" for role, mb in sorted(loaded.items()))
    idle = ", ".join(f"{role} {100 * value:.2f}" for role, value in sorted(shares.items()))
    return [
        f"PSS of the tree, five engines loaded, onnx (target <= {TREE_MB:.0f} MB, {met(total <= TREE_MB)}): "
        f"{total:.0f} MB ({parts})",
        f"idle processor time over {idle_seconds:.0f} s (target < {100 * IDLE_SHARE:.0f} % of a core, "
        f"{met(share < IDLE_SHARE)}): {100 * share:.2f} % ({idle})",
    ]


# -- a study's time


class NotTakenError(Exception):
    """The node did not answer a C-STORE: the study is left out, counted and told."""


def send(node: Node, files: list[Path], sender: Sender) -> float:
    """All of a study in one association; when the last was stored."""
    to = Destination(ae_title=node.settings["receive"]["ae_title"], host="127.0.0.1", port=node.port)
    batch = {_kind(path) for path in files}
    for path in files:
        outcome = sender.send_file(to, path, batch=batch)
        if outcome.status != 0:
            raise NotTakenError(str(outcome.reason))
    stored = time.time()
    sender.close()
    return stored


def _kind(path: Path) -> tuple[str, str]:
    meta = pydicom.filereader.read_file_meta_info(path)
    return str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)


def study_uid(files: list[Path]) -> str:
    return str(pydicom.dcmread(files[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def predicted(node: Node, uid: str) -> float:
    """Seconds that the engine took, as the result says: decoding, preparing, running the models, the map."""
    with open_read_only(node.root, None).connect() as tx:
        rows = tx.execute(job.select().where(job.c.study_uid == uid, job.c.stage == "report")).fetchall()
    (payload,) = [json.loads(row.payload) for row in rows]
    return float(payload["result"]["seconds"])


STEPS = ("ASSEMBLED", "ROUTED", "INFERRED", "REPORTED", "DELIVERED")
"""Events of a study in their order; a step is the time since the one before."""


def finished(node: Node, pacs: ReceivingPacs, uid: str) -> tuple[float, list[float]]:
    """When the last object of the study was accepted, and when each of `STEPS` was done."""
    answer = node.wait_state(uid, "DONE", "DEAD", "HELD", seconds=PATIENCE)
    assert answer["state"] == "DONE", answer
    wanted = {d["sop_instance_uid"] for d in answer["deliveries"]}
    came = [r.at for r in pacs.received if r.sop_instance_uid in wanted]
    assert wanted and len(came) >= len(wanted), answer
    return max(came), [max(e["at"] for e in answer["events"] if e["code"] == step) for step in STEPS]


@dataclass(frozen=True)
class Taken:
    """Milliseconds of one study from stored to delivered, without the quiet time."""

    whole: float
    engine: float
    """As the result says: decoding, preparing, running the models, the map."""
    steps: tuple[float, ...]
    """Of `whole`, up to each of `STEPS`; what the engine took is left out of INFERRED."""

    @property
    def overhead(self) -> float:
        return self.whole - self.engine


def latency(node: Node, pacs: ReceivingPacs, files: list[Path], sender: Sender) -> Taken:
    stored, uid = send(node, files, sender), study_uid(files)
    last, at = finished(node, pacs, uid)
    engine = 1000 * predicted(node, uid)
    steps = [1000 * (b - a) for a, b in zip([stored + QUIET, *at], at, strict=False)]
    steps[STEPS.index("INFERRED")] -= engine
    return Taken(1000 * (last - stored - QUIET), engine, tuple(steps))


def overhead(work: Path, a_node: MakeNode, rounds: int) -> list[str]:
    """Index, assemble, route, the way to the worker and back, report, deliver: all but quiet time and engine."""
    taken: dict[str, list[Taken]] = {task: [] for task in TASKS}
    lost: list[str] = []
    with ReceivingPacs(work / "pacs", ae_title="PACS") as pacs:
        node = a_node(work / "overhead", pacs.port, quiet=QUIET)
        sender = Sender("BENCH")
        try:
            ready(node)
            for number in range(rounds + 1):
                for task in TASKS:
                    files = phantom(task, work / f"{task}-{number}")
                    try:
                        found = latency(node, pacs, files, sender)
                    except NotTakenError as e:
                        lost.append(f"{task}: {e}")
                        continue
                    if number:  # the first study of an engine also loads what it needs; `first` tells that
                        taken[task].append(found)
        finally:
            node.stop()
    every = [one.overhead for found in taken.values() for one in found]
    lines = [
        f"stored -> delivered, without quiet time and predict (target <= {OVERHEAD_MS:.0f} ms, "
        f"{met(statistics.median(every) <= OVERHEAD_MS)}): {spread(every)}"
    ]
    lines += [
        f"  {task}: {spread([t.overhead for t in found])}: {where(found)}" for task, found in taken.items() if found
    ]
    return lines + [f"  NOT TAKEN, left out: {one}" for one in lost]


def where(found: list[Taken]) -> str:
    """Median of each step."""
    steps = zip(*(one.steps for one in found), strict=True)
    return ", ".join(f"{name.lower()} {statistics.median(ms):.0f}" for name, ms in zip(STEPS, steps, strict=True))


def first(work: Path, a_node: MakeNode, rounds: int, studies: int = 10) -> Iterator[str]:
    """The first study after /readyz against the tenth, of a node that has just started; each engine its own node."""
    for task in TASKS:
        ratios, firsts, tenths = [], [], []
        for number in range(rounds):
            with ReceivingPacs(work / f"pacs-{task}-{number}", ae_title="PACS") as pacs:
                node = a_node(work / f"first-{task}-{number}", pacs.port, quiet=QUIET)
                sender = Sender("BENCH")
                try:
                    made = [phantom(task, work / f"{task}-{number}-{n}") for n in range(studies)]
                    ready(node)
                    taken = [latency(node, pacs, files, sender).whole for files in made]
                finally:
                    node.stop()
            firsts.append(taken[0])
            tenths.append(statistics.median(taken[studies // 2 :]))
            ratios.append(firsts[-1] / tenths[-1])
        yield (
            f"{task}: first study after /readyz {spread(firsts)}, tenth {spread(tenths)}, "
            f"ratio median {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
        )


def spread(ms: list[float]) -> str:
    return f"median {statistics.median(ms):.0f} ms (min {min(ms):.0f}, max {max(ms):.0f}, n {len(ms)})"


def met(holds: bool) -> str:
    return "met" if holds else "MISSED"
