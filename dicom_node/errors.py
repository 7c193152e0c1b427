"""Every error the node raises on purpose. Stands under all other modules and imports none.

    NodeError
    ├── ConfigError             file, dotted key, what was expected            (exit 78)
    ├── RootInUseError          another node holds the lock of this root       (exit 75)
    ├── UnknownTargetError      no such study, destination or engine           (exit 4)
    ├── ReceiveError            an instance is refused before the acknowledgement; carries the C-STORE status
    │   ├── OutOfResourcesError     0xA700  disk under the watermark, or the index is behind
    │   ├── TooLargeError           0xA700  more bytes than receive.max_instance_mb
    │   ├── DataSetMismatchError    0xA900  command and data set disagree, or a UID is missing
    │   ├── CannotUnderstandError   0xC000  the data set cannot be parsed within the bounds
    │   ├── MalformedUidError       0x0117  a UID that PS3.5 section 9 does not allow
    │   └── NotAuthorisedError      0x0124  the peer may not store here
    ├── StoreError              the file system refused (never retried on fsync)
    ├── LedgerError             the ledger is unusable: corrupt, of a newer schema, not writable
    ├── PackageError            a task or a model package is refused, with the failing step
    ├── WorkerError             the worker lost a job: crash, time-out, memory (costs one attempt)
    │   ├── NoSuchModelError        an engine asked for a model that its package does not hold
    │   └── BackendError            a backend failed where the reference might not: the next one is tried
    ├── ClinicalSourceError     a source of clinical values gave no usable answer
    ├── NodeStoppingError       the node ends the worker: the job in hand keeps its attempt
    ├── ReportError             the objects of a result cannot be built (costs one attempt)
    ├── QueryError              a PACS did not answer a C-FIND (the check it was for says nothing)
    └── DeliveryError           an object was not delivered; says what may be done next

A class says two things: its C-STORE `status` (PS3.4 table B.2-1, PS3.7 annex C) where it has one, and whether
trying again can help (`retryable`). Messages never hold names, identifiers, dates or descriptions of a patient.
"""

from __future__ import annotations

from typing import ClassVar


class NodeError(Exception):
    """The base class; the docstring of a leaf is its default message."""

    status: ClassVar[int | None] = None
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message if message is not None else (type(self).__doc__ or type(self).__name__).strip())


class ConfigError(NodeError):
    """The configuration is not usable."""

    def __init__(self, file: str, key: str, expected: str) -> None:
        self.file, self.key, self.expected = file, key, expected
        super().__init__(f"{file}: {key}: {expected}" if key else f"{file}: {expected}")


class RootInUseError(NodeError):
    """Another node works on this store root."""

    retryable = True


class QueryError(NodeError):
    """A PACS did not answer a C-FIND."""

    retryable = True


class UnknownTargetError(NodeError):
    """There is no such study, destination or engine."""


class ReceiveError(NodeError):
    """The instance was not stored."""

    status: ClassVar[int] = 0xC000

    def __init__(self, message: str | None = None, *, offending_element: int | None = None) -> None:
        super().__init__(message)
        self.offending_element = offending_element
        """Tag for Offending Element (0000,0901), where one element is to blame."""


class OutOfResourcesError(ReceiveError):
    """Out of resources; send again later."""

    status = 0xA700
    retryable = True


class TooLargeError(ReceiveError):
    """The instance is larger than this node accepts."""

    status = 0xA700


class DataSetMismatchError(ReceiveError):
    """The data set does not match the command."""

    status = 0xA900


class CannotUnderstandError(ReceiveError):
    """The data set cannot be parsed."""

    status = 0xC000


class MalformedUidError(ReceiveError):
    """A UID is malformed."""

    status = 0x0117


class NotAuthorisedError(ReceiveError):
    """The peer is not authorised to store here."""

    status = 0x0124


class StoreError(NodeError):
    """The file system refused a write."""

    retryable = True


class LedgerError(NodeError):
    """The ledger cannot be used."""


class PackageError(NodeError):
    """The task or model package is refused."""


class WorkerError(NodeError):
    """The worker process lost the job."""

    retryable = True


class NoSuchModelError(WorkerError):
    """The package holds no model of this name: a site's own may come without a locator."""


class BackendError(WorkerError):
    """A backend cannot load or run a graph, or gave what no answer can be."""


class ReportError(NodeError):
    """The objects of a result cannot be built."""


class ClinicalSourceError(NodeError):
    """A source of clinical values gave no usable answer."""

    def __init__(self, code: str, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.code, self.again = code, again
        """`result.ClinicalCode`; whether asking again can help."""


class NodeStoppingError(NodeError):
    """The node is stopping."""

    retryable = True


class DeliveryError(NodeError):
    """The object was not delivered."""

    retryable = True
