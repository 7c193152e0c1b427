"""The statuses we answer and what a peer's status means for a delivery."""

from __future__ import annotations

import pytest
from pynetdicom.status import (
    STATUS_FAILURE,
    STATUS_SUCCESS,
    STATUS_WARNING,
    STORAGE_SERVICE_CLASS_STATUS,
    code_to_category,
)

from dicom_node import errors
from dicom_node.dimse.status import SCP_STATUSES, Outcome, classify, is_warning


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, Outcome.DELIVERED),
        (0x0111, Outcome.DELIVERED),
        (0xB000, Outcome.DELIVERED),
        (0xB006, Outcome.DELIVERED),
        (0xB007, Outcome.DELIVERED),
        (0x0107, Outcome.DELIVERED),
        (None, Outcome.RETRY),
        (0xA700, Outcome.RETRY),
        (0xA7FF, Outcome.RETRY),
        (0x0122, Outcome.PAUSE),
        (0x0112, Outcome.PAUSE),
        (0x0124, Outcome.PAUSE),
        (0x0214, Outcome.PAUSE),
        (0xA900, Outcome.DEAD),
        (0xA9FE, Outcome.DEAD),
        (0x0117, Outcome.DEAD),
        (0xC000, Outcome.LIMITED),
        (0xC211, Outcome.LIMITED),
        (0x0110, Outcome.LIMITED),
        (0xFE00, Outcome.LIMITED),
        (0x1234, Outcome.LIMITED),
    ],
)
def test_a_status_decides_what_the_delivery_does(status, outcome):
    assert classify(status) is outcome


def test_warnings_are_told_apart_from_plain_success():
    assert [is_warning(s) for s in (0x0000, 0xB000, 0xB006, 0x0116, 0xA700)] == [False, True, True, True, False]


def test_every_refusal_the_receive_path_raises_is_in_the_published_table():
    published = {s.code for s in SCP_STATUSES}
    leaves = errors.ReceiveError.__subclasses__()
    assert leaves
    assert {leaf.status for leaf in leaves} <= published


def test_what_we_answer_is_what_the_standard_has_for_storage():
    """As pynetdicom has PS3.4 table B.2-1 and PS3.7 annex C."""
    for status in SCP_STATUSES:
        category, meaning = STORAGE_SERVICE_CLASS_STATUS[status.code]
        assert category == (STATUS_SUCCESS if status.code == 0 else STATUS_FAILURE), meaning


def test_a_warning_is_what_another_implementation_calls_one():
    assert [c for c in range(1 << 16) if is_warning(c) != (code_to_category(c) == STATUS_WARNING)] == []
