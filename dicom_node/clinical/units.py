"""Conversion between UCUM units, by pint with ucumvert's grammar of UCUM."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucumvert import PintUcumRegistry


class Ucum:
    """The registry is built at the first unit that is not the wanted one (two seconds, once)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @cached_property
    def _registry(self) -> PintUcumRegistry:
        from ucumvert import PintUcumRegistry

        return PintUcumRegistry()

    @cached_property
    def _parsed(self) -> Callable[[str], Any]:
        return lru_cache(512)(self._registry.from_ucum)  # 10 ms a unit, and they are always the same

    def convert(self, value: float, unit: str, wanted: str) -> float | None:
        """None where the units are unknown or of different kinds: an amount of substance is no mass."""
        if unit == wanted:
            return value
        with self._lock:  # several stages ask, each in its thread
            return self._converted(value, unit, wanted)

    def _converted(self, value: float, unit: str, wanted: str) -> float | None:
        from lark.exceptions import LarkError
        from pint.errors import DimensionalityError, PintError

        registry = self._registry
        try:
            given, asked = self._parsed(unit), self._parsed(wanted)  # "10*9/L" has a factor of its own
            quantity = registry.Quantity(value * given.magnitude, given.units)
            return float(quantity.to(asked.units).magnitude / asked.magnitude)
        except (LarkError, DimensionalityError, PintError, ValueError, OverflowError):
            return None
