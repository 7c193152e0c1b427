"""The guard: bounded batches, answers that can be answers, and whose mistake it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_engine
from backends import tiny_model, truth

from dicom_node.errors import BackendError, WorkerError
from dicom_node.runtime import Place
from dicom_node.runtime.fake import FakeSession
from dicom_node.runtime.guard import Guarded, bound
from dicom_node.runtime.tensorrt_build import batches_of

SHAPES = {"logits": (2,), "features": (3, 4, 4)}


def images(count: int) -> Any:
    return np.linspace(-1, 2, count * 16, dtype=np.float32).reshape(count, 1, 4, 4)


def guarded(answer: Any = truth, limit: int = 16) -> tuple[Guarded, FakeSession]:
    inner = FakeSession(answer)
    return Guarded(inner, tiny_model(), SHAPES, limit), inner


@pytest.mark.parametrize(
    ("shape", "backend", "expected"),
    [
        ((77,), "openvino", 1024),
        ((77,), "onnx", 1024),
        ((1, 224, 224), "tensorrt", 16),
        ((1, 224, 224), "onnx", 4),
        ((1, 16, 112, 112), "cuda", 4),
        ((5, 16, 64, 64), "onnx", 4),
    ],
)
def test_the_bound_follows_dimensions_and_backend_unless_the_place_says_otherwise(
    shape: tuple[int, ...], backend: str, expected: int
) -> None:
    model = tiny_model(shapes={"x": shape})
    assert bound(model, Place(), backend) == expected
    assert bound(model, Place(max_batch={"classifier": 7}), backend) == 7
    assert bound(model, Place(max_batch={"classifier": 0, "locator": 3}), backend) == 1


def test_the_largest_batch_of_a_plan_is_the_largest_that_a_session_is_given() -> None:
    """Else a plan would refuse what the guard lets through."""
    for shape in ((77,), (1, 224, 224), (1, 16, 112, 112)):
        for place in (Place(), Place(max_batch={"classifier": 3})):
            model = tiny_model(shapes={"x": shape})
            assert bound(model, place, "tensorrt") == batches_of(model, place).most


@pytest.mark.parametrize(
    ("count", "parts"), [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1]), (10, [4, 4, 2])]
)
def test_a_large_batch_is_split_and_the_answers_are_those_of_one_run(count: int, parts: list[int]) -> None:
    session, inner = guarded(limit=4)
    found = session.run({"x": images(count)})
    assert [len(call["x"]) for call in inner.calls] == parts
    for name, expected in zip(("logits", "features"), tiny_engine.answers(images(count)), strict=True):
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": np.zeros((1, 2, 4, 4), np.float32)}, r"given x float32 \(1, 2, 4, 4\); it takes x float32 \(n, 1, 4"),
        ({"x": np.zeros((1, 1, 4, 4))}, "given x float64"),
        ({"y": np.zeros((1, 1, 4, 4), np.float32)}, "given y"),
        ({"x": np.zeros((0, 1, 4, 4), np.float32)}, r"\(0, 1, 4, 4\)"),
        ({"x": [[1.0]]}, "no array"),
        ({}, "given nothing"),
        ({"x": np.full((1, 1, 4, 4), np.nan, np.float32)}, "was given NaN"),
    ],
)
def test_the_engines_mistake_is_not_the_backends(inputs: Any, said: str) -> None:
    """Else a defect in engine.py would cost a site its fast backend."""
    with pytest.raises(WorkerError, match=said) as caught:
        guarded()[0].run(inputs)
    assert not isinstance(caught.value, BackendError)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": np.zeros((3, 2), np.float32)}, r"logits is float32 \(3, 2\)"),
        ({"logits": np.zeros((2, 3), np.float32)}, r"logits is float32 \(2, 3\)"),
        ({"logits": np.zeros((2, 2), np.float16)}, "logits is float16"),
        ({"features": None}, "features is missing"),
        ({"features": np.full((2, 3, 4, 4), np.inf, np.float32)}, "features holds NaN or infinity"),
    ],
)
def test_an_answer_that_can_be_none_is_a_fault_of_the_backend(change: dict[str, Any], said: str) -> None:
    session, _ = guarded(lambda inputs: truth(inputs) | change)
    with pytest.raises(BackendError, match=f"classifier on fake: {said}"):
        session.run({"x": images(2)})


def test_what_was_not_promised_does_not_reach_the_engine() -> None:
    session, _ = guarded(lambda inputs: truth(inputs) | {"debug": np.zeros(1)})
    assert session.run({"x": images(1)}).keys() == {"logits", "features"}


def test_a_view_reaches_the_backend_as_plain_memory() -> None:
    session, inner = guarded()
    session.run({"x": images(2)[:, :, ::-1]})
    assert inner.calls[0]["x"].flags.c_contiguous
