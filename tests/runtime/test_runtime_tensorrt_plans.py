"""The plan cache: what is used is what this node built for this machine; everything else is removed and built again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine
from backends import tiny_judge, tiny_model, truth
from fake_tensorrt import VERSIONS, Site, answers, graph_bytes, images, model_of

from dicom_node.errors import BackendError
from dicom_node.runtime import Place, cuda, plans
from dicom_node.runtime.choose import Tried, choose
from dicom_node.runtime.onnx import OnnxBackend
from dicom_node.runtime.plans import Key, Plans

KEY = Key({"library": "tensorrt_rtx", "version": "1.7", "graph": "a" * 64})


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*.{suffix}"))


def serve(site: Site, folder: Path, **how: Any) -> Any:
    """A start of the node: opens, answers rightly, closes."""
    session = site.open(place=Place(plans=folder), **how)
    x = images(3)
    np.testing.assert_allclose(session.run({"x": x})["logits"], answers(x)["logits"], rtol=1e-5)
    session.close()
    return session


# -- through the backend


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_is_built_once_and_kept_for_us_alone(tmp_path: Path, version: str) -> None:
    folder, site = tmp_path / "var" / "plans", Site(version)
    for _ in range(3):
        assert serve(site, folder).notes == ()
    assert site.library.builds == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(files(folder, "plan")) == (2 if site.name == "tensorrt" else 1)  # and the timing cache
    record = next(r for r in map(json.loads, map(Path.read_text, files(folder, "json"))) if r["key"]["kind"] == "plan")
    assert record["key"] == {
        "kind": "plan", "library": site.name, "version": version.split()[1], "gpu": "NVIDIA RTX A4000", "sm": "8.6",
        "multiprocessors": "48", "driver": record["key"]["driver"], "graph": model_of().digests["fp32"],
        "profile": "1/4/16; x 1x4x4", "settings": record["key"]["settings"],
    }  # fmt: skip
    assert "CUDA 13.0" in record["key"]["driver"] and "no TF32" in record["key"]["settings"]


def test_the_timing_cache_is_used_for_the_next_plan(tmp_path: Path) -> None:
    site = Site(VERSIONS[1])
    serve(site, tmp_path / "p")
    assert site.library.built["timing"] == b""
    site.open(model_of(graph_bytes(other=1)), Place(plans=tmp_path / "p"))
    assert site.library.built["timing"] == b"+"


def changed(**what: Any) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        for name, value in what.items():
            setattr(site.cuda, name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(names=(b"NVIDIA RTX A5000",)),
        changed(sm=(8, 9)),
        changed(driver=13010),
        lambda site: setattr(site.library, "__version__", "1.8.0"),
    ],
    ids=["gpu", "sm", "driver", "library"],
)
def test_any_other_part_of_the_key_builds_anew(tmp_path: Path, change: Callable[[Site], None]) -> None:
    site = Site()
    serve(site, tmp_path / "p")
    change(site)
    assert serve(site, tmp_path / "p").notes == ()
    assert site.library.builds == 2
    gpus = {json.loads(path.read_text())["key"]["gpu"] for path in files(tmp_path / "p", "json")}
    assert len(files(tmp_path / "p", "plan")) == len(gpus)  # a stale one of the same GPU is gone


def test_the_driver_s_own_version_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version"
    monkeypatch.setattr(cuda, "DRIVER_VERSION", version)
    site = Site()
    for text, builds in (("580.65.06\n", 1), ("580.65.06\n", 1), ("580.95.05\n", 2)):
        version.write_text(text)
        serve(site, tmp_path / "p")
        assert site.library.builds == builds


def test_another_graph_or_profile_or_setting_builds_anew(tmp_path: Path) -> None:
    from dicom_node.runtime.tensorrt_build import Settings

    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    site.open(model_of(graph_bytes(other=1)), Place(plans=folder))
    assert (site.library.builds, len(files(folder, "plan"))) == (2, 2)
    site.open(place=Place(plans=folder, max_batch={"classifier": 8}))
    assert (site.library.builds, len(files(folder, "plan"))) == (3, 2)
    site.open(place=Place(plans=folder, max_batch={"classifier": 8}), settings=Settings(level=5))
    assert (site.library.builds, len(files(folder, "plan"))) == (4, 2)


def test_a_size_that_the_graph_leaves_open_is_part_of_the_key(tmp_path: Path) -> None:
    """Two packages with one graph, whose golden cases have other sizes."""
    site, graph = Site(), graph_bytes(inputs={"x": [-1, 1, -1, -1]})
    for builds, size in ((1, 4), (2, 8), (3, 4)):
        session = site.open(model_of(graph, shapes={"x": (1, size, size)}), Place(plans=tmp_path / "p"))
        assert (session.notes, site.library.builds) == ((), builds)


def plan_of(folder: Path) -> Path:
    (path,) = files(folder, "plan")
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def hard_link(path: Path) -> None:
    os.link(path, path.parent.parent / "elsewhere")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def chown(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, -1)


def swap_record(path: Path) -> None:
    """A plan of another graph, whole, with its own record."""
    record = json.loads(path.with_suffix(".json").read_text())
    record["key"]["graph"] = "f" * 64
    path.with_suffix(".json").write_text(json.dumps(record))


def promise(size: int) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        record = json.loads(path.with_suffix(".json").read_text())
        record["plan"]["bytes"] = size
        path.with_suffix(".json").write_text(json.dumps(record))

    return change


def bad_record(text: str) -> Callable[[Path], Any]:
    return lambda path: path.with_suffix(".json").write_text(text)


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        (flip, "its bytes are not those that were recorded"),
        (lambda path: os.truncate(path, 10), "its bytes are not those that were recorded"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "its bytes are not those that were recorded"),
        (link, "it is a link"),
        (hard_link, "it is no plain file of its own"),
        (fifo, "it is no plain file of its own"),
        (chown, "it belongs to another user or is open to others"),
        (lambda path: path.chmod(0o620), "it belongs to another user or is open to others"),
        (lambda path: path.chmod(0o602), "it belongs to another user or is open to others"),
        (lambda path: path.with_suffix(".json").chmod(0o666), "it belongs to another user or is open to others"),
        (swap_record, "its record is another plan's"),
        (promise(10**30), "its bytes are not those that were recorded"),
        (promise(1 << 50), "its bytes are not those that were recorded"),
        (promise(-5), "its bytes are not those that were recorded"),
        (bad_record("{"), "its record is damaged"),
        (bad_record("[1]"), "its record is damaged"),
        (bad_record("[" * 50_000), "its record is damaged"),
    ],
)
def test_a_poisoned_plan_is_never_loaded_but_built_again(
    tmp_path: Path, poison: Callable[[Path], Any], said: str
) -> None:
    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    poison(plan_of(folder))
    before = len(site.library.loads)
    session = serve(site, folder)
    assert session.notes == (f"model classifier: plan cache: a plan was refused and is built again ({said})",) or (
        said == "it is a link" and said in session.notes[0]
    )
    assert site.library.builds == 2
    (loaded,) = site.library.loads[before:]
    assert json.loads(loaded)["serial"] == 2
    assert serve(site, folder).notes == () and site.library.builds == 2  # healed


def test_what_cannot_even_be_removed_is_told_and_never_loaded(tmp_path: Path) -> None:
    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    folder_instead(plan_of(folder))
    for builds in (2, 3):
        notes = " ".join(serve(site, folder).notes)
        assert "it is no plain file" in notes or builds == 3  # its record is gone by then
        assert "cannot be removed" in notes and "cannot be kept" in notes and site.library.builds == builds


@pytest.mark.parametrize("suffix", ["plan", "json"])
def test_half_of_a_pair_is_what_a_crash_leaves_and_is_built_again(tmp_path: Path, suffix: str) -> None:
    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    files(folder, suffix)[0].unlink()
    assert serve(site, folder).notes == () and site.library.builds == 2


def test_a_whole_plan_with_its_record_under_another_name_is_not_looked_at(tmp_path: Path) -> None:
    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    old = plan_of(folder)
    for suffix in (".plan", ".json"):
        old.with_suffix(suffix).rename(folder / f"{'0' * 64}{suffix}")
    serve(site, folder)
    assert site.library.builds == 2


def test_a_plan_that_the_library_does_not_take_is_built_again_once(tmp_path: Path) -> None:
    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    site.library.unloadable = {1}
    session = serve(site, folder)
    assert "not compatible with this version" in session.notes[0] and site.library.builds == 2
    site.library.unloadable = {2, 3}
    with pytest.raises(BackendError, match="does not take the plan"):
        site.open(place=Place(plans=folder))
    assert site.library.builds == 3 and site.cuda.left() == 0
    assert files(folder, "plan") == []  # and the next start is not asked to try it again
    site.library.unloadable = set()
    serve(site, folder)
    assert site.library.builds == 4


def test_a_poisoned_timing_cache_only_makes_a_build_slower(tmp_path: Path) -> None:
    site, folder = Site(VERSIONS[1]), tmp_path / "p"
    serve(site, folder)
    (timing,) = (p for p in files(folder, "plan") if b"+" in p.read_bytes()[:1])
    flip(timing)
    session = site.open(model_of(graph_bytes(other=1)), Place(plans=folder))
    assert "refused" in session.notes[0] and site.library.built["timing"] == b""


def test_the_timing_cache_is_not_read_while_another_engine_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all graphs, which load side by side: half of a pair would be told as somebody else's work."""
    folder, site, write, notes = tmp_path / "p", Site(VERSIONS[1]), Plans._write, list[Any]()
    serve(site, folder)
    place = Place(plans=folder)
    beside = threading.Thread(
        target=lambda: notes.append(Site(VERSIONS[1]).open(model_of(graph_bytes(other=2)), place).notes)
    )

    def slowly(self: Plans, name: str, data: bytes) -> None:
        write(self, name, data)
        if data == b"++" and beside.ident is None:
            beside.start()
            time.sleep(0.4)

    monkeypatch.setattr(Plans, "_write", slowly)
    notes.append(site.open(model_of(graph_bytes(other=1)), place).notes)
    beside.join()
    assert notes == [(), ()]


def test_a_timing_cache_of_another_machine_is_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(VERSIONS[0])
    monkeypatch.setattr(Plans, "get", lambda self, key: b"other machine" if key.parts["kind"] == "timing" else None)
    serve(site, tmp_path / "p")
    assert site.library.built["timing"] == b""


# -- the folder


def test_without_a_folder_every_start_builds() -> None:
    site = Site()
    for builds in (1, 2):
        assert site.open().notes == ()
        assert site.library.builds == builds


def test_a_folder_that_was_open_to_others_is_emptied(tmp_path: Path) -> None:
    site, folder = Site(), tmp_path / "p"
    serve(site, folder)
    folder.chmod(0o770)
    session = serve(site, folder)
    assert "open to others" in session.notes[0] and site.library.builds == 2
    assert folder.stat().st_mode & 0o777 == 0o700
    assert serve(site, folder).notes == () and site.library.builds == 2


def test_a_folder_that_is_not_ours_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        site = Site()
        assert "not used, plans are built at every start" in serve(site, tmp_path / name).notes[0]
        assert list((tmp_path / "real").iterdir()) == []
    monkeypatch.setattr(plans.os, "geteuid", lambda: 4711)
    assert "belongs to another user" in serve(Site(), tmp_path / "real").notes[0]


def test_a_full_disk_costs_the_next_start_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plans.os, "fsync", full)
    session = serve(Site(), tmp_path / "p")
    assert session.notes == ("model classifier: plan cache: a plan cannot be kept (No space left on device)",)
    assert {path.suffix for path in (tmp_path / "p").iterdir()} == {".lock"}


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    cache = Plans(tmp_path / "p")
    keys = [Key({"graph": str(i)}) for i in range(5)]
    for i, key in enumerate(keys[:3]):
        cache.put(key, b"plan")
        os.utime(tmp_path / "p" / f"{key.digest}.plan", (i, i))
    assert cache.get(keys[0]) == b"plan"  # used: now the youngest
    for key in keys[3:]:
        cache.put(key, b"plan")
    assert [i for i, key in enumerate(keys) if cache.get(key)] == [0, 3, 4]
    cache.close()


def test_what_a_crashed_writer_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    cache = Plans(tmp_path / "p")
    old, young = tmp_path / "p" / ".a.part", tmp_path / "p" / ".b.part"
    for path in (old, young):
        path.touch()
    os.utime(old, (1, 1))
    cache.put(KEY, b"plan")
    assert (old.exists(), young.exists()) == (False, True)
    cache.close()


# -- builders at the same time


def test_workers_that_start_together_build_one_plan(tmp_path: Path) -> None:
    sites = [Site() for _ in range(3)]
    for site in sites:
        site.library.step_seconds = 0.05
    threads = [threading.Thread(target=serve, args=(site, tmp_path / "p")) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(site.library.builds for site in sites) == 1
    assert all(len(site.library.loads) == 1 for site in sites)


def test_different_graphs_build_at_the_same_time(tmp_path: Path) -> None:
    held, free = Key({"graph": "1"}), Key({"graph": "2"})
    first, second = Plans(tmp_path / "p"), Plans(tmp_path / "p")
    with first.lock(held, 1.0), second.lock(free, 0.0):
        pass
    with (
        first.lock(held, 1.0),
        pytest.raises(BackendError, match="another worker builds this plan"),
        second.lock(held, 0.3),
    ):
        raise AssertionError
    with second.lock(held, 0.0):
        pass
    first.close()
    second.close()


def _hold(folder: str, ready: Any) -> None:
    with Plans(Path(folder)).lock(KEY, 1.0):
        ready.set()
        time.sleep(60)


def test_a_builder_that_dies_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    builder = context.Process(target=_hold, args=(str(tmp_path / "p"), ready))
    builder.start()
    assert ready.wait(60)
    cache = Plans(tmp_path / "p")
    with pytest.raises(BackendError), cache.lock(KEY, 0.0):
        raise AssertionError
    builder.kill()
    builder.join()
    with cache.lock(KEY, 1.0):
        cache.put(KEY, b"plan")
    assert cache.get(KEY) == b"plan"
    cache.close()


def test_the_node_chooses_it_and_tells_of_a_poisoned_plan(tmp_path: Path) -> None:
    """Through acceptance as the worker does it: right answers are accepted, and what the cache says is not lost."""

    def start() -> Tried:
        found = choose(
            [model], tiny_engine.arrays()["golden"], "classifier", tiny_judge,
            (site.backend(), OnnxBackend()), Place(plans=folder),
        )  # fmt: skip
        for session in found.sessions.values():
            session.close()
        return next(tried for tried in found.tried if tried.backend == "tensorrt_rtx")

    model = tiny_model()
    model = replace(model, digests={name: hashlib.sha256(data).hexdigest() for name, data in model.graphs.items()})
    site, folder = Site(), tmp_path / "p"
    site.library.network = json.loads(graph_bytes(outputs={"logits": [-1, 2], "features": [-1, 3, 4, 4]}))
    site.library.computes = lambda given: dict(
        zip(("logits", "features"), tiny_engine.answers(given["x"]), strict=True)
    )
    first = start()
    assert (first.status, first.reason, first.notes, first.version) == ("accepted", "", (), "1.7.1.116")
    flip(plan_of(folder))
    second = start()
    assert second.status == "accepted" and site.library.builds == 2
    assert "a plan was refused and is built again" in second.notes[0]
    site.library.computes = lambda given: truth(given) | {"logits": truth(given)["logits"] + 0.01}
    assert (start().status, site.cuda.left()) == ("refused", 0)


def test_no_configuration_names_a_plan() -> None:
    """A plan is executable: neither config.yaml, engine.yaml nor a manifest has a place for one."""
    from dicom_node.config import Config
    from dicom_node.packages import Manifest, Task

    for model in (Config, Manifest, Task):
        said = json.dumps(model.model_json_schema()).lower()
        assert '"plan"' not in said and "plan_file" not in said and '"plans"' not in said


def test_the_backend_takes_no_plan_from_a_package() -> None:
    """Bytes that are a whole plan, in place of a graph: parsed as a graph or refused, never loaded."""
    built = Site()
    built.open()
    site = Site()
    with pytest.raises((BackendError, KeyError)):
        site.open(model_of(built.library.loads[0]))
    assert site.library.loads == []
