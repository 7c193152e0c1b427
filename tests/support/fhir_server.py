"""A FHIR R4 server for tests: Patient and Observation, searched by POST as R4 says. And every way to answer badly."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

SYSTEM = "urn:oid:1.2.3.4"
LOINC, SCT, UCUM = "http://loinc.org", "http://snomed.info/sct", "http://unitsofmeasure.org"
FSH, EDV, VOLUME = (LOINC, "15067-2"), (LOINC, "11653-3"), (SCT, "118565006")
TESTIS, RIGHT, LEFT = (SCT, "40689003"), (SCT, "24028007"), (SCT, "7771000")


def concept(*codings: tuple[str, str]) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code} for system, code in codings]}


def patient(identifier: str = "PID1", *, logical: str = "p1", system: str = SYSTEM, **more: Any) -> dict[str, Any]:
    held = [{"system": system, "value": identifier}]
    return {"resourceType": "Patient", "id": logical, "identifier": held, "birthDate": "1990-02-03", **more}


def observation(
    code: tuple[str, str],
    value: float,
    unit: str,
    *,
    time: str = "2024-05-20T08:30:00+02:00",
    site: tuple[tuple[str, str], ...] = (),
    of: str = "p1",
    **more: Any,
) -> dict[str, Any]:
    made = {
        "resourceType": "Observation",
        "id": "o",
        "status": "final",
        "code": concept(code),
        "subject": {"reference": f"Patient/{of}"},
        "effectiveDateTime": time,
        "valueQuantity": {"value": value, "unit": unit, "system": UCUM, "code": unit},
    }
    if site:
        made["bodySite"] = concept(*site)
    return made | more


class FhirServer:
    """`with FhirServer(...) as server`: `server.url`; `server.asked` is what came in (method, path, form, headers)."""

    def __init__(
        self, *resources: dict[str, Any], token: str | None = None, tls: tuple[Path, Path] | None = None
    ) -> None:
        self.resources, self.token, self.page = list(resources), token, 100
        self.asked: list[tuple[str, str, dict[str, list[str]], dict[str, str]]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], bool] = lambda _handler: False
        """Answers instead of us; True = it did."""
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}/fhir"

    def __enter__(self) -> FhirServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def searches(self, resource: str) -> list[dict[str, list[str]]]:
        return [form for _, path, form, _ in self.asked if path == f"/fhir/{resource}/_search"]

    def _handler(outer) -> type[BaseHTTPRequestHandler]:  # noqa: N805  the handler's own self is another
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._serve({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._serve(parse_qs(body, strict_parsing=True))

            def _serve(self, form: dict[str, list[str]]) -> None:
                outer.asked.append((self.command, self.path, form, dict(self.headers)))
                with contextlib.suppress(OSError):
                    if outer.answer(self):
                        return
                    if outer.token is not None and self.headers.get("Authorization") != f"Bearer {outer.token}":
                        send(self, {"resourceType": "OperationOutcome"}, 401)
                        return
                    send(self, outer.respond(self.path, form))

        return Handler

    def respond(self, path: str, form: dict[str, list[str]]) -> dict[str, Any]:
        parts = urlsplit(path)
        if parts.path == "/fhir/metadata":
            return {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "status": "active"}
        if parts.path == "/fhir":  # a page of a search, as HAPI answers it
            start = int(parse_qs(parts.query)["from"][0])
            return self._bundle(self._last, start)
        if parts.path == "/fhir/Patient/_search":
            (identifier,) = form["identifier"]
            return self._bundle([r for r in self._of("Patient") if identifier in _identifiers(r)], 0)
        codes = form["code"][0].split(",")
        (of,) = form["patient"]
        found = [r for r in self._of("Observation") if _matches(r, of, codes, form)]
        self._last = sorted(found, key=lambda r: str(r.get("effectiveDateTime")), reverse=True)
        return self._bundle(self._last, 0)

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.resources if r["resourceType"] == kind]

    def _bundle(self, found: list[dict[str, Any]], start: int) -> dict[str, Any]:
        end = start + self.page
        links = [{"relation": "next", "url": f"{self.url}?from={end}"}] if end < len(found) else []
        return {
            "resourceType": "Bundle",
            "type": "searchset",
            "link": links,
            "entry": [{"resource": r} for r in found[start:end]],
        }


def _identifiers(resource: dict[str, Any]) -> list[str]:
    escape = str.maketrans({c: f"\\{c}" for c in "\\,|$"})
    return [f"{i['system']}|{i['value'].translate(escape)}" for i in resource["identifier"]]


def _matches(resource: dict[str, Any], of: str, codes: list[str], form: dict[str, list[str]]) -> bool:
    concepts = [resource["code"], *(c["code"] for c in resource.get("component", []))]
    held = {f"{c['system']}|{c['code']}" for one in concepts for c in one["coding"]}
    day = str(resource.get("effectiveDateTime", ""))[:10]
    within = all(day >= d[2:] if d.startswith("ge") else day <= d[2:] for d in form.get("date", [])) if day else True
    return resource["subject"]["reference"] == f"Patient/{of}" and bool(held & set(codes)) and within


def send(handler: BaseHTTPRequestHandler, value: Any, status: int = 200, kind: str = "application/fhir+json") -> bool:
    """One answer; bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


def drip(handler: BaseHTTPRequestHandler, stop: threading.Event, *, headers: bool) -> bool:
    """A byte now and then, for ever: never silent for long, never done."""
    if headers:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    else:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/fhir+json\r\nContent-Length: 1000\r\n\r\n")
    while not stop.is_set():
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    return True
