"""What routing knows of a study: the values of every series, looked up once and shared by all routes. No decisions.

Our own objects that came back are not part of the study here: they would establish indications for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Final, TypeAlias

from dicom_node.result import ClinicalInput
from dicom_node.route import body_part, contrast
from dicom_node.route.body_part import BodyPartVerdict, codes
from dicom_node.route.contrast import ContrastVerdict
from dicom_node.route.terms import Codes
from dicom_node.study import Header, Instance, Series, Study, is_own_output

Fact: TypeAlias = str | int | float
NESTED: Final = ("RequestAttributesSequence", "ReferencedRequestSequence", "ReferencedStudySequence")
"""Where an attribute of the request or the study is looked for when it is not at the top level."""


def lookup(header: Header, keyword: str) -> tuple[Fact, ...]:
    """All values of one attribute; the items of a code sequence as "value|scheme"; () when absent."""
    if found := _flat(header, keyword):
        return found
    items = (item for sequence in NESTED for item in header.items_of(sequence))
    return tuple(v for item in items for v in _flat(item, keyword))


def _flat(header: Header, keyword: str) -> tuple[Fact, ...]:
    value = header.values_.get(keyword)
    if value is None:
        return ()
    if not isinstance(value, tuple):
        return (value,) if value != "" else ()
    if items := [v for v in value if isinstance(v, Header)]:
        return tuple(codes(items)) or ("(sequence)",)  # present, but nothing that could be compared
    return tuple(v for v in value if not isinstance(v, Header) and v != "")


class SeriesFacts:
    """One series: values of any of its instances."""

    def __init__(self, number: int, series: Series, site_codes: Codes) -> None:
        self.number, self.series, self._site_codes = number, series, site_codes
        self._values: dict[str, tuple[Fact, ...]] = {}

    def values(self, key: str) -> tuple[Fact, ...]:
        """Distinct values of a DICOM keyword, of `modality`, `calling_ae` or `called_ae`."""
        if key not in self._values:
            found = (v for i in self.series.instances for v in _of_instance(i, key))
            self._values[key] = tuple(dict.fromkeys(found))
        return self._values[key]

    @cached_property
    def body_part(self) -> BodyPartVerdict:
        return body_part.judge(self.series, self._site_codes)

    @cached_property
    def contrast(self) -> ContrastVerdict:
        return contrast.judge(self.series)


def _of_instance(instance: Instance, key: str) -> tuple[Fact, ...]:
    if key == "calling_ae":
        return (instance.calling_ae_title.strip(),) if instance.calling_ae_title.strip() else ()
    if key == "called_ae":
        return (instance.called_ae_title.strip(),) if instance.called_ae_title.strip() else ()
    return lookup(instance.header, "Modality" if key == "modality" else key)


class StudyFacts:
    """One study without our own objects. `number` of a series counts from 1 in the study's order."""

    def __init__(self, study: Study, clinical: Mapping[str, ClinicalInput], site_codes: Codes | None = None) -> None:
        self.clinical = clinical
        kept = ((n, _foreign(series)) for n, series in enumerate(study.series, start=1))
        self.series = tuple(SeriesFacts(n, s, site_codes or {}) for n, s in kept if s.instances)

    def values(self, key: str) -> tuple[Fact, ...]:
        """Distinct values over all series."""
        return tuple(dict.fromkeys(v for s in self.series for v in s.values(key)))

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(i for s in self.series for i in s.series.instances)


def _foreign(series: Series) -> Series:
    kept = tuple(i for i in series.instances if not is_own_output(i.header))
    return series if len(kept) == len(series.instances) else Series(series.series_instance_uid, kept)
