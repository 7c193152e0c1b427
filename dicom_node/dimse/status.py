"""C-STORE statuses: what we answer as SCP, and what a peer's answer means to us as SCU. Tables only, no I/O.

`SCP_STATUSES` is PS3.4 table B.2-1 and PS3.7 annex C as this node uses them; the conformance statement is generated
from it. `classify` is the one place that decides what a status means for a delivery. The receive and the deliver side
share this file so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SUCCESS = 0x0000
MALFORMED_UID = 0x0117
SOP_CLASS_NOT_SUPPORTED = 0x0122
NOT_AUTHORISED = 0x0124
OUT_OF_RESOURCES = 0xA700
DATA_SET_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0xC211
"""Our own code within PS3.4's 0xCxxx range: the request handler met an error it does not know; nothing was stored."""


@dataclass(frozen=True, slots=True)
class ScpStatus:
    """One status this node returns for C-STORE."""

    code: int
    meaning: str
    when: str
    offending_element: bool = False
    """Offending Element (0000,0901) names the tag to blame, where there is one."""


SCP_STATUSES: tuple[ScpStatus, ...] = (
    ScpStatus(SUCCESS, "Success", "the instance is on stable storage: fsync of the file and of its folder are done"),
    ScpStatus(
        OUT_OF_RESOURCES,
        "Refused: Out of resources",
        "free space below store.min_free_gb, too many instances not indexed yet, a write refused by the file system "
        "(send again later); or an instance larger than receive.max_instance_mb (the association is aborted after it)",
    ),
    ScpStatus(
        DATA_SET_MISMATCH,
        "Error: Data Set does not match SOP Class",
        "SOP Class UID or SOP Instance UID differs from the command, or a Study, Series or SOP UID is missing",
        offending_element=True,
    ),
    ScpStatus(
        CANNOT_UNDERSTAND,
        "Error: Cannot understand",
        "the data set cannot be walked within the bounds (length beyond the end, depth > 32, > 100000 items)",
        offending_element=True,
    ),
    ScpStatus(
        PROCESSING_FAILURE, "Error: Cannot understand", "an unexpected error in the request handler; nothing was stored"
    ),
    ScpStatus(
        MALFORMED_UID,
        "Invalid Object Instance",
        "a UID is longer than 64 characters or not of digits and dots (leading zeros are tolerated)",
        offending_element=True,
    ),
    ScpStatus(SOP_CLASS_NOT_SUPPORTED, "SOP Class not supported", "normally prevented by negotiation"),
    ScpStatus(NOT_AUTHORISED, "Not authorised", "the peer may not store here"),
)

ERROR_COMMENT_LENGTH = 64
"""Error Comment (0000,0902) is LO."""


class Outcome(StrEnum):
    """What a delivery does next."""

    DELIVERED = "DELIVERED"
    """The peer has it (a warning counts: PS3.7 annex C says the operation was performed)."""
    RETRY = "RETRY"
    """Transient: back off and try again, for days."""
    PAUSE = "PAUSE"
    """The destination as a whole does not take us: pause it, alert, probe; objects stay pending."""
    LIMITED = "LIMITED"
    """Unclear: a few tries over a day, then DEAD."""
    DEAD = "DEAD"
    """This object will never be taken as it is."""


_EXACT = {
    SUCCESS: Outcome.DELIVERED,
    0x0111: Outcome.DELIVERED,  # duplicate SOP Instance: it is there already
    0x0001: Outcome.DELIVERED,  # PS3.7 annex C: 0001, 0107, 0116 and Bxxx are of class Warning
    0x0107: Outcome.DELIVERED,
    0x0116: Outcome.DELIVERED,
    MALFORMED_UID: Outcome.DEAD,
    SOP_CLASS_NOT_SUPPORTED: Outcome.PAUSE,
    0x0112: Outcome.PAUSE,  # printed for 0122 in the PS3.2 template: some peers send it
    NOT_AUTHORISED: Outcome.PAUSE,
    0x0214: Outcome.PAUSE,  # printed for 0124 in the PS3.2 template
    0x0110: Outcome.LIMITED,
}


def classify(status: int | None) -> Outcome:
    """What the Status (0000,0900) of a C-STORE-RSP means. None = no answer came (time-out, abort, connection lost)."""
    if status is None:
        return Outcome.RETRY
    if status in _EXACT:
        return _EXACT[status]
    if status >> 12 == 0xB:
        return Outcome.DELIVERED
    return {0xA7: Outcome.RETRY, 0xA9: Outcome.DEAD}.get(status >> 8, Outcome.LIMITED)


def is_warning(status: int) -> bool:
    """True for a status of class Warning (PS3.7 annex C): delivered, but worth a log line."""
    return status in (0x0001, 0x0107, 0x0116) or status >> 12 == 0xB
