"""TensorRT from graph to answer, on a recorded library and GPU: what is called, in which order, and freed."""

from __future__ import annotations

import gc
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import CudaError, FakeCuda
from fake_tensorrt import VERSIONS, Site, answers, graph_bytes, images, model_of

from dicom_node.errors import BackendError, PackageError
from dicom_node.runtime import Backend, Place
from dicom_node.runtime.tensorrt import TensorRtBackend
from dicom_node.runtime.tensorrt_build import Batches, batches_of
from dicom_node.runtime.tensorrt_session import split

ROW = 4 * 16


# -- answers


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 40])
def test_every_row_of_any_batch_gets_its_own_answer(version: str, count: int) -> None:
    session = Site(version).open()
    x = images(count)
    for _ in range(2):
        found = session.run({"x": x})
        assert found.keys() == {"logits", "features"}
        for name, expected in answers(x).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
            assert found[name].dtype == np.float32


def test_answers_stay_when_the_next_study_comes() -> None:
    session = Site().open()
    first = session.run({"x": images(2)})
    kept = {name: array.copy() for name, array in first.items()}
    session.run({"x": 100 * images(3)})
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])


def test_padding_is_zeros_and_not_the_rows_of_the_study_before() -> None:
    site = Site()
    session = site.open()
    session.run({"x": 100 * images(4)})
    session.run({"x": images(3)})
    (batch,) = (b for b in site.cuda.pinned.values() if len(b) == 16 * ROW)
    assert np.frombuffer(batch, np.float32)[3 * 16 : 4 * 16].tolist() == [0.0] * 16


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [4]),
        (4, [4]),
        (5, [4, 1]),
        (9, [16]),
        (16, [16]),
        (20, [16, 4]),
        (34, [16, 16, 1, 1]),
    ],
)
def test_batches_are_split_and_padded_to_less_than_twice_the_rows(count: int, expected: list[int]) -> None:
    parts = list(split(count, (1, 4, 16)))
    assert [batch for _, _, batch in parts] == expected
    assert [start for start, _, _ in parts] == [sum(r for _, r, _ in parts[:i]) for i in range(len(parts))]
    assert sum(rows for _, rows, _ in parts) == count and all(rows <= batch for _, rows, batch in parts)


@pytest.mark.parametrize(
    ("shape", "most", "expected", "steps"),
    [
        ((1, 224, 224), {}, "1/4/16", (1, 4, 16)),
        ((5, 16, 64, 64), {}, "1/1/4", (1, 4)),
        ((77,), {}, "1/16/1024", (1, 4, 16, 64, 256, 1024)),
        ((1, 224, 224), {"classifier": 6, "other": 2}, "1/4/6", (1, 4, 6)),
        ((1, 224, 224), {"classifier": 1}, "1/1/1", (1,)),
    ],
)
def test_the_profile_follows_the_dimensions_and_the_place(
    shape: tuple[int, ...], most: dict[str, int], expected: str, steps: tuple[int, ...]
) -> None:
    batches = batches_of(model_of(shapes={"x": shape}), Place(max_batch=most))
    assert (str(batches), batches.steps()) == (expected, steps)


def test_a_graph_for_one_batch_keeps_it() -> None:
    session = Site().open(model_of(graph_bytes(2)))
    assert session.batches == Batches(2, 2, 2)
    x = images(6)
    np.testing.assert_allclose(session.run({"x": x})["logits"], answers(x)["logits"], rtol=1e-5)
    with pytest.raises(BackendError, match="takes batches of 2, and was given 3"):
        session.run({"x": images(3)})


# -- the calls


@pytest.mark.parametrize("version", VERSIONS)
def test_shapes_addresses_enqueue_copy_wait_and_one_capture_a_batch(version: str) -> None:
    site = Site(version)
    session = site.open()
    calls = site.cuda.calls
    batch_16 = [
        "shape x 16", "address x", "address logits", "address features",
        f"copy in {16 * ROW}", "execute", "copy out 128", "copy out 768", "wait",
        "begin capture", f"copy in {16 * ROW}", "execute", "copy out 128", "copy out 768", "end capture",
    ]  # fmt: skip
    start = calls.index("address x") - 1
    assert calls[start : start + len(batch_16)] == batch_16
    assert calls.count("begin capture") == calls.count("end capture") == 3  # 16, 4, 1: before the first study
    assert all(call.split()[0] in ("pin", "malloc", "shape") for call in calls[:start])
    del calls[:]
    for count in (1, 4, 1, 16, 4, 1):
        session.run({"x": images(count)})
    assert calls == ["launch", "wait"] * 6  # nothing is captured, allocated or set again


def test_everything_is_freed_in_order_and_once() -> None:
    site = Site()
    session = site.open()
    session.run({"x": images(3)})
    assert site.cuda.left() and site.library.alive == ["engine", "context"]
    del site.cuda.calls[:]
    session.close()
    assert site.cuda.calls == ["wait", *["end graph"] * 3, *["free", "unpin"] * 3, "end stream"]
    assert site.cuda.left() == 0 and site.library.alive == []
    session.close()
    with pytest.raises(BackendError, match="is closed"):
        session.run({"x": images(1)})


def test_rtx_compiles_before_it_answers_and_leaves_graphs_to_the_session() -> None:
    """By default it would compile in the background, and the second study be computed by other kernels."""
    site = Site()
    session = site.open()
    config = site.library.runtime_config
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert config.cuda_graph_strategy.name == "DISABLED"
    session.close()


def test_a_plan_that_cannot_be_captured_runs_without_and_says_so() -> None:
    for version in VERSIONS:  # RTX is asked; TensorRT fails in the capture
        site = Site(version)
        site.library.capturable = False
        session = site.open()
        assert any("without a CUDA graph" in note for note in session.notes)
        x = images(5)
        np.testing.assert_allclose(session.run({"x": x})["logits"], answers(x)["logits"], rtol=1e-5)
        assert "launch" not in site.cuda.calls
        session.close()
        assert site.cuda.left() == 0


def test_it_uses_the_gpu_of_its_place() -> None:
    site = Site(names=(b"NVIDIA T4", b"NVIDIA L4"))
    chosen = []
    site.cuda.cudaSetDevice = lambda device: chosen.append(device) or (CudaError.cudaSuccess,)  # type: ignore[method-assign,func-returns-value]
    session = site.open(place=Place(device=1))
    session.run({"x": images(1)})
    assert set(chosen) == {1}
    with pytest.raises(BackendError, match="there is no GPU 2: this machine has 2"):
        site.open(place=Place(device=2))


# -- the builder


@pytest.mark.parametrize(("version", "flags"), [(VERSIONS[0], 1 << 1), (VERSIONS[1], 1 << 0), (VERSIONS[2], 1 << 0)])
def test_the_builder_is_set_alike_for_every_library(version: str, flags: int) -> None:
    site = Site(version)
    site.open()
    built = site.library.built
    assert site.library.creation_flags == flags  # STRONGLY_TYPED
    assert built["flags"] == set()  # no TF32, VERSION_COMPATIBLE, REFIT, FP16
    assert built["WORKSPACE"] == 2 << 30
    assert built["profile"] == {"x": ((1, 1, 4, 4), (4, 1, 4, 4), (16, 1, 4, 4))}
    assert built["targets"] == (["CURRENT"] if site.name == "tensorrt_rtx" else [])
    assert ("timing" in built) == (site.name == "tensorrt")


def test_each_precision_is_its_own_graph() -> None:
    half = graph_bytes(note="half")
    graphs = {"fp32": graph_bytes(), "fp16": half}
    digests = {name: hashlib.sha256(graph).hexdigest() for name, graph in graphs.items()}
    site = Site()
    session = site.open(model_of(graphs=graphs, digests=digests), precision="fp16")
    assert session.precision == "fp16" and b"half" in site.library.loads[0]
    with pytest.raises(BackendError, match="the package has no fp16 graph"):
        site.open(model_of(graphs={"fp32": graph_bytes()}), precision="fp16")


def test_an_open_batch_that_the_builder_refuses_becomes_one_case_at_a_time(tmp_path: Path) -> None:
    site = Site()
    site.library.refuses_open_batch = True
    place = Place(plans=tmp_path / "plans")
    session = site.open(place=place)
    assert session.batches == Batches(1, 1, 1) and site.library.builds == 2
    (note,) = session.notes
    assert "one case at a time" in note and "Myelin" in note and "/_src" not in note
    x = images(3)
    np.testing.assert_allclose(session.run({"x": x})["logits"], answers(x)["logits"], rtol=1e-5)
    assert site.open(place=place).batches == Batches(1, 1, 1)
    assert site.library.builds == 2  # not even the wide one is tried again


def test_every_error_of_the_parser_is_told_without_paths() -> None:
    errors = [
        {"node": i, "name": f"/net/layer{i}", "operator": op, "desc": f"no importer for {op} (In f at /home/x/y.cpp:3)"}
        for i, op in enumerate(["Det", "NonZero", "Det"])
    ]
    with pytest.raises(BackendError) as e:
        Site().open(model_of(graph_bytes(errors=errors)))
    said = str(e.value)
    assert "refuses 3 nodes" in said and "/" not in said
    for i, op in enumerate(["Det", "NonZero", "Det"]):
        assert f"node {i} {op} layer{i}: no importer for {op}" in said


@pytest.mark.parametrize(
    ("graph", "changes", "said"),
    [
        (graph_bytes(), {"inputs": ("image",)}, "its inputs are x; the manifest says image"),
        (graph_bytes(), {"outputs": ("logits",)}, "its outputs are logits, features; the manifest says logits"),
        (graph_bytes(dtype="HALF"), {}, "x is not of single precision"),
        (graph_bytes(), {"shapes": {"x": (1, 8, 8)}}, "the golden cases have 1 x 8 x 8"),
        (graph_bytes(outputs={"logits": [1, 2], "features": [-1, 3, 2, 2]}), {}, "logits does not have the batch"),
        (graph_bytes(), {"digests": {}}, "does not have the SHA-256 of the manifest"),
        (graph_bytes(), {"digests": {"fp32": "0" * 64}}, "does not have the SHA-256 of the manifest"),
    ],
)
def test_a_graph_that_is_not_the_manifest_s_is_refused(graph: bytes, changes: dict[str, Any], said: str) -> None:
    site = Site()
    with pytest.raises(PackageError, match=said):
        site.open(model_of(graph, **changes))
    assert site.cuda.left() == 0


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ({"plan_dtype": "HALF"}, "of its plan is not of single precision"),
        ({"plan_tensors": {"more": [-1, 2]}}, "its plan has features, logits, more, not"),
        ({"plan_tensors": {"logits": [-1, -1]}}, r"logits is \(16, -1\) for a batch of 16"),
    ],
)
def test_a_plan_that_is_not_the_manifest_s_is_refused(inside: dict[str, Any], said: str) -> None:
    site = Site()
    with pytest.raises(PackageError, match=said):
        site.open(model_of(graph_bytes(**inside)))
    gc.collect()
    assert site.cuda.left() == 0


def test_a_slow_build_is_cancelled() -> None:
    site = Site()
    site.library.steps, site.library.step_seconds = 1000, 0.01
    with pytest.raises(BackendError, match="the build of its plan took longer than 0 s"):
        site.open(build_seconds=0.05)
    assert site.cuda.left() == 0 and site.library.builds == 1


# -- what fails


def test_too_little_memory_is_told_with_sizes_and_nothing_stays() -> None:
    site = Site(memory=1000)
    with pytest.raises(BackendError, match=r"out of memory: .*x for a batch of 16: 0\.0 MB of GPU memory wanted"):
        site.open()
    gc.collect()
    assert site.cuda.left() == 0 and site.library.alive == []


def test_too_little_page_locked_memory() -> None:
    site = Site(fails={"cudaMallocHost": CudaError.cudaErrorMemoryAllocation})
    with pytest.raises(BackendError, match="of page-locked memory wanted"):
        site.open()
    gc.collect()
    assert site.cuda.left() == 0


def test_no_memory_for_the_plan_is_no_reason_to_build_it_again() -> None:
    site = Site()
    site.library.load_error = "Error Code 2: OutOfMemory (Requested size was 77 bytes.)"
    with pytest.raises(BackendError, match=r"cannot load its plan of .*1\.07 GB are free: .*OutOfMemory"):
        site.open()
    assert site.library.builds == 1 and site.cuda.left() == 0


def test_no_memory_for_the_context() -> None:
    site = Site()
    site.library.context_error = "Error Code 2: OutOfMemory"
    with pytest.raises(BackendError, match=r"needs 123\.0 MB of GPU memory to run"):
        site.open()


def test_after_a_fault_on_the_gpu_the_session_is_not_used_again() -> None:
    site = Site()
    session = site.open()
    site.cuda.fails["cudaStreamSynchronize"] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match="on a batch of 1: running on the GPU: cudaErrorIllegalAddress"):
        session.run({"x": images(1)})
    del site.cuda.fails["cudaStreamSynchronize"], site.cuda.calls[:]
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        session.run({"x": images(1)})
    assert site.cuda.calls == []
    session.close()
    assert site.cuda.left() == 0


def test_a_plan_that_does_not_start() -> None:
    site = Site()
    site.library.enqueue_fails = True
    with pytest.raises(BackendError, match="cannot be started"):
        site.open()


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"y": images(1)},
        {"x": images(1).astype(np.float64)},
        {"x": images(1)[:, 0]},
        {"x": images(1)[:0]},
        {"x": images(1), "y": images(1)},
        {"x": images(1)[..., :2]},
    ],
)
def test_wrong_input_is_told_and_breaks_nothing(inputs: dict[str, Any]) -> None:
    session = Site().open()
    with pytest.raises(BackendError, match="was given"):
        session.run(inputs)
    assert session.run({"x": images(1)})["logits"].shape == (1, 2)


# -- what is missing


def missing(backend: Backend) -> str:
    return backend.missing()


def raising(error: Exception) -> Any:
    def find(*_: object) -> Any:
        raise error

    return find


def test_nothing_is_missing_where_everything_is_there() -> None:
    for version in VERSIONS:
        backend = Site(version).backend()
        assert (missing(backend), backend.version()) == ("", version.split()[1])


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"fails": {"cudaGetDeviceCount": CudaError.cudaErrorInsufficientDriver}, "driver": 0}, "no NVIDIA driver"),
        (
            {"fails": {"cudaGetDeviceCount": CudaError.cudaErrorInsufficientDriver}, "driver": 12040},
            "driver is too old: it knows CUDA 12.4, 13.5 is installed",
        ),
        ({"fails": {"cudaGetDeviceCount": CudaError.cudaErrorNoDevice}}, "finds no GPU"),
        ({"names": ()}, "finds no GPU"),
        ({"sm": (9, 0)}, r"TensorRT-RTX 1.7.1.116 builds no plans for NVIDIA RTX A4000 \(SM 9.0\)"),
    ],
)
def test_a_driver_or_a_gpu_that_is_missing_is_named(gpu: dict[str, Any], said: str) -> None:
    backend = Site(**gpu).backend()
    assert re.search(said, missing(backend))
    with pytest.raises(BackendError, match=said):
        backend.open(model_of(), Place())


def test_full_tensorrt_takes_hopper_and_refuses_volta() -> None:
    assert missing(Site(VERSIONS[1], sm=(9, 0)).backend()) == ""
    assert "(SM 7.0) is too old" in missing(Site(VERSIONS[1], sm=(7, 0)).backend())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("no"),
            "TensorRT is not installed: install dicom-node[tensorrt], which needs NVIDIA's package index",
        ),
        (ImportError("libnvinfer.so.11: cannot open shared object file"), "its libraries cannot be loaded"),
        (OSError("libcudart"), "its libraries cannot be loaded"),
    ],
)
def test_a_library_that_is_missing_is_named(error: Exception, said: str) -> None:
    backend = TensorRtBackend("tensorrt", "fp32", find_module=raising(error), find_cuda=FakeCuda)
    assert said in missing(backend) and backend.version() == ""
    with pytest.raises(BackendError):
        backend.open(model_of(), Place())


def test_an_old_library_and_missing_cuda_bindings_are_named() -> None:
    site = Site(VERSIONS[0])
    site.library.__version__ = "10.9.0.34"
    assert "TensorRT 10.9.0.34 is too old: 10.16 or later" in missing(site.backend())
    site = Site()
    backend = TensorRtBackend(
        "tensorrt_rtx", "fp32", find_module=lambda _: site.library, find_cuda=raising(ImportError("cuda"))
    )
    assert "cuda-bindings is not installed" in missing(backend)


def test_without_a_gpu_the_library_is_not_even_loaded() -> None:
    """It takes a hundred megabytes of a worker that has no use for it."""
    backend = TensorRtBackend(
        "tensorrt_rtx", "fp32", find_module=raising(AssertionError("loaded")), find_cuda=lambda: FakeCuda(names=())
    )
    assert "finds no GPU" in missing(backend)


def test_on_this_machine_something_is_missing_or_nothing() -> None:
    """The real libraries, as far as they are installed: asked, never raising."""
    for name in ("tensorrt", "tensorrt_rtx"):
        backend: Backend = TensorRtBackend(name, "fp16")
        assert isinstance(backend.missing(), str) and isinstance(backend.version(), str)
