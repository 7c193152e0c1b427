"""Named conversations of peers that do not keep to PS3.7 and PS3.8, as byte streams: seeds of the fuzz target, cases of
the differential test. `found()` adds those that fuzzing found and that were kept (tests/hostile/corpus)."""

from __future__ import annotations

import struct
from pathlib import Path

from raw_scu import (
    EXPLICIT,
    IMPLICIT,
    MR,
    SC,
    VERIFICATION,
    association_request,
    command_element,
    echo_command,
    item,
    padded,
    pdata,
    small_data_set,
    store_command,
)

CORPUS = Path(__file__).parent.parent / "hostile" / "corpus"
UID = "1.2.826.0.1.3680043.9.1"
CONTEXTS = [(1, SC, (EXPLICIT,)), (3, MR, (EXPLICIT,)), (5, VERIFICATION, (IMPLICIT,))]
REQUEST = association_request(CONTEXTS)
RELEASE = b"\5\0\0\0\0\4\0\0\0\0"
ABORT = b"\7\0\0\0\0\4\0\0\0\0"
DATA = small_data_set()
STORE = pdata(1, 3, store_command(SC, UID)) + pdata(1, 2, DATA)
ECHO = pdata(5, 3, echo_command())


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBL", kind, 0, len(body)) + body


def pdvs(*values: tuple[int, int, bytes]) -> bytes:
    """One P-DATA-TF of several PDVs: context id, control header, fragment."""
    return pdu(4, b"".join(struct.pack(">LBB", len(f) + 2, c, m) + f for c, m, f in values))


def command(field: int, *elements: tuple[int, bytes], data_set: int = 0x0101) -> bytes:
    """Any command: Message ID 1, the elements given, in order of their tags."""
    every = {0x0100: struct.pack("<H", field), 0x0110: b"\1\0", 0x0800: struct.pack("<H", data_set), **dict(elements)}
    body = b"".join(command_element(tag, value) for tag, value in sorted(every.items()))
    return command_element(0, struct.pack("<L", len(body))) + body


def request(edit: dict[int, bytes] | None = None, *, tail: bytes = b"", **parameters) -> bytes:
    """An A-ASSOCIATE-RQ with bytes replaced (offset -> bytes) and `tail` behind its last item, its length set right."""
    whole = bytearray(association_request(parameters.pop("contexts", CONTEXTS), **parameters))
    for at, value in (edit or {}).items():
        whole[at : at + len(value)] = value
    return pdu(1, bytes(whole[6:]) + tail)


def bare_request(*items: bytes) -> bytes:
    """An A-ASSOCIATE-RQ of our AE titles and these items."""
    return pdu(
        1, struct.pack(">HH", 1, 0) + b"DICOM_NODE".ljust(16) + b"RAWSCU".ljust(16) + bytes(32) + b"".join(items)
    )


APPLICATION = item(0x10, b"1.2.840.10008.3.1.1.1")
USER = item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4"))


def context(number: int, *inner: bytes) -> bytes:
    return item(0x20, bytes((number, 0, 0, 0)) + b"".join(inner))


ABSTRACT, SYNTAX = item(0x30, SC.encode()), item(0x40, EXPLICIT.encode())


def store(sop_class: str = SC, uid: str = UID, data: bytes = DATA, context_id: int = 1) -> bytes:
    return pdata(context_id, 3, store_command(sop_class, uid)) + pdata(context_id, 2, data)


def _sound() -> dict[str, bytes]:
    return {
        "everything": REQUEST + STORE + ECHO + RELEASE,
        "two_instances_at_once": REQUEST + STORE + store(uid=f"{UID}.2", data=small_data_set(sop_instance=f"{UID}.2")),
        "command_byte_by_byte": REQUEST
        + b"".join(
            pdata(5, 3 if k == len(echo_command()) - 1 else 1, echo_command()[k : k + 1])
            for k in range(len(echo_command()))
        ),
        "one_pdu_for_all": REQUEST + pdvs((1, 3, store_command(SC, UID)), (1, 0, DATA[:40]), (1, 2, DATA[40:])),
        "empty_last_fragment": REQUEST + pdata(1, 3, store_command(SC, UID)) + pdata(1, 0, DATA) + pdata(1, 2, b""),
        "released": REQUEST + RELEASE,
        "aborted": REQUEST + ABORT,
        "max_pdu_zero": request(max_pdu=0) + STORE + ECHO,
        "max_pdu_one": request(max_pdu=1) + ECHO,
        "version_with_more_bits": request({6: b"\xff\xff"}) + ECHO,
        "role_selection": request(extra=item(0x54, struct.pack(">H", len(SC)) + SC.encode() + b"\1\1")) + ECHO,
        "asynchronous_operations": request(extra=item(0x53, b"\0\5\0\5")) + ECHO,
        "user_identity_with_answer": request(extra=item(0x58, b"\2\1\0\4user\0\4pass")) + ECHO,
        "extended_negotiation": request(extra=item(0x56, struct.pack(">H", len(SC)) + SC.encode() + b"\2\0\0\0\0\0"))
        + ECHO,
        "unknown_user_item": request(extra=item(0x7F, b"hello")) + ECHO,
        "unknown_item": request(tail=item(0x60, b"hello")) + ECHO,
    }


def _order() -> dict[str, bytes]:
    return {
        "data_before_request": ECHO,
        "release_before_request": RELEASE,
        "abort_before_request": ABORT,
        "acceptance_before_request": pdu(2, REQUEST[6:]),
        "nothing_at_all": b"",
        "half_a_header": b"\1\0\0",
        "half_a_request": REQUEST[:90],
        "another_protocol": b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",
        "tls_client_hello": bytes.fromhex("160301005a010000560303") + bytes(80),
        "second_request": REQUEST + REQUEST,
        "acceptance_to_an_acceptor": REQUEST + pdu(2, REQUEST[6:]),
        "rejection_to_an_acceptor": REQUEST + b"\3\0\0\0\0\4\0\1\1\1",
        "release_answer_unasked": REQUEST + b"\6\0\0\0\0\4\0\0\0\0",
        "unknown_pdu_00": REQUEST + b"\0\0\0\0\0\4\0\0\0\0",
        "unknown_pdu_08": REQUEST + b"\x08\0\0\0\0\4\0\0\0\0",
        "unknown_pdu_ff": REQUEST + b"\xff\0\0\0\0\4\0\0\0\0",
        "release_then_data": REQUEST + RELEASE + STORE,
        "release_twice": REQUEST + RELEASE + RELEASE,
        "abort_then_data": REQUEST + ABORT + STORE,
        "release_in_a_message": REQUEST + pdata(1, 3, store_command(SC, UID)) + pdata(1, 0, DATA[:40]) + RELEASE,
        "end_in_a_message": REQUEST + pdata(1, 3, store_command(SC, UID)) + pdata(1, 0, DATA),
        "end_in_a_pdu": REQUEST + STORE[:-20],
        "long_release": REQUEST + pdu(5, bytes(40)),
        "short_release": REQUEST + pdu(5, b""),
        "short_abort": REQUEST + pdu(7, b""),
    }


def _requests() -> dict[str, bytes]:
    return {
        "request_too_short": pdu(1, bytes(20)),
        "request_of_zeros": pdu(1, bytes(80)),
        "request_length_beyond_what_comes": REQUEST[:2] + b"\xff\xff\xff\xff" + REQUEST[6:],
        "request_over_64_kb": request(extra=item(0x7F, bytes(60_000)), tail=item(0x60, bytes(9_000))),
        "version_0": request({6: b"\0\0"}) + ECHO,
        "version_2": request({6: b"\0\2"}) + ECHO,
        "called_by_another_name": request(called="NOBODY") + ECHO,
        "called_by_no_name": request({10: b" " * 16}) + ECHO,
        "called_in_small_letters": request(called="dicom_node") + ECHO,
        "calling_by_no_name": request({26: b" " * 16}) + ECHO,
        "calling_with_line_breaks": request({26: b"A\r\nB\x1b[2J\0\0\xff\xfe"}) + ECHO,
        "calling_with_a_path": request({26: b"../../etc/passwd"}) + ECHO,
        "calling_with_a_backslash": request({26: b"A\\B             "}) + ECHO,
        "another_application": bare_request(item(0x10, b"1.2.3"), context(1, ABSTRACT, SYNTAX), USER),
        "no_application": bare_request(context(1, ABSTRACT, SYNTAX), USER),
        "no_context": bare_request(APPLICATION, USER),
        "no_user_information": bare_request(APPLICATION, context(1, ABSTRACT, SYNTAX)),
        "no_items": bare_request(),
        "context_0": bare_request(APPLICATION, context(0, ABSTRACT, SYNTAX), USER),
        "context_2": bare_request(APPLICATION, context(2, ABSTRACT, SYNTAX), USER),
        "same_context_twice": bare_request(
            APPLICATION, context(1, ABSTRACT, SYNTAX), context(1, ABSTRACT, SYNTAX), USER
        ),
        "context_without_abstract_syntax": bare_request(APPLICATION, context(1, SYNTAX), USER),
        "context_without_transfer_syntax": bare_request(APPLICATION, context(1, ABSTRACT), USER),
        "context_of_two_abstract_syntaxes": bare_request(
            APPLICATION, context(1, ABSTRACT, item(0x30, MR.encode()), SYNTAX), USER
        ),
        "context_of_a_hundred_syntaxes": bare_request(
            APPLICATION, context(1, ABSTRACT, *[item(0x40, b"1.2.%d" % k) for k in range(100)], SYNTAX), USER
        ),
        "nobodys_class": request(contexts=[(1, "1.2.3.4", (EXPLICIT,))]) + ECHO,
        "deflated_only": request(contexts=[(1, SC, ("1.2.840.10008.1.2.1.99",))]) + STORE,
        "abstract_syntax_no_uid": bare_request(APPLICATION, context(1, item(0x30, b"../../../tmp\0x"), SYNTAX), USER),
        "abstract_syntax_of_200": bare_request(APPLICATION, context(1, item(0x30, b"1." * 100 + b"1"), SYNTAX), USER),
        "abstract_syntax_not_ascii": bare_request(APPLICATION, context(1, item(0x30, b"\xff\xfe\x80"), SYNTAX), USER),
        "empty_abstract_syntax": bare_request(APPLICATION, context(1, item(0x30, b""), SYNTAX), USER),
        "item_longer_than_request": bare_request(APPLICATION, b"\x20\0\xff\xff\1\0\0\0", USER),
        "item_of_no_length": bare_request(APPLICATION, item(0x20, b""), USER),
        "half_an_item": bare_request(APPLICATION, context(1, ABSTRACT, SYNTAX), USER, b"\x20\0"),
        "maximum_length_of_two_bytes": bare_request(
            APPLICATION, context(1, ABSTRACT, SYNTAX), item(0x50, item(0x51, b"\1\1"))
        ),
        "role_selection_beyond_its_item": request(extra=item(0x54, b"\xff\xff" + SC.encode() + b"\1\1")) + ECHO,
        "user_identity_beyond_its_item": request(extra=item(0x58, b"\1\0\xff\xffuser")) + ECHO,
        "user_identity_of_no_type": request(extra=item(0x58, b"\x63\0\0\4user\0\0")) + ECHO,
        "implementation_version_of_300": request(extra=item(0x55, b"V" * 300)) + ECHO,
        "implementation_version_hostile": request(extra=item(0x55, b"\r\n\0\x1b\xff")) + ECHO,
    }


def _data() -> dict[str, bytes]:
    echo = echo_command()
    return {
        "pdv_longer_than_its_pdu": REQUEST + b"\4\0\0\0\0\x0a\0\0\0\x64\1\3" + bytes(4),
        "pdv_of_4_gb": REQUEST + b"\4\0\0\0\0\x0a\xff\xff\xff\xff\1\3" + bytes(4),
        "pdv_of_length_0": REQUEST + b"\4\0\0\0\0\6\0\0\0\0\1\3",
        "pdv_of_length_1": REQUEST + b"\4\0\0\0\0\5\0\0\0\1\1",
        "half_a_pdv_header": REQUEST + b"\4\0\0\0\0\3\0\0\0",
        "pdu_without_pdv": REQUEST + pdu(4, b"") + ECHO,
        "thousand_empty_pdvs": REQUEST + pdvs(*[(5, 1, b"")] * 1000) + ECHO,
        "pdu_longer_than_negotiated": REQUEST + pdu(4, bytes(140_000)),
        "context_not_accepted": REQUEST + pdata(99, 3, store_command(SC, UID)),
        "context_even": REQUEST + pdata(2, 3, echo),
        "control_header_with_more_bits": REQUEST + pdata(5, 0xFF, echo),
        "data_before_its_command": REQUEST + pdata(1, 0, b"data"),
        "data_of_another_context": REQUEST + pdata(1, 3, store_command(SC, UID)) + pdata(3, 2, DATA),
        "command_goes_on_in_another_context": REQUEST + pdata(1, 1, echo[:20]) + pdata(5, 3, echo[20:]),
        "command_in_a_message": REQUEST + pdata(1, 3, store_command(SC, UID)) + pdata(1, 0, DATA[:40]) + ECHO,
        "command_without_end": REQUEST + pdata(5, 1, bytes(60_000)) * 2,
        "store_of_another_class": REQUEST + store(MR),
        "echo_in_a_storage_context": REQUEST + pdata(1, 3, echo),
        "echo_with_a_data_set": REQUEST
        + pdata(5, 3, command(0x30, (0x0002, padded(VERIFICATION)), data_set=1))
        + pdata(5, 2, b"x"),
        "find": REQUEST + pdata(1, 3, command(0x20, (0x0002, padded(SC)))),
        "cancel": REQUEST + pdata(1, 3, command(0x0FFF, (0x0120, b"\1\0"))),
        "a_response_as_request": REQUEST + pdata(1, 3, command(0x8001, (0x0002, padded(SC)), (0x0900, b"\0\0"))),
        "no_such_command": REQUEST + pdata(1, 3, command(0x7777)),
        "n_create": REQUEST
        + pdata(1, 3, command(0x140, (0x0002, padded(SC)), (0x1000, padded(UID)), data_set=1))
        + pdata(1, 2, DATA),
        "command_not_group_0": REQUEST + pdata(5, 3, b"\x08\0\5\0\2\0\0\0xx"),
        "command_cut_short": REQUEST + pdata(5, 3, echo[:-3]),
        "command_empty": REQUEST + pdata(5, 3, b""),
        "command_group_length_wrong": REQUEST + pdata(5, 3, command_element(0, b"\xff\0\0\0") + echo[12:]),
        "command_without_group_length": REQUEST + pdata(5, 3, echo[12:]),
        "command_out_of_order": REQUEST + pdata(5, 3, echo[-10:] + echo[:-10]),
        "command_without_message_id": REQUEST
        + pdata(
            5,
            3,
            command_element(0x0002, padded(VERIFICATION))
            + command_element(0x0100, b"\x30\0")
            + command_element(0x0800, b"\1\1"),
        ),
        "command_element_of_4_gb": REQUEST + pdata(5, 3, struct.pack("<HHL", 0, 2, 0xFFFFFFF0) + b"x"),
        "store_without_instance": REQUEST
        + pdata(1, 3, command(1, (0x0002, padded(SC)), data_set=1))
        + pdata(1, 2, DATA),
        "store_without_data_set": REQUEST + pdata(1, 3, store_command(SC, UID, data_set=0x0101)),
        "instance_named_as_a_path": REQUEST + store(uid="../../../../tmp/owned"),
        "instance_named_for_a_shell": REQUEST + store(uid="1.2;touch${IFS}x|`id`"),
        "instance_of_200": REQUEST + store(uid="1." * 100 + "1"),
        "instance_of_no_name": REQUEST + store(uid=""),
        "another_instance_than_said": REQUEST + store(data=small_data_set(sop_instance=f"{UID}.9")),
        "another_class_than_said": REQUEST + store(data=small_data_set(sop_class=MR)),
        "no_study": REQUEST + store(data=small_data_set(study="")),
        "study_named_as_a_path": REQUEST + store(data=small_data_set(study="../../etc")),
        "data_set_empty": REQUEST + store(data=b""),
        "data_set_of_noise": REQUEST + store(data=bytes(range(256)) * 8),
        "data_set_cut_short": REQUEST + store(data=DATA[:-30]),
        "element_of_4_gb": REQUEST
        + store(data=DATA + struct.pack("<HH2sHL", 0x7FE1, 0x10, b"OB", 0, 0xFFFFFFF0) + b"x" * 10),
        "sequences_500_deep": REQUEST
        + store(
            data=struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
            + (
                struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
                + struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
            )
            * 500
        ),
        "fragments_without_end": REQUEST
        + store(
            data=DATA
            + struct.pack("<HH2sHL", 0x7FE1, 0x10, b"OB", 0, 0xFFFFFFFF)
            + struct.pack("<HHL", 0xFFFE, 0xE000, 8)
            + bytes(8)
        ),
    }


def named() -> dict[str, bytes]:
    """Every case written by hand."""
    return _sound() | _order() | _requests() | _data()


def found() -> dict[str, bytes]:
    """Every case that fuzzing found and that was kept."""
    return {path.stem: path.read_bytes() for path in sorted(CORPUS.glob("*.pdu"))}
