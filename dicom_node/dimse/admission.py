"""Who may open an association, and how many at a time. Policy only: no sockets, no threads of its own.

Two doors. A connection that has not yet asked for an association passes `connecting`: few of those at a time, fewer
from one address, and half the places are kept for addresses of `receive.allow`. An association request passes `admit`:
called AE title, calling AE title with its address and certificate, then the limits. An AE title is no authentication;
the certificate is.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from dicom_node.config import AllowedPeer, Receive

MAX_PENDING = int(Receive.model_fields["max_pending"].default)
MAX_PENDING_PER_PEER = int(Receive.model_fields["max_pending_per_peer"].default)


class Rejection(Enum):
    """Why an association is rejected: A-ASSOCIATE-RJ result, source, reason (PS3.8 table 9-21)."""

    CALLED_AE_TITLE = (1, 1, 7)
    CALLING_AE_TITLE = (1, 1, 3)
    APPLICATION_CONTEXT = (1, 1, 2)
    PROTOCOL_VERSION = (1, 2, 2)
    FULL = (2, 3, 2)
    """Local limit exceeded: transient, the peer may come again."""

    @property
    def reason(self) -> str:
        """For logs and metrics."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class _Peer:
    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    ae_title: str
    subject: str | None

    @classmethod
    def of(cls, peer: AllowedPeer) -> _Peer:
        return cls(ipaddress.ip_network(peer.address), peer.ae_title, peer.subject)


def plain_address(address: str) -> str:
    """An IPv4 peer of a dual-stack socket shows up as ::ffff:10.1.2.3; `allow` says 10.1.2.3."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


class Admission:
    """Counts connections and associations; every method may be called from any thread."""

    def __init__(self, config: Receive) -> None:
        self._called = frozenset((config.ae_title, *config.extra_ae_titles))
        self._allow = tuple(_Peer.of(peer) for peer in config.allow)
        self._max, self._max_per_peer = config.max_associations, config.max_associations_per_peer
        self._max_pending, self._max_pending_per_peer = config.max_pending, config.max_pending_per_peer
        reserved = config.reserved_associations
        self._reserve = self._max // 8 if reserved is None else reserved
        self._lock = threading.Lock()
        self._pending: Counter[str] = Counter()
        self._open: Counter[str] = Counter()

    def connecting(self, address: str) -> bool:
        """A connection came in. False = close it. True = call `connected` when its request is read, or it failed."""
        places = self._max_pending if self._is_known(address) else self._max_pending // 2
        with self._lock:
            if self._pending.total() >= places or self._pending[address] >= self._max_pending_per_peer:
                return False
            self._pending[address] += 1
            return True

    def connected(self, address: str) -> None:
        """The connection is no longer pending."""
        with self._lock:
            self._pending[address] -= 1
            self._pending += Counter()  # forget zeros: addresses come and go

    def admit(self, address: str, calling: str, called: str, subject: str | None) -> Rejection | None:
        """None = take it, and call `left` when it ends. `subject` is the CN of the peer's certificate, if any."""
        if called not in self._called:
            return Rejection.CALLED_AE_TITLE
        if self._allow and not any(self._matches(peer, address, calling, subject) for peer in self._allow):
            return Rejection.CALLING_AE_TITLE
        with self._lock:
            held = self._open[address]
            places = self._max - (self._reserve if held else 0)
            if held >= self._max_per_peer or self._open.total() >= places:
                return Rejection.FULL
            self._open[address] += 1
            return None

    def left(self, address: str) -> None:
        """An admitted association ended."""
        with self._lock:
            self._open[address] -= 1
            self._open += Counter()

    def _is_known(self, address: str) -> bool:
        if not self._allow:
            return True
        parsed = ipaddress.ip_address(address)
        return any(parsed in peer.network for peer in self._allow)

    @staticmethod
    def _matches(peer: _Peer, address: str, calling: str, subject: str | None) -> bool:
        return (
            peer.ae_title == calling
            and ipaddress.ip_address(address) in peer.network
            and (peer.subject is None or peer.subject == subject)
        )
