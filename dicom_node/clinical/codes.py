"""Codes of sources to the codes that tasks are written in: retired SNOMED identifiers, and the site's own map.

Meanings are never compared (PS3.3 8.8). Standard codes are not overruled: the map is for codes that it names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dicom_node.clinical.model import CodeKey
from dicom_node.config_clinical import PrivateCode, PrivateSite

RIGHT, LEFT = ("24028007", "SCT"), ("7771000", "SCT")
_RETIRED = frozenset({"SRT", "SNM3", "99SDM"})
"""SNOMED RT identifiers, as equipment still writes them (PS3.16 annex O)."""


def canonical(value: str, scheme: str) -> CodeKey:
    """SNOMED RT as SNOMED CT, by DICOM's own table; anything else as it is."""
    value, scheme = value.strip(), scheme.strip()
    if scheme in _RETIRED:
        from pydicom.sr._snomed_dict import mapping  # the table behind pydicom's equality of codes

        known = mapping["SRT"].get(value)
        return (known, "SCT") if known else (value, scheme)
    return value, scheme


def side_of(code: CodeKey) -> str:
    """R or L, for the qualifier values of laterality."""
    return {RIGHT: "R", LEFT: "L"}.get(code, "")


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a concept name stands for."""

    code: CodeKey
    unit: str = ""
    side: str = ""


class CodeMap:
    """`clinical.codes` and `clinical.sites` of config.yaml."""

    def __init__(self, codes: Iterable[PrivateCode] = (), sites: Iterable[PrivateSite] = ()) -> None:
        self._codes = {((c.code.value, c.code.scheme), (c.model or "").casefold()): c for c in codes}
        self._sites = {(s.code.value, s.code.scheme): s for s in sites}

    def quantity(self, code: CodeKey, model: str = "") -> Quantity:
        """`model`: Manufacturer's Model Name of the report; an entry for a model goes before one for any."""
        key = (code[0].strip(), code[1].strip())
        entry = self._codes.get((key, model.strip().casefold())) or self._codes.get((key, ""))
        if entry is None:
            return Quantity(canonical(*key))
        return Quantity(canonical(entry.means.value, entry.means.scheme), entry.unit or "", entry.laterality or "")

    def site(self, code: CodeKey) -> tuple[CodeKey, str]:
        """The body site, and the side where the code names that too."""
        entry = self._sites.get((code[0].strip(), code[1].strip()))
        if entry is None:
            return canonical(*code), ""
        return canonical(entry.means.value, entry.means.scheme), entry.laterality or ""

    def names_site(self, code: CodeKey) -> bool:
        """Whether a container of this name is named by its anatomy: SNOMED, or a code that the site's own map knows."""
        return canonical(*code)[1] == "SCT" or (code[0].strip(), code[1].strip()) in self._sites

    def asked_as(self, codes: Iterable[CodeKey]) -> tuple[CodeKey, ...]:
        """The codes to ask a server for: those given, and what the site calls them (entries for any model)."""
        wanted = tuple(dict.fromkeys(codes))
        own = [
            key
            for (key, model), entry in self._codes.items()
            if not model and canonical(entry.means.value, entry.means.scheme) in wanted
        ]
        return (*wanted, *own)
