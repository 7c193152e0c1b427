"""The worker's stage loop: one of the two places of the node where every exception is caught. Engines and backends are
foreign code; what they raise is a fault of the attempt in hand, and the process goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dicom_node.errors import NodeError
from dicom_node.log import place_of

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fault:
    """An attempt that failed; free of PHI."""

    text: str


def guarded(work: Callable[[], _T]) -> _T | Fault:
    """Run foreign code. Whatever it raises is a fault of this attempt, and this process goes on."""
    try:
        return work()
    except NodeError as e:
        return Fault(str(e))
    except MemoryError:
        return Fault("out of memory (infer.memory_gb)")
    except (Exception, SystemExit) as e:  # noqa: BLE001  the worker's stage loop: an engine may raise anything
        # Type and place only: the text of a foreign exception may quote a data element.
        return Fault(f"{type(e).__name__} at {place_of(e.__traceback__)}")
