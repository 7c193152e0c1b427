"""TLS for both roles, by the BCP 195 profile (PS3.15 B.12): TLS 1.2 or newer, forward secrecy, AEAD, and both sides
show a certificate of the CA in config.yaml. Files that change are loaded anew; open associations stay.

Host names are not compared: DICOM nodes are known by AE title and address, and their certificates rarely name a host.
The CA is therefore the gate; use one that signs nothing but DICOM nodes, and `allow: [{subject: …}]` to bind the AE
title of a peer to its certificate.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dicom_node.config import Tls
from dicom_node.errors import ConfigError

CIPHERS = "ECDHE+AESGCM"
"""For TLS 1.2; the suites of 1.3 all qualify."""


def server_context(tls: Tls) -> ssl.SSLContext:
    """For the listener: a peer without a certificate of our CA does not get past the handshake."""
    return _context(ssl.PROTOCOL_TLS_SERVER, tls)


def client_context(tls: Tls) -> ssl.SSLContext:
    """For a destination."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, tls)


def _context(protocol: int, tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    for key, action in (
        ("cert", lambda: context.load_cert_chain(tls.cert, tls.key)),
        ("ca", lambda: context.load_verify_locations(tls.ca)),
    ):
        try:
            action()
        except (OSError, ssl.SSLError) as e:  # SSLError is an OSError; named for the reader
            raise ConfigError(str(getattr(tls, key)), f"tls.{key}", f"a PEM file that loads ({e})") from None
    return context


class ReloadingContext:
    """Hands out a context made from the files as they are now. A renewal that cannot be loaded keeps the old one."""

    def __init__(
        self, tls: Tls, make: Callable[[Tls], ssl.SSLContext], on_failure: Callable[[ConfigError], None]
    ) -> None:
        self._tls, self._make, self._on_failure = tls, make, on_failure
        self._lock = threading.Lock()
        self._seen = self._state()
        self._context = make(tls)

    def get(self) -> ssl.SSLContext:
        """For one new connection."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                try:
                    self._context = self._make(self._tls)
                except (
                    ConfigError
                ) as e:  # half a renewal (the key is not there yet): looked at again when a file changes
                    self._on_failure(e)
            return self._context

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stamp(path) for path in (self._tls.cert, self._tls.key, self._tls.ca))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def subject_common_name(certificate: dict[str, Any] | None) -> str | None:
    """CN of a peer's certificate, as `SSLSocket.getpeercert` gives it."""
    for part in (certificate or {}).get("subject", ()):
        for name, value in part:
            if name == "commonName":
                return str(value)
    return None
