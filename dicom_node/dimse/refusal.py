"""Why an association did not come about, in words that say what to do. Stands beside sender.py; sends no DICOM.

pynetdicom tells of a failed connection only that it failed; `diagnose` therefore looks once more, at TCP and TLS.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from pynetdicom.association import Association

from dicom_node.config import Destination
from dicom_node.dimse.tls import client_context

TLS_VERDICT_SECONDS = 1.0
"""With TLS 1.3 a refused certificate shows only after the handshake (RFC 8446 4.4.2.4): wait so long for the alert."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An association that did not come about."""

    reason: str
    """Free of PHI."""
    permanent: bool
    """True = it will be so until a person changes something."""


_PERMANENT: dict[tuple[int | None, int | None], str] = {
    (1, 1): "rejected without a reason given",
    (1, 2): "rejected: application context not supported",
    (1, 3): "our AE title {ours} is not known there: enter it in the destination's configuration",
    (1, 7): "its AE title is another than the one configured here (deliver.destinations.*.ae_title)",
    (2, 1): "rejected by its upper layer",
    (2, 2): "rejected: protocol version not supported",
}
_TRANSIENT: dict[tuple[int | None, int | None], str] = {
    (3, 1): "rejected for now: temporary congestion",
    (3, 2): "rejected for now: it holds as many associations as it can",
}


def rejected(association: Association, calling_ae_title: str) -> Refusal | None:
    """What an A-ASSOCIATE-RJ says (PS3.8 table 9-21: result 1 = permanent, 2 = transient); None = there was none."""
    primitive = association.acceptor.primitive
    if not association.is_rejected or primitive is None:
        return None
    key = (primitive.result_source, primitive.diagnostic)
    where = f"(source {key[0]}, reason {key[1]})"
    if primitive.result == 1:
        text = _PERMANENT.get(key, f"rejected for good {where}").format(ours=calling_ae_title)
        return Refusal(text, True)
    return Refusal(_TRANSIENT.get(key, f"rejected for now {where}"), False)


def diagnose(to: Destination, *, connected: bool, seconds: float, connect_seconds: float) -> Refusal:
    """No answer came at all: is it the network, TLS, or something that is not a DICOM port?"""
    place = f"{to.host}:{to.port}"
    if not connected or to.tls is not None:
        try:
            with socket.create_connection((to.host, to.port), connect_seconds) as plain:
                if to.tls is not None:
                    _shake_hands(to, plain)
        except ssl.SSLError as e:
            text = f"the TLS handshake fails ({e.reason or 'no reason given'}): certificates and CA on both sides"
            return Refusal(text, True)
        except OSError as e:
            return Refusal(f"no connection to {place} ({e.strerror or type(e).__name__})", False)
    text = f"{place} takes the connection, but within {seconds:.0f} s no association comes about: "
    hint = "is it DICOM?" if to.tls is not None else "is it DICOM, and without TLS?"
    return Refusal(text + hint, False)


def _shake_hands(to: Destination, plain: socket.socket) -> None:
    if to.tls is None:
        return
    with client_context(to.tls).wrap_socket(plain, server_hostname=to.host) as secured:
        secured.settimeout(TLS_VERDICT_SECONDS)
        try:
            secured.recv(1)
        except TimeoutError:  # it waits for our A-ASSOCIATE-RQ: TLS is well
            return
