"""The seam between the transport (`association.py`) and what is done with an instance (`receive.py`).

The transport knows sockets, PDUs and DIMSE commands, and nothing of files; the receiver knows files and nothing of
PDUs. Either can be replaced without the other noticing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dicom_node.dimse.admission import Rejection


@dataclass(frozen=True, slots=True)
class Association:
    """One accepted association."""

    association_id: str
    """Ours: 32 hexadecimal digits."""
    calling_ae_title: str
    called_ae_title: str
    peer: str
    """Address without port."""


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A request with a data set: the command, before it. UIDs are as the peer wrote them, perhaps malformed."""

    association: Association
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    event_type_id: int | None = None
    """Of an N-EVENT-REPORT."""


@dataclass(frozen=True, slots=True)
class StoreResponse:
    """What goes into the C-STORE-RSP."""

    status: int
    comment: str = ""
    """Error Comment (0000,0902): at most 64 characters, nothing about a patient."""
    offending_element: int | None = None


class Sink(Protocol):
    """Takes one data set. Either `finish` or `abandon` is called, once; `write` only before."""

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises TooLargeError: then the peer is told and cut, and the sink has cleaned up."""

    def finish(self) -> StoreResponse:
        """The last byte was written: make it durable, or refuse. Never raises."""

    def abandon(self) -> None:
        """The peer is gone: leave nothing behind. Never raises."""


class Receiver(Protocol):
    """What the transport tells. Called from several threads; never raises; never takes long but in a Sink."""

    def opened(self, association: Association, rejected_contexts: list[tuple[str, int]]) -> None:
        """Accepted. Contexts we did not take: abstract syntax and result (3 abstract, 4 transfer syntaxes; PS3.8)."""

    def begin(self, request: StoreRequest) -> Sink:
        """A C-STORE-RQ came; its data set follows."""

    def notify(self, request: StoreRequest) -> Sink:
        """An N-CREATE-RQ of Instance Availability Notification came; its data set follows."""

    def commitment(self, request: StoreRequest) -> Sink:
        """An N-EVENT-REPORT-RQ of the Storage Commitment Push Model came; its data set follows."""

    def closed(self, association: Association, *, released: bool) -> None:
        """It ended, in order or not."""

    def rejected(self, rejection: Rejection, peer: str, calling: str, called: str) -> None:
        """An association was asked for and not given."""

    def dropped(self, reason: str, peer: str) -> None:
        """A connection was cut for what it did, or failed to do."""

    def lingered(self, peer: str) -> None:
        """A peer did not close its connection in time after the end of its association; we did."""
