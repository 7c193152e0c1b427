"""The life of a package at a site: every refusal names file and step and leaves the package in use where it is."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_engine
import yaml

from dicom_node import cli, packages
from dicom_node.errors import PackageError, RootInUseError, StoreError, WorkerError
from dicom_node.log import Log
from dicom_node.metrics import Metrics
from dicom_node.packages import install as files
from dicom_node.service import models
from dicom_node.store.ledger import Ledger

REPOSITORY = Path(__file__).parent.parent
SCHEMAS = REPOSITORY / "docs/schemas"
ENGINE = "def select(study, clinical): ...\ndef predict(selection, pixels, run): ...\n"


class Site:
    """A store root, a task with its own package (version 1), and a drawer of packages to install."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "var"
        tiny_engine.write_task(folder / "engines", ENGINE)
        self.path = folder / "config.yaml"
        self.settings = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
        self.settings["engines"]["path"] = [str(folder / "engines")]
        self.settings["routes"] = [self.settings["routes"][0] | {"engine": "tiny"}]
        self.settings["infer"]["memory_gb"] = 4
        self.write()

    def write(self) -> None:
        self.path.write_text(yaml.safe_dump(self.settings))

    def run(self, *arguments: str) -> int:
        return cli.main(["engines", *arguments, "--config", str(self.path)])

    def package(self, version: str, **how: Any) -> Path:
        return tiny_engine.write_package(self.folder / "brought" / version, {"version": version}, **how)

    def has(self, version: str) -> None:
        """A version that is there already, as if an earlier release had installed it."""
        tiny_engine.write_package(self.root / "models/tiny" / version, {"version": version})

    @property
    def active(self) -> str:
        task = packages.load_task(self.folder / "engines/tiny")
        return packages.active_package(task, self.root).manifest.version

    def state(self) -> dict[str, bytes]:
        models = self.root / "models"
        return {p.relative_to(models).as_posix(): p.read_bytes() for p in models.rglob("*") if p.is_file()}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def used(site: Site) -> Site:
    """Version 2 is in use."""
    site.has("2")
    (site.root / "models/tiny/active").write_text("2\n")
    return site


# -- install


def test_an_accepted_package_is_installed_read_only_and_not_yet_in_use(used: Site, capsys: Any) -> None:
    brought = used.package("3")
    assert used.run("install", str(brought), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((SCHEMAS / "engines-install.v1.schema.json").read_text()))
    assert (answer["task"], answer["version"], answer["already_installed"]) == ("tiny", "3", False)
    assert [line["model"] for line in answer["accepted"]] == ["classifier"]
    there = used.root / "models/tiny/3"
    assert packages.load_package(there).digest == packages.load_package(brought).digest == answer["digest"]
    assert {p.stat().st_mode & 0o777 for p in there.rglob("*") if p.is_file()} == {0o444}
    assert used.active == "2"
    assert not list((used.root / "models").glob(".*"))
    assert used.run("install", str(brought)) == 0
    assert "installed already" in capsys.readouterr().out


def test_a_version_is_given_once(used: Site, capsys: Any) -> None:
    before = used.state()
    other = tiny_engine.write_package(used.folder / "other", {"version": "2", "algorithm": "Another"})
    assert used.run("install", str(other)) == 1
    assert "version 2 is installed with other bytes" in capsys.readouterr().err
    assert used.state() == before


def manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, not the digests of the files."""
    content = yaml.safe_load((folder / "manifest.yaml").read_text())
    change(content)
    (folder / "manifest.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content))))


def tampered(site: Site) -> Path:
    folder = site.package("3")
    data = bytearray((folder / "models/classifier/fp32.onnx").read_bytes())
    data[100] ^= 1
    (folder / "models/classifier/fp32.onnx").write_bytes(data)
    return folder


def outside(site: Site) -> Path:
    folder = site.package("3")
    manifest(folder, lambda m: m["files"].update({"../../outside.npz": m["files"]["head.npz"]}))
    return folder


def linked(site: Site) -> Path:
    folder = site.package("3")
    (folder / "head.npz").rename(site.folder / "head.npz")
    (folder / "head.npz").symlink_to(site.folder / "head.npz")
    return folder


def version_is_a_path(site: Site) -> Path:
    folder = site.package("3")
    manifest(folder, lambda m: m.update(version="../../../x"))
    return folder


def without_signature(site: Site) -> Path:
    site.settings["engines"]["require_signature"] = True
    site.write()
    return site.package("3")


def signed_by_a_stranger(site: Site) -> Path:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder = without_signature(site)
    ours, theirs = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    (site.root / "keys").mkdir(parents=True)
    (site.root / "keys/site-key.pub").write_bytes(base64.b64encode(ours.public_key().public_bytes_raw()))
    tiny_engine.write_manifest(folder, tiny_engine.MANIFEST | {"version": "3"}, sign_with=theirs)
    return folder


def graph(change: Callable[[Any], object]) -> Callable[[Site], Path]:
    def make(site: Site) -> Path:
        onnx = pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
        model = onnx.load_from_string(tiny_engine.GRAPH.read_bytes())
        change(model)
        return site.package("3", graph=model.SerializeToString())

    return make


def operator(model: Any) -> None:
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Evil"


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def oversize(model: Any) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 20, 1 << 20])


def other_name(model: Any) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "image"


def other_type(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 11


def other_size(model: Any) -> None:
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 8


def other_size_than_golden(site: Site) -> Path:
    """The graph leaves the size open and the golden answers are of another shape."""
    return site.package("3", golden={"classifier.features": np.zeros((3, 3, 8, 8), np.float32)})


def nan_output(site: Site) -> Path:
    """A bias that is not a number: what the graph answers is none, and golden.npz says so too."""
    onnx = pytest.importorskip("onnx", reason="onnx builds the graphs of this test (extra [train])")
    model = onnx.load_from_string(tiny_engine.GRAPH.read_bytes())
    bias = next(t for t in model.graph.initializer if t.name == "b")
    bias.raw_data = np.full(2, np.nan, np.float32).tobytes()
    golden = {"classifier.logits": np.full((3, 2), np.nan, np.float32)}
    return site.package("3", graph=model.SerializeToString(), golden=golden)


def nan_graph(site: Site) -> Path:
    """The same graph against sound golden answers."""
    folder = nan_output(site)
    np.savez_compressed(folder / "golden.npz", **tiny_engine.arrays()["golden"])
    tiny_engine.write_manifest(folder, tiny_engine.MANIFEST | {"version": "3"})
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tampered, r"fp32\.onnx is not the file the manifest was written for \(SHA-256 differs\)"),
        (outside, "manifest.yaml: files"),
        (linked, "head.npz is a link"),
        (version_is_a_path, "manifest.yaml: version"),
        (without_signature, "not signed, and engines.require_signature is true"),
        (signed_by_a_stranger, "the signature does not fit the manifest"),
        (graph(operator), r"graph check of models/classifier/fp32\.onnx: operator Evil is not accepted"),
        (graph(external), r"graph check of models/classifier/fp32\.onnx: K lies in another file"),
        (graph(oversize), r"graph check of models/classifier/fp32\.onnx: initialisers claim more than"),
        (graph(other_name), r"fp32\.onnx: its inputs are image; the manifest says x"),
        (graph(other_type), r"fp32\.onnx: x is not of single precision"),
        (graph(other_size), r"fp32\.onnx: x has the shape \? x 1 x 8 x 8; the manifest says 4 x 4"),
        (
            other_size_than_golden,
            r"golden replay of classifier on onnx: .*features is float32 .*, float32 \(3, 3, \d, \d\) expected",
        ),
        (nan_output, "golden replay of classifier on onnx: .*logits holds NaN or infinity"),
        (nan_graph, "golden replay of classifier on onnx: .*logits holds NaN or infinity"),
    ],
)
def test_bad_input_is_refused_with_file_and_step_and_the_package_in_use_stays(
    used: Site, make: Callable[[Site], Path], said: str, capsys: Any
) -> None:
    brought, before = make(used), used.state()
    assert used.run("install", str(brought)) == 1
    error = capsys.readouterr().err
    assert error.startswith("dicom-node: ") and error.count("\n") == 1
    with pytest.raises(PackageError, match=said):
        raise PackageError(error)
    assert used.state() == before and used.active == "2"
    assert files.installed(used.root, "tiny") == ("2",)


def test_a_package_of_no_task_here_is_an_unknown_engine(site: Site, capsys: Any) -> None:
    other = tiny_engine.write_package(site.folder / "other", {"task": "other", "version": "3"})
    assert site.run("install", str(other)) == 4
    assert "no task 'other'" in capsys.readouterr().err


def test_a_task_whose_library_is_absent_says_what_to_install(site: Site, capsys: Any) -> None:
    path = site.folder / "engines/tiny/engine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"libraries": ["no_such_library"]}))
    assert site.run("install", str(site.package("3"))) == 1
    assert "not available: install no_such_library" in capsys.readouterr().err


def test_a_disk_that_refuses_leaves_nothing_behind(used: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    package, before = files.check(used.package("3"), None), used.state()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"), files.staged(package, used.root):
        pass
    assert used.state() == before


def test_two_installs_do_not_meet(site: Site) -> None:
    with files.lock_models(site.root), pytest.raises(RootInUseError):
        models.install(cli_config(site), site.package("3"))


def cli_config(site: Site) -> Any:
    from dicom_node import config

    return config.load(site.path)


def interrupted(site: Site, brought: Path, seconds: float) -> float:
    """Install, and kill -9 so many seconds after the first byte is copied. How long it was at it."""
    command = [sys.executable, "-m", "dicom_node", "engines", "install", str(brought), "--config", str(site.path)]
    old = set((site.root / "models").glob(".staging-*"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not set((site.root / "models").glob(".staging-*")) - old:
        time.sleep(0.001)
    started = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
    return time.monotonic() - started


@pytest.mark.long
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new_one(used: Site) -> None:
    brought, found = used.package("3"), []
    whole = interrupted(used, brought, 60.0)
    for step in range(12):
        there = used.root / "models/tiny/3"
        if there.is_dir():
            assert packages.load_package(there).manifest.version == "3"
            shutil.rmtree(there)
        interrupted(used, brought, whole * step / 10)
        found.append(files.installed(used.root, "tiny"))
        assert used.active == "2"
    assert set(found) == {("2",), ("2", "3")}
    assert used.run("install", str(brought)) == 0  # and sweeps what the kills left
    assert not list((used.root / "models").glob(".*"))


# -- activate, rollback


class Worker:
    """Stands for a worker that serves: loads what it is told, or refuses."""

    def __init__(self, digest: str = "first") -> None:
        self.loaded, self.refuses, self.lost = digest, False, False
        self.asked: list[Path | None] = []

    def load(self, task: str, candidate: Path | None = None) -> dict[str, Any]:
        self.asked.append(candidate)
        if self.lost and candidate:
            raise WorkerError("SIGSEGV")
        if self.refuses and candidate:
            return {"error": "golden replay of classifier: off by 1"}
        self.loaded = "first" if candidate is None else packages.load_package(candidate).digest
        return {"error": "", "accepted": []}

    def engines(self) -> dict[str, Any]:
        return {"tiny": {"digest": self.loaded}}

    def digest(self, task: str) -> str:
        return self.loaded


@pytest.fixture
def ledger(site: Site) -> Iterator[Ledger]:
    (site.root / "run").mkdir(parents=True)
    made = Ledger(site.root)
    yield made
    made.close()


def events(ledger: Ledger) -> list[tuple[str, str]]:
    from dicom_node.store.schema import event

    with ledger.read() as tx:
        return [(row.code, row.text) for row in tx.execute(event.select().order_by(event.c.id))]


def test_a_switch_is_told_counted_and_goes_back_step_by_step(site: Site, ledger: Ledger) -> None:
    for version in "23":
        site.has(version)
    workers, metrics = [Worker(), Worker()], Metrics()
    switch = models.Switch(cli_config(site), ledger, Log.null(), metrics, workers)  # type: ignore[arg-type]

    def order(kind: str, version: str = "") -> Any:
        return switch.apply({"kind": kind, "task": "tiny", "version": version})

    assert "2 (demonstration)" in order("activate", "2")["text"] and site.active == "2"
    assert "before: 2" in order("activate", "3")["text"] and site.active == "3"
    order("activate", "3")  # twice is once
    assert files.history(site.root, "tiny") == ("3", "2")
    three = packages.load_package(site.root / "models/tiny/3").digest
    assert [w.loaded for w in workers] == [three, three]
    order("rollback")
    assert site.active == "2"
    order("rollback")
    assert site.active == "1" and files.history(site.root, "tiny") == ()
    assert "nothing to go back to" in order("rollback")["error"]
    codes = [code for code, _ in events(ledger)]
    assert codes == ["PACKAGE_ACTIVATED"] * 3 + ["PACKAGE_ROLLED_BACK"] * 2
    assert metrics.value("dicom_node_package_switches_total", engine="tiny", outcome="activated") == 3
    assert metrics.value("dicom_node_package_switches_total", engine="tiny", outcome="rolled_back") == 2


@pytest.mark.parametrize("fault", ["refuses", "lost"])
def test_a_worker_that_refuses_leaves_all_with_the_package_in_use(site: Site, ledger: Ledger, fault: str) -> None:
    site.has("2")
    workers, metrics = [Worker(), Worker()], Metrics()
    setattr(workers[1], fault, True)
    switch = models.Switch(cli_config(site), ledger, Log.null(), metrics, workers)  # type: ignore[arg-type]
    answer = switch.apply({"kind": "activate", "task": "tiny", "version": "2"})
    assert ("golden replay" if fault == "refuses" else "SIGSEGV") in answer["error"]
    assert site.active == "1" and [w.loaded for w in workers] == ["first", "first"]
    assert workers[0].asked[-1] is None  # it had gone ahead and was sent back
    ((code, text),) = events(ledger)
    assert code == "PACKAGE_REFUSED" and "the package in use stays" in text
    assert metrics.value("dicom_node_package_switches_total", engine="tiny", outcome="refused") == 1


def test_an_installed_package_that_was_changed_is_not_put_to_use(site: Site, ledger: Ledger) -> None:
    site.has("2")
    (site.root / "models/tiny/2/head.npz").write_bytes(b"changed")
    switch = models.Switch(cli_config(site), ledger, Log.null(), Metrics(), [])
    assert "head.npz is not" in switch.apply({"kind": "activate", "task": "tiny", "version": "2"})["error"]
    assert site.active == "1"


@pytest.mark.parametrize("version", ["9", "..", "../../../engines/tiny/model", "", "active"])
def test_only_what_is_installed_can_be_put_to_use(site: Site, ledger: Ledger, version: str) -> None:
    site.has("2")
    switch = models.Switch(cli_config(site), ledger, Log.null(), Metrics(), [])
    assert "is not installed (2)" in switch.apply({"kind": "activate", "task": "tiny", "version": version})["error"]


def test_without_a_running_node_the_order_is_carried_out_here(site: Site, capsys: Any) -> None:
    site.has("2")
    assert site.run("activate", "tiny", "2") == 0
    assert site.active == "2"
    ledger = Ledger(site.root)
    assert [code for code, _ in events(ledger)] == ["PACKAGE_ACTIVATED"]
    ledger.close()
    assert site.run("rollback", "tiny") == 0
    assert site.active == "1"
    assert "the package that comes with the task" not in capsys.readouterr().out.splitlines()[-1]


def test_a_marker_is_replaced_whole(site: Site) -> None:
    site.has("2")
    files.choose(site.root, "tiny", tuple(str(n) for n in range(40)))
    assert len(files.history(site.root, "tiny")) == files.HISTORY_KEPT
    assert files.history(site.root, "tiny")[0] == "0"
    (site.root / "models/tiny/active").write_text("../../x\n2\n")
    assert files.history(site.root, "tiny") == ("2",)  # nothing of it becomes a path


# -- verify


def test_verify_replays_every_package_and_names_the_one_that_no_longer_holds(used: Site, capsys: Any) -> None:
    used.has("3")
    assert used.run("verify", "--json") == 0
    lines = json.loads(capsys.readouterr().out)
    jsonschema.validate(lines, json.loads((SCHEMAS / "engines-verify.v1.schema.json").read_text()))
    assert [(x["version"], x["state"]) for x in lines] == [("1", "shipped"), ("2", "active"), ("3", "installed")]
    assert all(line["ok"] and line["accepted"] for line in lines)
    (used.root / "models/tiny/2/ood.npz").write_bytes(b"changed")
    assert used.run("verify", "tiny") == 1
    out = capsys.readouterr().out
    assert "REFUSED: 2: ood.npz is not" in out and len(re.findall(r"^tiny .* ok$", out, re.MULTILINE)) == 2
