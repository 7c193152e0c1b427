"""Clinical values from JSON files in a folder, for a laboratory system that can write files and no DICOM.

A file says which study (Study Instance UID or Accession Number) and which patient; it counts only where both are the
study's. File names mean nothing: a value of the wire never becomes part of a path, so the files are read and compared.
Write under another name (not `*.json`) and rename: a file that is half written is an invalid one.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.identity import Subject
from dicom_node.clinical.model import ClinicalCode, Gathered, Observation, problem
from dicom_node.clinical.times import moment
from dicom_node.errors import ClinicalSourceError

MAX_FILES = 5000
MAX_FILE_BYTES = 256 * 1024
ABOUT = "sidecar"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class SidecarCode(_Strict):
    value: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Annotated[str, Field(min_length=1, max_length=64)]


class SidecarValue(_Strict):
    """One measurement."""

    code: SidecarCode
    """As in engine.yaml, or one of `clinical.codes`: LOINC is LN, SNOMED CT is SCT."""
    value: float
    unit: Annotated[str, Field(min_length=1, max_length=32)]
    """UCUM."""
    time: Annotated[str, Field(min_length=10, max_length=40)]
    """ISO 8601: a day, or a date and time with or without an offset."""
    laterality: Literal["R", "L"] | None = None
    site: SidecarCode | None = None
    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,31}$")] | None = None
    """The system it is from, for the report. No patient data."""

    @field_validator("time")
    @classmethod
    def _a_day(cls, text: str) -> str:
        if moment(text) is None:
            raise ValueError("ISO 8601 with at least a day")
        return text


class Sidecar(_Strict):
    """Clinical values of one study (docs/schemas/sidecar.v1.schema.json)."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    study_instance_uid: Annotated[str, Field(pattern=r"^[0-9.]{1,64}$")] | None = None
    accession_number: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    patient_id: Annotated[str, Field(min_length=1, max_length=64)]
    issuer_of_patient_id: Annotated[str, Field(max_length=64)] | None = None
    patient_birth_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    values: Annotated[tuple[SidecarValue, ...], Field(min_length=1, max_length=200, strict=False)]

    @model_validator(mode="after")
    def _of_a_study(self) -> Sidecar:
        if self.study_instance_uid is None and self.accession_number is None:
            raise ValueError("study_instance_uid or accession_number")
        return self


@dataclass(frozen=True, slots=True)
class _Read:
    """A file as it was when it was read."""

    stamp: tuple[int, int, int]
    content: Sidecar | None
    """None = not a sidecar; `why` says so."""
    why: str = ""


class SidecarFolder:
    """Keeps what it has read while the files stay the same. Used by one thread."""

    def __init__(self, folder: Path, codes: CodeMap) -> None:
        self._folder, self._codes = folder, codes
        self._known: dict[str, _Read] = {}

    def ask(self, subject: Subject) -> Gathered:
        """What the files say of the study. Raises ClinicalSourceError where the folder cannot be read."""
        self._refresh()
        observations: list[Observation] = []
        problems: list[str] = []
        for read in self._known.values():
            if read.content is None or not _of_study(read.content, subject):
                continue
            if _of_patient(read.content, subject):
                observations += [self._observation(v) for v in read.content.values]
            else:
                text = "a file of this study names another patient"
                problems.append(problem(ClinicalCode.CLINICAL_PATIENT_MISMATCH, ABOUT, text))
        return Gathered(tuple(observations), tuple(dict.fromkeys(problems)))

    def invalid(self) -> list[str]:
        """Files that are no sidecars and why, for `check`: names of files are the operator's own."""
        self._refresh()
        return [f"{name}: {read.why}" for name, read in sorted(self._known.items()) if read.content is None]

    def __len__(self) -> int:
        return len(self._known)

    def _refresh(self) -> None:
        known: dict[str, _Read] = {}
        for entry in self._files():
            try:
                stamp = _stamp(entry.stat(follow_symlinks=False))
            except OSError:
                continue  # renamed or removed while we look
            before = self._known.get(entry.name)
            known[entry.name] = before if before and before.stamp == stamp else _read(Path(entry.path))
        self._known = known

    def _files(self) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._folder) as entries:
                found = [e for e in entries if e.name.endswith(".json") and e.is_file(follow_symlinks=False)]
        except OSError as e:
            text = f"the folder cannot be read ({e.strerror})"
            raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, text, again=True) from None
        if len(found) > MAX_FILES:
            text = f"the folder holds more than {MAX_FILES} files"
            raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_INVALID, text, again=False)
        yield from sorted(found, key=lambda e: e.name)

    def _observation(self, value: SidecarValue) -> Observation:
        quantity = self._codes.quantity((value.code.value, value.code.scheme))
        site, side = (("", ""), "")
        if value.site is not None:
            site, side = self._codes.site((value.site.value, value.site.scheme))
        return Observation(
            code=quantity.code,
            value=value.value,
            unit=quantity.unit or value.unit,
            side=value.laterality or side or quantity.side,
            time=value.time,
            site=site,
            origin="sidecar",
            source=f"sidecar ({value.source})" if value.source else "sidecar",
        )


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> _Read:
    """Opened once, without following a link; judged by what was opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        return _Read((0, 0, 0), None, f"cannot be opened ({e.strerror})")
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        stamp = _stamp(status)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            return _Read(stamp, None, f"not a file of at most {MAX_FILE_BYTES} bytes")
        raw = file.read(MAX_FILE_BYTES + 1)
    try:
        return _Read(stamp, Sidecar.model_validate(json.loads(raw)))
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        return _Read(stamp, None, f"{where or 'file'}: {first['msg'].removeprefix('Value error, ')}")
    except (ValueError, RecursionError):
        return _Read(stamp, None, "not JSON")


def _of_study(sidecar: Sidecar, subject: Subject) -> bool:
    """By both where the file names both."""
    keys = [(sidecar.study_instance_uid, subject.study_uid), (sidecar.accession_number, subject.accession_number)]
    return all(bool(theirs) and ours == theirs for ours, theirs in keys if ours is not None)


def _of_patient(sidecar: Sidecar, subject: Subject) -> bool:
    """Patient ID; issuer and birth date where both sides name them."""
    both = ((sidecar.issuer_of_patient_id, subject.issuer), (sidecar.patient_birth_date, subject.birth_date))
    return sidecar.patient_id == subject.patient_id and all(a == b for a, b in both if a and b)


def schema() -> dict[str, Any]:
    """JSON Schema of a file; docs/schemas/sidecar.v1.schema.json is this, written down."""
    made = Sidecar.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "sidecar.v1.schema.json",
        **json.loads(re.sub(r"\s*\\n\s*", " ", json.dumps(made))),
        "anyOf": [{"required": ["study_instance_uid"]}, {"required": ["accession_number"]}],
    }
