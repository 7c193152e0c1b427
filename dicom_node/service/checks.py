"""`dicom-node check`: everything that can be said about a configuration before a study depends on it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dicom_node import packages
from dicom_node.config import Config, Tls
from dicom_node.pixels.decode import available_decoders
from dicom_node.pixels.dynamic_model import ORDER
from dicom_node.route import check_routes
from dicom_node.runtime import backends
from dicom_node.service.sources import check_sources

NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph", "glusterfs"})
WAL_RESET_FIXED = (3, 51, 3)
Finding = tuple[str, str, str]


def check(config: Config) -> tuple[dict[str, Any], int]:
    """The answer (docs/schemas/check) and the exit code: 0 = no warning and no error."""
    check_routes(config.routes, "config.yaml")
    found = [*_store(config), *_decoders(), *_tls(config), *_engines(config), *_clinical(config), *_phases(config)]
    found += [*_runtime(config), *check_sources(config.clinical), *_unbuilt(config)]
    ok = not any(level in ("warning", "error") for level, _, _ in found)
    findings = [{"level": level, "about": about, "text": text} for level, about, text in found]
    return {"ok": ok, "findings": findings}, 0 if ok else 1


def _store(config: Config) -> Iterator[Finding]:
    root = config.store.root
    existing = next(p for p in (root, *root.parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        yield "error", "store.root", f"{existing} is not writable for this user"
    kind = _file_system(existing)
    if kind in NETWORK_FILE_SYSTEMS:
        yield "error", "store.root", f"lies on {kind}: the durability promise and the ledger need a local disk"
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize / 1e9
    level = "ok" if free > 2 * config.store.min_free_gb else "warning"
    yield level, "store.min_free_gb", f"{free:.1f} GB free, {config.store.min_free_gb:g} GB kept as a reserve"
    if sqlite3.sqlite_version_info < WAL_RESET_FIXED:
        text = f"{sqlite3.sqlite_version}: older than 3.51.3; safe here, because one connection writes"
        yield "note", "SQLite", text


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, from /proc/self/mounts; "" where that cannot be told."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    holding = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda m: len(m[0]))[1] if holding else ""


def _decoders() -> Iterator[Finding]:
    for syntax, plugin in available_decoders().items():
        yield ("ok" if plugin else "error"), "decoder", f"{syntax}: {plugin or 'none is installed'}"


def _tls(config: Config) -> Iterator[Finding]:
    sections: dict[str, Tls | None] = {"receive.tls": config.receive.tls}
    sections["query.tls"] = None if config.query is None else config.query.tls
    sections |= {f"deliver.destinations.{n}.tls": d.tls for n, d in config.deliver.destinations.items()}
    for name, section in sections.items():
        if section is None:
            continue
        for key in ("cert", "key", "ca"):
            path: Path = getattr(section, key)
            if not os.access(path, os.R_OK):
                yield "error", f"{name}.{key}", f"{path} cannot be read"


def _engines(config: Config) -> Iterator[Finding]:
    known = {engine["task"]: engine for engine in packages.engines_list(config)}
    for route in config.routes:
        engine = known.get(route.engine)
        if engine is None:
            yield "error", f"route {route.name}", f"no task {route.engine} under engines.path"
        elif not engine["available"]:
            yield "error", f"route {route.name}", f"{route.engine} is not available: {engine['reason']}"
        else:
            text = f"{route.engine} {engine['version']} ({engine['intended_use']}), {route.mode}"
            yield "ok", f"route {route.name}", text
            if engine["intended_use"] == "demonstration" and route.mode == "live":
                yield from _withheld(config, route.name, route.deliver)


def _withheld(config: Config, route: str, names: tuple[str, ...]) -> Iterator[Finding]:
    for name in names:
        if not config.deliver.destinations[name].takes_demonstration:
            text = (
                f"results for {name} are withheld: the package is for demonstration, and {name} is neither "
                "loopback nor has accept_demonstration: true"
            )
            yield "warning", f"route {route}", text


def _runtime(config: Config) -> Iterator[Finding]:
    """Which backends can be tried here; a worker then holds each to the golden answers."""
    named = config.infer.runtime
    here: dict[str, bool] = {}
    for backend in backends.known(named):
        here[backend.name] = here.get(backend.name, False) or not (why := backend.missing())
        if why and named != "auto":
            yield "note", "infer.runtime", f"{backend.name} {backend.precision}: {why}"
    usable = ", ".join(name for name, is_here in here.items() if is_here)
    if named not in ("auto", "onnx") and not any(is_here for name, is_here in here.items() if name != "onnx"):
        yield "warning", "infer.runtime", f"{named} is not on this machine: the reference, onnx, serves instead"
    else:
        yield "ok", "infer.runtime", f"{named}: can be tried here: {usable}"


def _clinical(config: Config) -> Iterator[Finding]:
    """A route that asks for a value which no engine collects would wait for ever, and the sender look slow."""
    wanted = packages.wanted_of(config.engines.path)
    known = {entry.name.casefold() for route in config.routes for entry in wanted(route.engine)}
    for route in config.routes:
        asked = [*route.require.clinical]
        for matcher in (*route.indication.any, *route.indication.all):
            value = matcher.get("clinical", [])
            asked += [value] if isinstance(value, str) else [str(v) for v in value] if isinstance(value, list) else []
        for name in sorted({name for name in asked if name.casefold() not in known}):
            yield "error", f"route {route.name}", f"no engine of the routes collects a clinical value {name}"


def _phases(config: Config) -> Iterator[Finding]:
    """A phase that no rule names is never found: such a route would never run."""
    for route in config.routes:
        for name in route.require.phases:
            if name.casefold() not in ORDER:
                yield "error", f"route {route.name}", f"require.phases: one of {', '.join(ORDER)}, not {name}"


def _unbuilt(config: Config) -> Iterator[Finding]:
    """Keys that this version reads and does not yet act on: said loudly, never ignored in silence."""
    if config.infer.devices != "auto":
        yield "error", "infer.devices", f"{config.infer.devices} is not in this version: auto, which is the first GPU"
    for name, destination in config.deliver.destinations.items():
        if destination.commitment:
            yield "error", f"destination {name}", "storage commitment is not in this version: commitment: false"
