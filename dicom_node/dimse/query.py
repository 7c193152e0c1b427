"""The node as Query/Retrieve SCU: C-FIND on the Study Root model (PS3.4 C.6.2), for two questions only.

How many instances does the PACS say each series has, and whose study does it think this is? Stands under `route` and
`deliver`; decides nothing. An answer that did not come is a `QueryError`, never an empty answer. Nothing a PACS says
is written to a log: identifiers stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.presentation import build_context

from dicom_node.config import Query
from dicom_node.dimse.requestor import associate
from dicom_node.dimse.sender import why_not
from dicom_node.errors import ConfigError, QueryError

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
MAX_ANSWERS = 2000
"""A series or study level query of one study never has so many; more is another answer than was asked for."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose study it is: Patient ID (0010,0020) and Accession Number (0008,0050), without padding."""

    patient_id: str
    accession_number: str


class Finder:
    """Asks one PACS. An association a question: they are rare, and a PACS closes idle ones."""

    def __init__(self, query: Query, calling_ae_title: str) -> None:
        self._query, self._calling = query, calling_ae_title

    def series_counts(self, study_uid: str) -> dict[str, int | None]:
        """Series Instance UID to Number of Series Related Instances (0020,1209). Raises QueryError.

        None where the PACS does not fill the key: it is optional (PS3.4 table C.6-3), and absent is no evidence.
        """
        keys = Dataset()
        keys.QueryRetrieveLevel = "SERIES"
        keys.StudyInstanceUID = study_uid
        keys.SeriesInstanceUID = ""
        keys.NumberOfSeriesRelatedInstances = None
        found: dict[str, int | None] = {}
        for answer in self._find(keys):
            uid = str(answer.get("SeriesInstanceUID", ""))
            if uid and str(answer.get("StudyInstanceUID", study_uid)) == study_uid:
                found[uid] = _count(answer)
        return found

    def identities(self, study_uid: str) -> frozenset[Identity]:
        """Under whom the PACS holds the study; empty = it does not know the study. Raises QueryError."""
        keys = Dataset()
        keys.QueryRetrieveLevel = "STUDY"
        keys.StudyInstanceUID = study_uid
        keys.PatientID = keys.AccessionNumber = ""
        return frozenset(
            identity_of(answer) for answer in self._find(keys) if str(answer.get("StudyInstanceUID", "")) == study_uid
        )

    def _find(self, keys: Dataset) -> Iterator[Dataset]:
        ae = AE(self._calling)
        seconds = self._query.timeout_seconds
        ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = seconds
        contexts = [build_context(STUDY_ROOT_FIND, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]
        try:
            association = associate(ae, self._query, contexts)
        except ConfigError as e:
            raise QueryError(str(e)) from None
        if not association.is_established:
            why = why_not(association, self._query, seconds).reason
            raise QueryError(f"the PACS takes no association for C-FIND: {why}")
        try:
            yield from _answers(association, keys)
        finally:
            if association.is_established:
                association.release()


def identity_of(dataset: Dataset) -> Identity:
    """Of an answer, or of an object of ours."""
    return Identity(*(str(dataset.get(k) or "").strip(" \0") for k in ("PatientID", "AccessionNumber")))


def _answers(association: Any, keys: Dataset) -> Iterator[Dataset]:
    """Pending answers until the final status (PS3.4 C.4.1.1.4). Raises QueryError on any other end."""
    try:
        for number, (status, identifier) in enumerate(association.send_c_find(keys, STUDY_ROOT_FIND)):
            if "Status" not in status:
                raise QueryError("the PACS did not answer a C-FIND: time-out or abort")
            if status.Status == 0x0000:
                return
            if status.Status not in (0xFF00, 0xFF01):
                raise QueryError(f"C-FIND answered with 0x{status.Status:04X}")
            if number >= MAX_ANSWERS:
                association.abort()
                raise QueryError("C-FIND gave more answers than were asked for")
            if identifier is None:
                raise QueryError("an answer to C-FIND cannot be read")
            yield identifier
    except (RuntimeError, ValueError) as e:
        raise QueryError(f"C-FIND failed ({type(e).__name__})") from None
    raise QueryError("the PACS did not end its answer to a C-FIND")


def _count(answer: Dataset) -> int | None:
    value = answer.get("NumberOfSeriesRelatedInstances")
    try:
        return None if value in (None, "") else int(value)
    except (TypeError, ValueError):
        return None
