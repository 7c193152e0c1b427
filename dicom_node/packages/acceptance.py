"""What a worker says of each engine, the acceptance table; `<store.root>/acceptance.json` keeps the last for people.

The child that says it runs foreign code, so it is checked here before it becomes a label, a log line or a file. The
file is shown (`engines list`) and never believed: a worker holds what serves to its golden answers itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dicom_node.store.files import write_durable

FILE = "acceptance.json"
_MAX_BYTES = 4 << 20
BackendName = Literal["onnx", "openvino", "cuda", "tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "fp16"]
Status = Literal["accepted", "refused", "not here", "excluded", "not tried"]
STATUSES: tuple[str, ...] = get_args(Status)
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a0-\u024f\u2010-\u2026]")


def plain(text: str) -> str:
    """One line of Latin letters: what a child says is printed on a terminal."""
    return _UNPRINTABLE.sub("?", text)


Text = Annotated[str, Field(max_length=400), AfterValidator(plain)]
Label = Annotated[str, Field(max_length=120), AfterValidator(plain)]


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(_Said):
    """One model held to its golden answers on one backend."""

    model: Annotated[str, Field(max_length=32)]
    backend: BackendName
    precision: Precision
    cases: int
    worst: float
    tolerance: float


class TriedBackend(_Said):
    """One backend, and what came of it."""

    backend: BackendName
    precision: Precision
    version: Label
    status: Status
    reason: Text
    notes: Annotated[tuple[Text, ...], Field(max_length=8)]
    lines: Annotated[tuple[Line, ...], Field(max_length=64)]
    load_seconds: float
    milliseconds: float


class Serving(_Said):
    """An engine that serves: its package, its backend and all that were tried."""

    error: Literal[""]
    version: Annotated[str, Field(max_length=32)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    intended_use: Literal["demonstration", "research", "clinical"]
    algorithm: Annotated[str, Field(max_length=64)]
    backend: BackendName
    precision: Precision
    library: Label
    accepted: Annotated[tuple[Line, ...], Field(max_length=64)]
    tried: Annotated[tuple[TriedBackend, ...], Field(max_length=32)]
    seconds: float


class Refused(_Said):
    """One that does not."""

    error: Annotated[str, Field(min_length=1), AfterValidator(lambda text: plain(text)[:2000])]


def checked(told: Any) -> dict[str, Any]:
    """What a child said of one engine, as plain values. Raises ValueError."""
    kind = Serving if isinstance(told, dict) and told.get("error") == "" else Refused
    return kind.model_validate(told).model_dump(mode="json")


def write(root: Path, engines: Mapping[str, Any]) -> None:
    """`engines`: task -> {"at", **what the worker said}. Raises StoreError."""
    write_durable(root / FILE, json.dumps({"schema": 1, "engines": dict(engines)}, indent=1).encode())


def read(root: Path) -> dict[str, dict[str, Any]]:
    """What was written; {} where nothing was, or where it is not ours."""
    try:
        with (root / FILE).open("rb") as file:
            said = json.loads(file.read(_MAX_BYTES))["engines"]
        return {
            str(task): {"at": float(told["at"]), **checked({k: v for k, v in told.items() if k != "at"})}
            for task, told in said.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError):
        return {}
