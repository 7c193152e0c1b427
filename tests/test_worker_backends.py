"""Backends that crash, hang, answer wrong or drift: the job runs again on the next, and nothing of them ever leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_engine
from worker_bench import ENGINE, Bench

from dicom_node.errors import WorkerError
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.packages import acceptance
from dicom_node.worker import Standing, client

SUPPORT = Path(__file__).parent / "support"
CHANGES = "dicom_node_backend_changes_total"


class Odd(Bench):
    """A bench whose backends are told what to do."""

    def __init__(
        self, folder: Path, tasks: tuple[str, ...] = ("tiny",), module: str = "odd_worker", **infer: Any
    ) -> None:
        for task in tasks:
            tiny_engine.write_task(folder / "engines", ENGINE, task)
        super().__init__(folder, tasks, module=module, **infer)

    def tell(self, **behaviours: str) -> None:
        (self.root.parent / "odd.json").write_text(json.dumps(behaviours))

    def using(self, task: str = "tiny") -> str:
        return str(self.client.engines()[task]["backend"])

    def tried(self, task: str = "tiny") -> dict[str, str]:
        return {t["backend"]: t["status"] for t in self.client.engines()[task]["tried"]}

    def changes(self, backend: str, reason: str, task: str = "tiny") -> float:
        return self.metrics.value(CHANGES, engine=task, backend=backend, reason=reason)

    def gauge(self, backend: str, task: str = "tiny") -> float:
        return self.metrics.value("dicom_node_engine_backend", engine=task, backend=backend, precision="fp32")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Odd]]:
    made: list[Odd] = []
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.setenv("ODD_BACKENDS", str(tmp_path / "odd.json"))

    def make(*tasks: str, first: Mapping[str, str] | None = None, **infer: Any) -> Odd:
        made.append(Odd(tmp_path, tasks or ("tiny",), **infer))
        made[-1].tell(**(first or {}))
        return made[-1]

    yield make
    for one in made:
        one.client.close()


MODES = {
    "raise": "the device is gone",
    "leak": "KeyError",
    "nan": "holds NaN",
    "shape": "is float32 (1, 1",
}
SHARED = (*MODES, "swallow", "mistake", "every")


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Odd]:
    """A worker with an engine for each of the tests that leave it alive: a backend is left for one engine."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SUPPORT))
        patch.setenv("ODD_BACKENDS", str(folder / "odd.json"))
        made = Odd(folder, SHARED)
        made.tell()
        made.client.ready(60)
        yield made
        made.client.close()


@pytest.fixture
def shared(one_worker: Odd) -> Odd:
    """All of its backends sound."""
    one_worker.tell()
    return one_worker


def made_by(reply: Any) -> tuple[str, float, str]:
    """Backend, probability, and what the report says of its acceptance."""
    assert reply.outcome == "RESULT", reply
    provenance = reply.result["provenance"]
    return (
        provenance["backend"],
        reply.result["findings"][0]["scores"][0]["probability"],
        provenance["parameters"]["acceptance"],
    )


def test_the_fastest_accepted_backend_serves_and_all_that_were_tried_are_told(odd: Callable[..., Odd]) -> None:
    bench = odd(first={"cuda": "lie"})
    told = bench.client.ready(60)["tiny"]
    assert bench.tried() == {"cuda": "refused", "openvino": "accepted", "onnx": "accepted"}
    assert (told["backend"], told["precision"], told["library"]) == ("openvino", "fp32", "odd 1")
    assert "off by" in next(t["reason"] for t in told["tried"] if t["backend"] == "cuda")
    name, _, said = made_by(bench.run())
    assert name == "openvino"
    assert "openvino fp32 (odd 1): classifier off by" in said
    assert (bench.gauge("openvino"), bench.gauge("onnx"), bench.said) == (1, 0, [])
    ratio = bench.metrics.value(
        "dicom_node_engine_acceptance_ratio", engine="tiny", backend="openvino", precision="fp32"
    )
    assert 0 <= ratio <= 1
    assert [line["reason"] for line in bench.log.of("backend_not_used")] == [
        t["reason"] for t in told["tried"] if t["backend"] == "cuda"
    ]
    assert bench.kept[-1]["tiny"]["backend"] == "openvino"


@pytest.mark.parametrize(("runtime", "backend", "first"), [("auto", "onnx", None), ("openvino", "openvino", 1.0)])
def test_a_backend_that_is_named_serves_where_it_is_accepted_and_no_race_is_run(
    odd: Callable[..., Odd], runtime: str, backend: str, first: float | None
) -> None:
    bench = odd(first={"cuda": "missing", "openvino": "slow"}, runtime=runtime)
    assert bench.client.ready(60)["tiny"]["backend"] == backend
    shown = bench.metrics.exposition().decode()
    assert ('dicom_node_engine_first_choice{engine="tiny"} 1.0' in shown) == (first == 1.0)
    assert ("dicom_node_engine_first_choice{" in shown) == (first is not None)


@pytest.mark.parametrize(("mode", "said"), MODES.items())
def test_an_answer_that_cannot_be_one_costs_the_backend_its_place_and_the_job_nothing(
    shared: Odd, mode: str, said: str
) -> None:
    bench = shared
    pid, before = bench.client.pid, made_by(bench.run(engine=mode))
    assert before[0] == "cuda"
    counted, spooled = bench.metrics.value("dicom_node_ood_ratio", route="tiny-route"), set(spool(bench))
    bench.tell(cuda=mode)
    after = made_by(bench.run(engine=mode))
    assert (after[0], after[1]) == ("openvino", before[1])
    assert bench.client.pid == pid
    assert bench.metrics.value("dicom_node_ood_ratio", route="tiny-route") == counted + 1  # judged once, not twice
    assert len(set(spool(bench)) - spooled) == 2  # frames and map of one result
    assert (bench.using(mode), bench.tried(mode)["cuda"]) == ("openvino", "excluded")
    assert (bench.changes("cuda", "answer", mode), bench.gauge("cuda", mode), bench.gauge("openvino", mode)) == (
        1,
        0,
        1,
    )
    (event,) = [text for text in bench.said if text.startswith(f"{mode}: ")]
    assert event.startswith(f"{mode}: openvino fp32 serves; cuda is left out: ")
    assert said in event
    assert "DOE" not in event + json.dumps(bench.log.said)
    bench.tell()
    assert made_by(bench.run(engine=mode))[0] == "openvino"  # well again: not before the node starts again
    assert bench.using("mistake") == "cuda"  # nobody else's backend


def spool(bench: Bench) -> list[Path]:
    return list((bench.root / "spool").iterdir())


def test_a_refusal_made_of_a_failed_answer_does_not_leave(shared: Odd) -> None:
    """An engine that swallows the failure must not turn it into an answer about a patient."""
    shared.tell(cuda="nan")
    assert made_by(shared.run("swallow", engine="swallow"))[0] == "openvino"


def test_what_the_reference_refuses_too_is_the_engines_fault(shared: Odd) -> None:
    reply = shared.run("shape", engine="mistake")
    assert (reply.outcome, "it takes x float32" in reply.error) == ("FAULT", True)
    assert (shared.using("mistake"), shared.changes("cuda", "answer", "mistake")) == ("cuda", 0)
    assert not [text for text in shared.said if text.startswith("mistake: ")]


def test_when_every_other_has_failed_the_reference_serves(shared: Odd) -> None:
    before = made_by(shared.run(engine="every"))
    shared.tell(cuda="raise", openvino="shape")
    after = made_by(shared.run(engine="every"))
    assert (after[0], after[1]) == ("onnx", before[1])
    assert shared.tried("every") == {"cuda": "excluded", "openvino": "refused", "onnx": "accepted"}


@pytest.mark.parametrize(("mode", "reason", "said"), [("crash", "crash", "SIGSEGV"), ("hang", "deadline", "deadline")])
def test_a_backend_that_takes_the_worker_with_it_is_left_out_of_every_later_child(
    odd: Callable[..., Odd], mode: str, reason: str, said: str
) -> None:
    bench = odd()
    bench.client.ready(60)
    before = made_by(bench.run())
    bench.tell(cuda=mode)
    with pytest.raises(WorkerError, match=said):
        bench.run(timeout=1.5)
    after = made_by(bench.run())
    assert (after[0], after[1]) == ("openvino", before[1])
    assert bench.tried() == {"cuda": "excluded", "openvino": "accepted", "onnx": "accepted"}
    assert (bench.changes("cuda", reason), bench.restarts(reason), bench.gauge("cuda")) == (1, 1, 0)
    (event,) = bench.said
    assert "tiny: openvino fp32 serves; cuda is left out" in event
    assert [line["backend"] for line in bench.log.of("backend_dropped")] == ["cuda"]


@pytest.mark.long
def test_a_crash_outside_any_backend_leaves_all_of_them_in_place(odd: Callable[..., Odd]) -> None:
    bench = odd()
    bench.client.ready(60)
    with pytest.raises(WorkerError, match="SIGABRT"):
        bench.run("abort")
    assert made_by(bench.run())[0] == "cuda"
    assert bench.said == []


@pytest.mark.long
def test_of_engines_loaded_side_by_side_the_backend_that_crashes_is_found(odd: Callable[..., Odd]) -> None:
    bench = odd("one", "three", "two", first={"cuda": "load-crash"})
    told = bench.client.ready(120)
    assert {task: (t["error"], t["backend"]) for task, t in told.items()} == dict.fromkeys(
        ("one", "three", "two"), ("", "openvino")
    )
    assert sum(bench.changes("cuda", "crash", task) for task in told) == 3
    assert len(bench.said) == 3
    assert bench.client.loading == ()


def test_a_package_is_not_refused_for_a_backend_that_dies_of_it(odd: Callable[..., Odd]) -> None:
    bench = odd()
    bench.client.ready(60)
    bench.tell(cuda="load-crash")
    told = bench.client.load("tiny")
    assert (told["error"], told["backend"]) == ("", "openvino")
    assert (bench.changes("cuda", "crash"), bench.using()) == (1, "openvino")


def test_what_one_worker_left_no_other_goes_on_with(odd: Callable[..., Odd]) -> None:
    bench = odd()
    first, second = bench.client, bench.worker(1)
    try:
        for worker in (first, second):
            assert worker.ready(60)["tiny"]["backend"] == "cuda"
        bench.tell(cuda="nan")
        assert made_by(bench.run())[0] == "openvino"
        bench.tell()  # what failed there looks well here
        bench.client = second
        assert made_by(bench.run())[0] == "openvino"
        assert (bench.gauge("cuda"), bench.restarts("dropped")) == (0, 1)
        assert "tiny: openvino fp32 serves in place of cuda fp32: it gave no sound answer" in bench.said[1]
        pid = second.pid
        assert (made_by(bench.run())[0], second.pid) == ("openvino", pid)
    finally:
        first.close()


@pytest.mark.long
def test_a_device_that_is_lost_costs_a_job_one_attempt_whatever_the_other_engines_ran_on(
    odd: Callable[..., Odd],
) -> None:
    bench = odd("one", "two")
    bench.client.ready(60)
    before = made_by(bench.run(engine="one"))
    bench.tell(cuda="crash")
    with pytest.raises(WorkerError, match="SIGSEGV"):
        bench.run(engine="one")
    bench.tell(cuda="load-crash")
    after = made_by(bench.run(engine="one"))
    assert (after[0], after[1]) == ("openvino", before[1])
    assert (bench.using("two"), bench.tried("two")["cuda"]) == ("openvino", "excluded")


def test_a_backend_that_drifts_is_found_by_the_replay_and_left(odd: Callable[..., Odd]) -> None:
    bench = odd()
    bench.client.ready(60)
    before = made_by(bench.run())
    replays = "dicom_node_golden_replays_total"
    assert not bench.client.replay(3600, 30)  # not due
    assert bench.client.replay(0, 30)
    assert bench.metrics.value(replays, engine="tiny", outcome="held") == 1
    bench.tell(cuda="lie")  # plausible numbers, which no check of a single answer can see
    assert bench.client.replay(0, 30)
    assert bench.metrics.value(replays, engine="tiny", outcome="drifted") == 1
    assert (bench.using(), bench.changes("cuda", "drift")) == ("openvino", 1)
    assert "no longer gives the golden answers" in bench.said[0]
    after = made_by(bench.run())
    assert (after[0], after[1]) == ("openvino", before[1])


@pytest.mark.long
def test_a_backend_that_hangs_in_the_replay_is_left_too(odd: Callable[..., Odd]) -> None:
    bench = odd()
    bench.client.ready(60)
    bench.tell(cuda="hang")
    started = time.monotonic()
    assert bench.client.replay(0, 1.0)
    assert time.monotonic() - started < 5
    assert made_by(bench.run())[0] == "openvino"
    assert bench.changes("cuda", "deadline") == 1


def test_a_reference_that_drifts_is_held_to_its_answers_anew_and_else_serves_no_longer(odd: Callable[..., Odd]) -> None:
    bench = odd(first={"cuda": "missing", "openvino": "missing"})
    assert bench.client.ready(60)["tiny"]["backend"] == "onnx"
    bench.tell(cuda="missing", openvino="missing", onnx="lie")
    assert bench.client.replay(0, 30)
    reply = bench.run()
    assert (reply.outcome, (reply.refusal or {})["code"]) == ("REFUSED", "ENGINE_NOT_AVAILABLE")
    assert bench.metrics.value("dicom_node_engine_accepted", engine="tiny") == 0
    assert bench.said == [bench.said[0]] and "nothing serves any longer" in bench.said[0]


def test_a_backend_taken_out_under_a_running_node_is_an_event_when_the_worker_starts_again(
    odd: Callable[..., Odd],
) -> None:
    bench = odd()
    bench.client.ready(60)
    bench.tell(cuda="missing")
    assert made_by(bench.run())[0] == "cuda"
    with pytest.raises(WorkerError):
        bench.run("abort")
    assert made_by(bench.run())[0] == "openvino"
    assert bench.said == ["tiny: openvino fp32 serves in place of cuda fp32: it is no longer here (it was taken out)"]
    assert bench.changes("cuda", "missing") == 1


def test_a_worker_that_comes_back_serves_on_what_served_and_tries_nothing_else(
    odd: Callable[..., Odd], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, said, merge = odd(), list[dict[str, str]](), client._with_earlier

    def heard(told: dict[str, Any], earlier: Any) -> dict[str, Any]:
        said.append({t["backend"]: t["status"] for t in told["tried"]})
        return merge(told, earlier)

    monkeypatch.setattr(client, "_with_earlier", heard)
    bench.client.ready(60)
    assert (made_by(bench.run())[0], bench.tried()["openvino"]) == ("cuda", "accepted")
    bench.tell(openvino="load-crash", onnx="slow")  # whoever tried it would die of it
    with pytest.raises(WorkerError):
        bench.run("abort")
    assert made_by(bench.run())[0] == "cuda"
    assert (said[-1], bench.said) == ({"cuda": "accepted", "openvino": "not tried", "onnx": "accepted"}, [])
    assert bench.tried()["openvino"] == "accepted"  # as it was found when this node began


def test_what_was_accepted_before_the_worker_died_is_still_the_next(odd: Callable[..., Odd]) -> None:
    bench = odd()
    bench.client.ready(60)
    with pytest.raises(WorkerError):
        bench.run("abort")
    bench.client.ready(60)
    bench.tell(cuda="nan")
    assert made_by(bench.run())[0] == "openvino"
    assert bench.tried() == {"cuda": "excluded", "openvino": "accepted", "onnx": "accepted"}


def test_a_backend_that_dies_while_it_is_left_is_to_blame(odd: Callable[..., Odd]) -> None:
    """Of a device that is lost the library may not even let go: the attempt is lost, the next is without it."""
    bench = odd()
    bench.client.ready(60)
    bench.tell(cuda="stuck")
    with pytest.raises(WorkerError, match="SIGSEGV"):
        bench.run()
    assert made_by(bench.run())[0] == "openvino"
    assert (bench.changes("cuda", "crash"), bench.tried()["cuda"]) == (1, "excluded")


@pytest.mark.parametrize(
    ("rebuilt", "backend", "reason", "said"),
    [
        ("", "tensorrt_rtx", "plan", "tensorrt_rtx serves on; model classifier: plan cache: a plan was refused"),
        ("refuse", "onnx", "refused", "onnx fp32 serves in place of tensorrt_rtx fp32: it was not accepted again"),
    ],
)
def test_a_plan_poisoned_under_a_running_worker_changes_nothing_but_the_name_and_an_event(
    odd: Callable[..., Odd], rebuilt: str, backend: str, reason: str, said: str
) -> None:
    bench = odd(module="plan_worker", runtime="tensorrt")
    bench.client.ready(60)
    before = made_by(bench.run())
    assert (before[0], bench.said) == ("tensorrt_rtx", [])
    (plan,) = (bench.root / "plans").glob("*.plan")
    poison = plan.read_bytes()[::-1]
    plan.write_bytes(poison)
    assert made_by(bench.run()) == before  # what is loaded goes on
    bench.tell(tensorrt_rtx=rebuilt)
    with pytest.raises(WorkerError):
        bench.run("abort")
    after = made_by(bench.run())
    assert (after[0], after[1]) == (backend, before[1])
    assert (len(bench.said), said in bench.said[0]) == (1, True)
    assert bench.changes("tensorrt_rtx", reason) == 1
    assert poison not in [path.read_bytes() for path in (bench.root / "plans").glob("*.plan")]


# -- the parent's own


def told(backend: str = "openvino", digest: str = "a" * 64, **status: str) -> dict[str, Any]:
    tried = [
        {"backend": b, "precision": "fp32", "version": "1", "status": status.get(b, "accepted"), "reason": "why",
         "lines": [], "notes": [], "load_seconds": 0.1, "milliseconds": 1.0}
        for b in ("openvino", "onnx")
    ]  # fmt: skip
    return {
        "error": "", "version": "1", "digest": digest, "intended_use": "research", "algorithm": "A", "seconds": 1.0,
        "backend": backend, "precision": "fp32", "library": "1", "accepted": [], "tried": tried,
    }  # fmt: skip


class Room:
    def __init__(self) -> None:
        self.metrics, self.said = Metrics(), list[str]()
        self.standing = Standing("auto", Log.null(), self.metrics, changed=self.said.append)

    def uses(self, backend: str) -> float:
        return self.metrics.value("dicom_node_engine_backend", engine="t", backend=backend, precision="fp32")


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (told("onnx", openvino="not here"), "missing"),
        (told("onnx", openvino="refused"), "refused"),
        (told("onnx"), "slower"),
        (told("onnx", digest="b" * 64), "package"),
    ],
)
def test_a_change_says_its_reason(after: dict[str, Any], reason: str) -> None:
    room = Room()
    room.standing.tell(0, {"t": told()})
    assert room.said == []
    room.standing.tell(0, {"t": after})
    assert len(room.said) == 1
    assert room.metrics.value(CHANGES, engine="t", backend="openvino", reason=reason) == 1


def test_a_backend_is_in_use_while_any_worker_uses_it() -> None:
    room = Room()
    for worker in (0, 1):
        room.standing.tell(worker, {"t": told()})
    room.standing.drop(0, "t", "openvino", "crash", "SIGSEGV")
    room.standing.tell(0, {"t": told("onnx")})
    assert (room.uses("openvino"), room.uses("onnx")) == (1, 1)
    room.standing.tell(1, {"t": told("onnx")})
    assert (room.uses("openvino"), room.uses("onnx")) == (0, 1)
    assert room.standing.excluded() == {"t": {"openvino": "the worker died in it: SIGSEGV"}}


def test_words_of_a_child_become_neither_labels_nor_lines() -> None:
    room = Room()
    room.standing.tell(0, {"t": told()})
    room.standing.drop(0, "t", "evil\nname", "evil", "line\nfeed \x1b[31m" + "x" * 4000)
    room.standing.tell(0, {"t": told("onnx")})
    assert "\n" not in room.said[0] and "\x1b" not in room.said[0]
    assert len(room.said[0]) < 400
    assert room.metrics.value(CHANGES, engine="t", backend="other", reason="answer") == 1


def test_a_plan_that_had_to_be_built_again_is_told_though_nothing_changed() -> None:
    room, after = Room(), told()
    refused = "model classifier: plan cache: a plan was refused and is built again (its digest differs)"
    after["tried"][0]["notes"] = ["model classifier: batch 1 is run without a CUDA graph", refused]
    room.standing.tell(0, {"t": after})
    assert room.said == [f"t: openvino serves on; {refused}"]
    assert room.metrics.value(CHANGES, engine="t", backend="openvino", reason="plan") == 1


def test_a_note_is_told_once_and_not_again_by_every_worker_that_comes_back() -> None:
    before = told()
    before["tried"][0]["notes"] = ["model classifier: plan cache: a plan was refused and is built again"]
    after = told(openvino="not tried")
    (line, _) = client._with_earlier(after, before)["tried"]
    assert (line["status"], line["milliseconds"], line["notes"]) == ("accepted", 1.0, [])
    other = told(digest="b" * 64, openvino="not tried")
    assert client._with_earlier(other, before) == other


def test_a_reference_that_is_loaded_anew_is_not_left_out() -> None:
    room = Room()
    room.standing.tell(0, {"t": told("onnx")})
    room.standing.drop(0, "t", "onnx", "drift", "logits off by 5e-01")
    room.standing.tell(0, {"t": told("onnx")})
    reason = "it no longer gives the golden answers (logits off by 5e-01)"
    assert room.said == [f"t: onnx fp32 serves on, loaded anew: {reason}"]
    assert room.standing.excluded() == {}


def test_one_worker_does_not_tell_what_another_left() -> None:
    room = Room()
    for worker in (0, 1):
        room.standing.tell(worker, {"t": told()})
    room.standing.drop(0, "t", "openvino", "crash", "SIGSEGV")
    room.standing.tell(1, {"t": told()})  # a package was loaded, say, while the other starts again
    assert room.said == []
    room.standing.tell(0, {"t": told("onnx")})
    assert room.said == ["t: onnx fp32 serves; openvino is left out: the worker died in it (SIGSEGV)"]


@pytest.mark.parametrize(
    "change",
    [{"backend": "evil"}, {"error": None}, {"digest": "x"}, {"tried": [{}]}, {"surplus": 1}, {"seconds": "DOE^JANE"}],
)
def test_what_is_no_acceptance_table_is_not_taken(change: dict[str, Any]) -> None:
    assert acceptance.checked(told()) == told()
    with pytest.raises(ValueError, match="validation error"):
        acceptance.checked(told() | change)


def test_what_is_shown_on_a_terminal_is_one_plain_line() -> None:
    bad, after = "off\n\x1b[2J by 5.0e-02 \u2026", told()
    after["tried"][0] |= {"reason": bad, "notes": [bad], "version": bad}
    (line, _) = acceptance.checked(after)["tried"]
    plain = "off??[2J by 5.0e-02 \u2026"
    assert (line["reason"], line["notes"], line["version"]) == (plain, [plain], plain)
    assert acceptance.checked({"error": bad + "x" * 5000})["error"] == (plain + "x" * 5000)[:2000]


def test_the_table_is_kept_for_people_and_a_damaged_file_is_none(tmp_path: Path) -> None:
    table = {"t": {"at": 5.0, **told()}, "u": {"at": 6.0, "error": "no package"}}
    acceptance.write(tmp_path, table)
    assert acceptance.read(tmp_path) == table
    for damage in ("", "[]", '{"engines": {"t": {"at": 1, "error": ""}}}', '{"engines": 5}', "{" * 5000):
        (tmp_path / acceptance.FILE).write_text(damage)
        assert acceptance.read(tmp_path) == {}
