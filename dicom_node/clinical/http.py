"""HTTP to one FHIR server: TLS, bearer token, bounded answers. httpx only here.

No environment (no proxy, no .netrc), no redirects, no cookies of consequence, no compressed answers (a small one may
unpack to gigabytes). Errors say what went wrong, never what was asked: the question holds Patient ID.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dicom_node.clinical.model import ClinicalCode
from dicom_node.config_clinical import Fhir
from dicom_node.errors import ClinicalSourceError

if TYPE_CHECKING:
    import httpx

MAX_TOKEN_BYTES = 16 * 1024
_JSON = ("application/fhir+json", "application/json")
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


def tls_context(section: Fhir) -> ssl.SSLContext:
    """TLS 1.2 or newer; the server's certificate and name are checked. Raises ClinicalSourceError."""
    try:
        context = ssl.create_default_context(cafile=section.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if section.cert is not None:
            context.load_cert_chain(section.cert, section.key)
    except (OSError, ValueError) as e:  # SSLError is an OSError
        text = f"certificate files cannot be used ({type(e).__name__})"
        raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_DENIED, text, again=True) from None
    return context


def token_of(section: Fhir) -> str | None:
    """Read anew for every study: tokens are renewed. Raises ClinicalSourceError."""
    if section.token_file is None:
        return None
    try:
        with section.token_file.open("rb") as file:
            text = file.read(MAX_TOKEN_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not text or not text.isprintable() or " " in text:
        said = "token_file cannot be read, or holds no bearer token"
        raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_DENIED, said, again=True)
    return text


@asynccontextmanager
async def open_connection(section: Fhir) -> AsyncIterator[Connection]:
    """For the questions about one study."""
    import httpx

    headers = {"Accept": _JSON[0], "Accept-Encoding": "identity", "User-Agent": "dicom-node"}
    if (token := token_of(section)) is not None:
        headers["Authorization"] = f"Bearer {token}"
    verify = tls_context(section) if section.base_url.startswith("https:") else False
    async with httpx.AsyncClient(
        headers=headers, verify=verify, trust_env=False, follow_redirects=False, timeout=section.timeout_seconds
    ) as client:
        yield Connection(client, section.base_url.rstrip("/"), int(section.max_answer_mb * 1e6))


class Connection:
    """Requests below the base URL."""

    def __init__(self, client: httpx.AsyncClient, base: str, limit: int) -> None:
        self._client, self._base, self._limit = client, base, limit

    async def get(self, path: str) -> Mapping[str, Any]:
        """A resource."""
        return await self._answer("GET", f"{self._base}/{path}")

    async def search(self, resource: str, query: Mapping[str, str | list[str]]) -> Mapping[str, Any]:
        """A search by POST (R4 3.1.0.9)."""
        return await self._answer("POST", f"{self._base}/{resource}/_search", dict(query))

    async def follow(self, link: str) -> Mapping[str, Any]:
        """The next page: the token goes to our server only, whatever the link says."""
        ours, theirs = urlsplit(self._base), urlsplit(link)
        if (ours.scheme, ours.netloc.lower()) != (theirs.scheme, theirs.netloc.lower()):
            raise _invalid("the next page lies on another server")
        return await self._answer("GET", link)

    async def _answer(self, method: str, url: str, form: dict[str, str | list[str]] | None = None) -> Mapping[str, Any]:
        import httpx

        try:
            async with self._client.stream(method, url, data=form) as response:
                self._judge(response)
                body = bytearray()
                async for block in response.aiter_raw():
                    body += block
                    if len(body) > self._limit:
                        raise _invalid(f"an answer of more than {self._limit / 1e6:g} MB")
        except (httpx.TransportError, ssl.SSLError) as e:  # under TLS 1.3 a refusal of our certificate comes unwrapped
            text = _CAUSES.get(type(e).__name__, type(e).__name__)
            if isinstance(e, ssl.SSLError):
                text = "TLS ended by the server; it may want a certificate of ours"
            if isinstance(e, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(e):
                text = "its certificate is not signed by the CA, or names another host"
            raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_UNREACHABLE, text, again=True) from None
        except (httpx.InvalidURL, httpx.StreamError):
            raise _invalid("a link or an answer that is no HTTP") from None
        return _parsed(bytes(body))

    def _judge(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (401, 403):
            text = f"the server answers {status}: the token or its rights"
            raise ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_DENIED, text, again=True)
        if status != 200:
            again = status in _AGAIN
            code = ClinicalCode.CLINICAL_SOURCE_UNREACHABLE if again else ClinicalCode.CLINICAL_SOURCE_INVALID
            raise ClinicalSourceError(code, f"the server answers {status}", again=again)
        kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in _JSON:
            raise _invalid("the answer is not application/fhir+json")
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise _invalid("the answer is compressed")


_CAUSES = {
    "ConnectError": "no connection",
    "ConnectTimeout": "no connection in time",
    "ReadTimeout": "no answer in time",
    "RemoteProtocolError": "the connection ended within the answer, or it is no HTTP",
}


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise _invalid("the answer is not JSON") from None
    if not isinstance(value, dict):
        raise _invalid("the answer is not a FHIR resource")
    return value


def _invalid(text: str) -> ClinicalSourceError:
    return ClinicalSourceError(ClinicalCode.CLINICAL_SOURCE_INVALID, text, again=False)
