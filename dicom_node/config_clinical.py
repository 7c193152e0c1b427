"""The section `clinical` of config.yaml: where clinical values come from beside the study's own reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from dicom_node.config_base import Section, is_loopback

Origin: TypeAlias = Literal["sr", "fhir", "sidecar"]
ORIGINS: tuple[Origin, ...] = ("sr", "fhir", "sidecar")
Uri = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*:[^\s|,$\\]+$", max_length=256)]


class CodeName(Section):
    """Code Value and Coding Scheme Designator; in a FHIR answer the designator of an unknown system is its URI."""

    value: Annotated[str, Field(min_length=1, max_length=64)]
    scheme: Annotated[str, Field(min_length=1, max_length=256)]


class PrivateCode(Section):
    """What a vendor or a laboratory calls a quantity in its own words."""

    code: CodeName
    means: CodeName
    """The code of the quantity in engine.yaml."""
    model: str | None = None
    """Only in reports of this Manufacturer's Model Name; null = of any, and in FHIR."""
    unit: str | None = None
    """UCUM, where the source writes a unit of its own; null = the source's own unit must be UCUM."""
    laterality: Literal["R", "L"] | None = None


class PrivateSite(Section):
    """A body site of the source's own, or one that names the side too."""

    code: CodeName
    means: CodeName
    laterality: Literal["R", "L"] | None = None


class Fhir(Section):
    """A FHIR R4 server that holds Patient and Observation."""

    base_url: Annotated[str, Field(max_length=512)]
    identifier_systems: dict[Annotated[str, Field(max_length=64)], Uri] = Field(min_length=1)
    """Issuer of Patient ID (0010,0021) to Identifier.system; "" is for studies that name no issuer."""
    token_file: Path | None = None
    """Holds the bearer token; read for every study, so that it may be renewed."""
    ca: Path | None = None
    """PEM of the CA that signs the server; null = those of the system."""
    cert: Path | None = None
    key: Path | None = None
    """Our certificate and its key, where the server asks for one."""
    timeout_seconds: float = Field(10, gt=0, le=60)
    """For all questions about one study together."""
    max_answer_mb: float = Field(4, gt=0, le=64)

    @model_validator(mode="after")
    def _sound(self) -> Fhir:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url: a URL such as https://fhir.hospital.example/r4")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError("base_url: https, because Patient ID and birth date go over it (http on loopback only)")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url: without user, query and fragment; a secret belongs into token_file")
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert: cert and key together")
        return self


class Clinical(Section):
    sidecar: Path | None = None
    """Folder of JSON files (docs/schemas/sidecar.v1.schema.json)."""
    fhir: Fhir | None = None
    priority: tuple[Origin, ...] = ORIGINS
    """Whose value is used where several sources have one."""
    wait_seconds: float = Field(600, ge=0, le=86400)
    """How long a study waits for a source that does not answer, or for a value that its route requires."""
    codes: tuple[PrivateCode, ...] = ()
    sites: tuple[PrivateSite, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Clinical:
        if sorted(self.priority) != sorted(ORIGINS):
            raise ValueError(f"priority: each of {', '.join(ORIGINS)} once")
        return self


def resolved(section: Clinical, base: Path) -> Clinical:
    """Paths relative to the file that names them."""
    fhir = section.fhir and section.fhir.model_copy(
        update={
            name: None if (path := getattr(section.fhir, name)) is None else base / path
            for name in ("token_file", "ca", "cert", "key")
        }
    )
    return section.model_copy(update={"sidecar": section.sidecar and base / section.sidecar, "fhir": fhir})
