"""`./scripts/test` on a fresh machine: every test module is found where the training side is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
WITHOUT = """
import sys, pytest

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "monai", "onnxscript", "safetensors", "sklearn", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(["--collect-only", "-q", "-n", "0"]))
"""
"""What the extra `train` brings and `dev` does not cannot be imported."""


@pytest.mark.long
def test_test_modules_are_collected_without_the_extra_train() -> None:
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
