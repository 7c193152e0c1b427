"""The side of the body an instance shows, from its header. Never defaulted: silence and conflict both give "".

Order of strength: image, frame, series, anatomic region modifier, text. Texts are matched, never repeated: the note
names attributes only (a description may hold a name).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from dicom_node.study import Header

_MODIFIERS = {  # PS3.16 CID 244, and the retired SRT codes that older modalities still send
    "24028007": "R", "7771000": "L", "51440002": "B",
    "G-A100": "R", "G-A101": "L", "G-A102": "B",
}  # fmt: skip
_SERIES_TEXTS = ("SeriesDescription", "ProtocolName", "BodyPartExamined", "PerformedProcedureStepDescription")
_STUDY_TEXTS = ("StudyDescription", "RequestedProcedureDescription")

_NOT_A_SIDE = re.compile(  # "rule out", "with/without", and quadrants of the abdomen say nothing about a paired organ
    r"\b[rcw]/o\b|\b(?:right|left)\s+(?:upper|lower)\s+quadrant\b"
)
_SIDES = {
    "R": re.compile(
        r"\b(?:r|rt|right|dx|dex|dext|dexter|dextra|destr[ao]|rechts|rechte[rnsm]?|droite?|derech[ao]|direit[ao])\b"
        r"|\bre(?=\.|$|\))|\bправ\w+|右"
    ),
    # "sin" is Latin for left and Spanish for without: only where nothing can follow that one is without.
    "L": re.compile(
        r"\b(?:l|lt|left|sinister|sinistr[ao]|links|linke[rnsm]?|gauche|izquierd[ao]|esquerd[ao])\b"
        r"|\b(?:sin|li)(?=\.|$|\))|\bлев(?:ая|ый|ой|ого|ое|ую)\b|左"
    ),
    "B": re.compile(
        r"\b(?:bilat|bilateral\w*|both|beide\w*|beidseit\w*|bds|bdsts|bilatéra\w*|ambos|entramb[ei])\b"
        r"|\b(?:оба|обе|обеих|двусторонн\w*)\b|双侧|雙側|両側|两侧|兩側"
    ),
}


def laterality(header: Header) -> tuple[str, str]:
    """("R" | "L" | "B" | "", note). The note says why the side is unknown, or from where it is known."""
    said = list(_explicit(header))
    said += _texts(header, _SERIES_TEXTS)
    # A bilateral examination holds images of one side: the study's "both" does not contradict the image's "left".
    said += [(key, side) for key, side in _texts(header, _STUDY_TEXTS) if not (said and side == "B")]
    if not said:
        return "", "no attribute states the side"
    sides = {side for _, side in said}
    if len(sides) > 1:
        return "", "conflict: " + ", ".join(f"{key} says {side}" for key, side in said)
    key, side = said[0]
    if side == "U":
        return "", f"{key} says unpaired"
    return side, f"from {key}"


def _explicit(header: Header) -> Iterator[tuple[str, str]]:
    yield from _term("ImageLaterality", header.text("ImageLaterality"), "RLUB")
    for groups in header.items_of("SharedFunctionalGroupsSequence")[:1]:
        for anatomy in groups.items_of("FrameAnatomySequence")[:1]:
            yield from _term("FrameLaterality", anatomy.text("FrameLaterality"), "RLUB")
    yield from _term("FrameLaterality", header.text("FrameLaterality"), "RLUB")
    yield from _term("Laterality", header.text("Laterality"), "RLB")
    for region in header.items_of("AnatomicRegionSequence")[:1]:
        for modifier in region.items_of("AnatomicRegionModifierSequence"):
            side = _MODIFIERS.get(modifier.text("CodeValue"))
            if side and modifier.text("CodingSchemeDesignator") in ("SCT", "SRT", "SNM3", "99SDM"):
                yield "AnatomicRegionModifierSequence", side


def _term(key: str, value: str, allowed: str) -> Iterator[tuple[str, str]]:
    value = value.strip().upper()
    if len(value) == 1 and value in allowed:
        yield key, value


def _texts(header: Header, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    found = ((key, side_of_text(header.text(key))) for key in keys)
    return [(key, side) for key, side in found if side]


def side_of_text(text: str) -> str:
    """ "R", "L", "B" or "" of one description; a text that names both sides is bilateral."""
    text = _NOT_A_SIDE.sub(" ", unicodedata.normalize("NFKC", text).casefold().replace("_", " ")).strip()
    sides = {side for side, pattern in _SIDES.items() if pattern.search(text)}
    if "B" in sides or len(sides) > 1:
        return "B"
    return sides.pop() if sides else ""
