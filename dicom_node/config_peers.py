"""Who is talked to: AE titles, TLS, the destinations of results and the PACS that is asked. Parts of config.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dicom_node.config_base import Section, is_loopback


def _ae_title(value: Any) -> Any:
    """PS3.5 6.2 AE: 1..16 characters of the default repertoire, no backslash, not only spaces."""
    if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x5b\x5d-\x7e]{1,16}", value) or not value.strip():
        raise ValueError("an AE title: 1 to 16 printable ASCII characters without a backslash (PS3.5 table 6.2-1)")
    return value.strip()


AETitle = Annotated[str, BeforeValidator(_ae_title)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Tls(Section):
    """PEM files: our certificate chain, its key, and the CA that signs our peers (both sides present one)."""

    cert: Path
    key: Path
    ca: Path


class Destination(Section):
    ae_title: AETitle
    host: str
    port: Port
    tls: Tls | None = None
    objects: tuple[Literal["sr", "capture"], ...] = ("sr", "capture")
    sr: Literal["comprehensive3d", "enhanced"] = "comprehensive3d"
    capture: Literal["multiframe", "keyframes"] = "multiframe"
    charset: Literal["ISO_IR 192", "GB18030", "ISO_IR 100"] = "ISO_IR 192"
    commitment: bool = False
    accept_demonstration: bool = False
    check_identity: bool = False
    """Before sending: the PACS (`query`) knows the study under the same Patient ID and Accession Number, else hold."""

    @property
    def takes_demonstration(self) -> bool:
        """Demonstration results go only to loopback, or where the operator said so in writing."""
        return self.accept_demonstration or is_loopback(self.host)


class Retry(Section):
    first_seconds: float = Field(5, gt=0)
    max_seconds: float = Field(900, gt=0)
    give_up_hours: float = Field(72, gt=0)


class Deliver(Section):
    destinations: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")], Destination] = Field(
        default_factory=dict
    )
    retry: Retry = Retry()


class Query(Section):
    """The PACS as Query/Retrieve SCP (Study Root, FIND): for `require.series_count` and `check_identity`."""

    ae_title: AETitle
    host: str
    port: Port
    tls: Tls | None = None
    timeout_seconds: float = Field(10, gt=0)
    attempts: int = Field(3, ge=1)
    """So often it is asked before "no answer", "fewer here" or "unknown there" counts."""
    retry_seconds: float = Field(60, gt=0)
