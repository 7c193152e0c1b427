"""Clinical values from a FHIR R4 server: Patient by identifier and system, then Observation by code.

Searches are sent by POST, so that Patient ID stands in no URL and no proxy's log. An answer is believed only as far
as it can be checked here: the patient's identifier and birth date, the subject and status of each Observation. Bounded
in time and size; nothing is followed to another server.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from dicom_node.clinical.codes import CodeMap, side_of
from dicom_node.clinical.http import Connection, open_connection
from dicom_node.clinical.identity import Subject
from dicom_node.clinical.model import ClinicalCode, CodeKey, Gathered, Observation, problem
from dicom_node.clinical.times import moment
from dicom_node.config_clinical import Fhir
from dicom_node.errors import ClinicalSourceError

ABOUT = "FHIR"
MAX_PAGES = 5
COUNT = 100
SYSTEMS = {"LN": "http://loinc.org", "SCT": "http://snomed.info/sct", "UCUM": "http://unitsofmeasure.org"}
_SCHEMES = {uri: scheme for scheme, uri in SYSTEMS.items()}
_STATUSES = "final,amended,corrected"
"""Preliminary, cancelled and entered-in-error results are no results."""
Json = Mapping[str, Any]


class FhirSource:
    """One server."""

    def __init__(self, section: Fhir, codes: CodeMap) -> None:
        self._section, self._codes = section, codes

    def ask(self, subject: Subject, wanted: Iterable[CodeKey], days: float) -> Gathered:
        """What the server holds of the patient, `days` around the images. Raises ClinicalSourceError."""
        system = self._section.identifier_systems.get(subject.issuer)
        if not subject.patient_id or system is None:
            what = "no Patient ID" if not subject.patient_id else "an Issuer of Patient ID that the configuration lacks"
            return _nothing(ClinicalCode.CLINICAL_PATIENT_UNKNOWN, f"the study has {what}")
        codes = self._codes.asked_as(wanted)
        return asyncio.run(self._bounded(lambda c: self._values(c, subject, system, codes, days)))

    def check(self) -> str:
        """Ask for nobody: reachable, FHIR R4, our token accepted, search by POST. Raises ClinicalSourceError."""
        return asyncio.run(self._bounded(self._check))

    async def _bounded(self, work: Any) -> Any:
        """A hard limit: a server that sends a byte now and then never trips a time-out between bytes."""
        try:
            async with asyncio.timeout(self._section.timeout_seconds), open_connection(self._section) as connection:
                return await work(connection)
        except OSError as e:
            if not isinstance(e, TimeoutError):  # while the connection closes: the answer was not complete
                text = f"the connection broke ({type(e).__name__})"
                raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, text, again=True) from None
            text = f"no answer within {self._section.timeout_seconds:g} s"
            raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, text, again=True) from None

    async def _check(self, connection: Connection) -> str:
        said = await connection.get("metadata")
        version = str(said.get("fhirVersion", ""))[:16]
        if said.get("resourceType") != "CapabilityStatement" or not version.startswith("4."):
            raise _invalid(f"metadata is not a CapabilityStatement of FHIR R4 (fhirVersion {version or 'absent'})")
        system = next(iter(self._section.identifier_systems.values()))
        _entries(await connection.search("Patient", {"identifier": f"{system}|dicom-node-check", "_count": "1"}))
        return f"FHIR {version}, searches by POST are answered"

    async def _values(
        self, connection: Connection, subject: Subject, system: str, codes: Iterable[CodeKey], days: float
    ) -> Gathered:
        patient = await self._patient(connection, subject, system)
        if isinstance(patient, Gathered):
            return patient
        query: dict[str, str | list[str]] = {
            "patient": patient,
            "code": ",".join(f"{SYSTEMS.get(scheme, scheme)}|{_escaped(value)}" for value, scheme in codes),
            "status": _STATUSES,
            "_sort": "-date",
            "_count": str(COUNT),
        }
        if subject.images is not None:
            around = timedelta(days=math.ceil(days) + 1)
            first, last = subject.images - around, subject.images + around
            query["date"] = [f"ge{first:%Y-%m-%d}", f"le{last:%Y-%m-%d}"]
        found: list[Observation] = []
        bundle = await connection.search("Observation", query)
        for _ in range(MAX_PAGES):
            for resource in _entries(bundle):
                if _is_of(resource, patient):
                    found += _observations(resource, self._codes)
            link = _next(bundle)
            if link is None:
                return Gathered(tuple(found))
            bundle = await connection.follow(link)
        raise _invalid(f"more than {MAX_PAGES} pages of Observations")

    async def _patient(self, connection: Connection, subject: Subject, system: str) -> str | Gathered:
        """The logical id of the one patient; else why there is none."""
        identifier = f"{system}|{_escaped(subject.patient_id)}"
        query = {"identifier": identifier, "_elements": "identifier,birthDate,active,link", "_count": "5"}
        bundle = await connection.search("Patient", query)
        patients = [p for p in _entries(bundle) if p.get("resourceType") == "Patient" and p.get("active") is not False]
        if not patients:
            return _nothing(ClinicalCode.CLINICAL_PATIENT_UNKNOWN, "the server has no such patient")
        if len(patients) > 1 or _next(bundle) is not None:
            return _nothing(
                ClinicalCode.CLINICAL_PATIENT_AMBIGUOUS, "the server has several patients of that identifier"
            )
        (patient,) = patients
        held = {(i.get("system"), i.get("value")) for i in _list(patient, "identifier")}
        born = str(patient.get("birthDate", ""))
        if (system, subject.patient_id) not in held:
            return _nothing(ClinicalCode.CLINICAL_PATIENT_MISMATCH, "the server's patient has another identifier")
        if subject.birth_date and born and not subject.birth_date.startswith(born[:10]):
            return _nothing(ClinicalCode.CLINICAL_PATIENT_MISMATCH, "the server's patient has another birth date")
        logical = str(patient.get("id", ""))
        if not 0 < len(logical) <= 64 or not all(c.isalnum() or c in "-." for c in logical):
            raise _invalid("a Patient without a usable id")
        return logical


def _observations(resource: Json, codes: CodeMap) -> Iterator[Observation]:
    """An Observation, or each component of one (a panel, a Doppler measurement)."""
    if resource.get("status") not in _STATUSES.split(","):
        return
    time = _time(resource)
    site, side = _site(resource, codes)
    for part in (resource, *_list(resource, "component")):
        quantity = part.get("valueQuantity")
        if not isinstance(quantity, dict):
            continue
        value = _finite(quantity.get("value"))
        if value is None:
            continue
        unit = str(quantity.get("code", "")) if quantity.get("system") == SYSTEMS["UCUM"] else ""
        named = {codes.quantity(key) for key in _codings(part.get("code"))}
        for name in sorted(named, key=lambda n: n.code):
            yield Observation(
                code=name.code,
                value=value,
                unit=(name.unit or unit)[:32],
                side=side or name.side,
                time=time,
                site=site,
                origin="fhir",
                source=ABOUT,
                inexact="comparator" in quantity,
            )


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _time(resource: Json) -> str:
    """When it was taken, not when it was written down. A period counts by its end; a month is no day."""
    period = resource.get("effectivePeriod")
    said = resource.get("effectiveDateTime") or resource.get("effectiveInstant")
    if said is None and isinstance(period, dict):
        said = period.get("end") or period.get("start")
    text = str(said or "")[:40]
    return text if moment(text) is not None else ""


def _site(resource: Json, codes: CodeMap) -> tuple[CodeKey, str]:
    """Body site, and the side: a coding of its own, or one that `clinical.sites` names."""
    sides, sites = set[str](), list[CodeKey]()
    for key in _codings(resource.get("bodySite")):
        if side := side_of(key):
            sides.add(side)
            continue
        site, side = codes.site(key)
        sites.append(site)
        sides |= {side} - {""}
    return (sites[0] if sites else ("", "")), (sides.pop() if len(sides) == 1 else "")


def _codings(concept: object) -> Iterator[CodeKey]:
    if isinstance(concept, dict):
        for coding in _list(concept, "coding"):
            system = str(coding.get("system", ""))
            yield str(coding.get("code", ""))[:64], _SCHEMES.get(system, system)[:256]


def _is_of(resource: Json, patient: str) -> bool:
    """The server may answer anything: only the patient's own count."""
    subject = resource.get("subject")
    reference = str(subject.get("reference", "")) if isinstance(subject, dict) else ""
    named = reference.split("/_history/")[0].split("/")[-2:]
    return resource.get("resourceType") == "Observation" and named == ["Patient", patient]


def _entries(bundle: Json) -> list[Json]:
    if bundle.get("resourceType") != "Bundle":
        raise _invalid(f"{str(bundle.get('resourceType', 'no FHIR resource'))[:32]} in place of a Bundle")
    resources = [e["resource"] for e in _list(bundle, "entry") if isinstance(e.get("resource"), dict)]
    return [r for r in resources if r.get("resourceType") != "OperationOutcome"]


def _next(bundle: Json) -> str | None:
    return next((str(li["url"]) for li in _list(bundle, "link") if li.get("relation") == "next" and "url" in li), None)


def _list(value: Json, key: str) -> list[dict[str, Any]]:
    found = value.get(key)
    return [v for v in found if isinstance(v, dict)] if isinstance(found, list) else []


def _escaped(value: str) -> str:
    """R4 3.1.1.4.1.1: `,`, `|`, `$` and `\\` of a parameter's value."""
    return "".join(f"\\{c}" if c in "\\,|$" else c for c in value)


def _nothing(code: ClinicalCode, text: str) -> Gathered:
    return Gathered(problems=(problem(code, ABOUT, text),))


def _invalid(text: str) -> ClinicalSourceError:
    return ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_INVALID, text, again=False)
