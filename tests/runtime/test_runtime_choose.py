"""Choosing a backend: the fastest that gives the golden answers and decides alike; nothing a candidate does matters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import tiny_engine
from backends import ENGINES, SHIPPED, ToldBackend, judge_of, models_of, tiny_judge, tiny_model, truth

from dicom_node import packages
from dicom_node.errors import BackendError, NodeError, PackageError, WorkerError
from dicom_node.runtime import Place
from dicom_node.runtime.backends import known
from dicom_node.runtime.choose import Chosen, Tried, choose, close, replay
from dicom_node.runtime.onnx import OnnxBackend
from dicom_node.runtime.openvino import OpenVinoBackend

GOLDEN = tiny_engine.arrays()["golden"]
SLOW = 0.004
"""Seconds that the reference takes, on the clock of these tests."""


class Clock:
    """Moved by hand: a test of speed must not depend on the machine."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def told(name: str, precision: str = "fp32", answer: Any = truth, **how: Any) -> ToldBackend:
    return ToldBackend(name, precision, answer, pause=CLOCK.advance, **({"seconds": 0.001} | how))


def reference(**how: Any) -> ToldBackend:
    return told("onnx", **({"seconds": SLOW} | how))


def chosen(*backends: Any, **how: Any) -> Chosen:
    arguments: dict[str, Any] = {
        "models": [tiny_model()], "golden": GOLDEN, "explained": "classifier", "judge": tiny_judge,
        "backends": backends, "place": Place(), "clock": CLOCK,
    }  # fmt: skip
    return choose(**(arguments | how))


def line(found: Chosen, backend: str, precision: str = "fp32") -> Tried:
    return next(t for t in found.tried if (t.backend, t.precision) == (backend, precision))


def off(by: Any, output: str = "logits") -> Callable[..., Any]:
    return lambda inputs: truth(inputs) | {output: truth(inputs)[output] + np.float32(by)}


def raising(error: BaseException) -> Callable[..., Any]:
    def answer(*_: Any) -> Any:
        raise error

    return answer


# -- the race


def test_a_clearly_faster_backend_serves_and_the_reference_is_closed() -> None:
    fast, slow = told("fast"), reference()
    found = chosen(fast, slow)
    assert (found.backend, found.precision) == ("fast", "fp32")
    assert (fast.open_now, slow.open_now) == (1, 0)
    assert [(t.backend, t.status) for t in found.tried] == [("fast", "accepted"), ("onnx", "accepted")]
    assert (line(found, "onnx").milliseconds, line(found, "fast").milliseconds) == pytest.approx((4, 1))
    np.testing.assert_array_equal(found.sessions["classifier"].run({"x": GOLDEN["classifier.x"]})["logits"],
                                  GOLDEN["classifier.logits"])  # fmt: skip


def test_a_slower_one_is_accepted_and_not_taken() -> None:
    slower, fast = told("slower", seconds=3 * SLOW), reference()
    found = chosen(slower, fast)
    assert found.backend == "onnx"
    assert line(found, "slower").status == "accepted"
    assert (slower.open_now, fast.open_now) == (0, 1)


def test_as_fast_as_the_reference_is_not_enough() -> None:
    """Else the backend of a live engine would change with the noise of a start."""
    assert chosen(told("even", seconds=SLOW), reference()).backend == "onnx"


def test_a_backend_that_the_configuration_names_serves_although_the_reference_is_faster() -> None:
    slower = told("slower", seconds=3 * SLOW)
    assert chosen(slower, reference(), named=True).backend == "slower"
    assert chosen(told("liar", answer=off(0.05)), reference(), named=True).backend == "onnx"


def test_one_disturbed_round_changes_nothing() -> None:
    """Half a second of another process's work, in the reference's second round."""
    calls = iter(range(1000))

    def disturbed(inputs: Any) -> Any:
        CLOCK.advance(0.5 if next(calls) == 3 else 0)
        return truth(inputs)

    assert chosen(told("even", seconds=SLOW), reference(answer=disturbed)).backend == "onnx"


def test_of_two_as_fast_the_first_in_order_serves() -> None:
    found = chosen(told("gpu", "fp32", seconds=SLOW), told("cpu", seconds=SLOW), reference(seconds=4 * SLOW))
    assert found.backend == "gpu"


def test_what_served_before_serves_again_and_nothing_else_is_loaded() -> None:
    """A worker that died is back soon, on the same backend: another one might win the race this time."""
    faster, before, slow = told("faster"), told("before", seconds=0.002), reference()
    found = chosen(faster, before, slow, settled=("before", "fp32"))
    assert found.backend == "before"
    assert [(t.backend, t.status) for t in found.tried] == [
        ("faster", "not tried"), ("before", "accepted"), ("onnx", "accepted")]  # fmt: skip
    assert (faster.opened, before.open_now, slow.open_now) == (0, 1, 0)
    found = chosen(told("faster"), reference(), settled=("onnx", "fp32"))
    assert (found.backend, line(found, "faster").status) == ("onnx", "not tried")


def test_what_served_before_is_held_to_the_answers_again() -> None:
    liar, other = told("before", answer=off(0.05)), told("other")
    found = chosen(liar, other, reference(), settled=("before", "fp32"))
    assert (found.backend, line(found, "before").status) == ("other", "refused")
    found = chosen(told("before"), other, reference(), settled=("before", "fp32"), excluded={"before": "it hung"})
    assert (found.backend, line(found, "before").status) == ("other", "excluded")
    assert chosen(told("other"), reference(), settled=("gone", "fp32")).backend == "other"


# -- what a candidate may do


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (off(0.05), r"logits off by 5\.0.e-02, allowed 1\.00e-03"),
        (off(0.05, "features"), "features off by"),
        (off(float("nan")), "NaN"),
        (off(np.zeros((1, 1))[..., None]), r"logits is float32"),
        (lambda inputs: truth(inputs) | {"logits": truth(inputs)["logits"].astype(np.float64)}, "float64"),
        (lambda inputs: {"logits": truth(inputs)["logits"]}, "features is missing"),
        (lambda inputs: {k: v[:1] for k, v in truth(inputs).items()}, r"\(1, 2\)"),
        (raising(BackendError("device lost")), "device lost"),
        (raising(WorkerError("odd")), "odd"),
        (raising(RuntimeError("/home/foreign words")), "failed with RuntimeError"),
        (raising(MemoryError()), "failed with MemoryError"),
        (raising(ZeroDivisionError()), "failed with ZeroDivisionError"),
        (raising(KeyError("x")), "failed with KeyError"),
        (lambda inputs: None, "failed with AttributeError"),
    ],
)
def test_a_candidate_that_lies_or_fails_is_refused_with_its_reason(answer: Any, said: str) -> None:
    import re

    liar, honest = told("liar", answer=answer), reference()
    found = chosen(liar, honest)
    assert found.backend == "onnx"
    refused = line(found, "liar")
    assert refused.status == "refused"
    assert re.search(said, refused.reason), refused.reason
    assert "foreign words" not in refused.reason
    assert (liar.open_now, honest.open_now) == (0, 1)


@pytest.mark.parametrize("error", [BackendError("no memory"), PackageError("op"), OSError("x"), ImportError("x")])
def test_a_candidate_that_does_not_open_is_refused(error: Exception) -> None:
    found = chosen(told("broken", opening=raising(error)), reference())
    assert (found.backend, line(found, "broken").status) == ("onnx", "refused")
    assert line(found, "broken").reason == (str(error) if isinstance(error, NodeError) else
                                            f"failed with {type(error).__name__}")  # fmt: skip


def test_another_decision_within_the_tolerance_is_refused() -> None:
    """A golden case near the threshold: 1e-4 of a logit is nothing, another category is."""
    margin = float(GOLDEN["classifier.logits"][0, 0] - GOLDEN["classifier.logits"][0, 1])

    def near(outputs: Any) -> Any:
        return tuple(("HIGH" if z[0] - z[1] >= margin - 5e-5 else "LOW",) for z in outputs["logits"].astype(float))

    found = chosen(told("flips", answer=off([-1e-4, 0])), reference(), judge=near)
    assert line(found, "flips").reason == "golden replay of classifier on flips: decides otherwise on a case"
    assert chosen(told("holds", answer=off([1e-4, 0])), reference(), judge=near).backend == "holds"


def test_a_batch_of_one_must_answer_as_a_batch_of_three() -> None:
    def batch_dependent(inputs: Any) -> Any:
        return off(0.5)(inputs) if len(inputs["x"]) == 1 else truth(inputs)

    assert "off by 5" in line(chosen(told("odd", answer=batch_dependent), reference()), "odd").reason


def test_the_largest_batch_is_held_to_the_answers_before_a_study_comes_with_it() -> None:
    """A plan has a graph for each batch; three golden cases alone would never reach that for sixteen."""
    wrong = [False]

    def wide(inputs: Any) -> Any:
        last = np.zeros((len(inputs["x"]), 1), np.float32)
        last[15:] = 0.5 if wrong[0] else 0
        return off(last)(inputs)

    fine = chosen(told("odd", answer=wide), reference())
    assert (fine.backend, fine.sessions["classifier"].bound) == ("odd", 16)
    wrong[0] = True
    assert "off by 5" in line(chosen(told("odd", answer=wide), reference()), "odd").reason
    assert "off by 5" in replay(fine, [tiny_model()], GOLDEN, "classifier", tiny_judge)


def test_answers_that_the_next_run_overwrites_are_refused() -> None:
    """A session that gives a view of its own memory would change one patient's answer while the next one runs."""
    memory = {name: np.repeat(array[:1], 16, axis=0) for name, array in truth({"x": GOLDEN["classifier.x"]}).items()}

    def shared(inputs: Any) -> Any:
        for name, array in truth(inputs).items():
            memory[name][: len(array)] = array
        return {name: array[: len(inputs["x"])] for name, array in memory.items()}

    assert "off by" in line(chosen(told("shared", answer=shared), reference()), "shared").reason


def test_a_candidate_that_fails_in_the_race_is_out() -> None:
    calls = iter(range(1000))

    def tires(inputs: Any) -> Any:
        if next(calls) > 4:
            raise BackendError("out of memory")
        return truth(inputs)

    tired = told("tired", answer=tires)
    found = chosen(tired, reference())
    assert (found.backend, line(found, "tired").status, line(found, "tired").reason) == (
        "onnx", "refused", "out of memory",
    )  # fmt: skip
    assert tired.open_now == 0


def test_a_candidate_cannot_spoil_the_truth_it_is_held_to() -> None:
    golden = {name: array.copy() for name, array in GOLDEN.items()}

    def vandal(inputs: Any) -> Any:
        inputs["x"][:] = 0
        return truth(inputs)

    found = chosen(told("vandal", answer=vandal), reference(), golden=golden)
    assert (found.backend, line(found, "vandal").status) == ("onnx", "refused")
    assert replay(found, [tiny_model()], GOLDEN, "classifier", tiny_judge) == ""


# -- not tried at all


def test_what_is_not_here_is_said_and_not_opened() -> None:
    absent = told("absent", missing="no CUDA device")
    found = chosen(absent, reference())
    assert (line(found, "absent").status, line(found, "absent").reason, absent.opened) == (
        "not here", "no CUDA device", 0,
    )  # fmt: skip


def test_an_excluded_backend_is_not_touched_at_any_precision() -> None:
    dropped = [told("fast", precision, missing="never asked") for precision in ("fp16", "fp32")]
    found = chosen(*dropped, reference(), excluded={"fast": "it crashed", "onnx": "cannot be"})
    assert [(t.status, t.reason) for t in found.tried[:2]] == [("excluded", "it crashed")] * 2
    assert (found.backend, [b.opened for b in dropped]) == ("onnx", [0, 0])


def test_the_caller_knows_which_backend_is_being_touched_when_the_process_dies() -> None:
    said: list[str] = []
    opened_under: list[str] = []
    fast = told("fast", opening=lambda: opened_under.append(said[-1]))
    found = chosen(fast, reference(), at=said.append)
    assert opened_under == ["fast"]
    assert [key for key, _ in groupby(said)][:4] == ["onnx", "", "fast", ""]
    assert (set(said), said[-1], found.backend) == ({"onnx", "fast", ""}, "", "fast")


def test_every_model_that_is_loaded_is_a_step_of_its_own() -> None:
    """The caller gives each so much time; plans of several networks may take it each."""
    said: list[str] = []
    golden = GOLDEN | {name.replace("classifier", "second"): array for name, array in GOLDEN.items()}
    before: list[int] = []
    fast = told("fast", opening=lambda: before.append(said.count("fast")))
    chosen(fast, reference(), models=[tiny_model(), tiny_model(name="second")], golden=golden, at=said.append)
    assert before[1] == before[0] + 1


def test_what_is_not_taken_is_closed_as_a_call_of_its_library() -> None:
    """One that crashes while it frees memory is to blame, not the engine; one that raises stops nothing."""
    said: list[str] = []
    closed_under: list[str] = []

    def closing() -> None:
        closed_under.append(said[-1])
        raise RuntimeError("context is lost")

    slow = told("slow", seconds=SLOW, closing=closing)
    found = chosen(slow, told("other", seconds=SLOW / 8), reference(), at=said.append)
    assert (found.backend, closed_under, said[-1]) == ("other", ["slow"], "")
    close("slow", {n: slow.open(tiny_model(), Place()) for n in ("a", "b")}, said.append)
    assert (slow.open_now, closed_under) == (0, ["slow"] * 3)  # the second too, although the first raised


def test_what_a_backend_notes_while_it_loads_is_told() -> None:
    noting = told("noting")
    noting.notes = ("plan cache: a plan was refused and is built again",)
    assert line(chosen(noting, reference()), "noting").notes == noting.notes


# -- precision


def half(**changes: Any) -> Any:
    graph = tiny_engine.GRAPH.read_bytes()
    return tiny_model(graphs={"fp32": graph, "fp16": graph}, tolerance={"fp32": 1e-3, "fp16": 2e-2}, **changes)


def test_fp16_is_held_to_its_own_tolerance() -> None:
    lossy = told("gpu", "fp16", off(0.01)), told("gpu", "fp32", off(0.01)), reference()
    found = chosen(*lossy, models=[half()])
    assert (found.backend, found.precision) == ("gpu", "fp16")
    assert line(found, "gpu").status == "refused"
    assert [t.tolerance for t in line(found, "gpu", "fp16").lines] == [2e-2]


def test_without_a_graph_or_a_tolerance_a_precision_is_refused() -> None:
    for model in (tiny_model(), tiny_model(graphs=half().graphs), tiny_model(tolerance=half().tolerance)):
        found = chosen(told("gpu", "fp16"), reference(), models=[model])
        assert (found.backend, line(found, "gpu", "fp16").status) == ("onnx", "refused")


def test_a_model_without_fp16_runs_at_fp32_beside_one_that_has_it() -> None:
    golden = GOLDEN | {name.replace("classifier", "table"): array for name, array in GOLDEN.items()}
    gpu16 = told("gpu", "fp16")
    models = [half(), tiny_model(name="table")]
    found = chosen(gpu16, reference(), models=models, golden=golden)
    assert line(found, "gpu", "fp16").reason == "model table has no graph and tolerance at fp16"
    gpu32 = told("gpu", "fp32", seconds=SLOW)
    found = chosen(gpu16, gpu32, reference(), models=models, golden=golden)
    assert (found.backend, found.precision) == ("gpu", "fp16")
    assert {name: s.precision for name, s in found.sessions.items()} == {"classifier": "fp16", "table": "fp32"}
    assert (gpu16.open_now, gpu32.open_now) == (1, 1)


# -- the reference


@pytest.mark.parametrize(
    "how",
    [
        {"answer": off(0.01)},
        {"answer": raising(BackendError("no memory"))},
        {"opening": raising(PackageError("refused"))},
        {"opening": raising(BackendError("no memory"))},
    ],
)
def test_nothing_serves_without_a_reference_that_gives_the_golden_answers(how: Any) -> None:
    fast = told("fast")
    with pytest.raises(PackageError):
        chosen(fast, reference(**how))
    assert fast.opened == 0


@pytest.mark.parametrize("name", ["classifier.logits", "classifier.features", "classifier.x"])
def test_a_poisoned_golden_case_is_refused(name: str) -> None:
    poisoned = GOLDEN | {name: GOLDEN[name] + np.float32(0.5)}
    with pytest.raises(PackageError, match="off by"):
        chosen(OnnxBackend(), golden=poisoned)
    with pytest.raises(PackageError, match="no complete case"):
        chosen(OnnxBackend(), golden={key: a for key, a in GOLDEN.items() if key != name})


def test_golden_answers_on_which_the_reference_decides_otherwise_are_refused() -> None:
    calls = iter(range(10))
    with pytest.raises(PackageError, match="decides otherwise"):
        chosen(reference(), judge=lambda outputs: tuple((next(calls),) for _ in outputs["logits"]))


def test_a_reference_that_fails_after_its_acceptance_leaves_nothing_open() -> None:
    calls = iter(range(1000))

    def tires(inputs: Any) -> Any:
        if next(calls) > 4:
            raise MemoryError
        return truth(inputs)

    fast, slow = told("fast"), reference(answer=tires)
    with pytest.raises(PackageError, match="the reference failed: failed with MemoryError"):
        chosen(fast, slow)
    assert (fast.open_now, slow.open_now) == (0, 0)


# -- drift


def test_replay_says_when_a_session_in_use_no_longer_gives_the_golden_answers() -> None:
    drift = [0.0]
    found = chosen(told("fast", answer=lambda inputs: off(drift[0])(inputs)), reference())
    ask = (found, [tiny_model()], GOLDEN, "classifier", tiny_judge)
    assert replay(*ask) == ""
    drift[0] = 0.05
    assert "on fast: logits off by 5.00e-02" in replay(*ask)
    drift[0] = float("nan")
    assert "NaN" in replay(*ask)
    found.sessions["classifier"].close()


# -- the five packages


@pytest.mark.parametrize("engine", SHIPPED)
def test_openvino_gives_the_answers_of_every_shipped_package(engine: str) -> None:
    missing = OpenVinoBackend().missing()
    if missing:
        pytest.skip(missing)
    package = packages.load_package(ENGINES / engine / "model")
    explained = package.manifest.explain.model
    asked = (models_of(package), package.golden, explained, judge_of(package))
    found = choose(*asked, known("auto"), Place(threads=1))
    accepted = line(found, "openvino")
    assert accepted.status == "accepted", accepted.reason
    assert {t.model for t in accepted.lines} == set(package.manifest.models)
    # A hundredth of what is allowed: bfloat16, where a processor has it, would be off by a hundred times more.
    assert max(t.worst for t in accepted.lines) < 1e-5
    assert line(found, "onnx").status == "accepted"
    assert found.backend in ("onnx", "openvino")
    assert replay(found, *asked) == ""
    for session in found.sessions.values():
        session.close()


@pytest.mark.parametrize("engine", SHIPPED)
def test_the_fp16_graph_of_every_shipped_package_decides_as_the_fp32_graph(engine: str) -> None:
    """On the processor ONNX Runtime computes an fp16 graph in fp32 between its casts: what is tested is the graph."""
    package = packages.load_package(ENGINES / engine / "model")
    explained = package.manifest.explain.model

    class Half(OnnxBackend):
        name = "half"

    backends = (Half("fp16"), Half("fp32"), OnnxBackend())
    found = choose(models_of(package), package.golden, explained, judge_of(package), backends, Place(threads=1))
    fp16 = line(found, "half", "fp16")
    assert fp16.status == "accepted", fp16.reason
    assert any(t.worst > 1e-6 for t in fp16.lines)  # another graph was run
