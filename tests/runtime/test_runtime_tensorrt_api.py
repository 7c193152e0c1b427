"""The fakes speak only words that the real libraries have: names and parameters, of every version the node takes."""

from __future__ import annotations

import importlib
import inspect

import fake_cuda
import fake_tensorrt
import pytest
import tensorrt_api

from dicom_node.errors import BackendError
from dicom_node.runtime import cuda, tensorrt
from dicom_node.runtime.tensorrt_build import make_logger


def said(parameters: list[str]) -> list[str]:
    """Names only."""
    return [name.rstrip("?") for name in parameters]


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_the_fake_library_has_the_members_and_parameters_of_the_real_one(version: str) -> None:
    api = tensorrt_api.stored()[version]
    for name, cls in fake_tensorrt.Library(version, fake_cuda.FakeCuda()).classes():
        for member, value in vars(cls).items():
            if member[0] == "_":
                continue
            assert member in api[name]
            if inspect.isfunction(value):
                own = [p for p in inspect.signature(value).parameters if p != "self"]
                real = [said([part for part in one.split(", ") if part]) for one in api[name][member]]
                assert own in real, f"{name}.{member}{own} is none of {real}"


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_what_the_node_subclasses_has_the_library_s_parameters(version: str) -> None:
    api = tensorrt_api.stored()[version]
    library = fake_tensorrt.Library(version, fake_cuda.FakeCuda())
    from dicom_node.runtime.tensorrt_build import _deadline

    for name, made in (("ILogger", make_logger(library)), ("IProgressMonitor", _deadline(library, 0.0))):
        own = {k: v for k, v in vars(type(made)).items() if inspect.isfunction(v) and k[0] != "_" and k != "said"}
        for member, function in own.items():
            assert list(inspect.signature(function).parameters)[1:] == api[name][member][0].split(", ")


def test_the_fake_library_refuses_a_name_that_the_real_one_lacks() -> None:
    full, rtx = (fake_tensorrt.Library(name, fake_cuda.FakeCuda()) for name in fake_tensorrt.VERSIONS[1:])
    config = full.Builder(make_logger(full)).create_builder_config()
    assert not hasattr(config, "set_compute_capability") and not hasattr(full, "ComputeCapability")
    with pytest.raises(AttributeError):
        config.num_compute_capabilities = 1
    rtx.Builder(make_logger(rtx)).create_builder_config().num_compute_capabilities = 1


def test_the_fake_cuda_has_the_functions_and_parameters_of_the_real_one() -> None:
    (known,) = (api["runtime"] for name, api in tensorrt_api.stored().items() if name.startswith("cuda "))
    for name, (parameters,) in known.items():
        function = getattr(fake_cuda.FakeCuda, name)
        assert ", ".join(list(inspect.signature(function).parameters)[1:]) == parameters
    own = {name for name in vars(fake_cuda.FakeCuda) if name.startswith("cuda") and name[4].isupper()}
    assert own - {"cudaStreamNonBlocking", "cudaMemcpyKind", "cudaStreamCaptureMode"} == known.keys()


def test_the_stored_names_are_those_of_the_installed_library() -> None:
    pytest.importorskip("tensorrt_rtx_libs", reason="TensorRT-RTX is not installed (extra [rtx])")
    module = tensorrt.find_module("tensorrt_rtx")
    found, stored = tensorrt_api.of_tensorrt(module), tensorrt_api.stored()[fake_tensorrt.VERSIONS[2]]
    for name, cls in fake_tensorrt.Library(fake_tensorrt.VERSIONS[2], fake_cuda.FakeCuda()).classes():
        for member in (m for m in vars(cls) if m[0] != "_"):
            assert found[name].get(member) == stored[name][member], f"{name}.{member}"
    for enumeration in tensorrt_api.ENUMS:
        assert stored[enumeration].keys() <= found[enumeration].keys()


def test_the_stored_functions_and_errors_are_those_of_the_installed_cuda_bindings() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (extra [rtx])")
    runtime = importlib.import_module("cuda.bindings.runtime")
    (known,) = (api for name, api in tensorrt_api.stored().items() if name.startswith("cuda "))
    assert tensorrt_api.of_cuda(runtime) == known
    for fake, real in (
        (fake_cuda.CudaError, runtime.cudaError_t),
        (fake_cuda.CopyKind, runtime.cudaMemcpyKind),
        (fake_cuda.CaptureMode, runtime.cudaStreamCaptureMode),
    ):
        for member in fake:
            assert int(getattr(real, member.name)) == int(member)
    assert int(runtime.cudaStreamNonBlocking) == fake_cuda.FakeCuda.cudaStreamNonBlocking
    assert {"name", "major", "minor", "multiProcessorCount"} <= set(dir(runtime.cudaDeviceProp))


def test_the_real_cuda_bindings_take_what_the_node_gives_them() -> None:
    """Without a driver every call is refused by CUDA, which is after the bindings have converted its arguments."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (extra [rtx])")
    library = cuda.find_library()
    if not int(library.cudaGetDeviceCount()[0]):
        pytest.skip("this machine has a GPU: addresses that are made up must not reach it")
    gpu = object.__new__(cuda.Gpu)
    gpu._library, gpu.device = library, cuda.Device(0, "none", (8, 0), 1, "none")
    stream, graph = library.cudaStream_t(0), library.cudaGraphExec_t(0)
    for call in (
        gpu.use,
        lambda: gpu.allocate(16, "x"),
        lambda: gpu.free(4096),
        lambda: gpu.pin(16, "x"),
        lambda: gpu.unpin(4096),
        gpu.make_stream,
        lambda: gpu.end_stream(stream),
        lambda: gpu.copy_in(4096, 8192, 16, stream),
        lambda: gpu.copy_out(4096, 8192, 16, stream),
        lambda: gpu.wait(stream),
        lambda: gpu.capture(stream, lambda: None),
        lambda: gpu.launch(graph, stream),
        lambda: gpu.end_graph(graph),
    ):
        with pytest.raises(BackendError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            call()
    assert gpu.free_memory() == "an unknown amount"
    assert int(stream) == 0
    for function, given in (("cudaStreamEndCapture", stream), ("cudaGraphDestroy", library.cudaGraph_t(0))):
        assert int(getattr(library, function)(given)[0])
    assert int(library.cudaGraphInstantiate(library.cudaGraph_t(0), 0)[0])
    with pytest.raises(BackendError, match="driver"):
        cuda.find_devices(library)
