"""`engines bench`: every engine on every backend of this machine, beside the same graphs in torch eager.

One process for each backend and one for torch, asked in turn, so that memory, first load and a crash are each one's own
and a ratio is of rounds that lie beside each other. Prints nothing and decides nothing about what serves. torch is
asked only where the extra `train` is installed; without it the packages in use are timed, and no ratio is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dicom_node import packages
from dicom_node.config import Config
from dicom_node.errors import NodeError, UnknownTargetError
from dicom_node.runtime.backends import known
from dicom_node.service import bench_table as table
from dicom_node.service.bench_child import Child, ChildError, durations, phantom, training
from dicom_node.service.bench_table import Case, Row
from dicom_node.service.models import task_folder

Say = Callable[[str], None]
PRESETS = ("demo", "paper", "nano")
BATCHES = (2, 4, 8, 16, 32, 64)
SLOW_MS = 1500.0
"""A larger batch is not tried where a pass would take longer."""
OPEN_SECONDS, PLAN_SECONDS = 300.0, 1800.0
DEPLOYED = "deploy graphs of the preset, weights of a fixed seed, golden answers of torch"
MEASURE = ["-m", "dicom_node.worker.measure"]
LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "torch",
    "nyxus",
)


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    task: str | None = None
    presets: tuple[str, ...] = ("demo",)
    backends: tuple[str, ...] = ()
    """None named: all that `infer.runtime: auto` would try."""
    seconds: float = 3.0
    """Of timing for each row, spread over the rounds."""
    rounds: int = 7
    threads: int = 0
    """0: as a worker has them."""
    graphs: Path | None = None
    """Where exported graphs are kept and found again; None: a folder that goes with the command."""

    def threads_of(self, config: Config) -> int:
        return self.threads or max(1, len(os.sched_getaffinity(0)) // config.infer.workers_per_device)


def bench(config: Config, asked: Asked, say: Say) -> tuple[dict[str, Any], bool]:
    """The answer, and whether every target on ratios that was asked about holds. Raises UnknownTargetError."""
    tasks = [asked.task] if asked.task else sorted(packages.find_tasks(config.engines.path))
    for task in tasks:
        task_folder(config, task)
    names = list(dict.fromkeys(backend.name for backend in known("auto")))
    if strange := [name for name in asked.backends if name not in names]:
        raise UnknownTargetError(f"no backend {strange[0][:32]!r} ({', '.join(names)})")
    wanted = [b for b in known("auto") if not asked.backends or b.name in asked.backends]
    ways = [(backend.name, backend.precision) for backend in wanted]
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        run = _Bench(config, asked, Path(work), say)
        ways, absent = run.here(ways)
        rows = [row for preset in asked.presets for task in tasks for row in run.engine(task, preset, ways)]
        cases = [c for task in tasks for c in run.cases(task, ways)] if "demo" in asked.presets else []
    judged = table.gates(rows, every_task=asked.task is None)
    answer = {
        "machine": machine(asked.threads_of(config)),
        "versions": ", ".join(f"{name} {found}" for name, found in versions().items()),
        "graphs": run.graphs_said,
        "absent": [{"backend": name, "precision": p, "reason": why} for (name, p), why in absent.items()],
        "rows": table.plain(rows),
        "cases": table.plain(cases),
        "gates": table.plain(judged),
    }
    return answer, all(gate.held for gate in judged)


def machine(threads: int) -> str:
    """Without the host's name."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads, Python {platform.python_version()}, "
        f"{platform.system()} {platform.release().split('-')[0]}, load {load:.1f}"
    )


def versions() -> dict[str, str]:
    """Of the libraries that run graphs, as installed."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass
class _Contestant:
    """A child that has opened its graphs, and what its rounds took."""

    row: Row
    child: Child
    rounds: list[list[float]]

    def lost(self, why: ChildError) -> None:
        self.row = replace(self.row, status=table.FAILED, reason=str(why), p50_ms=None)
        self.child.close()


class _Bench:
    def __init__(self, config: Config, asked: Asked, work: Path, say: Say) -> None:
        self._config, self._asked, self._work, self._say = config, asked, work, say
        self._threads = asked.threads_of(config)
        self.graphs_said = "the packages in use"

    def here(self, ways: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
        """Backends that can be tried on this machine, and why others cannot; each is asked in a process of its own."""
        absent = {}
        for name, precision in ways:
            child = Child(MEASURE)
            try:
                said = child.ask({"do": "here", "backend": name, "precision": precision}, OPEN_SECONDS)
                if said.get("missing", ""):
                    absent[name, precision] = str(said["missing"])
            except ChildError as e:
                absent[name, precision] = str(e)
            finally:
                child.close()
        return [way for way in ways if way not in absent], absent

    # -- one engine, one preset

    def engine(self, task: str, preset: str, ways: list[tuple[str, str]]) -> list[Row]:
        """A row for each backend, and one for torch."""
        folder, why = self._graphs(task, preset, ways)
        if folder is None and preset != "demo":
            return [Row(task, preset, *way, table.NOT_HERE, f"its graphs cannot be exported: {why}") for way in ways]
        done: list[Row] = []
        entered: list[_Contestant] = []
        with contextlib.ExitStack() as stack:
            for way in ways:
                self._enter(Row(task, preset, *way, table.FAILED), MEASURE, folder, entered, done, stack)
            if folder is not None:
                eager = ["-m", "engines.training", "eager", task, "--preset", preset, "--graphs", str(folder)]
                reference = Row(task, preset, table.TORCH, "fp32", table.FAILED)
                self._enter(reference, [*eager, "--threads", str(self._threads)], folder, entered, done, stack)
            self._rounds(entered)
            for contestant in entered:
                self._batches(contestant)
        why = next((row.reason for row in done if row.backend == table.TORCH), why)
        rows = [*_compared(entered, why), *done]
        for row in rows:
            self._say(table.line(row))
        return rows

    def _graphs(self, task: str, preset: str, ways: list[tuple[str, str]]) -> tuple[Path | None, str]:
        """Exported by the training side, in the precisions that are wanted; or why not."""
        precisions = sorted({precision for _, precision in ways} | {"fp32"})
        folder = (self._asked.graphs or self._work) / f"{task}-{preset}"
        with contextlib.suppress(OSError, ValueError, KeyError):
            models = json.loads((folder / "deploy.json").read_text("utf-8"))["models"]
            if all(p in m["precisions"] for m in models.values() for p in precisions if p in m["tolerance"]):
                self.graphs_said = DEPLOYED
                return folder, ""
        self._say(f"{task} {preset}: exporting its graphs")
        options = [option for p in precisions for option in ("--precision", p)]
        why = training("deploy", task, "--preset", preset, "--out", str(folder), *options)
        if why:
            return None, why
        self.graphs_said = DEPLOYED
        return folder, ""

    def _enter(
        self, row: Row, command: list[str], graphs: Path | None, entered: list[_Contestant], done: list[Row],
        stack: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        """Start a process and let it open the graphs."""
        self._say(f"{row.task} {row.preset}: loading on {row.backend} {row.precision}")
        child = Child(command)
        stack.callback(child.close)
        try:
            said = child.ask(self._opening(row, graphs), PLAN_SECONDS if "tensorrt" in row.backend else OPEN_SECONDS)
            status = str(said.get("status", "reference"))
            row = replace(row, status=status, reason=str(said.get("reason", "")), version=str(said.get("version", "")))
            if status in (table.REFUSED, table.NOT_HERE):
                done.append(row)
                return
            worst = max((m["worst"] / m["tolerance"] for m in said["models"].values()), default=0.0)
            first = said.get("seconds") if row.backend != table.TORCH else None
            row = replace(row, off=worst, first_load_s=first, build_s=said.get("builds"))
        except ChildError as e:
            done.append(replace(row, reason=str(e)))
            return
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            done.append(replace(row, status=table.FAILED, reason="its answer is no answer"))
            return
        entered.append(_Contestant(row, child, []))

    def _opening(self, row: Row, graphs: Path | None) -> dict[str, Any]:
        return {
            "do": "open", "backend": row.backend, "precision": row.precision, "threads": self._threads,
            "task": str(task_folder(self._config, row.task).absolute()),
            "root": str(self._config.store.root.absolute()), "signed": self._config.engines.require_signature,
            "graphs": None if graphs is None else str(graphs.absolute()), "plans": str(self._work / "plans"),
        }  # fmt: skip

    # -- timing

    def _rounds(self, entered: list[_Contestant]) -> None:
        """Everybody once a round, in an order that turns; a contestant that is lost leaves the others their rounds."""
        for number in range(self._asked.rounds):
            turned = entered[number % max(1, len(entered)) :] + entered[: number % max(1, len(entered))]
            for contestant in turned:
                if contestant.row.status == table.FAILED:
                    continue
                try:
                    contestant.rounds.append(self._time(contestant, 1))
                except ChildError as e:
                    contestant.lost(e)
        for contestant in entered:
            if contestant.row.status != table.FAILED:
                self._summed(contestant)

    def _time(self, contestant: _Contestant, batch: int) -> list[float]:
        seconds = self._asked.seconds / self._asked.rounds
        return contestant.child.milliseconds({"do": "time", "batch": batch, "seconds": seconds}, 120 + 10 * seconds)

    def _summed(self, contestant: _Contestant) -> None:
        every = [ms for one in contestant.rounds for ms in one]
        try:
            memory = contestant.child.ask({"do": "memory"}, 60)
            rss, pss = float(memory["rss"]) / 1e6, float(memory["pss"]) / 1e6
        except (ChildError, KeyError, TypeError, ValueError):
            contestant.lost(ChildError("its answer is no answer"))
            return
        contestant.row = replace(
            contestant.row, p50_ms=table.percentile(every, 0.5), p95_ms=table.percentile(every, 0.95),
            samples=len(every), rss_mb=rss, pss_mb=pss,
        )  # fmt: skip

    def _batches(self, contestant: _Contestant) -> None:
        """Throughput, until a larger batch gives no more; what a backend does not take ends the search, not the row."""
        row = contestant.row
        if row.p50_ms is None:
            return
        passes = {1: row.p50_ms}
        for batch in BATCHES:
            if batch * row.p50_ms > SLOW_MS:
                break
            try:
                passes[batch] = statistics.median(self._time(contestant, batch))
            except ChildError:
                break
            if table.best_batch(passes)[0] < batch / 2:
                break
        best, per_second = table.best_batch(passes)
        contestant.row = replace(row, best_batch=best, per_second=per_second)

    # -- decoded input to result

    def cases(self, task: str, ways: list[tuple[str, str]]) -> Iterator[Case]:
        """The package in use, on each backend, with a phantom study."""
        self._say(f"{task}: decoded input to result")
        folder = self._work / f"phantom-{task}"
        try:
            home = packages.load_task(task_folder(self._config, task))
            if home.missing_libraries:
                raise ChildError(f"not available: install {', '.join(home.missing_libraries)}")
            files = [str(path.absolute()) for path in phantom(task, folder)]
        except NodeError as e:
            yield Case(task, "result", "", "", str(e))
            return
        for way in ways:
            for case in self._case(task, way, files):
                self._say(table.line(case))
                yield case

    def _case(self, task: str, way: tuple[str, str], files: list[str]) -> Iterator[Case]:
        row = Row(task, "demo", *way, table.FAILED)
        child = Child(MEASURE)
        try:
            said = child.ask(self._opening(row, None), PLAN_SECONDS if "tensorrt" in way[0] else OPEN_SECONDS)
            if said.get("status") != table.ACCEPTED:
                yield Case(task, "result", *way, f"{said.get('status')}: {said.get('reason')}")
                return
            seconds = self._asked.seconds
            answer = child.ask({"do": "case", "files": files, "seconds": seconds}, 120 + 10 * seconds)
            rss = float(child.ask({"do": "memory"}, 60).get("rss", 0.0)) / 1e6
            found = {"result": durations(answer, "ms")}
            if (task, "score") in table.AIMS:
                score = durations(answer, "score_ms")
                beyond = [a - b for a, b in zip(found["result"], score, strict=False)]
                found = {"score": score, "map": beyond} | found
            for what, ms in found.items():
                yield Case(
                    task, what, *way, "", table.percentile(ms, 0.5), table.percentile(ms, 0.95), len(ms),
                    table.AIMS.get((task, what)), rss,
                )  # fmt: skip
        except ChildError as e:
            yield Case(task, "result", *way, str(e))
        finally:
            child.close()


def _compared(entered: list[_Contestant], why: str) -> list[Row]:
    """The rows with their ratios, where torch was timed in every round that they were."""
    torch = next((c for c in entered if c.row.backend == table.TORCH), None)
    if torch is not None and torch.row.p50_ms is None:
        why, torch = torch.row.reason, None
    rows = []
    for contestant in entered:
        row = contestant.row
        if contestant is torch or row.p50_ms is None:
            rows.append(row)
        elif torch is None:
            rows.append(replace(row, ratio_reason=why or "torch was not timed"))
        else:
            rows.append(replace(row, ratio=table.ratio_of(contestant.rounds, torch.rounds)))
    return rows
