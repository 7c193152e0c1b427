"""A session that answers what it is told to: for engine authors' tests, which then need no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

Answer = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


class FakeSession:
    """`FakeSession(lambda inputs: {"logits": …})`; remembers what it was given in `calls`."""

    backend = "fake"
    precision = "fp32"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.calls: list[dict[str, NDArray[Any]]] = []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The told answer."""
        self.calls.append(dict(inputs))
        return self._answer(inputs)

    def close(self) -> None:
        """Nothing to free."""
