"""The documents are true: tables equal the code, what they name exists, and their examples run."""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dicom_node import config
from dicom_node.cli import _parser
from dicom_node.engine import Prediction, Selection
from dicom_node.errors import ConfigError
from dicom_node.metrics import CATALOGUE
from dicom_node.result import Refusal, RefusalCode
from dicom_node.study import Header, Instance, Study

REPOSITORY = Path(__file__).parent.parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DEPLOY_README = REPOSITORY / "deploy" / "README.md"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def program() -> Any:
    """scripts/docs, loaded once: what it imports costs a second."""
    return runpy.run_path(str(REPOSITORY / "scripts" / "docs"))["main"]


@pytest.fixture
def generate(program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["docs", *arguments])
        try:
            return Done(program(), capsys.readouterr().out, "")
        except SystemExit as e:
            return Done(1, capsys.readouterr().out, str(e))

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(DOCS, tmp_path / "docs")
    return tmp_path / "docs"


def test_every_generated_block_is_as_the_code_says(generate: Callable[..., Done]) -> None:
    done = generate("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_stale_block_is_named_and_written_anew(copy: Path, generate: Callable[..., Done]) -> None:
    page = copy / "operator-guide.md"
    true = page.read_text()
    page.write_text(true.replace("| `NO_ROUTE` |", "| `NO_RUOTE` |"))
    done = generate("--check", "--docs", str(copy))
    assert (done.returncode, done.stdout) == (1, "operator-guide.md: refusals\n")
    assert page.read_text() != true  # --check changes nothing
    assert generate("--docs", str(copy)).returncode == 0
    assert page.read_text() == true


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("begin states (", "begin staets (", "not closed"),
        ("<!-- end states -->", "", "not closed"),
        ("states", "nothing", "no such block"),
    ],
)
def test_a_broken_block_is_an_error(
    copy: Path, generate: Callable[..., Done], before: str, after: str, said: str
) -> None:
    for other in copy.glob("[!o]*.md"):
        other.unlink()  # the error comes before anybody misses them
    page = copy / "operator-guide.md"
    page.write_text(page.read_text().replace(before, after))
    done = generate("--check", "--docs", str(copy))
    assert done.returncode == 1
    assert said in done.stderr


def test_a_block_that_no_page_shows_is_an_error(copy: Path, generate: Callable[..., Done]) -> None:
    (copy / "metrics.md").unlink()
    done = generate("--check", "--docs", str(copy))
    assert done.returncode == 1
    assert "'alerts', 'metrics'" in done.stderr


# --- what they name exists


def prose(page: Path) -> str:
    """Without code blocks: those are checked on their own."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, DEPLOY_README], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def mentioned(pattern: str) -> Iterator[tuple[str, str]]:
    for page in [*PAGES, DEPLOY_README]:
        for match in re.findall(pattern, page.read_text()):
            yield page.name, match


def test_metrics_that_are_mentioned_exist() -> None:
    found = list(mentioned(r"`(dicom_node_[a-z_]+)`"))
    assert found
    for page, name in found:
        assert name in CATALOGUE, f"{page}: {name}"


def test_files_that_are_mentioned_exist() -> None:
    found = list(mentioned(r"`((?:deploy|docs|dicom_node|scripts)/[\w./-]+)`"))
    assert found
    for page, name in found:
        assert (REPOSITORY / name).exists(), f"{page}: {name}"


def test_commands_that_are_mentioned_exist() -> None:
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    found = list(mentioned(r"`dicom-node ([a-z]+)"))
    assert {"explain", "check", "retry", "complete", "echo", "status"} <= {name for _, name in found}
    for page, name in found:
        assert name in commands, f"{page}: {name}"


def keys(model: Any, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if hasattr(inner, "model_fields"):
                yield from keys(inner, f"{prefix}{name}.")


def test_configuration_keys_that_are_mentioned_exist() -> None:
    known = {*keys(config.Config), *keys(config.Route), *keys(config.Destination)}
    sections = "|".join(config.Config.model_fields)
    found = [(page, key) for page, key in mentioned(rf"`((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)`")]
    assert len(found) > 15
    for page, key in found:
        if Path(key).suffix not in (".yaml", ".jsonl", ".xml", ".md", ".conf", ".yml", ".sh"):
            assert key in known, f"{page}: {key}"


@pytest.mark.parametrize("path", [p for p in PAGES if "```yaml" in p.read_text()], ids=lambda p: p.name)
def test_pieces_of_configuration_are_accepted(path: Path) -> None:
    """Whole sections as they stand; a route's destination is taken as given."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        data = yaml.safe_load(block)
        data.setdefault("deliver", {"destinations": {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}}})
        config.parse(data, file=path.name, base=REPOSITORY)
        with pytest.raises(ConfigError):
            config.parse({**data, "no_such_section": 1}, file=path.name, base=REPOSITORY)


# --- examples run


class Frames:
    """Sixteen frames of a ramp."""

    def frames(self, instance: Instance, numbers: tuple[int, ...] | None = None) -> Iterator[np.ndarray[Any, Any]]:
        for number in numbers or ():
            yield np.full((8, 12, 3), number, np.uint8)


def study(frames: int) -> Study:
    header = Header.from_json(
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.3.1", "SOPInstanceUID": "1.2", "NumberOfFrames": frames}
    )
    return Study.from_instances("1", 1, [Instance("0" * 32, header, "", "", Path("x"), "", "", "", "", 0.0)])


def test_the_example_engine_does_what_the_guide_says() -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "engine-author-guide.md").read_text(), re.DOTALL | re.M)
    engine: dict[str, Any] = {}
    exec(source, engine)  # noqa: S102  our own page
    assert engine["select"](study(8), {}) == Refusal(RefusalCode.TOO_FEW_FRAMES, "no clip of 16 frames")

    selection = engine["select"](study(20), {})
    assert isinstance(selection, Selection)

    def run(name: str, inputs: Any) -> Any:
        assert name == "classifier"
        assert inputs["x"].shape == (16, 1, 8, 12)
        return {"logits": np.ones((16, 2), np.float32), "features": np.zeros((16, 4, 2, 3), np.float32)}

    prediction = engine["predict"](selection, Frames(), run)
    assert isinstance(prediction, Prediction)
    (unit,) = prediction.units
    assert unit.frames.shape == (16, 8, 12)
    assert unit.region == (0, 0, 11, 7)
    assert [r.frame_number for r in unit.frame_refs] == list(range(1, 17))


def test_the_systemd_example_opens_only_the_networks() -> None:
    block = re.search(r"^```ini\n(.*?)^```", DEPLOY_README.read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    assert {line.partition("=")[0] for line in block[1].splitlines() if "=" in line} == {"IPAddressAllow"}
