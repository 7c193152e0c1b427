"""config.yaml: one section per module, strict keys. An error names the file, the dotted key and what was expected.

Any string may be `{file: PATH}` (a secret kept elsewhere; relative to config.yaml). `shipped()` is where the packaged
tasks and the default configuration lie, inside and outside a checkout.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dicom_node import config_clinical, config_phases
from dicom_node.config_base import Section as _Section
from dicom_node.config_base import is_loopback as is_loopback
from dicom_node.config_clinical import Clinical
from dicom_node.config_peers import AETitle, Deliver, Port
from dicom_node.config_peers import Destination as Destination
from dicom_node.config_peers import Query as Query
from dicom_node.config_peers import Retry as Retry
from dicom_node.config_peers import Tls as Tls
from dicom_node.errors import ConfigError


def shipped() -> Path:
    """The folder that holds `engines/`, `config.yaml` and `deploy/`: in the wheel, else the checkout."""
    packaged = Path(__file__).parent / "_shipped"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent


def _network(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError('a network such as "10.1.0.0/16"')
    try:
        return str(ipaddress.ip_network(value, strict=False))
    except ValueError:
        raise ValueError('a network such as "10.1.0.0/16"') from None


class AllowedPeer(_Section):
    """Who may open an association: AE title and address; with TLS also the subject's common name."""

    ae_title: AETitle
    address: Annotated[str, BeforeValidator(_network)] = "0.0.0.0/0"
    subject: str | None = None


class Receive(_Section):
    ae_title: AETitle = "DICOM_NODE"
    extra_ae_titles: tuple[AETitle, ...] = ()
    host: str = "127.0.0.1"
    port: Port = 11112
    allow: tuple[AllowedPeer, ...] = ()
    tls: Tls | None = None
    max_associations: int = Field(64, ge=1, le=4096)
    max_associations_per_peer: int = Field(16, ge=1)
    reserved_associations: int | None = Field(None, ge=0)
    """Of `max_associations`, for peers that hold none: nobody, however busy, can keep another out. null = an eighth."""
    max_pending: int = Field(32, ge=1, le=4096)
    """Connections that have not yet asked for an association; half of them for addresses of `allow` only."""
    max_pending_per_peer: int = Field(8, ge=1)
    max_request_bytes: int = Field(65536, ge=1024, le=1 << 20)
    """Of an A-ASSOCIATE-RQ."""
    max_pdu: int = Field(131072, ge=4096, le=1 << 20)
    max_pdvs: int = Field(1_000_000, ge=100)
    """Presentation data values (fragments) of one message."""
    max_instance_mb: int = Field(2048, ge=1)
    handshake_timeout: float = Field(10, gt=0)
    request_timeout: float = Field(10, gt=0)
    idle_timeout: float = Field(60, gt=0)
    min_bytes_per_second: float = Field(1024, ge=0)
    """A message that comes more slowly, judged over each `idle_timeout`, is a stall that pretends to be alive."""
    release_timeout: float = Field(1, gt=0)
    priority_ae: tuple[AETitle, ...] = ()
    availability: bool = False
    """Accept Instance Availability Notifications (N-CREATE): a hint that a study is complete."""
    also_accept: tuple[str, ...] = ()
    """Further Storage SOP Class UIDs (vendor private classes): stored, never routed."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Receive:
        if not self.allow and not is_loopback(self.host):
            raise ValueError("allow: must list the peers, because host is not loopback ([] = anyone)")
        if (self.reserved_associations or 0) >= self.max_associations:
            raise ValueError("reserved_associations: must be less than max_associations")
        return self


FallbackCharset: TypeAlias = Literal[
    "GB18030", "ISO_IR 13", "ISO_IR 100", "ISO_IR 101", "ISO_IR 109", "ISO_IR 110", "ISO_IR 126", "ISO_IR 127",
    "ISO_IR 138", "ISO_IR 144", "ISO_IR 148", "ISO_IR 166", "ISO_IR 203", "ISO 2022 IR 149",
]  # fmt: skip


class Store(_Section):
    root: Path = Path("var")
    ledger: str | None = None
    """SQLAlchemy URL; null = SQLite in the root."""
    min_free_gb: float = Field(2, ge=0)
    keep_days: float = Field(7, gt=0)
    fallback_charset: FallbackCharset | None = None
    """For text without a Specific Character Set (0008,0005), or in another than it declares; null = UTF-8, Latin-1."""


class Assemble(_Section):
    quiet_seconds: float = Field(60, ge=0)
    force_after_seconds: float = Field(7200, gt=0)
    late: Literal["rerun", "ignore"] = "rerun"
    max_revisions: int = Field(3, ge=1)


class Engines(_Section):
    path: tuple[Path, ...] = (Path("engines"),)
    require_signature: bool = False


BodyPart: TypeAlias = Literal["THYROID", "KIDNEY", "LIVER", "SCROTUM"]
Scalar: TypeAlias = str | int | float | bool


class Regex(_Section):
    regex: str

    @model_validator(mode="after")
    def _compiles(self) -> Regex:
        try:
            re.compile(self.regex)
        except re.error as e:
            raise ValueError(f"regex: not a regular expression ({e})") from None
        return self


class Range(_Section):
    range: tuple[float, float]


class Exists(_Section):
    exists: bool


Matcher: TypeAlias = "Regex | Range | Exists | list[Scalar] | Scalar"
When: TypeAlias = dict[str, Matcher]

WHEN_KEYS = frozenset({"body_part", "modality", "contrast", "calling_ae", "called_ae"})
INDICATION_KEYS = WHEN_KEYS | {"roi", "clinical", "sr_finding"}


class Indication(_Section):
    """What establishes the task's indication: any one of these, or all of them."""

    any: tuple[dict[str, Matcher], ...] = ()
    all: tuple[dict[str, Matcher], ...] = ()

    @model_validator(mode="after")
    def _one(self) -> Indication:
        if bool(self.any) == bool(self.all):
            raise ValueError("either any: [...] or all: [...], with at least one matcher")
        return self


class RouteAssemble(_Section):
    quiet_seconds: float | None = Field(None, ge=0)


def _lower(value: Any) -> Any:
    return value.casefold() if isinstance(value, str) else value


class Require(_Section):
    min_frames: int | None = Field(None, ge=1)
    min_instances: int | None = Field(None, ge=1)
    phases: tuple[Annotated[config_phases.PhaseName, BeforeValidator(_lower)], ...] = ()
    clinical: tuple[str, ...] = ()
    series_count: bool = False
    """Ask the PACS (`query`) how many instances the selected series have; fewer here = incomplete."""


class Route(_Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
    when: When
    indication: Indication
    engine: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
    mode: Literal["live", "shadow"] = "live"
    deliver: tuple[str, ...] = ()
    priority: int = Field(0, ge=0, le=9)
    assemble: RouteAssemble = RouteAssemble()
    require: Require = Require()
    if_incomplete: Literal["run", "hold", "give_up"] = "give_up"
    hold_hours: float = Field(72, gt=0)
    """A held study is given up after so long."""
    not_assessable: Literal["none", "sr"] = "none"

    @model_validator(mode="after")
    def _keys(self) -> Route:
        _check_keys("when", self.when, WHEN_KEYS)
        for matcher in (*self.indication.any, *self.indication.all):
            _check_keys("indication", matcher, INDICATION_KEYS)
        if not self.when:
            raise ValueError("when: at least one condition")
        return self


def _check_keys(where: str, conditions: dict[str, Any], own: frozenset[str]) -> None:
    from pydicom.datadict import tag_for_keyword  # imported late: pydicom costs 0.2 s and `check` needs it only here

    for key in conditions:
        if key not in own and tag_for_keyword(key) is None:
            raise ValueError(f"{where}.{key}: one of {', '.join(sorted(own))}, or a DICOM keyword (PS3.6)")


class Infer(_Section):
    runtime: Literal["auto", "onnx", "openvino", "cuda", "tensorrt"] = "auto"
    devices: str = "auto"
    timeout_seconds: float = Field(120, gt=0)
    max_attempts: int = Field(3, ge=1)
    workers_per_device: int = Field(1, ge=1, le=16)
    memory_gb: float = Field(8, gt=0)
    replay_minutes: float = Field(60, ge=0)
    """Between two replays of the golden cases in an idle worker; 0 = never."""


class Capture(_Section):
    max_frames: int = Field(64, ge=1)
    max_mb: float = Field(40, gt=0)


class Report(_Section):
    manufacturer: str = "dicom-node"
    station_name: Annotated[str, Field(max_length=16)] = "DICOM_NODE"
    series_number: int = Field(9000, ge=1)
    uid_root: Annotated[str, Field(pattern=r"^[0-2](\.(0|[1-9][0-9]*))+$", max_length=30)] | None = None
    language: str = "en-US"
    capture: Capture = Capture()


class MetricsServer(_Section):
    host: str = "127.0.0.1"
    port: Port = 9108


class Log(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Audit(_Section):
    path: Path | None = None
    syslog: str | None = None


class Config(_Section):
    """The whole file."""

    receive: Receive = Receive()
    store: Store = Store()
    assemble: Assemble = Assemble()
    engines: Engines = Engines()
    routes: tuple[Route, ...] = ()
    phases: config_phases.Rules = config_phases.Rules()
    infer: Infer = Infer()
    report: Report = Report()
    deliver: Deliver = Deliver()
    query: Query | None = None
    clinical: Clinical = Clinical()
    metrics: MetricsServer = MetricsServer()
    log: Log = Log()
    audit: Audit = Audit()

    @model_validator(mode="after")
    def _references(self) -> Config:
        _check_query(self)
        names = [route.name for route in self.routes]
        for index, route in enumerate(self.routes):
            if names.count(route.name) > 1:
                raise ValueError(f"routes.{index}.name: used once only, {route.name!r} is used twice")
            for name in route.deliver:
                if name not in self.deliver.destinations:
                    known = ", ".join(self.deliver.destinations) or "none is defined"
                    raise ValueError(
                        f"routes.{index}.deliver: a name under deliver.destinations ({known}), not {name!r}"
                    )
        return self


def _check_query(config: Config) -> None:
    """A check that cannot be made must not look as if it were."""
    if config.query is not None:
        return
    asks = [f"routes.{n}.require.series_count" for n, route in enumerate(config.routes) if route.require.series_count]
    asks += [
        f"deliver.destinations.{n}.check_identity" for n, d in config.deliver.destinations.items() if d.check_identity
    ]
    if asks:
        raise ValueError(f"{asks[0]}: needs the section query (the PACS to ask)")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice: the second would silently win."""


def _no_duplicates(loader: Any, node: Any) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def _secrets(value: Any, base: Path, file: str, key: str) -> Any:
    """Replace `{file: PATH}` by the file's text, without its trailing line break."""
    if isinstance(value, dict):
        if set(value) == {"file"} and isinstance(value["file"], str):
            path = base / value["file"]
            try:
                return path.read_text().rstrip("\r\n")
            except OSError as e:
                raise ConfigError(file, key, f"a readable file, but {path} is not ({e.strerror})") from None
        return {k: _secrets(v, base, file, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_secrets(v, base, file, f"{key}.{i}") for i, v in enumerate(value)]
    return value


def parse(data: Any, *, file: str, base: Path) -> Config:
    """Check already parsed YAML. Relative paths are resolved against `base`."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(file, "", "a mapping of sections (receive, store, …)")
    try:
        config = Config.model_validate(_secrets(data, base, file, ""))
    except ValidationError as e:
        raise _first_error(e, file) from None
    return _resolve(config, base)


def load(path: Path) -> Config:
    """Read and check config.yaml. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(str(path), "", f"a readable file ({e})") from None
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  a SafeLoader subclass
    except yaml.YAMLError as e:
        raise ConfigError(str(path), "", f"YAML ({' '.join(str(e).split())})") from None
    return parse(data, file=str(path), base=path.resolve().parent)


_MATCHER_FORMS = "a value, a list of values, {regex: …}, {range: [low, high]} or {exists: true}"
_KINDS = {"missing": "required", "extra_forbidden": "no such key"}


def _first_error(error: ValidationError, file: str) -> ConfigError:
    """One error at a time: the first, with the union members that pydantic puts into the path left out."""
    first = error.errors(include_url=False)[0]
    parts = [
        str(p) for p in first["loc"] if not re.search(r"[\[(]", str(p)) and str(p) not in ("Regex", "Range", "Exists")
    ]
    message = _KINDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "missing" and any("Regex" in str(p) for p in first["loc"]):  # none of the Matcher's forms
        return ConfigError(file, ".".join(parts[:-1]), _MATCHER_FORMS)
    if re.match(r"^[a-z_]+(\.[a-zA-Z0-9_]+)*: ", message) and first["type"] == "value_error":
        key, _, message = message.partition(": ")
        parts.append(key)
    return ConfigError(file, ".".join(parts), message)


def _resolve(config: Config, base: Path) -> Config:
    """Make every path of the file absolute, relative to the file (not to the working directory)."""

    def tls(section: Tls | None) -> Tls | None:
        return section and Tls(cert=base / section.cert, key=base / section.key, ca=base / section.ca)

    destinations = {n: d.model_copy(update={"tls": tls(d.tls)}) for n, d in config.deliver.destinations.items()}
    return config.model_copy(
        update={
            "receive": config.receive.model_copy(update={"tls": tls(config.receive.tls)}),
            "store": config.store.model_copy(update={"root": base / config.store.root}),
            "engines": config.engines.model_copy(update={"path": tuple(base / p for p in config.engines.path)}),
            "query": config.query and config.query.model_copy(update={"tls": tls(config.query.tls)}),
            "deliver": config.deliver.model_copy(update={"destinations": destinations}),
            "clinical": config_clinical.resolved(config.clinical, base),
            "audit": config.audit.model_copy(update={"path": config.audit.path and base / config.audit.path}),
        }
    )
