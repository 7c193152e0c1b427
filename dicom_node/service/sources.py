"""What `dicom-node check` says of the sources of clinical values: it goes there and asks, for nobody."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.fhir import FhirSource
from dicom_node.clinical.sidecar import SidecarFolder
from dicom_node.config_clinical import Clinical, Fhir
from dicom_node.errors import ClinicalSourceError

SHOWN = 5


def check_sources(section: Clinical) -> Iterator[tuple[str, str, str]]:
    """Level, about, text."""
    codes = CodeMap(section.codes, section.sites)
    if section.fhir is not None:
        yield from _token(section.fhir)
        try:
            yield "ok", "clinical.fhir", FhirSource(section.fhir, codes).check()
        except ClinicalSourceError as e:
            yield "error", "clinical.fhir", f"{e.code}: {e}"
    if section.sidecar is not None:
        yield from _sidecar(section.sidecar, codes)


def _token(section: Fhir) -> Iterator[tuple[str, str, str]]:
    if section.token_file is None:
        yield "note", "clinical.fhir.token_file", "none: the server is asked without credentials"
        return
    try:
        mode = section.token_file.stat().st_mode
    except OSError:
        return  # the question itself will say so
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        text = f"{section.token_file} is open to other users (mode {stat.S_IMODE(mode):o}): chmod 600"
        yield "warning", "clinical.fhir.token_file", text


def _sidecar(path: Path, codes: CodeMap) -> Iterator[tuple[str, str, str]]:
    folder = SidecarFolder(path, codes)
    try:
        invalid = folder.invalid()
    except ClinicalSourceError as e:
        yield "error", "clinical.sidecar", f"{e.code}: {path}: {e}"
        return
    yield "ok", "clinical.sidecar", f"{len(folder) - len(invalid)} valid files in {path}"
    for text in invalid[:SHOWN]:
        yield "warning", "clinical.sidecar", text
    if len(invalid) > SHOWN:
        yield "warning", "clinical.sidecar", f"and {len(invalid) - SHOWN} more files that are no sidecars"
