"""The HTTP door to the metrics: /metrics, /healthz and /readyz, for Prometheus and a supervisor.

Stands above metrics.py, imports nothing else of the node. Bounded: few hands, each with a time-out; nothing is changed
through it, and nothing here names a patient or a study.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dicom_node.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Health:
    """What /healthz and /readyz say. `reasons`: one PHI-free sentence for everything that is not well."""

    alive: bool
    """False = the process should be restarted: a loop stands still."""
    ready: bool
    """Studies sent now are stored and worked on: listening, ledger writable, engines loaded, decoders present."""
    reasons: tuple[str, ...] = ()


class MetricsServer(ThreadingHTTPServer):
    """Bounded: at most so many requests at once, each with a time-out; more are dropped."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], metrics: Metrics, health: Callable[[], Health]) -> None:
        self.metrics, self.health = metrics, health
        self._free = threading.BoundedSemaphore(8)
        super().__init__(address, _Handler)

    def close(self) -> None:
        """Stop answering and give the port back."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Refuse the connection when all hands are busy, instead of one more thread."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One request in its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = 5
    server_version = "dicom-node"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", self.server.metrics.exposition())
        elif path == "/healthz":
            health = self.server.health()
            self._json(200 if health.alive else 503, {"alive": health.alive})
        elif path == "/readyz":
            health = self.server.health()
            self._json(200 if health.ready else 503, asdict(health))
        else:
            self._json(404, {"paths": ["/metrics", "/healthz", "/readyz"]})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self._answer(status, "application/json", json.dumps(body).encode() + b"\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it so
        """Scrapes are not logged."""


def serve(metrics: Metrics, host: str, port: int, health: Callable[[], Health]) -> MetricsServer:
    """/metrics, /healthz and /readyz on threads of their own; `port` 0 = any (`server.server_address`)."""
    server = MetricsServer((host, port), metrics, health)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
