"""Who is let in, and how many at a time."""

from __future__ import annotations

import pytest

from dicom_node.config import Receive
from dicom_node.dimse.admission import MAX_PENDING, MAX_PENDING_PER_PEER, Admission, Rejection, plain_address

ALLOW = [
    {"ae_title": "SCANNER", "address": "10.1.0.0/16"},
    {"ae_title": "PACS", "address": "10.2.0.1", "subject": "pacs.hospital"},
    {"ae_title": "SIX", "address": "fd00::/8"},
]


@pytest.mark.parametrize(
    ("address", "calling", "subject", "ok"),
    [
        ("10.1.2.3", "SCANNER", None, True),
        ("10.1.2.3", "SCANNER", "anything", True),
        ("10.3.2.3", "SCANNER", None, False),
        ("10.1.2.3", "scanner", None, False),
        ("10.2.0.1", "PACS", "pacs.hospital", True),
        ("10.2.0.1", "PACS", None, False),
        ("10.2.0.1", "PACS", "other.hospital", False),
        ("10.1.2.3", "PACS", "pacs.hospital", False),
        ("fd00::1", "SIX", None, True),
        ("10.1.2.3", "SIX", None, False),
    ],
)
def test_ae_title_address_and_certificate_must_agree(address, calling, subject, ok):
    admission = Admission(Receive(host="0.0.0.0", allow=ALLOW))  # noqa: S104
    assert admission.admit(address, calling, "DICOM_NODE", subject) is (None if ok else Rejection.CALLING_AE_TITLE)


def test_the_called_title_is_asked_first():
    admission = Admission(Receive(host="0.0.0.0", allow=ALLOW))  # noqa: S104
    assert admission.admit("10.9.9.9", "X", "Y", None) is Rejection.CALLED_AE_TITLE


def test_pending_connections_are_few_and_strangers_get_half():
    admission = Admission(Receive(host="0.0.0.0", allow=ALLOW))  # noqa: S104
    strangers = [f"192.0.2.{i}" for i in range(100)]
    assert sum(admission.connecting(a) for a in strangers) == MAX_PENDING // 2
    known = [admission.connecting("10.1.0.1") for _ in range(MAX_PENDING)]
    assert sum(known) == MAX_PENDING_PER_PEER
    assert admission.connecting("10.1.0.2")
    for address in strangers[: MAX_PENDING // 2]:
        admission.connected(address)
    assert admission.connecting("192.0.2.200")


def test_places_come_back():
    admission = Admission(Receive(max_associations=2, max_associations_per_peer=1))
    assert admission.admit("127.0.0.1", "A", "DICOM_NODE", None) is None
    assert admission.admit("127.0.0.1", "A", "DICOM_NODE", None) is Rejection.FULL
    assert admission.admit("127.0.0.2", "A", "DICOM_NODE", None) is None
    assert admission.admit("127.0.0.3", "A", "DICOM_NODE", None) is Rejection.FULL
    admission.left("127.0.0.1")
    assert admission.admit("127.0.0.3", "A", "DICOM_NODE", None) is None
    assert admission.admit("127.0.0.4", "A", "DICOM_NODE", None) is Rejection.FULL


@pytest.mark.parametrize(
    ("given", "plain"), [("10.1.2.3", "10.1.2.3"), ("::ffff:10.1.2.3", "10.1.2.3"), ("fe80::1%eth0", "fe80::1")]
)
def test_addresses_have_one_spelling(given, plain):
    assert plain_address(given) == plain


def test_the_reserve_is_for_peers_that_hold_none():
    admission = Admission(Receive(max_associations=4, reserved_associations=2))
    assert [admission.admit("127.0.0.1", "A", "DICOM_NODE", None) for _ in range(3)] == [None, None, Rejection.FULL]
    assert admission.admit("127.0.0.2", "A", "DICOM_NODE", None) is None
    assert admission.admit("127.0.0.2", "A", "DICOM_NODE", None) is Rejection.FULL
    assert admission.admit("127.0.0.3", "A", "DICOM_NODE", None) is None


def test_pending_connections_are_as_many_as_configured():
    admission = Admission(Receive(max_pending=3, max_pending_per_peer=2))
    assert [admission.connecting(a) for a in ("::1", "::1", "::1", "127.0.0.1", "127.0.0.2")] == [
        True, True, False, True, False,
    ]  # fmt: skip
