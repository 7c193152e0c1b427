"""Where this node answers otherwise than stock pynetdicom, it is meant, and the reason is written down."""

from __future__ import annotations

import hostile_cases
import pytest
from differential import RACE, differences, table


@pytest.mark.long
def test_every_difference_from_stock_pynetdicom_is_explained(tmp_path):
    rows = table()
    found = {row.case: (row.ours, row.stock) for row in differences(tmp_path)}
    written = {row.case: (row.ours, row.stock) for row in rows if row.case in found or not row.why.startswith(RACE)}
    assert found == written  # python tests/support/differential.py writes the table anew


def test_every_row_has_a_reason_and_a_case():
    cases = hostile_cases.named() | hostile_cases.found()
    rows = table()
    assert len(rows) > 20
    assert [row.case for row in rows if len(row.why) < 15] == []
    assert [row.case for row in rows if row.case not in cases] == []


def test_the_corpus_is_small():
    found = hostile_cases.found()
    assert all(len(stream) <= 8192 for stream in found.values())
    assert sum(map(len, found.values())) < 200_000
