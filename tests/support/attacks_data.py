"""Data sets that cost a Storage SCP more than they weigh (`besieged.Attack`).

Stock pynetdicom acknowledges garbage, and 398 KB of deflate open to 800 MB in it.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from attacks import CONTEXTS
from besieged import Besieged
from hostile_cases import UID
from raw_scu import SC, RawScu, small_data_set


def _implicit(tag: int, length: int) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length)


def _explicit(tag: int, vr: bytes, length: int) -> bytes:
    return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, length)


def bombs() -> dict[str, tuple[int, bytes]]:
    """Data sets that cost more than they weigh: name -> (context, bytes)."""
    undefined, item = 0xFFFFFFFF, struct.pack("<HHL", 0xFFFE, 0xE000, 0)
    tower = _implicit(0x00081140, undefined) + _implicit(0xFFFEE000, undefined)
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflated.compress(_explicit(0x7FE00010, b"OB", 100 << 20))
    body += b"".join(deflated.compress(bytes(1 << 20)) for _ in range(100)) + deflated.flush()
    return {
        "noise": (3, os.urandom(4096)),
        "element beyond the end": (3, _implicit(0x00100010, 0xFFFFFFF0) + b"x" * 10),
        "500 sequences in each other": (3, tower * 500),
        "100,000 sequences in each other": (3, tower * 100_000),
        "200,000 empty items": (3, _implicit(0x00081140, 200_000 * 8) + item * 200_000),
        "200,000 empty items without length": (3, _implicit(0x00081140, undefined) + item * 200_000),
        "1,100,000 empty elements": (3, _implicit(0x00080000, 0) * 1_100_000),
        "300,000 fragments": (1, _explicit(0x7FE00010, b"OB", undefined) + item * 300_000),
        "100 MB deflated": (1, body),
    }


def data_set_bombs(node: Besieged) -> Iterator[None]:
    """Refused each, and the association goes on. (Stock: 0x0000 for garbage; 398 KB of deflate open to 800 MB.)"""
    with RawScu(node.port, timeout=30) as scu:
        scu.associate([*CONTEXTS, (5, SC, ("1.2.840.10008.1.2.1.99",))])
        assert scu.results == {1: 0, 3: 0, 5: 4}  # deflated is not taken
        for name, (context_id, data) in bombs().items():
            status = scu.store(data, SC, UID, context_id=context_id).status
            assert status in (0xC000, 0xA900), (name, hex(status))
            yield
        assert scu.store(small_data_set(), SC, UID).status == 0
    assert node.stored() == 1


def bombs_together(node: Besieged) -> Iterator[None]:
    """The costly ones four at a time."""
    costly = [bomb for name, bomb in bombs().items() if "0,000" in name]

    def send(k: int) -> None:
        with RawScu(node.port, timeout=60) as scu:
            scu.associate(CONTEXTS)
            for context_id, data in costly:
                assert scu.store(data, SC, f"{UID}.{k}", context_id=context_id).status != 0

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(send, k) for k in range(4)]
        yield
        for each in running:
            each.result()
