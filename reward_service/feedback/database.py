"""A SQLite file or a PostgreSQL server: opening, migrating, and transactions that wait their turn.

SQLite keeps a write-ahead log, so that several processes may read and write at once on one
machine, and flushes every commit to the disk: what was acknowledged survives a kill. Any other
SQLAlchemy URL names a server (``postgresql+psycopg://...``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError

from reward_service.feedback.schema import FIRST, HEAD

_TRIES = 5
_MIGRATION_LOCK = 0x726C6866  # of PostgreSQL: one process at a time creates and migrates
_MIGRATIONS = Path(__file__).parent / "migrations"

Result = TypeVar("Result")


class Database:
    """The open store, shared by all that reads and writes it. Safe for threads.

    Example:
        >>> with Database(Path("runs/x/feedback.sqlite")) as database:
        ...     database.write(lambda connection: connection.execute(...))
    """

    def __init__(self, location: Path | str) -> None:
        """Open, create where there is nothing yet, and bring an older store up to date.

        Args:
            location: A file for SQLite, or any SQLAlchemy URL.

        Raises:
            ValueError: Not a database, one with other tables, or one of a newer version.
        """
        plain = str(location)
        if "://" in plain:
            url = make_url(plain)
        else:
            Path(plain).parent.mkdir(parents=True, exist_ok=True)
            url = make_url("sqlite://").set(database=plain)
        self.shown = url.render_as_string(hide_password=True)
        """The location without its password, for messages."""
        self.is_sqlite = url.get_backend_name() == "sqlite"
        try:
            # One more connection than the threads that serve the page.
            pool: dict[str, Any] = {} if self.is_sqlite else {"pool_size": 10, "max_overflow": 31}
            self._engine = create_engine(url, pool_pre_ping=not self.is_sqlite, **pool)
        except (ArgumentError, ModuleNotFoundError) as error:
            raise ValueError(
                f"{self.shown} cannot be used as a database: {error}: check the URL, and that "
                "its driver is installed (PostgreSQL: pip install ray-rlhf[postgres])"
            ) from None
        # SQLite has one writer: threads queue here instead of polling the file's lock.
        self._writer: AbstractContextManager[Any] = (
            threading.Lock() if self.is_sqlite else nullcontext()
        )
        if self.is_sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        try:
            self._create_or_migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` in one transaction; again when another writer got in between.

        When it returns, what ``work`` wrote is on the disk.
        """
        for tries in range(_TRIES):
            try:
                with self._writer, self._engine.connect() as connection:
                    with connection.execution_options(rlhf_writes=True).begin():
                        return work(connection)
            except (IntegrityError, OperationalError):
                if tries == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def read(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` in one transaction that sees one state of the store."""
        with self._engine.connect() as connection, connection.begin():
            return work(connection)

    def forget_deleted(self) -> None:
        """What was deleted leaves the files too.

        SQLite has overwritten it in the database (``secure_delete``); here its write-ahead log is
        emptied. A server's tables are vacuumed; its own log and backups are its administrator's.

        Raises:
            RuntimeError: Somebody reads the SQLite file for so long that its log stays.
        """
        with self._engine.connect() as connection:
            autocommit = connection.execution_options(isolation_level="AUTOCOMMIT")
            raw = autocommit.connection.dbapi_connection
            if not self.is_sqlite:
                autocommit.execute(text("VACUUM"))
                return
            assert raw is not None
            # Through the driver: SQLAlchemy would open a transaction first. Waits for readers.
            cursor = raw.cursor()
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            found = cursor.fetchone()
            assert found is not None
        if found[0]:
            raise RuntimeError(
                f"the rows are deleted, but {self.shown}-wal may still hold them because another "
                "process is reading: stop the page, then open the store once (rlhf feedback stats)"
            )

    def _create_or_migrate(self) -> None:
        try:
            if self.read(self._revision) == HEAD:
                return
            self.write(self._migrate)
        except DatabaseError as error:
            raise ValueError(f"{self.shown} cannot be opened as a database: {error.orig}") from None

    def _revision(self, connection: Connection) -> str | None:
        """The store's revision; ``None`` for an empty database.

        Raises:
            ValueError: Tables of something else.
        """
        existing = set(inspect(connection).get_table_names())
        if "alembic_version" in existing and "annotators" in existing:
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return str(found)
        if "feedback_schema" in existing:
            version = connection.execute(text("SELECT version FROM feedback_schema")).scalar()
            return FIRST if version == 1 else f"schema version {version}"
        if existing:
            raise ValueError(
                f"{self.shown} holds other tables ({sorted(existing)[0]}, ...) and is no "
                "store of judgements: give another file or database"
            )
        return None

    def _migrate(self, connection: Connection) -> None:
        # Heavy to import, and needed once in the life of a store.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        if not self.is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        revision = self._revision(connection)
        if revision == HEAD:
            return  # another process was faster
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
        if revision is not None and revision not in known:
            raise ValueError(
                f"{self.shown} has revision {revision!r}, this program knows "
                f"{', '.join(reversed(known))}: use the version of ray-rlhf that wrote it"
            )
        if revision == FIRST and "alembic_version" not in inspect(connection).get_table_names():
            command.stamp(config, FIRST)
        command.upgrade(config, "head")


def _configure_sqlite(connection: Any, _: Any) -> None:
    # Transactions are begun by hand: the driver's own begin too late to wait for a lock.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=30000",
        "foreign_keys=ON",
        "secure_delete=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once. Upgrading a reader that saw an older state would fail
    # immediately, whatever the timeout.
    writes = connection.get_execution_options().get("rlhf_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
