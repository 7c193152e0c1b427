"""The loop guard: which objects are our own."""

from __future__ import annotations

from typing import Any

import pytest

from dicom_node.study import Header, is_own_output


@pytest.mark.parametrize(
    ("attributes", "own"),
    [
        ({"ManufacturerModelName": "dicom-node", "Manufacturer": "Any Hospital"}, True),
        ({"ManufacturerModelName": "DICOM-NODE "}, True),  # a PACS may pad and change case
        ({"SecondaryCaptureDeviceManufacturerModelName": "dicom-node"}, True),
        (
            {"ManufacturerModelName": "X", "ContributingEquipmentSequence": [{"ManufacturerModelName": "dicom-node"}]},
            True,
        ),
        ({"ManufacturerModelName": "EPIQ 5G", "Manufacturer": "dicom-node"}, False),
        ({"ManufacturerModelName": "dicom-node-viewer"}, False),
        ({"StationName": "DICOM_NODE", "ContributingEquipmentSequence": [{"Manufacturer": "X"}]}, False),
        ({}, False),
    ],
)
def test_own_outputs_are_known_by_their_data_set(attributes: dict[str, Any], own: bool) -> None:
    assert is_own_output(Header.from_json(attributes)) is own
