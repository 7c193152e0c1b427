"""Nodes and peers that run for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_node import REPOSITORY, SHIPPED_CONFIG, Node, Pacs, free_port


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """A node with the shipped configuration on free ports and short times; keyword sections are merged in."""
    made: list[Node] = []

    def make(pacs_port: int | None = None, folder: str = "node", **sections: dict[str, Any]) -> Node:
        settings = yaml.safe_load(SHIPPED_CONFIG.read_text())
        settings["receive"]["port"], settings["metrics"]["port"] = free_port(), free_port()
        settings["store"]["min_free_gb"] = 0.05
        settings["infer"]["runtime"] = "onnx"  # trying all backends takes seconds at each start; test_backends.py asks
        settings["engines"]["path"] = [str(REPOSITORY / "engines")]
        settings["assemble"]["quiet_seconds"] = 1
        settings["deliver"]["destinations"]["pacs"]["port"] = pacs_port or free_port()
        settings["deliver"]["retry"] = {"first_seconds": 0.5, "max_seconds": 2, "give_up_hours": 72}
        for name, section in sections.items():
            if isinstance(section, dict):
                settings[name] = (settings[name] or {}) | section
            else:
                settings[name] = section
        where = tmp_path / folder
        where.mkdir()
        made.append(Node(where, settings))
        return made[-1]

    yield make
    for node in made:
        if node.process is not None and node.process.poll() is None:
            node.kill()


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    """A PACS that runs."""
    made = Pacs(free_port(), tmp_path / "pacs").start()
    yield made
    made.stop()
