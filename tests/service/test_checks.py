"""`check`: what a route asks for must be something that can ever be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_engine

from dicom_node import config
from dicom_node.service.checks import check

FSH = {"name": "FSH", "code": {"value": "15067-2", "scheme": "LN", "meaning": "FSH"}, "unit": "[IU]/L",
       "range": [0.1, 200]}  # fmt: skip


@pytest.mark.parametrize(
    ("route", "unknown"),
    [
        ({}, []),
        ({"require": {"clinical": ["fsh"]}}, []),
        ({"require": {"clinical": ["FSH", "EDV"]}}, ["EDV"]),
        ({"indication": {"any": [{"clinical": "LDH"}, {"roi": True}]}}, ["LDH"]),
        ({"indication": {"all": [{"clinical": ["FSH", "AFP"]}]}}, ["AFP"]),
    ],
)
def test_a_clinical_value_that_no_engine_collects_is_an_error(
    tmp_path: Path, route: dict[str, Any], unknown: list[str]
) -> None:
    tiny_engine.write_task(tmp_path / "engines", "", clinical=[FSH])
    values = {"name": "r", "when": {"modality": "US"}, "indication": {"any": [{"roi": True}]}, "engine": "tiny"}
    data = {"routes": [values | route], "engines": {"path": ["engines"]}}
    found, _ = check(config.parse(data, file="x", base=tmp_path))
    said = [f["text"] for f in found["findings"] if "clinical value" in f["text"] and f["level"] == "error"]
    assert said == [f"no engine of the routes collects a clinical value {name}" for name in unknown]
