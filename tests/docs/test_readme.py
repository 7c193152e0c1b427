"""The README is what a newcomer believes: its commands exist, its links lead somewhere, its tree is a real one."""

from __future__ import annotations

import re
from pathlib import Path

from dicom_node.cli import _parser

REPOSITORY = Path(__file__).parent.parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_command_it_names_exists():
    (commands,) = [a for a in _parser()._actions if a.dest == "command"]
    named = set(re.findall(r"^dicom-node ([a-z]+)", README, re.MULTILINE))
    assert named == set(commands.choices) - {"demo"}
    for script in re.findall(r"\./(scripts/\w+)", README):
        assert (REPOSITORY / script).is_file(), script


def test_every_link_and_picture_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_the_tree_is_one_a_node_made():
    for text in ("Imaging Measurement Report (126000, DCM)", "PROB-HIGHGRADE, 99INFER", "NOT A PATIENT RESULT"):
        assert text in README
