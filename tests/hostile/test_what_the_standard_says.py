"""Peers that break a rule of PS3.7 or PS3.8, and what the standard has the acceptor answer: never nothing."""

from __future__ import annotations

import hostile_cases as cases
import pytest
from hostile_cases import REQUEST
from listener_process import ListenerProcess, listening, wait_for
from raw_scu import EXPLICIT, SC, RawScu
from wire_replay import Transcript, replay

SERVICE_USER, SERVICE_PROVIDER = 0, 2
UNRECOGNISED_PDU, UNEXPECTED_PDU, INVALID_PARAMETER = 1, 2, 6
"""Reasons of A-ABORT (PS3.8 table 9-26)."""


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> int:
    with listening(tmp_path_factory.mktemp("standard"), idle_timeout=3.0) as node:
        yield node.port


def said(port: int, name: str) -> Transcript:
    return replay(port, cases.named()[name])


OUT_OF_ORDER = [
    "second_request", "acceptance_to_an_acceptor", "rejection_to_an_acceptor", "release_answer_unasked",
    "data_before_request", "release_before_request", "acceptance_before_request",
    "data_before_its_command", "data_of_another_context", "command_in_a_message", "unknown_pdu_00", "unknown_pdu_08",
    "unknown_pdu_ff", "pdv_longer_than_its_pdu", "pdv_of_length_0", "pdv_of_length_1", "half_a_pdv_header",
    "pdu_longer_than_negotiated", "context_not_accepted", "command_without_end", "request_too_short",
]  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_what_is_out_of_place_is_aborted(port, name):
    """PS3.8 table 9-10: AA-1 before an association, AA-8 in one; then nothing but the end of the connection.

    Before an association, and where the message is wrong and not the PDU, the user of the service may abort."""
    answer = said(port, name)
    assert answer.words[-2:] == ("ABORT", "closed"), answer
    assert answer.abort is not None and answer.abort[0] in (SERVICE_USER, SERVICE_PROVIDER)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unknown_pdu_08", UNRECOGNISED_PDU),
        ("unknown_pdu_ff", UNRECOGNISED_PDU),
        ("second_request", UNEXPECTED_PDU),
        ("acceptance_to_an_acceptor", UNEXPECTED_PDU),
        ("release_answer_unasked", UNEXPECTED_PDU),
        ("pdv_longer_than_its_pdu", INVALID_PARAMETER),
        ("pdv_of_length_1", INVALID_PARAMETER),
    ],
)
def test_the_abort_says_why(port, name, reason):
    assert said(port, name).abort == (SERVICE_PROVIDER, reason)


@pytest.mark.parametrize("name", ["abort_then_data", "aborted"])
def test_after_an_abort_nothing_is_said(port, name):
    assert said(port, name).words == ("AC(1:0,3:0,5:0)", "closed")


@pytest.mark.parametrize("name", ["released", "release_in_a_message"])
def test_a_release_is_answered_whatever_was_in_hand(port, name):
    assert said(port, name).words[-2:] == ("RP", "closed")


@pytest.mark.parametrize("name", ["role_selection", "asynchronous_operations", "extended_negotiation"])
def test_what_is_negotiated_beyond_contexts_does_no_harm(port, name):
    assert said(port, name).words[:2] == ("AC(1:0,3:0,5:0)", "C-ECHO=0000")


@pytest.mark.parametrize("name", ["unknown_item", "unknown_user_item"])
def test_items_of_unknown_type_are_ignored(port, name):
    """PS3.8 9.3.1 and D.3.3: so that later editions can add some."""
    assert said(port, name).words[:2] == ("AC(1:0,3:0,5:0)", "C-ECHO=0000")


def test_another_application_context_is_rejected(port):
    """PS3.8 table 9-21: rejected permanent, service user, application context name not supported."""
    assert said(port, "another_application").words[0] == "RJ(1,1,2)"


@pytest.mark.parametrize("name", ["context_without_abstract_syntax", "context_without_transfer_syntax"])
def test_a_request_that_cannot_be_negotiated_is_answered(port, name):
    assert said(port, name).words[0][:2] in ("AB", "RJ", "AC")


@pytest.mark.parametrize("name", ["context_even", "nobodys_class", "command_goes_on_in_another_context"])
def test_an_echo_belongs_in_an_accepted_context_of_verification(port, name):
    """PS3.8 annex E.2: a PDV names an accepted context; PS3.4 A.4: C-ECHO is of the Verification SOP Class."""
    answer = said(port, name)
    assert "C-ECHO=0000" not in answer.words, answer


def test_one_abort_is_all(port):
    """PS3.8 table 9-10, Sta13: whatever comes is ignored until the connection is closed. Found by fuzzing."""
    stream = REQUEST + cases.pdata(5, 3, b"\x08\0\5\0\2\0\0\0xx") + b"\4\0\xff\xff\xff\xff" + bytes(100)
    assert replay(port, stream).words.count("ABORT") == 1


def test_a_released_association_gives_its_place_back(tmp_path):
    """Else a modality that opens one for each instance is rejected by its own shadow as soon as places are few."""
    with listening(tmp_path, max_associations_per_peer=1) as node:
        for _ in range(20):
            with RawScu(node.port) as scu:
                scu.associate().release()


def test_an_abort_of_an_unknown_source_kills_no_thread(tmp_path):
    with ListenerProcess(tmp_path / "root") as node:
        for reason in (0, 91):
            replay(node.port, REQUEST + cases.pdu(7, bytes((0, 0, reason, 0))), patience=0.1)
        wait_for(lambda: len(node.messages.of("association_closed")) == 2)
        node.stop()
    assert not [line for line in node.log_lines if "thread_died" in line]


def test_status_and_comment_of_what_cannot_be_stored(port):
    """Each refusal is a status of PS3.4 table B.2-1 or PS3.7 annex C, and the association goes on."""
    wanted = {
        "another_instance_than_said": "A900", "another_class_than_said": "A900", "no_study": "A900",
        "instance_named_as_a_path": "0117", "instance_of_200": "0117", "instance_of_no_name": "0117",
        "data_set_of_noise": "C000", "element_of_4_gb": "C000", "sequences_500_deep": "C000",
        "fragments_without_end": "C000", "data_set_cut_short": "C000", "store_of_another_class": "A900",
    }  # fmt: skip
    for name, status in wanted.items():
        answer = replay(port, cases.named()[name] + cases.ECHO + cases.RELEASE)
        assert answer.words == ("AC(1:0,3:0,5:0)", f"C-STORE={status}", "C-ECHO=0000", "RP", "closed"), name


def test_no_class_of_nobody_is_accepted_and_deflated_is_not(port):
    assert said(port, "deflated_only").words[0] == "AC(1:4)"
    assert said(port, "nobodys_class").words[0] == "AC(1:3)"
    assert (
        replay(port, cases.request(contexts=[(1, SC, (EXPLICIT,)), (3, "1.2.3", (EXPLICIT,))])).words[0]
        == "AC(1:0,3:3)"
    )
