"""The sentences that stand in the objects and on the pictures. Light: imports nothing."""

from __future__ import annotations

from typing import Final

DEMONSTRATION_MARK: Final = "TRAINED ON SIMULATED IMAGES - NOT A PATIENT RESULT"
RESEARCH_MARK: Final = "Research use only. Not for clinical use."
NOT_ANATOMY: Final = "Shows influence on the score, not anatomy."
_LO = 64
"""Characters of one LO value (PS3.5 table 6.2-1)."""


def mark_of(intended_use: str) -> str:
    """What every object says of its intended use; "" only for a clinical package."""
    return {"demonstration": DEMONSTRATION_MARK, "clinical": ""}.get(intended_use, RESEARCH_MARK)


def series_description(title: str, intended_use: str) -> str:
    """The mark first, so that no viewer's narrow column cuts it; then as many words of the title as LO holds."""
    mark = mark_of(intended_use)
    words = f"{mark.removesuffix('.')}: {title}" if mark else title
    if len(words) <= _LO:
        return words
    return words[: _LO + 1].rpartition(" ")[0].rstrip(" :-") or words[:_LO]
