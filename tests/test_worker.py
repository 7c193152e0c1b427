"""The worker: what an engine does wrong costs one attempt, and the next job runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_engine
from pydicom.dataset import FileDataset, FileMetaDataset
from worker_bench import ENGINE, Bench, Job, route

from dicom_node.config import Config, Engines, Store
from dicom_node.errors import NodeStoppingError, WorkerError
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.result import ClinicalInput, Code, result_from_json
from dicom_node.study import Header, Instance, Study
from dicom_node.worker import WorkerClient
from dicom_node.worker.child import visible
from dicom_node.worker.wire import EndedError, GarbageError, Wire

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One worker for the tests that leave it alive, and for those that do not: that is the point."""
    folder = tmp_path_factory.mktemp("worker")
    tiny_engine.write_task(folder / "engines", ENGINE)
    made = Bench(folder)
    made.client.ready(60)
    yield made
    made.client.close()


# -- a good job


def test_ready_tells_the_package_and_the_acceptance_table(bench: Bench) -> None:
    told = bench.client.engines()["tiny"]
    assert (told["error"], told["version"], told["intended_use"]) == ("", "1", "demonstration")
    (line,) = told["accepted"]
    assert (line["model"], line["backend"], line["cases"], line["tolerance"]) == ("classifier", "onnx", 3, 1e-3)
    assert bench.metrics.value("dicom_node_engine_accepted", engine="tiny") == 1
    assert bench.client.is_ready


def test_a_job_gives_a_result_with_its_provenance_and_its_arrays(bench: Bench) -> None:
    counted = bench.metrics.value("dicom_node_ood_ratio", route="tiny-route")
    reply = bench.run()
    assert (reply.outcome, reply.error) == ("RESULT", "")
    made = result_from_json(json.loads(json.dumps(reply.result)))
    logits = tiny_engine.answers(np.full((1, 1, 4, 4), 0.5, np.float32))[0][0]
    expected = 1 / (1 + np.exp((logits[0] - logits[1]) / 2))
    assert made.findings[0].scores[0].probability == pytest.approx(expected, abs=1e-4)
    assert made.provenance.package_digest == reply.package["digest"] == bench.client.engines()["tiny"]["digest"]
    heatmap = made.findings[0].heatmap
    assert heatmap is not None
    assert np.load(bench.root / "spool" / heatmap.map.name, allow_pickle=False).shape == (2, 8, 8)
    assert bench.metrics.value("dicom_node_ood_ratio", route="tiny-route") == counted + 1


def test_an_engine_is_told_what_the_site_has_set(bench: Bench) -> None:
    made = result_from_json(json.loads(json.dumps(bench.run().result)))
    assert made.provenance.parameters["arterial"] == "(18.0, 45.0)"


def test_the_same_input_runs_nothing_again(bench: Bench) -> None:
    first = bench.run()
    spooled = len(list((bench.root / "spool").iterdir()))
    again = bench.run(previous=first.input_digest)
    assert (again.outcome, again.input_digest) == ("UNCHANGED", first.input_digest)
    assert len(list((bench.root / "spool").iterdir())) == spooled


def test_clinical_values_reach_the_engine_and_the_result(bench: Bench) -> None:
    fsh = ClinicalInput("FSH", Code("15067-2", "LN", "FSH"), 7.5, "[IU]/L", "20260101", "SR")
    reply = bench.run(clinical=[fsh])
    assert reply.result is not None
    made = result_from_json(json.loads(json.dumps(reply.result)))
    assert made.clinical == (fsh,)
    assert made.provenance.parameters["FSH"] == "7.5"


def test_the_worker_never_imports_torch_nor_the_training_side(bench: Bench) -> None:
    reply = bench.run("modules")
    assert reply.result is not None
    modules = set(reply.result["provenance"]["parameters"]["modules"].split())
    assert "onnxruntime" in modules
    assert not {"torch", "monai", "engines", "onnx", "highdicom", "pynetdicom"} & {m.split(".")[0] for m in modules}


def test_what_an_engine_prints_goes_nowhere(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.run("print").outcome == "RESULT"
    assert "DOE" not in "".join(capfd.readouterr())


# -- refusals are answers


def test_a_refusal_of_the_engine_is_an_answer(bench: Bench) -> None:
    reply = bench.run("refuse")
    assert (reply.outcome, dict(reply.refusal or {})) == ("REFUSED", {"code": "ROI_REQUIRED", "detail": "no region"})
    assert reply.package["version"] == "1"


def test_pixels_that_cannot_be_decoded_are_refused_with_the_transfer_syntax(bench: Bench, tmp_path: Path) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    ds = FileDataset(str(tmp_path / "video.dcm"), {}, file_meta=meta, preamble=bytes(128))
    ds.Rows = ds.Columns = 8
    ds.PixelData = bytes(64)
    ds["PixelData"].is_undefined_length = True
    ds["PixelData"].VR = "OB"
    ds.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0\x02\x00\x00\x00ab\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    ds.save_as(tmp_path / "video.dcm")
    reply = bench.run("decode", path=tmp_path / "video.dcm")
    assert reply.outcome == "REFUSED"
    assert reply.refusal is not None
    assert reply.refusal["code"] == "PIXELS_UNDECODABLE"
    assert "MPEG2" in reply.refusal["detail"]


def test_a_colour_space_that_was_put_right_stands_in_the_report(bench: Bench, tmp_path: Path) -> None:
    """PS3.3 C.7.6.3.1.2: tagged RGB, stored as YCbCr. The pixels were believed, and the reader is told."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds = FileDataset(str(tmp_path / "teal.dcm"), {}, file_meta=meta, preamble=bytes(128))
    ds.Rows = ds.Columns = 32
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = bytes((0, 128, 128)) * (32 * 32)
    ds.save_as(tmp_path / "teal.dcm")
    made = result_from_json(json.loads(json.dumps(bench.run("decode", path=tmp_path / "teal.dcm").result)))
    assert made.provenance.parameters["pixel data corrected"] == "COLOR_SPACE_CORRECTED"


def test_an_engine_that_is_not_loaded_is_not_available(bench: Bench) -> None:
    reply = bench.run(engine="other")
    assert (reply.outcome, (reply.refusal or {})["code"]) == ("REFUSED", "ENGINE_NOT_AVAILABLE")


# -- faults in the engine: one attempt, same process


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("nan", "Lesion 1: the logits hold NaN"),
        ("shape", "it takes x float32"),
        ("model", "no model 'other'"),
        ("raise", "RuntimeError at engine.py:"),
        ("exit", "SystemExit at engine.py:"),
        ("none", "neither a refusal nor a prediction"),
        ("nothing", "neither a refusal nor a selection"),
        ("decode", "StoreError|cannot be read"),
        ("memory", "out of memory"),
        ("numpy", "not plain values"),
    ],
)
def test_a_fault_costs_one_attempt_and_the_next_job_runs(bench: Bench, mode: str, said: str) -> None:
    bench.client.ready(60)
    pid, spooled = bench.client.pid, set((bench.root / "spool").iterdir())
    reply = bench.run(mode)
    assert reply.outcome == "FAULT"
    assert re.search(said, reply.error), reply.error
    assert "DOE" not in reply.error
    assert mode == "numpy" or set((bench.root / "spool").iterdir()) == spooled
    assert bench.run().outcome == "RESULT"
    assert bench.client.pid == pid


# -- faults of the process: one attempt, a new process


def test_a_crash_names_its_signal_and_the_next_job_runs(bench: Bench) -> None:
    before = bench.restarts("crash")
    with pytest.raises(WorkerError, match="SIGABRT"):
        bench.run("abort")
    assert bench.restarts("crash") == before + 1
    assert not bench.client.is_ready
    assert bench.run().outcome == "RESULT"  # starts another
    assert bench.client.is_ready


def test_a_hang_is_killed_at_the_deadline_even_with_the_interpreter_lock_held(bench: Bench) -> None:
    bench.client.ready(60)
    pid, started = bench.client.pid, time.monotonic()
    assert pid is not None
    with pytest.raises(WorkerError, match="no answer by the deadline"):
        bench.run("hang", timeout=0.5)
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)
    assert bench.restarts("deadline") == 1
    assert bench.run().outcome == "RESULT"


def test_a_worker_that_was_killed_while_idle_is_replaced(bench: Bench) -> None:
    bench.client.ready(60)
    pid = bench.client.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    assert not bench.client.is_ready
    assert bench.run().outcome == "RESULT"
    assert bench.client.pid != pid


def test_answers_of_a_compromised_child_are_not_believed(bench: Bench, tmp_path: Path) -> None:
    """A decoder that was taken over can write what it likes; a name that leaves the spool must not get through."""
    good = bench.run().result
    assert good is not None
    forged = json.loads(json.dumps(good))
    forged["findings"][0]["heatmap"]["map"]["name"] = "../../../etc/passwd"
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    hint = ClinicalInput("forged", Code("1", "2", "3"), str(tmp_path / "forged.json"), "", "", "")  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match="answer that cannot be used"):
        bench.run("traversal", clinical=[hint])
    with pytest.raises(WorkerError, match="answer that cannot be used"):
        bench.run("garbage")
    with pytest.raises(WorkerError, match="more than 64 MB"):
        bench.run("flood")
    assert bench.restarts("protocol") == 3
    assert bench.run().outcome == "RESULT"


# -- loading


def failing_tasks(engines: Path) -> dict[str, str]:
    """One good task among bad ones, and what each bad one must say."""
    tiny_engine.write_task(engines, ENGINE)
    tampered = tiny_engine.write_task(engines, ENGINE, "tampered") / "model/models/classifier/fp32.onnx"
    tampered.write_bytes(tampered.read_bytes()[:-1] + b"!")
    drifted = tiny_engine.write_task(engines, ENGINE, "drifted", package=False)
    logits = tiny_engine.arrays()["golden"]["classifier.logits"] + np.float32(0.1)
    tiny_engine.write_package(drifted / "model", {"task": "drifted"}, golden={"classifier.logits": logits})
    foreign = tiny_engine.write_task(engines, ENGINE, "foreign", package=False)
    tiny_engine.write_package(foreign / "model", {"task": "foreign"}, head={"W": tiny_engine.W[::-1].copy()})
    tiny_engine.write_task(engines, ENGINE, "needy", libraries=["no_such_library_here"])
    tiny_engine.write_task(engines, "import no_such_library_here", "careless")
    tiny_engine.write_task(engines, "raise SystemExit('DOE^JANE')", "leaving")
    tiny_engine.write_task(engines, "def select(study, clinical): ...", "half")
    tiny_engine.write_task(engines, "import os; os.abort()", "poison")
    return {
        "tampered": "SHA-256 differs",
        "drifted": "golden replay of classifier on onnx: logits off by",
        "foreign": "head.npz is not the head of this graph",
        "needy": "not available: install no_such_library_here",
        "careless": "imports what is not installed: no_such_library_here",
        "leaving": "SystemExit at engine.py:1",
        "half": "defines no select and predict",
        "poison": "while it was loaded, the worker process ended (SIGABRT)",
        "absent": "no task absent under engines.path",
    }


def test_engines_that_cannot_be_loaded_are_named_and_the_others_serve(tmp_path: Path) -> None:
    expected = failing_tasks(tmp_path / "engines")
    made = Bench(tmp_path, ("tiny", *expected))
    try:
        told = made.client.ready(120)
        assert told["tiny"]["error"] == ""
        for task, said in expected.items():
            assert said in told[task]["error"], task
            assert "DOE" not in told[task]["error"]
            assert made.metrics.value("dicom_node_engine_accepted", engine=task) == 0
        assert {line["engine"] for line in made.log.of("engine_refused")} == set(expected)
        assert made.run().outcome == "RESULT"
        refused = made.run(engine="drifted").refusal
        assert refused is not None
        assert (refused["code"], "golden replay" in refused["detail"]) == ("ENGINE_NOT_AVAILABLE", True)
    finally:
        made.client.close()


def test_a_backend_that_is_not_here_leaves_the_reference_and_says_so(tmp_path: Path) -> None:
    tiny_engine.write_task(tmp_path / "engines", ENGINE)
    made = Bench(tmp_path, runtime="cuda")
    try:
        told = made.client.ready(60)["tiny"]
    finally:
        made.client.close()
    if any(tried["backend"] == "cuda" and tried["status"] != "not here" for tried in told["tried"]):
        pytest.skip("this machine has onnxruntime-gpu")
    assert (told["error"], told["backend"], told["precision"]) == ("", "onnx", "fp32")
    assert {t["reason"] != "" for t in told["tried"] if t["backend"] == "cuda"} == {True}
    assert made.metrics.value("dicom_node_engine_first_choice", engine="tiny") == 0
    assert made.metrics.value("dicom_node_engine_backend", engine="tiny", backend="onnx", precision="fp32") == 1


def test_a_worker_that_cannot_start_says_so_and_is_not_ready(tmp_path: Path) -> None:
    tiny_engine.write_task(tmp_path / "engines", ENGINE)
    made = Bench(tmp_path, memory_gb=0.05)  # less than the interpreter has already
    try:
        with pytest.raises(WorkerError, match="the worker does not start"):
            made.client.ready(0)
        assert not made.client.is_ready
    finally:
        made.client.close()
    with pytest.raises(NodeStoppingError):
        made.run()


# -- the end


def test_close_in_the_middle_of_a_job_ends_it_without_a_fault(tmp_path: Path) -> None:
    tiny_engine.write_task(tmp_path / "engines", ENGINE)
    made = Bench(tmp_path)
    made.client.ready(60)
    pid, ended = made.client.pid, []

    def work() -> None:
        try:
            made.run("hang")
        except NodeStoppingError as e:
            ended.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    made.client.close()
    thread.join(5)
    assert (len(ended), time.monotonic() - started < 3) == (1, True)
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert not made.log.of("worker_ended")


PARENT = """
import sys
from pathlib import Path
from worker_bench import Bench
made = Bench(Path(sys.argv[1]))
made.client.ready(60)
print(made.client.pid, flush=True)
made.run("hang", timeout=600)
"""


def test_a_hung_worker_does_not_outlive_its_killed_parent(tmp_path: Path) -> None:
    tiny_engine.write_task(tmp_path / "engines", ENGINE)
    search = os.pathsep.join(str(REPOSITORY / p) for p in ("", "tests", "tests/support"))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": search}
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)
    assert child.is_running()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not alive
    parent.stdout.close()


# -- parts


def test_an_engine_sees_the_series_of_its_route_and_what_may_hold_a_region() -> None:
    def one(series: str, modality: str) -> Instance:
        header = Header.from_json({"SeriesInstanceUID": series, "Modality": modality, "SOPInstanceUID": series + ".1"})
        return Instance("0" * 32, header, "", "", Path("x"), "", "", "", "", 0.0)

    whole = Study.from_instances("1", 1, [one("1.1", "US"), one("1.2", "US"), one("1.3", "SEG"), one("1.4", "SR")])
    assert [s.series_instance_uid for s in visible(whole, frozenset({"1.2"})).series] == ["1.2", "1.3", "1.4"]
    assert visible(whole, frozenset()) == whole


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wire(ours), theirs


def test_the_deadline_is_for_the_whole_message(pair: tuple[Wire, socket.socket]) -> None:
    """A peer that sends a byte now and then must not keep us for ever."""
    wire, theirs = pair
    stop = threading.Event()

    def dribble() -> None:
        while not stop.wait(0.05):
            theirs.send(b" ")

    thread = threading.Thread(target=dribble)
    thread.start()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        wire.receive(time.monotonic() + 0.4)
    stop.set()
    thread.join()
    assert 0.3 < time.monotonic() - started < 2


def test_messages_keep_their_borders(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    theirs.sendall(b'{"a":1}\n{"b"')
    assert wire.receive() == {"a": 1}
    theirs.sendall(b':"\\u00e9\\n"}\n[1]\n{"c":3}')
    assert wire.receive() == {"b": "é\n"}
    with pytest.raises(GarbageError):
        wire.receive()
    theirs.close()
    with pytest.raises(EndedError):
        wire.receive()  # half a message is none


# -- the real package


def test_the_shipped_renal_engine_scores_a_phantom_clip(tmp_path: Path) -> None:
    if not (REPOSITORY / "engines/renal_ceus/model/manifest.yaml").is_file():
        pytest.skip("engines/renal_ceus holds no model package")
    from dicom_node.store.header import read_header
    from engines.renal_ceus import phantom
    from engines.training import dicomfile

    path = dicomfile.write(phantom.make(900_001, 1), tmp_path / "clip.dcm", "jpeg", dicomfile.Labels())
    header = read_header(path)
    clip = Instance("0" * 32, header, "", "a" * 64, path, "", "", "", "", 0.0)
    config = Config(engines=Engines(path=(REPOSITORY / "engines",)), store=Store(root=tmp_path))
    client = WorkerClient(config, ("renal_ceus",), Log.null(), Metrics())
    try:
        reply = client.run(Job(), route("renal_ceus"), Study.from_instances("1", 1, [clip]), None, timeout=60)
    finally:
        client.close()
    assert reply.outcome == "RESULT", reply
    assert reply.result is not None
    (finding,) = result_from_json(json.loads(json.dumps(reply.result))).findings
    assert finding.heatmap is not None
    assert len(finding.heatmap.frame_refs) >= 3
    assert finding.site.value == "64033007"
