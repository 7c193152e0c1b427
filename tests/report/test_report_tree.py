"""The readable tree, against a golden text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dicom_node.report.tree import readable_tree

GOLDEN = Path(__file__).parent / "tree.txt"


def test_the_tree_is_the_golden_one(case: Any) -> None:
    case.intended_use = "demonstration"
    text = re.sub(r"2\.25\.\d+", "2.25.UID", readable_tree(case.sr()))
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_tree_names_no_patient(case: Any) -> None:
    text = readable_tree(case.sr())
    assert not any(word in text for word in ("Doe", "P-001", "19600102", "A-77"))


def test_another_kind_of_object_is_refused(case: Any) -> None:
    with pytest.raises(ValueError, match="not a Structured Report"):
        readable_tree(case.capture())
