"""Tasks and model packages: untrusted input until every step has passed; the step that failed is named."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_engine
import yaml

from dicom_node import packages
from dicom_node.config import Config, Engines, Store
from dicom_node.errors import PackageError
from dicom_node.packages import acceptance
from dicom_node.service.operate import engines_text

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return tiny_engine.write_package(tmp_path / "1")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as its author would: digests of files are not made again."""
    path = folder / "manifest.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))  # the copy has no shared parts, so no aliases


# -- a good one


def test_a_package_is_read_whole(package: Path) -> None:
    loaded = packages.load_package(package)
    assert loaded.digest == hashlib.sha256((package / "manifest.yaml").read_bytes()).hexdigest()
    np.testing.assert_array_equal(loaded.head_weights, tiny_engine.W)
    np.testing.assert_array_equal(loaded.ood_precision, np.diag([1.0, 2.0, 4.0]))
    assert loaded.read("models/classifier/fp32.onnx") == tiny_engine.GRAPH.read_bytes()
    assert not loaded.golden["classifier.x"].flags.writeable


def test_the_shipped_tasks_and_their_packages_load() -> None:
    found = packages.find_tasks([REPOSITORY / "engines"])
    assert "renal_ceus" in found
    for folder in found.values():
        task = packages.load_task(folder)
        if (folder / "model").is_dir():
            assert packages.load_package(folder / "model").manifest.task == task.task.task


# -- what is refused


def tamper(folder: Path) -> None:
    data = bytearray((folder / "models/classifier/fp32.onnx").read_bytes())
    data[100] ^= 1
    (folder / "models/classifier/fp32.onnx").write_bytes(data)


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere.npz"
    (folder / "head.npz").rename(target)
    (folder / "head.npz").symlink_to(target)


def link_folder(folder: Path) -> None:
    target = folder.parent / "models"
    (folder / "models").rename(target)
    (folder / "models").symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tamper, "fp32.onnx is not the file .*SHA-256"),
        (lambda f: (f / "golden.npz").write_bytes(b""), "golden.npz is not .* bytes long"),
        (lambda f: (f / "golden.npz").open("ab").write(b"x"), "golden.npz is not .* bytes long"),
        (lambda f: (f / "head.npz").unlink(), "head.npz cannot be read"),
        (lambda f: (f / "extra.onnx").write_bytes(b""), "extra.onnx is a file the manifest does not list"),
        (lambda f: (f / "models/more.onnx").write_bytes(b""), "models/more.onnx is a file the manifest does not list"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is a link or no plain file"),
        (link_out, "head.npz is a link"),
        (link_folder, "models is a link"),
        (lambda f: (f / "manifest.yaml").unlink(), "manifest.yaml cannot be read"),
        (lambda f: (f / "manifest.yaml").write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda f: (f / "manifest.yaml").write_text("a: [1"), "not YAML"),
        (lambda f: (f / "manifest.yaml").write_text("[" * 100_000), "nested too deeply|not YAML"),
        (lambda f: (f / "manifest.yaml").write_text("#" * (2 << 20)), "larger than 1 MB"),
        (lambda f: (f / "manifest.yaml").write_text("a: &x [1]\nb: *x"), "aliases are not allowed"),
        (lambda f: (f / "manifest.yaml").open("a").write("version: '2'\n"), "written twice"),
        (lambda f: (f / "manifest.yaml").write_text("a: !!python/object/apply:os.abort []"), "not YAML"),
        (lambda f: (f / "manifest.yaml").write_text("- 1"), "manifest.yaml: .*dictionary"),
    ],
)
def test_files_that_are_not_what_the_manifest_says_are_refused(
    package: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(package)
    with pytest.raises(PackageError, match=said):
        packages.load_package(package)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(unknown=1), "unknown"),
        (lambda m: m["files"].update({"../outside.npz": m["files"]["head.npz"]}), "files"),
        (lambda m: m["files"].update({"a/../b.npz": m["files"]["head.npz"]}), "names stay inside"),
        (lambda m: m["files"].update({"/etc/passwd.txt": m["files"]["head.npz"]}), "files"),
        (lambda m: m["files"].update({"weights.pt": m["files"]["head.npz"]}), "a package holds"),
        (lambda m: m["files"].update({"models/classifier/fp32.plan": m["files"]["head.npz"]}), "a package holds"),
        (lambda m: m["files"].pop("ood.npz"), "ood.npz is missing"),
        (lambda m: m["models"].update({"../x": m["models"]["classifier"]}), "models"),
        (lambda m: m.update(version="../../x"), "version"),
        (lambda m: m.update(positive="other"), "positive"),
        (lambda m: m["ood"].update(limit=float("nan")), "ood.limit"),
        (lambda m: m["ood"].update(limit=float("inf")), "ood.limit"),
        (lambda m: m["calibration"].update(T=0), "calibration.T"),
        (lambda m: m["calibration"].update(method="none"), "T: 1 where the method is none"),
        (lambda m: m["models"]["classifier"]["tolerance"].update(fp32=10), "tolerance.fp32"),
        (lambda m: m["models"]["classifier"].update(tolerance={}), "tolerance for fp32"),
        (lambda m: m["explain"].update(vmin=2.0), "vmin < vmax"),
        (lambda m: m["explain"].update(model="other"), "explain.model"),
        (lambda m: m["decision"]["abstain"].update(lower=0.6), "abstain.lower <= threshold"),
        (lambda m: m["files"]["head.npz"].update(bytes=3 << 30), "files.head.npz.bytes"),
        (lambda m: m.update(files={f"{n}.txt": m["files"]["head.npz"] for n in range(65)} | m["files"]), "at most 64"),
    ],
)
def test_manifests_that_would_switch_a_gate_off_are_refused(
    package: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(package, change)
    with pytest.raises(PackageError, match=said):
        packages.load_package(package)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": {"W": np.zeros((2, 4))}}, "do not fit"),
        ({"head": {"W": np.zeros((3, 3))}}, "do not fit"),
        ({"head": {"b": None}}, "head.npz holds W and b"),
        ({"head": {"W": np.array([["a"]])}}, "head.npz holds W and b"),
        ({"ood": {"mean": np.zeros(4)}}, "do not fit"),
        ({"ood": {"mean": np.array([0, np.nan, 0])}}, "not finite"),
        ({"ood": {"precision": -np.eye(3)}}, "not positive definite"),
        ({"ood": {"precision": np.zeros((3, 3))}}, "not positive definite"),
        ({"ood": {"precision": np.array([[1.0, 5, 0], [0, 1, 0], [0, 0, 1]])}}, "not symmetric"),
        ({"head": {"W": np.array([[{"a": 1}]], dtype=object)}}, "holds no plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PackageError, match=said):
        packages.load_package(tiny_engine.write_package(tmp_path / "1", **changes))


def bomb() -> bytes:
    """A few megabytes that unpack to half a gigabyte and more."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("W.npy", "w") as member,
    ):
        for _ in range(33):
            member.write(bytes(16 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda: b"no zip", "no plain arrays"), (lambda: b"PK\x03\x04", "no plain arrays"), (bomb, "unpacks")],
)
def test_array_files_that_are_none_are_refused(package: Path, make: Callable[[], bytes], said: str) -> None:
    (package / "head.npz").write_bytes(make())
    tiny_engine.write_manifest(package, tiny_engine.MANIFEST)
    with pytest.raises(PackageError, match=said):
        packages.load_package(package)


def test_a_file_exchanged_after_loading_is_not_used(package: Path) -> None:
    loaded = packages.load_package(package)
    tamper(package)
    with pytest.raises(PackageError, match="SHA-256"):
        loaded.read("models/classifier/fp32.onnx")
    with pytest.raises(PackageError, match="lists no"):
        loaded.read("../1/head.npz")


# -- signature


@pytest.fixture
def site_key(tmp_path: Path) -> Any:
    """A private key whose public half the site trusts."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/site-key.pub").write_bytes(base64.b64encode(key.public_key().public_bytes_raw()) + b"\n")
    return key


def test_a_signed_package_is_accepted(package: Path, site_key: Any, tmp_path: Path) -> None:
    tiny_engine.write_manifest(package, tiny_engine.MANIFEST, sign_with=site_key)
    assert packages.load_package(package, keys=tmp_path / "keys").manifest.signature is not None


def appended(text: str) -> str:
    """A second, unsigned statement after the signed part."""
    return text + "provenance: {note: unsigned}\n"


def inline(text: str) -> str:
    return text.replace("version: '1'", "version: '2'", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (inline, "signature does not fit"),
        (appended, "must be the last block"),
        (lambda t: t.replace("site-key", "other-key"), "key other-key, which is not among"),
        (lambda t: t.replace("site-key", "../site-key"), "signature.key_id"),
        (lambda t: t.replace("sig: ", "sig: AAAA"), "signature does not fit"),
        (lambda t: t[: t.index("signature:")], "not signed"),
    ],
)
def test_what_is_not_signed_is_not_believed(
    package: Path, site_key: Any, tmp_path: Path, change: Callable[[str], str], said: str
) -> None:
    tiny_engine.write_manifest(package, tiny_engine.MANIFEST, sign_with=site_key)
    path = package / "manifest.yaml"
    path.write_text(change(path.read_text()))
    with pytest.raises(PackageError, match=said):
        packages.load_package(package, keys=tmp_path / "keys")


# -- tasks and the active package


def test_the_first_folder_of_the_path_wins_and_missing_ones_are_passed_over(tmp_path: Path) -> None:
    site, shipped = tmp_path / "site", tmp_path / "shipped"
    for place in (site, shipped):
        tiny_engine.write_task(place, "", package=False)
    tiny_engine.write_task(shipped, "", "second", package=False)
    (shipped / "training").mkdir()
    found = packages.find_tasks([tmp_path / "absent", site, shipped])
    assert found == {"tiny": site / "tiny", "second": shipped / "second"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "other"}, "folder's name is its identity"),
        ({"paired": "perhaps"}, "engine.yaml: paired"),
        ({"libraries": ["os.path; import x"]}, "engine.yaml: libraries"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = tiny_engine.write_task(tmp_path, "", package=False)
    (folder / "engine.yaml").write_text(yaml.safe_dump(tiny_engine.TASK | changes))
    with pytest.raises(PackageError, match=said):
        packages.load_task(folder)


def test_a_task_without_code_is_refused(tmp_path: Path) -> None:
    folder = tiny_engine.write_task(tmp_path, "", package=False)
    (folder / "engine.py").unlink()
    with pytest.raises(PackageError, match=r"engine\.py is missing"):
        packages.load_task(folder)


def installed(root: Path, version: str, folder: str | None = None) -> Path:
    return tiny_engine.write_package(root / "models/tiny" / (folder or version), {"version": version})


def test_the_marker_chooses_the_package_and_the_demonstration_one_is_the_fallback(tmp_path: Path) -> None:
    task = packages.load_task(tiny_engine.write_task(tmp_path / "engines", ""))
    root = tmp_path / "root"
    assert packages.active_package(task, root).folder == task.folder / "model"
    installed(root, "2")
    installed(root, "3")
    assert packages.active_package(task, root).manifest.version == "1"  # installed is not active
    (root / "models/tiny/active").write_text("3\n")
    assert packages.active_package(task, root).manifest.version == "3"


@pytest.mark.parametrize("marker", ["9", "..", "../../engines/tiny/model", "", "\n"])
def test_a_marker_that_names_no_installed_version_is_refused(tmp_path: Path, marker: str) -> None:
    """Never silently the demonstration package in place of the site's own."""
    task = packages.load_task(tiny_engine.write_task(tmp_path / "engines", ""))
    installed(tmp_path, "2")
    (tmp_path / "models/tiny/active").write_text(marker)
    with pytest.raises(PackageError, match="is not installed"):
        packages.active_package(task, tmp_path)


def test_a_package_of_another_task_or_version_is_refused(tmp_path: Path) -> None:
    task = packages.load_task(tiny_engine.write_task(tmp_path / "engines", ""))
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/active").write_text("2")
    installed(tmp_path, "7", folder="2")
    with pytest.raises(PackageError, match="says version 7"):
        packages.active_package(task, tmp_path)
    shutil.rmtree(tmp_path / "models/tiny/2")
    tiny_engine.write_package(tmp_path / "models/tiny/2", {"version": "2", "task": "other"})
    with pytest.raises(PackageError, match="made for other, not for tiny"):
        packages.active_package(task, tmp_path)


# -- shown


def test_engines_list_tells_what_is_there_and_what_is_wrong(tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    tiny_engine.write_task(engines, "")
    tiny_engine.write_task(engines, "", "needs_much", libraries=["no_such_library_here"])
    tamper(tiny_engine.write_task(engines, "", "broken") / "model")
    config = Config(engines=Engines(path=(engines,)), store=Store(root=tmp_path / "var"))
    told = {line["task"]: line for line in packages.engines_list(config)}
    good = told["tiny"]
    assert (good["available"], good["version"], good["intended_use"]) == (True, "1", "demonstration")
    assert good["backends"]["tensorrt"] == "not executed by us"
    assert good["metrics"] == {"test": {"auc": 0.9}}
    assert told["needs_much"]["reason"] == "not available: install no_such_library_here"
    assert not told["broken"]["available"]
    assert "SHA-256" in told["broken"]["reason"]


def test_engines_list_shows_the_table_of_the_last_worker(tmp_path: Path) -> None:
    tiny_engine.write_task(tmp_path / "engines", "")
    tiny_engine.write_task(tmp_path / "engines", "", "refused")
    (tmp_path / "var").mkdir()
    line = {"model": "classifier", "backend": "onnx", "precision": "fp32", "cases": 3, "worst": 0.0, "tolerance": 1e-3}
    tried = [
        {"backend": name, "precision": "fp32", "version": "1", "status": status, "reason": reason,
         "lines": [line] if status == "accepted" else [], "notes": [], "load_seconds": 0.1, "milliseconds": 2.0}
        for name, status, reason in (
            ("tensorrt", "not tried", "what served before"), ("tensorrt_rtx", "refused", "no memory"),
            ("cuda", "not here", "no CUDA device"), ("openvino", "excluded", "it hung"), ("onnx", "accepted", ""),
        )
    ]  # fmt: skip
    serving = {
        "error": "", "version": "1", "digest": "a" * 64, "intended_use": "demonstration", "algorithm": "Tiny",
        "backend": "onnx", "precision": "fp32", "library": "1.31", "accepted": [line], "tried": tried, "seconds": 1.0,
    }  # fmt: skip
    acceptance.write(
        tmp_path / "var", {"tiny": {"at": 5.0, **serving}, "refused": {"at": 6.0, "error": "golden replay: off"}}
    )
    config = Config(engines=Engines(path=(tmp_path / "engines",)), store=Store(root=tmp_path / "var"))
    told = {line["task"]: line for line in packages.engines_list(config)}
    backends = told["tiny"]["backends"]
    assert backends["onnx"] == "in use, fp32 (accepted: fp32)"
    assert backends["openvino"] == "excluded: it hung"
    assert backends["cuda"] == "not executed by us; not here: no CUDA device"
    assert backends["tensorrt_rtx"] == "refused: no memory"
    assert backends["tensorrt"] == "not executed by us; not tried: what served before"
    assert told["tiny"]["acceptance"]["tried"] == tried
    schema = (Path(__file__).parents[1] / "docs/schemas/engines-list.v1.schema.json").read_text()
    jsonschema.validate(list(told.values()), json.loads(schema))
    assert {t["status"] for t in tried} == set(acceptance.STATUSES)
    assert (told["refused"]["available"], told["refused"]["acceptance"]["error"]) == (True, "golden replay: off")
    text = engines_text(list(told.values()))
    assert "3 golden cases, worst 0.0e+00 of 1.0e-03 allowed: ok" in text
    assert "golden replay: off" in text


def test_an_unsigned_package_is_not_available_where_signatures_are_required(tmp_path: Path) -> None:
    tiny_engine.write_task(tmp_path / "engines", "")
    config = Config(
        engines=Engines(path=(tmp_path / "engines",), require_signature=True), store=Store(root=tmp_path / "var")
    )
    (told,) = packages.engines_list(config)
    assert (told["available"], told["reason"]) == (False, "model: not signed, and engines.require_signature is true")
