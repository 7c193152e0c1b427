"""What the stages ask: which values of a study a task can use, and whether anybody outside is to be asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dicom_node.clinical.codes import CodeMap
from dicom_node.clinical.judge import codes_of, collect, is_age
from dicom_node.clinical.model import CodeKey, Collected, Gathered, Wanted
from dicom_node.clinical.units import Ucum
from dicom_node.config_clinical import Clinical
from dicom_node.result import ClinicalInput
from dicom_node.study import Study


class ClinicalValues:
    """`wanted_of` gives a task's entries. `gathered`: `Gathered.to_json()` of the job; None = nobody was asked."""

    def __init__(self, wanted_of: Callable[[str], Sequence[Wanted]], section: Clinical | None = None) -> None:
        self._wanted_of, self._ucum = wanted_of, Ucum()
        self._section = section or Clinical()
        self._codes = CodeMap(self._section.codes, self._section.sites)

    def for_engine(self, study: Study, engine: str, gathered: Mapping[str, Any] | None = None) -> Collected:
        """By `ClinicalInput.key`."""
        outside = Gathered.from_json(gathered)
        wanted = self._wanted_of(engine)
        return collect(study, wanted, self._ucum, outside, codes=self._codes, priority=self._section.priority)

    def known(
        self, study: Study, engines: Iterable[str], gathered: Mapping[str, Any] | None = None
    ) -> Mapping[str, ClinicalInput]:
        """By name, over all engines: for conditions of routes, which name no side."""
        each = [self.for_engine(study, engine, gathered) for engine in dict.fromkeys(engines)]
        return {v.name: v for found in each for v in found.values.values()}

    def asks(self, engine: str) -> bool:
        """True where a source outside the study may have a value for the engine."""
        outside = self._section.sidecar is not None or self._section.fhir is not None
        return outside and bool(self._asked(engine))

    def question(self, engines: Iterable[str]) -> tuple[tuple[CodeKey, ...], float]:
        """The codes to ask for, and how many days around the images."""
        entries = [entry for engine in dict.fromkeys(engines) for entry in self._asked(engine)]
        codes = dict.fromkeys(code for entry in entries for code in sorted(codes_of(entry)))
        return tuple(codes), max((entry.max_age_days for entry in entries), default=0.0)

    def _asked(self, engine: str) -> list[Wanted]:
        return [entry for entry in self._wanted_of(engine) if not is_age(entry)]
