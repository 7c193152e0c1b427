"""The ledger: opens the database and hands out transactions. One writing connection in one process.

Why one: SQLite before 3.51.3 can corrupt a WAL database when two connections write and checkpoint at once
(sqlite.org/wal.html#walresetbug), and Debian 12 ships 3.40. Readers elsewhere (`open_read_only`) never checkpoint.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicom_node.errors import LedgerError
from dicom_node.store import schema

Clock = Callable[[], float]
LEDGER_FILE = "ledger.sqlite"


class Ledger:
    """`with ledger.write() as tx:` is one durable transaction; everything in it happens or nothing does.

    `on_commit` is called after each commit that changed something; the service wakes stages with it: those that the
    transaction names by `wakes`, else all. A claim, and what was delivered, leave nothing for another: `wakes=()`.
    """

    def __init__(self, root: Path, url: str | None = None, *, clock: Clock = time.time) -> None:
        self.clock = clock
        self.on_commit: Callable[[Collection[str] | None], None] = lambda _stages: None
        self._lock = threading.RLock()
        self._engine = sa.create_engine(
            url or f"sqlite:///{root / LEDGER_FILE}",
            poolclass=sa.pool.StaticPool,
            connect_args={"check_same_thread": False} if _is_sqlite(url) else {},
        )
        if _is_sqlite(url):
            sa.event.listen(self._engine, "connect", _durable_sqlite)
            sa.event.listen(self._engine, "begin", _begin_immediate)
        self._open()

    def _open(self) -> None:
        try:
            with self._engine.begin() as tx:
                if self._engine.dialect.name == "sqlite":
                    verdict = tx.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                    if verdict != "ok":
                        raise LedgerError(
                            f"the ledger is damaged ({verdict}): restore it, or move it away and start: "
                            "the node indexes the stored files anew"
                        )
                schema.metadata.create_all(tx)
                version = tx.execute(sa.select(schema.meta.c.value).where(schema.meta.c.key == "schema")).scalar()
                if version is None:
                    tx.execute(schema.meta.insert().values(key="schema", value=str(schema.SCHEMA_VERSION)))
                elif int(version) > schema.SCHEMA_VERSION:
                    raise LedgerError(
                        f"the ledger has schema {version}, this version of dicom-node knows "
                        f"{schema.SCHEMA_VERSION}: run the newer version"
                    )
        except sa.exc.DBAPIError as e:
            raise LedgerError(f"the ledger cannot be opened: {e.orig}") from e

    @contextmanager
    def write(self, *, wakes: Collection[str] | None = None) -> Iterator[sa.Connection]:
        """One transaction on the only writing connection. Raises sqlalchemy.exc.DBAPIError."""
        with self._lock, self._engine.begin() as tx:
            before = _changes(tx)
            yield tx
            changed = before is None or _changes(tx) != before
        if changed and wakes != ():  # each stage that is woken asks the ledger, and holds up the one that has work
            self.on_commit(wakes)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Read through the same connection, under the same lock (the stages' reads are short)."""
        with self._lock, self._engine.connect() as connection:
            yield connection

    def checkpoint(self) -> None:
        """Fold the write-ahead log back, so that it does not grow without end."""
        if self._engine.dialect.name == "sqlite":
            with self._lock, self._engine.connect() as connection:
                raw = connection.connection.dbapi_connection
                assert raw is not None  # noqa: S101  a checked-out connection has one
                raw.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Close the connection; the ledger is durable at every commit, so nothing is flushed here."""
        with self._lock:
            self._engine.dispose()


def open_read_only(root: Path, url: str | None = None) -> sa.Engine:
    """For the command line beside a running node: reads, never writes, never checkpoints."""
    if not _is_sqlite(url):
        return sa.create_engine(url or "")
    path = root / LEDGER_FILE
    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: has this node run yet?")
    return sa.create_engine(
        "sqlite://",
        poolclass=sa.pool.StaticPool,
        creator=lambda: sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False, timeout=10
        ),
    )


def add_event(tx: sa.Connection, at: float, study_uid: str | None, code: str, text: str) -> None:
    """Append to what happened, in words an operator understands. `text` is free of PHI."""
    tx.execute(schema.event.insert().values(at=at, study_uid=study_uid, code=code, text=text))


def has_event(tx: sa.Connection, study_uid: str, code: str) -> bool:
    """Whether this happened to the study already."""
    same = sa.select(schema.event.c.id).where(schema.event.c.study_uid == study_uid, schema.event.c.code == code)
    return tx.execute(same.limit(1)).first() is not None


def one(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A row as a plain dict."""
    return None if row is None else dict(row)


def _changes(tx: sa.Connection) -> int | None:
    """Rows this connection has ever changed; None where the driver does not say."""
    count: int | None = getattr(tx.connection.dbapi_connection, "total_changes", None)
    return count


def _is_sqlite(url: str | None) -> bool:
    return url is None or url.startswith("sqlite")


def _durable_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's "begin" event below opens the transaction, not the driver
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=30000",
        "foreign_keys=ON",
        "wal_autocheckpoint=1000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
