"""The tables of docs/routing.md, made from the data they describe, so that the page cannot drift.

`python -m dicom_node.route.tables docs/routing.md` writes them between their markers; a test compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from dicom_node.route import body_part, terms

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def render(page: str) -> str:
    """The page with every marked table written anew. Raises KeyError for an unknown table name."""
    tables = {"weights": weights, "codes": codes, "presets": presets, "words": words, "others": others}
    return _MARKED.sub(lambda m: f"{m[1]}{tables[m[2]]()}{m[3]}", page)


def weights() -> str:
    """The classes of evidence, strongest first."""
    read = {
        "anatomic code": body_part.ANATOMY_SEQUENCES,
        "procedure code": body_part.PROCEDURE_SEQUENCES,
        "series words": body_part.SERIES_TEXT,
        "study words": dict.fromkeys((*body_part.STUDY_TEXT, *body_part.STEP_TEXT)),
        "image type": ("ImageType value 3, modality US",),
        "body part examined": ("BodyPartExamined",),
        "region": ("a region code, ImageType value 3 or BodyPartExamined that fits several organs",),
    }
    rows = [(kind, str(weight), ", ".join(read[kind])) for kind, weight in body_part.WEIGHTS.items()]
    return _table(("class", "weight", "read from"), rows)


def codes() -> str:
    """Codes by body part."""
    columns = (terms.ANATOMY, terms.PROCEDURES, terms.REGIONS)
    rows = [(part, *(_values_of(part, table) for table in columns)) for part in _parts()]
    return _table(("body part", "anatomic code", "procedure code", "region code"), rows)


def presets() -> str:
    """Image Type value 3 and Body Part Examined."""
    rows = []
    for part in _parts():
        named = (terms.IMAGE_TYPES, terms.BODY_PART_TERMS)
        fits = (terms.IMAGE_TYPE_REGIONS, terms.BODY_PART_REGIONS)
        stands = [", ".join(k for k, v in table.items() if v == part) for table in named]
        region = ", ".join(k for table in fits for k, v in table.items() if part in v)
        rows.append((part, *stands, region))
    return _table(("body part", "ImageType value 3", "BodyPartExamined", "regions that fit"), rows)


def words() -> str:
    """Words of descriptions by body part."""
    groups = {**terms.WORDS, terms.ELSEWHERE: terms.WORDS_ELSEWHERE}
    rows = [(part, ", ".join(group)) for part, group in groups.items()]
    return _table(("body part", "words"), rows)


def others() -> str:
    """Words with another effect."""
    rows = [
        ("the examination is of another kind: no body part", terms.WORDS_EXCLUDED),
        ("overlooked, so that their parts name no organ", terms.WORDS_BLANKED),
        ("with contrast", terms.CONTRAST_WORDS),
        ("with and without, so with", terms.CONTRAST_BOTH),
        ("without contrast", terms.NO_CONTRAST_WORDS),
        ("overlooked for contrast", terms.CONTRAST_BLANKED),
    ]
    return _table(("effect", "words"), [(effect, ", ".join(group)) for effect, group in rows])


def _parts() -> tuple[str, ...]:
    return (*terms.BODY_PARTS, terms.ELSEWHERE)


def _values_of(part: str, table: Mapping[tuple[str, str], frozenset[str]]) -> str:
    return ", ".join(f"{value} {scheme}" for (value, scheme), stands in table.items() if part in stands)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") or " " for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(render(target.read_text(encoding="utf-8")), encoding="utf-8")
