"""Where a backend is in doubt, the reference is the judge: on the same input, within its own bounds."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_engine
from backends import Arrays, ToldBackend, tiny_model, truth

from dicom_node.errors import WorkerError
from dicom_node.runtime import Place
from dicom_node.worker.answers import Reference

GOLDEN = tiny_engine.arrays()["golden"]


def test_the_reference_judges_a_large_study_in_parts_and_lets_go() -> None:
    """It is opened in the middle of a job, beside the backend that failed: its own largest batch holds for it."""
    sizes: list[int] = []

    def answer(inputs: Arrays) -> Arrays:
        sizes.append(len(inputs["x"]))
        return truth(inputs)

    onnx = ToldBackend("onnx", answer=answer)  # type: ignore[arg-type]
    Reference(onnx, [tiny_model()], GOLDEN, Place()).judge("classifier", {"x": np.zeros((9, 1, 4, 4), np.float32)})
    assert (sizes, onnx.open_now) == ([4, 4, 1], 0)


def test_what_the_reference_cannot_answer_is_said_and_it_lets_go() -> None:
    onnx = ToldBackend("onnx")
    with pytest.raises(WorkerError, match="it takes x float32"):
        Reference(onnx, [tiny_model()], GOLDEN, Place()).judge("classifier", {"x": np.zeros((1, 1, 4, 2), np.float32)})
    assert (onnx.opened, onnx.open_now) == (1, 0)
