"""The audit trail of the line: what the stages tell, with what an audit message needs besides (PS3.15 A.5)."""

from __future__ import annotations

import getpass
from collections import Counter

from dicom_node.audit import Audit
from dicom_node.config import Config
from dicom_node.store import studies
from dicom_node.store.deliveries import Delivery
from dicom_node.store.ledger import Ledger


class Trail:
    """Does nothing, and reads nothing, where no audit is configured."""

    def __init__(self, config: Config, ledger: Ledger, audit: Audit) -> None:
        self._destinations, self._ledger, self.audit = config.deliver.destinations, ledger, audit

    def study_received(self, study_uid: str) -> None:
        """A study is complete."""
        if not self.audit.enabled:
            return
        with self._ledger.read() as tx:
            about = studies.about(tx, study_uid)
        self.audit.study_received(
            study_uid, about.patient_id, about.sop_classes, calling_ae=about.calling_ae, address=about.peer
        )

    def object_sent(self, sent: Delivery) -> None:
        """A destination has one of our objects."""
        if not self.audit.enabled:
            return
        with self._ledger.read() as tx:
            about = studies.about(tx, sent.study_uid)
        to = self._destinations[sent.destination]
        classes = Counter([sent.sop_class_uid])
        self.audit.study_sent(sent.study_uid, about.patient_id, classes, called_ae=to.ae_title, address=to.host)

    def ordered(self, action: str, study_uid: str) -> None:
        """An operator moved a study."""
        if self.audit.enabled:
            self.audit.accessed(getpass.getuser(), action, study_uid)
