"""Associations of the node: no response is lost between pynetdicom's own threads."""

from __future__ import annotations

import threading
import time

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from dicom_node.config import Destination
from dicom_node.dimse.pacs import ReceivingPacs
from dicom_node.dimse.requestor import associate


def test_no_response_is_lost_where_the_threads_of_a_busy_machine_come_late(tmp_path, monkeypatch):
    """pynetdicom's thread comes late out of its pause, the requester late to its response: alone, it loses the second.

    A thread that is late from here on is what a busy machine makes of one in some thousand C-STORE.
    """
    pause, take = threading.Event.wait, DIMSEServiceProvider.get_msg

    def wait(event, timeout=None):
        went_on = pause(event, timeout)
        if isinstance(threading.current_thread(), Association):
            time.sleep(0.03)
        return went_on

    def get_msg(provider, block=False):
        time.sleep(0.1 if block else 0.0)
        return take(provider, block=block)

    with ReceivingPacs(tmp_path / "pacs") as pacs:
        ae = AE("NODE")
        ae.dimse_timeout = 1.0
        to = Destination(ae_title="PACS", host="127.0.0.1", port=pacs.port)
        association = associate(ae, to, [build_context(Verification)])
        monkeypatch.setattr(threading.Event, "wait", wait)
        monkeypatch.setattr(DIMSEServiceProvider, "get_msg", get_msg)
        answers = [association.send_c_echo() for _ in range(3) if association.is_established]
        monkeypatch.undo()
        association.release()
    assert [answer.get("Status") for answer in answers] == [0, 0, 0]
