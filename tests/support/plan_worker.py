"""A worker with a GPU and TensorRT-RTX that are not there: `python -m plan_worker`, started by WorkerClient(module=…).

The library is the fake of `fake_tensorrt`, which computes as the tiny graph does; the plan cache is the node's own.
`ODD_BACKENDS` names a JSON file; where it says {"tensorrt_rtx": "refuse"}, the library takes no plan any more.
"""

from __future__ import annotations

import json

import tiny_engine
from fake_tensorrt import Site, graph_bytes
from odd_worker import behaviour

from dicom_node.runtime import Backend
from dicom_node.runtime.onnx import OnnxBackend
from dicom_node.worker.child import main


def known(_runtime: str) -> tuple[Backend, ...]:
    site = Site()
    site.library.network = json.loads(graph_bytes(outputs={"logits": [-1, 2], "features": [-1, 3, 4, 4]}))
    site.library.computes = lambda given: dict(
        zip(("logits", "features"), tiny_engine.answers(given["x"]), strict=True)
    )
    site.library.load_error = "damaged" if behaviour(site.name) == "refuse" else ""
    return site.backend(), OnnxBackend()


if __name__ == "__main__":
    main(known)
