"""`engines build`: the plans that this machine's backends need, compiled before the first study waits for them."""

from __future__ import annotations

from typing import Any

from dicom_node import packages
from dicom_node.config import Config
from dicom_node.errors import NodeError
from dicom_node.service.bench_child import Child, ChildError
from dicom_node.service.models import task_folder

BACKENDS = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp16", "fp32")
BUILD_SECONDS = 3600.0
"""For the graphs of one engine on one backend."""
MEASURE = ["-m", "dicom_node.worker.measure"]
Line = dict[str, Any]


def build(config: Config, task: str | None, sm: int | None) -> tuple[list[Line], int]:
    """A line for each graph, and 1 where one was refused or, for a GPU that was named, none was built.

    `sm`: compute capability of a GPU that is not here; TensorRT-RTX alone builds for one. Raises UnknownTargetError.
    """
    tasks = [task] if task else sorted(packages.find_tasks(config.engines.path))
    targets = [] if sm is None else [f"SM{sm}"]
    lines: list[Line] = []
    for name in BACKENDS if sm is None else BACKENDS[1:]:
        for precision in PRECISIONS:
            lines += _backend(config, tasks, name, precision, targets)
    built = any(line["status"] == "built" for line in lines)
    refused = any(line["status"] == "refused" for line in lines)
    return lines, 1 if refused or (targets and not built) else 0


def _backend(config: Config, tasks: list[str], name: str, precision: str, targets: list[str]) -> list[Line]:
    about = {"backend": name, "precision": precision, "target": targets[0] if targets else ""}
    nothing = {"model": "", "seconds": None, "bytes": None, "key": ""}
    lines: list[Line] = []
    for task in tasks:
        folder = task_folder(config, task)
        child = Child(MEASURE)
        try:
            question = {
                "do": "build", "backend": name, "precision": precision, "targets": targets, "threads": 1,
                "task": str(folder.absolute()), "root": str(config.store.root.absolute()),
                "signed": config.engines.require_signature,
            }  # fmt: skip
            answer = child.ask(question, BUILD_SECONDS)
            if answer["missing"]:  # of this machine, so of every task
                return [{"task": "", **about, **nothing, "status": "not here", "reason": answer["missing"]}]
            lines += [{"task": task, **about, **line} for line in answer["lines"]]
        except (ChildError, KeyError, TypeError) as e:
            why = str(e) if isinstance(e, NodeError) else "its answer is no answer"
            lines.append({"task": task, **about, **nothing, "status": "refused", "reason": why})
        finally:
            child.close()
    return lines


def text(answer: list[Line]) -> str:
    """For a terminal."""
    lines = []
    for line in answer:
        name = f"{line['backend']} {line['precision']}" + (f" for {line['target']}" if line["target"] else "")
        if line["status"] == "not here":
            lines.append(f"not here: {name}: {line['reason']}")
            continue
        about = f"{line['task']:<16}{line['model']:<12}{name:<32}{line['status']}"
        if line["seconds"] is None:
            lines.append(f"{about}: {line['reason']}")
            continue
        size = "" if line["bytes"] is None else f", {line['bytes'] / 1e6:.1f} MB"
        key = f", key {line['key'][:16]}…" if line["key"] else ""
        lines.append(
            f"{about} in {line['seconds']:.1f} s{size}{key}" + (f" ({line['reason']})" if line["reason"] else "")
        )
    return "\n".join(lines) or "no task folder under engines.path"
