"""The log: one JSON object a line on stderr, about associations, studies and jobs; never about patients.

Stands under every stage, imports none. A `Log` is passed by constructor; there is no global logger.

What keeps patients out, in the order of the processors:
1. a field with a forbidden name (patient_name, accession_number, …) is dropped and its name listed under `scrubbed`;
2. a value that is not plain (a Dataset, bytes, an exception) is replaced by the name of its type;
3. instance UIDs inside text are replaced by their pseudonym: HMAC-SHA256 under a secret of this store root, so lines
   of one study can be joined, and nobody without the root can tell which study. UIDs of the standard stay readable;
4. no exception is ever formatted: a line says its type and place.
Messages of pydicom and pynetdicom quote data elements, therefore only their type and place are logged, not their text.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

FORBIDDEN = re.compile(
    r"patient|birth|accession|physician|operators?(name|id)|performer|issuer|phone|institution|department"
    r"|description|comment|history|medicalrecord|^mrn$|^ssn$|personname|^dataset$|pixeldata|elementvalue"
)
"""Searched in the lower-cased name without underscores: attributes of the Patient, Visit and Study modules (PS3.3 C.2,
C.3, C.7.1, C.7.2) that identify or describe a person."""
_ALLOWED_NAMES = frozenset({"patient_conflict"})

# An instance UID has at least five components or is UUID-derived (PS3.5 B.2); 1.2.840.10008 is the standard's own root.
_UID = re.compile(r"(?<![\d.])(?!1\.2\.840\.10008\.)(?:2\.25\.\d{16,39}|[0-2](?:\.\d+){5,})(?![\d.]*\d)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a line break in a value must not begin a line of the log
_MAX_TEXT = 500
_MAX_ITEMS = 50
_LIBRARIES = ("pydicom", "pynetdicom", "highdicom")


def pseudonym(secret: bytes, uid: str) -> str:
    """16 hex digits that stand for a UID wherever only its identity matters."""
    return hmac.digest(secret, uid.strip("\0 ").encode(), "sha256").hex()[:16]


def load_secret(root: Path) -> bytes:
    """The secret of this store root, made on first use (0600). Two processes that start together get the same one."""
    path = root / "run" / "hmac.key"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    own = path.with_name(f".hmac.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(own, path)  # fails where another process was first: then its secret counts
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return path.read_bytes()


class _Scrubber:
    """A structlog processor: drops forbidden fields, keeps plain values only, hides instance UIDs."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> EventDict:
        clean: dict[str, Any] = {}
        dropped: list[str] = []
        for name, value in event.items():
            self._keep(clean, dropped, str(name), value)
        if dropped:
            clean["scrubbed"] = sorted(dropped)
        return clean

    def _keep(self, clean: dict[str, Any], dropped: list[str], name: str, value: Any) -> None:
        if name not in _ALLOWED_NAMES and FORBIDDEN.search(name.lower().replace("_", "")):
            dropped.append(self._text(name))
        else:
            clean[name] = self._plain(value, dropped)

    def _plain(self, value: Any, dropped: list[str]) -> Any:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if type(value) is str or (isinstance(value, str) and type(value).__module__.startswith("dicom_node.")):
            return self._text(value)  # our own StrEnums are text; pydicom's UID and PersonName are not
        if type(value) in (list, tuple, set, frozenset):
            items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
            return [self._plain(item, dropped) for item in items[:_MAX_ITEMS]]
        if type(value) is dict:
            inner: dict[str, Any] = {}
            for key, item in list(value.items())[:_MAX_ITEMS]:
                self._keep(inner, dropped, str(key), item)
            return inner
        if isinstance(value, Path):
            return self._text(str(value))
        if type(value).__name__ == "UID":
            return self._text(str(value))
        return f"<{type(value).__name__}>"

    def _text(self, value: str) -> str:
        text = _UID.sub(lambda match: "uid:" + pseudonym(self._secret, match[0]), str(value)[: 4 * _MAX_TEXT])
        return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)[:_MAX_TEXT]


class _Lines:
    """One `write` a line, so lines of several processes do not mix; a closed stderr must not stop the line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the stream is closed
                pass

    debug = info = warning = error = msg


def _discard(_logger: Any, _method: str, _event: EventDict) -> EventDict:
    raise structlog.DropEvent


class Log:
    """Bound fields, four levels, and pseudonyms. `event` is a constant snake_case word; what varies is a field."""

    def __init__(self, logger: FilteringBoundLogger, secret: bytes) -> None:
        self._logger, self._secret = logger, secret

    @classmethod
    def open(
        cls,
        *,
        level: str = "info",
        format: Literal["json", "console"] = "json",  # noqa: A002  the name of the key in config.yaml
        secret: bytes,
        stream: TextIO | None = None,
    ) -> Log:
        """A log on `stream` (stderr). `secret` is `load_secret(root)`."""
        stream = stream if stream is not None else sys.stderr
        last: Any = (
            structlog.processors.JSONRenderer(ensure_ascii=False)
            if format == "json"
            else structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), timestamp_key="at", exception_formatter=lambda *_: None
            )
        )
        logger = structlog.wrap_logger(
            _Lines(stream),
            processors=[
                structlog.processors.add_log_level,
                _Scrubber(secret),
                structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
                last,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
            context_class=dict,
            cache_logger_on_first_use=False,
        )
        return cls(logger.bind(), secret)

    @classmethod
    def null(cls) -> Log:
        """A log that writes nothing, for tests and for one-off commands."""
        logger = structlog.wrap_logger(
            None, processors=[_discard], wrapper_class=structlog.make_filtering_bound_logger(LEVELS["error"])
        )
        return cls(logger.bind(), b"null")

    def bind(self, **fields: object) -> Log:
        """The same log with `fields` on every line, for example `association=…` or `job=…`."""
        return Log(self._logger.bind(**fields), self._secret)

    def uid(self, uid: str) -> str:
        """The pseudonym of a Study, Series or SOP Instance UID, as this log shows it."""
        return pseudonym(self._secret, uid)

    def debug(self, event: str, **fields: object) -> None:
        """For developers."""
        self._logger.debug(event, **fields)

    def info(self, event: str, **fields: object) -> None:
        """What happened to a study or an association."""
        self._logger.info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something failed and will be tried again, or a peer did something wrong."""
        self._logger.warning(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Somebody should look."""
        self._logger.error(event, **fields)


class Section(Protocol):
    """`log` of config.yaml, as far as this module needs it."""

    @property
    def level(self) -> str: ...
    @property
    def format(self) -> Literal["json", "console"]: ...


def make_log(section: Section, root: Path) -> Log:
    """The log of a process that is just starting: opened, and everything else that would write to stderr made quiet."""
    log = Log.open(level=section.level, format=section.format, secret=load_secret(root))
    quiet_libraries(log)
    quiet_values()
    return log


def place_of(trace: TracebackType | None) -> str:
    """`file.py:line` of the innermost frame: with the type, all a line says of an exception."""
    frames = traceback.extract_tb(trace)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


class _LibraryHandler(logging.Handler):
    """Says that a library complained, where and how often not; its text may quote data elements and is left out."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        say = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        say("library_message", library=record.name, place=f"{record.filename}:{record.lineno}", error=error)


def quiet_values() -> None:
    """Once a process: pydicom's checks on reading warn with the value they dislike, and a value may be a name."""
    import pydicom.config  # not at import: the command line opens no log and needs no pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


def quiet_libraries(log: Log, loggers: Mapping[str, int] | None = None) -> None:
    """Once, at the start of a process: let DICOM libraries, warnings and dying threads speak through `log` only.

    pynetdicom prints data sets at debug level and pydicom quotes values in its warnings; both are PHI.
    """
    handler = _LibraryHandler(log)
    for name, level in (loggers or dict.fromkeys(_LIBRARIES, logging.WARNING)).items():
        library = logging.getLogger(name)
        library.setLevel(level)
        library.handlers[:] = [handler]
        library.propagate = False

    def show(
        message: Warning | str,  # noqa: ARG001  never shown
        category: type[Warning],
        filename: str,
        lineno: int,
        *_: object,
        **__: object,
    ) -> None:
        log.debug("library_warning", error=category.__name__, place=f"{Path(filename).name}:{lineno}")

    warnings.showwarning = show
    threading.excepthook = lambda args: log.error(
        "thread_died",
        error=args.exc_type.__name__,
        place=place_of(args.exc_traceback),
        thread=args.thread.name if args.thread else "",
    )
