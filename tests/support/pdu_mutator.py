"""Changes a PDU stream as a fuzzer should: most often inside the frames, so that the change is reached at all.

Bytes thrown into a stream nearly always break a length first, and everything behind it is never read. Here PDUs are
lost, doubled, swapped and cut, items and PDVs change their content, and the lengths around them are set right again -
except when it is the length that is to be wrong.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from wire_replay import split, whole

WORDS = (
    b"1.2.840.10008.1.1", b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.5.1.4.1.1.7",
    b"1.2.840.10008.3.1.1.1", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0", b"\xfe\xff\0\xe0",
    b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0", b"\xe0\x7f\x10\0", b"\x08\0\x18\0", b"SQ\0\0\xff\xff\xff\xff",
    b"DICOM_NODE      ", b"../../", b"\r\n", b"\0",
)  # fmt: skip
Mutate = Callable[[bytes, int], bytes]
"""Changes bytes freely: libFuzzer's own mutator, or `scatter`."""


def scatter(chance: random.Random) -> Mutate:
    """A plain mutator, for where there is no libFuzzer."""

    def mutate(data: bytes, max_size: int) -> bytes:
        changed = bytearray(data or b"\0")
        for _ in range(chance.randint(1, 3)):
            at, what = chance.randrange(len(changed) or 1), chance.random()
            if what < 0.5 and changed:
                changed[at] = chance.choice((0, 1, 2, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            elif what < 0.75:
                changed[at:at] = chance.choice(WORDS)
            else:
                del changed[at : at + chance.randint(1, 8)]
        return bytes(changed[:max_size])

    return mutate


def mutated(stream: bytes, mutate: Mutate, chance: random.Random, max_size: int) -> bytes:
    """One change somewhere; at most `max_size` bytes."""
    pdus = split(stream)
    if not pdus or chance.random() < 0.1:
        return mutate(stream, max_size)
    at = chance.randrange(len(pdus))
    what = chance.random()
    if what < 0.55:
        pdus[at] = _inside(pdus[at], mutate, chance, max_size)
    elif what < 0.65:
        pdus.insert(chance.randrange(len(pdus) + 1), pdus[at])
    elif what < 0.72:
        del pdus[at]
    elif what < 0.79:
        other = chance.randrange(len(pdus))
        pdus[at], pdus[other] = pdus[other], pdus[at]
    elif what < 0.86:
        pdus[at] = pdus[at][: chance.randrange(len(pdus[at]))]
    elif what < 0.93:
        pdus[at] = bytes((chance.randrange(9),)) + pdus[at][1:]
    else:
        pdus[at] = _resized(pdus[at], chance)
    return b"".join(pdus)[:max_size]


def _inside(pdu: bytes, mutate: Mutate, chance: random.Random, max_size: int) -> bytes:
    """Content changed, lengths right."""
    if not whole(pdu):
        return mutate(pdu, max_size)
    kind, body = pdu[0], pdu[6:]
    if kind == 4:
        body = _values(body, mutate, chance, max_size)
    elif kind == 1 and len(body) > 68 and chance.random() < 0.85:
        body = body[:68] + _items(body[68:], mutate, chance, max_size)
    else:
        body = mutate(body, max_size)
    return struct.pack(">BBL", kind, pdu[1], len(body)) + body


def _values(body: bytes, mutate: Mutate, chance: random.Random, max_size: int) -> bytes:
    """The PDVs of a P-DATA-TF, one of them changed or divided in two."""
    values, at = [], 0
    while len(body) - at >= 6:
        length, context, control = struct.unpack_from(">LBB", body, at)
        end = at + 4 + length
        if length < 2 or end > len(body):
            break
        values.append((context, control, body[at + 6 : end]))
        at = end
    if not values or chance.random() < 0.1:
        return mutate(body, max_size)
    which = chance.randrange(len(values))
    context, control, fragment = values[which]
    what = chance.random()
    if what < 0.6:
        values[which] = (context, control, mutate(fragment, max_size))
    elif what < 0.7:
        values[which] = (context, chance.randrange(4), fragment)
    elif what < 0.8:
        values[which] = (chance.choice((1, 3, 5, 0, 2, 99)), control, fragment)
    else:
        half = chance.randrange(len(fragment) + 1)
        values[which : which + 1] = [(context, control & 1, fragment[:half]), (context, control, fragment[half:])]
    return b"".join(struct.pack(">LBB", len(f) + 2, c, m) + f for c, m, f in values)


def _items(body: bytes, mutate: Mutate, chance: random.Random, max_size: int, depth: int = 0) -> bytes:
    """The items of an A-ASSOCIATE-RQ, one of them changed, lost, doubled or opened."""
    items, at = [], 0
    while len(body) - at >= 4:
        kind, length = struct.unpack_from(">BxH", body, at)
        end = at + 4 + length
        if end > len(body):
            break
        items.append((kind, body[at + 4 : end]))
        at = end
    if not items:
        return mutate(body, max_size)
    which = chance.randrange(len(items))
    kind, inner = items[which]
    what = chance.random()
    if what < 0.5 and kind in (0x20, 0x50) and depth == 0:
        skip = 4 if kind == 0x20 else 0
        items[which] = (kind, inner[:skip] + _items(inner[skip:], mutate, chance, max_size, 1))
    elif what < 0.7:
        items[which] = (kind, mutate(inner, 1 << 14))
    elif what < 0.8:
        items.insert(chance.randrange(len(items) + 1), items[which])
    elif what < 0.9:
        del items[which]
    else:
        items[which] = (chance.choice((0x10, 0x20, 0x30, 0x40, 0x50, *range(0x51, 0x5A), 0x7F)), inner)
    return b"".join(struct.pack(">BxH", kind, len(i) & 0xFFFF) + i for kind, i in items)


def _resized(pdu: bytes, chance: random.Random) -> bytes:
    """A length that is not true."""
    if len(pdu) < 6:
        return pdu
    length = struct.unpack_from(">L", pdu, 2)[0]
    wrong = chance.choice((0, 1, length - 1, length + 1, length * 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))
    return pdu[:2] + struct.pack(">L", wrong & 0xFFFFFFFF) + pdu[6:]
