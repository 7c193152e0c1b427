"""The section `phases` of config.yaml: how the contrast phases of dynamic MR are found and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from dicom_node.config_base import Section

PhaseName: TypeAlias = Literal["pre", "arterial", "portal venous", "delayed", "hepatobiliary"]
PRE: PhaseName = "pre"
ARTERIAL: PhaseName = "arterial"
PORTAL: PhaseName = "portal venous"
DELAYED: PhaseName = "delayed"
HEPATOBILIARY: PhaseName = "hepatobiliary"
ORDER: tuple[PhaseName, ...] = (PRE, ARTERIAL, PORTAL, DELAYED, HEPATOBILIARY)

Seconds: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Window: TypeAlias = tuple[Seconds, Seconds]
_WINDOWS: Mapping[PhaseName, Window] = {
    PRE: (-7200.0, 0.0), ARTERIAL: (15.0, 50.0), PORTAL: (55.0, 100.0), DELAYED: (120.0, 330.0),
    HEPATOBILIARY: (600.0, 1800.0),
}  # fmt: skip


def _beside_the_usual(value: Any) -> Any:
    """A site writes the windows it changes."""
    return {**_WINDOWS, **value} if isinstance(value, Mapping) else value


class Rules(Section):
    """What a site may set; the stack's notes say what it did set. Also the `rules` of `pixels.dynamic.plan`."""

    windows: Annotated[dict[PhaseName, Window], BeforeValidator(_beside_the_usual)] = Field(dict(_WINDOWS))
    """Seconds after the injection, after LI-RADS' terms. What is written beats them, unless it contradicts them."""
    words: dict[PhaseName, tuple[str, ...]] = Field({})
    """A site's own words for the phases in Series Description, beside the usual ones."""
    arm_to_liver_seconds: float = Field(25.0, gt=0, le=120)
    """From the injection to the first arterial phase, where the bolus start is not written."""
    minimum_slices: int = Field(20, ge=1)
    """A group of fewer slice positions is a localiser, a test bolus or a stray picture, and is left out."""
    maximum_tr_ms: float = Field(10.0, gt=0, le=1000)
    """Spoiled gradient echo of a breath-hold; in-phase and opposed-phase 2D series have ten times as much."""

    @model_validator(mode="after")
    def _sound(self) -> Rules:
        _check_windows(self.windows)
        low, high = self.windows[ARTERIAL]
        if not low <= self.arm_to_liver_seconds <= high:
            raise ValueError(f"arm_to_liver_seconds: inside the arterial window, {low:g} to {high:g} s")
        _check_words(self.words)
        return self


def _check_windows(windows: Mapping[PhaseName, Window]) -> None:
    """In the order of time and apart, or a phase would have two names and the first would win by chance."""
    for name in ORDER:
        low, high = windows[name]
        if low >= high:
            raise ValueError(f"windows: {name}: the earlier second first, not {low:g} to {high:g}")
    if windows[PRE][1] > 0:
        raise ValueError("windows: pre: ends at 0 at the latest, the injection")
    if windows[ARTERIAL][0] < 0:
        raise ValueError("windows: arterial: begins at 0 at the earliest, the injection")
    for earlier, later in pairwise(ORDER):
        if windows[later][0] < windows[earlier][1]:
            raise ValueError(f"windows: {later}: begins after {earlier} ends, at {windows[earlier][1]:g} s")


def _check_words(words: Mapping[PhaseName, tuple[str, ...]]) -> None:
    """Descriptions are read as runs of letters, so another word would never be found."""
    used: dict[str, PhaseName] = {}
    for name, own in words.items():
        for word in own:
            folded = word.casefold()
            if not folded or folded != " ".join(re.findall(r"[^\W\d_]+", folded)):
                raise ValueError(f"words: {name}: letters with single blanks between, not {word!r}")
            if used.setdefault(folded, name) != name:
                raise ValueError(f"words: {name}: {word!r} already means {used[folded]}")
