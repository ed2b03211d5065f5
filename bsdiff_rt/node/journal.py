"""The journal of a DICOM node: what was received, what became of it, and what was sent. Torch-free.

An SQLite file says it all, so that a node that is killed at any point goes on where it was:

    received -> done -> waiting, sending, sent (for each destination)
             -> refused or failed, with a reason

A result that was sent to a destination that offers storage commitment is then wanted, asked, and done or failed.
It holds no element of a header but the SOP Instance UIDs of results.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bsdiff_rt.errors import SettingsError

State = Literal["received", "done", "refused", "failed"]

VERSION = 2
MOST_ASKS = 3  # how often a destination is asked to answer for one result
_SCHEMA = """
CREATE TABLE objects (
  id INTEGER PRIMARY KEY,
  sha256 TEXT NOT NULL UNIQUE,
  sender TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  received_at REAL NOT NULL,
  state TEXT NOT NULL DEFAULT 'received' CHECK (state IN ('received', 'done', 'refused', 'failed')),
  starts INTEGER NOT NULL DEFAULT 0,
  reason TEXT,
  ended_at REAL,
  result_bytes INTEGER NOT NULL DEFAULT 0,
  has_files INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX waiting ON objects (id) WHERE state = 'received';
CREATE INDEX kept ON objects (id) WHERE has_files;
CREATE INDEX times ON objects (received_at);
CREATE TABLE sendings (
  result_uid TEXT NOT NULL,
  destination TEXT NOT NULL,
  object INTEGER NOT NULL REFERENCES objects (id) ON DELETE CASCADE,
  state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'sending', 'sent')),
  tries INTEGER NOT NULL DEFAULT 0,
  reason TEXT,
  sent_at REAL,
  commitment TEXT NOT NULL DEFAULT 'none' CHECK (commitment IN ('none', 'wanted', 'asked', 'done', 'failed')),
  asks INTEGER NOT NULL DEFAULT 0,
  asked_at REAL,
  transaction_uid TEXT,
  PRIMARY KEY (result_uid, destination)
);
CREATE INDEX unsent ON sendings (destination, object) WHERE state != 'sent';
CREATE INDEX of_object ON sendings (object);
CREATE INDEX uncommitted ON sendings (destination, object) WHERE commitment IN ('wanted', 'asked');
"""
# From version 1, which knew no storage commitment.
_UPGRADE = """
ALTER TABLE sendings ADD COLUMN commitment TEXT NOT NULL DEFAULT 'none'
  CHECK (commitment IN ('none', 'wanted', 'asked', 'done', 'failed'));
ALTER TABLE sendings ADD COLUMN asks INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sendings ADD COLUMN asked_at REAL;
ALTER TABLE sendings ADD COLUMN transaction_uid TEXT;
CREATE INDEX uncommitted ON sendings (destination, object) WHERE commitment IN ('wanted', 'asked');
"""
# An object that nothing will be done to any more.
_FINISHED = """state != 'received' AND NOT EXISTS (
  SELECT 1 FROM sendings WHERE sendings.object = objects.id
  AND (sendings.state != 'sent' OR sendings.commitment IN ('wanted', 'asked')))"""


@dataclass(frozen=True)
class Waiting:
    """An X-ray to process: its number, the SHA-256 of its file, and how often processing it was begun."""

    number: int
    sha256: str
    starts: int


@dataclass(frozen=True)
class Sending:
    """A result to send.

    Attributes:
        number: of the X-ray.
        sha256: of the X-ray's file.
        result_uid: SOP Instance UID of the result.
        begun: whether sending it was begun before, so that it may have arrived.
        received_at: when the X-ray was received, seconds since 1970.
    """

    number: int
    sha256: str
    result_uid: str
    begun: bool
    received_at: float


@dataclass(frozen=True)
class Uncommitted:
    """A result that a destination is to be asked to answer for.

    Attributes:
        number: of the X-ray.
        sha256: of the X-ray's file.
        result_uid: SOP Instance UID of the result.
        asks: how often it was asked before.
    """

    number: int
    sha256: str
    result_uid: str
    asks: int


@dataclass(frozen=True)
class Line:
    """One X-ray on the status page.

    Attributes:
        number: of the X-ray.
        sender: AE title that sent it.
        received_at, ended_at: times, seconds since 1970.
        state: what became of it.
        reason: why it was refused, failed or not sent yet, or a remark about its result.
        sent, unsent: number of destinations that have the result, and that wait for it.
        committed, uncommitted: number of destinations that answer for it (storage commitment), and of those that were
            or will be asked to, and do not.
    """

    number: int
    sender: str
    received_at: float
    ended_at: float | None
    state: State
    reason: str | None
    sent: int
    unsent: int
    committed: int = 0
    uncommitted: int = 0


class Journal:
    """The journal file. Any thread may use it; each call is one transaction that is on the disk when it returns.

    Args:
        path: the file, which is made if it does not exist.

    Raises:
        SettingsError: the file cannot be used, or another version of this program wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            elif version == 1:
                self._db.executescript(f"BEGIN; {_UPGRADE} PRAGMA user_version = {VERSION}; COMMIT;")
            elif version != VERSION:
                raise SettingsError(f"{path}: a journal of version {version}; {VERSION} is known. Use a new folder.")
        except sqlite3.Error as error:
            raise SettingsError(f"{path}: cannot be used as a journal ({error}). Use another folder.") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Yield the database for changes that happen together or not at all."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _ask(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def add(self, sha256: str, sender: str, size: int) -> bool:
        """Enter an X-ray whose file is on the disk. Return whether it is new.

        One that is known is not entered again, and nothing is done for it again. The exception is one that was refused
        or failed: it gets another chance.

        Args:
            sha256: of its file.
            sender: AE title that sent it.
            size: of its file, in bytes.
        """
        now = time.time()
        with self._change() as db:
            again = db.execute(
                "UPDATE objects SET state = 'received', starts = 0, reason = NULL, ended_at = NULL, has_files = 1, "
                "bytes = ?, received_at = ?, sender = ? WHERE sha256 = ? AND state IN ('refused', 'failed')",
                (size, now, sender, sha256),
            )
            new = db.execute(
                "INSERT INTO objects (sha256, sender, bytes, received_at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (sha256) DO NOTHING",
                (sha256, sender, size, now),
            )
            return bool(again.rowcount or new.rowcount)

    def is_settled(self, sha256: str) -> bool:
        """Return whether an X-ray is known and its file is not needed again."""
        return bool(self._ask("SELECT 1 FROM objects WHERE sha256 = ? AND state IN ('received', 'done')", (sha256,)))

    def find_waiting(self, taken: Collection[int]) -> Waiting | None:
        """Return the first X-ray that waits to be processed and is not among the `taken` numbers."""
        rows = self._ask(
            "SELECT id, sha256, starts FROM objects WHERE state = 'received' ORDER BY id LIMIT ?", (len(taken) + 1,)
        )
        return next((Waiting(*row) for row in rows if row[0] not in taken), None)  # type: ignore[arg-type]

    def begin(self, number: int) -> None:
        """Count that processing an X-ray was begun."""
        with self._change() as db:
            db.execute("UPDATE objects SET starts = starts + 1 WHERE id = ?", (number,))

    def finish(
        self, sha256: str, result_uid: str, size: int, destinations: Collection[str], remark: str | None = None
    ) -> bool:
        """Enter the result of an X-ray, which is on the disk, and that it is to be sent.

        A result that was sent before, or is to be sent, is not sent again. It is the same X-ray in another encoding.

        Args:
            sha256: of the X-ray's file.
            result_uid: SOP Instance UID of the result.
            size: of the result's file, in bytes.
            destinations: where to send it.
            remark: what the page says about it.

        Returns:
            Whether it is sent to any of them.
        """
        with self._change() as db:
            db.execute(
                "UPDATE objects SET state = 'done', ended_at = ?, result_bytes = ?, reason = ? WHERE sha256 = ?",
                (time.time(), size, remark, sha256),
            )
            added = db.executemany(
                "INSERT INTO sendings (result_uid, destination, object) "
                "SELECT ?, ?, id FROM objects WHERE sha256 = ? ON CONFLICT (result_uid, destination) DO NOTHING",
                [(result_uid, destination, sha256) for destination in destinations],
            ).rowcount
            if not added:
                db.execute("UPDATE objects SET reason = 'the same result was sent before' WHERE sha256 = ?", (sha256,))
            return added > 0

    def give_up(self, sha256: str, state: Literal["refused", "failed"], reason: str) -> None:
        """Enter that an X-ray has no result, and why."""
        with self._change() as db:
            db.execute(
                "UPDATE objects SET state = ?, reason = ?, ended_at = ? WHERE sha256 = ?",
                (state, reason, time.time(), sha256),
            )

    def redo(self, number: int) -> None:
        """Enter that the result of an X-ray is lost and has to be made again."""
        with self._change() as db:
            db.execute("DELETE FROM sendings WHERE object = ? AND state != 'sent'", (number,))
            db.execute("UPDATE objects SET state = 'received', ended_at = NULL WHERE id = ?", (number,))

    def find_sending(self, destination: str, postponed: Collection[int]) -> Sending | None:
        """Return the first result that waits for a destination and is not among the `postponed` numbers."""
        rows = self._ask(
            "SELECT objects.id, sha256, result_uid, sendings.state = 'sending', received_at FROM sendings "
            "JOIN objects ON objects.id = object WHERE destination = ? AND sendings.state != 'sent' "
            "ORDER BY object LIMIT ?",
            (destination, len(postponed) + 1),
        )
        found = next((row for row in rows if row[0] not in postponed), None)
        if found is None:
            return None
        number, sha256, result_uid, begun, received_at = found
        return Sending(int(str(number)), str(sha256), str(result_uid), bool(begun), float(str(received_at)))

    def begin_sending(self, sending: Sending, destination: str) -> None:
        """Enter that sending a result begins. If the node is killed now, nobody knows whether it has arrived."""
        self._note(sending, destination, "state = 'sending', reason = NULL, tries = tries + 1")

    def note_sent(self, sending: Sending, destination: str, *, commit: bool = False) -> None:
        """Enter that a destination has a result.

        Args:
            sending: from `find_sending`.
            destination: which has it.
            commit: whether the destination offers storage commitment, so that it is to be asked for it.
        """
        change = "state = 'sent', reason = NULL, sent_at = ?, commitment = ?, transaction_uid = NULL"
        self._note(sending, destination, change, time.time(), "wanted" if commit else "none")

    def find_uncommitted(self, destination: str, before: float, limit: int) -> list[Uncommitted]:
        """Return results that a destination is to be asked to answer for.

        Args:
            destination: which has them.
            before: those that were asked for before this time (s of 1970) and not answered are asked for again.
            limit: how many at most.
        """
        rows = self._ask(
            "SELECT objects.id, sha256, result_uid, asks FROM sendings JOIN objects ON objects.id = object "
            "WHERE destination = ? AND commitment IN ('wanted', 'asked') "
            "AND (commitment = 'wanted' OR asked_at < ?) AND sendings.state = 'sent' ORDER BY object LIMIT ?",
            (destination, before, limit),
        )
        return [Uncommitted(*row) for row in rows]  # type: ignore[arg-type]

    def begin_commitment(self, results: Collection[str], destination: str, transaction: str) -> None:
        """Enter that a destination is asked to answer for results.

        Args:
            results: their SOP Instance UIDs.
            destination: whom is asked.
            transaction: UID of the request.
        """
        with self._change() as db:
            db.executemany(
                "UPDATE sendings SET commitment = 'asked', asks = asks + 1, asked_at = ?, transaction_uid = ? "
                "WHERE result_uid = ? AND destination = ?",
                [(time.time(), transaction, result, destination) for result in results],
            )

    def note_commitment(self, transaction: str, committed: Collection[str], failed: Collection[str]) -> int:
        """Enter a destination's report. A result that it does not answer for is sent again, a few times.

        Args:
            transaction: UID of the request. Nothing happens if it is not known.
            committed, failed: SOP Instance UIDs.

        Returns:
            How many results of the request were found.
        """
        with self._change() as db:
            found = db.executemany(
                "UPDATE sendings SET commitment = 'done', reason = NULL "
                "WHERE transaction_uid = ? AND result_uid = ? AND commitment = 'asked'",
                [(transaction, result) for result in committed],
            ).rowcount
            found += db.executemany(
                "UPDATE sendings SET commitment = 'failed', reason = 'the destination does not answer for it', "
                "state = iif(asks < ?, 'waiting', state) "
                "WHERE transaction_uid = ? AND result_uid = ? AND commitment = 'asked'",
                [(MOST_ASKS, transaction, result) for result in failed],
            ).rowcount
        return found

    def give_up_commitment(self, results: Collection[str], destination: str, reason: str) -> None:
        """Enter that a destination is not asked any more to answer for results, and why."""
        with self._change() as db:
            db.executemany(
                "UPDATE sendings SET commitment = 'failed', reason = ? WHERE result_uid = ? AND destination = ?",
                [(reason, result, destination) for result in results],
            )

    def keep_destinations(self, names: Collection[str]) -> None:
        """Enter that only these destinations are asked for storage commitment from now on."""
        marks = ", ".join("?" * len(names))
        with self._change() as db:
            db.execute(
                "UPDATE sendings SET commitment = 'failed', reason = 'the destination is not named any more' "
                f"WHERE commitment IN ('wanted', 'asked') AND destination NOT IN ({marks})",
                tuple(names),
            )

    def count_commitments(self) -> dict[str, int]:
        """Return the number of results sent to destinations that offer storage commitment, by state."""
        rows = self._ask("SELECT commitment, COUNT(*) FROM sendings WHERE commitment != 'none' GROUP BY commitment")
        return {"wanted": 0, "asked": 0, "done": 0, "failed": 0} | {str(name): int(str(n)) for name, n in rows}

    def note_unsent(self, sending: Sending, destination: str, reason: str, *, unsure: bool) -> None:
        """Enter that a result was not sent, and why.

        Args:
            sending: from `find_sending`.
            destination: where it was to be sent.
            reason: one line.
            unsure: whether the destination may have it all the same.
        """
        self._note(sending, destination, "state = ?, reason = ?", "sending" if unsure else "waiting", reason)

    def _note(self, sending: Sending, destination: str, change: str, *values: object) -> None:
        with self._change() as db:
            db.execute(
                f"UPDATE sendings SET {change} WHERE result_uid = ? AND destination = ?",
                (*values, sending.result_uid, destination),
            )

    def count_bytes(self) -> int:
        """Return how many bytes the files of all objects take."""
        ((count,),) = self._ask("SELECT COALESCE(SUM(bytes + result_bytes), 0) FROM objects WHERE has_files")
        return int(str(count))

    def find_finished(self, before: float) -> list[tuple[int, str, int]]:
        """Return number, SHA-256 and bytes of finished objects whose files are still there, the oldest first.

        Args:
            before: only those that were received before this time, seconds since 1970.
        """
        query = (
            "SELECT id, sha256, bytes + result_bytes FROM objects "
            f"WHERE has_files AND received_at < ? AND {_FINISHED} ORDER BY id"
        )
        return [(int(str(number)), str(sha256), int(str(size))) for number, sha256, size in self._ask(query, (before,))]

    def note_removed(self, number: int) -> bool:
        """Enter that the files of a finished object are removed. Return False if it is not finished any more."""
        with self._change() as db:
            query = f"UPDATE objects SET has_files = 0 WHERE id = ? AND {_FINISHED}"
            return db.execute(query, (number,)).rowcount > 0

    def forget(self, before: float) -> None:
        """Remove the entries of finished objects without files that were received before a time."""
        with self._change() as db:
            db.execute(f"DELETE FROM objects WHERE NOT has_files AND received_at < ? AND {_FINISHED}", (before,))

    def list_files(self) -> set[str]:
        """Return the SHA-256 of every object whose files are there."""
        return {str(sha256) for (sha256,) in self._ask("SELECT sha256 FROM objects WHERE has_files")}

    def count_states(self) -> dict[str, int]:
        """Return the number of objects by state."""
        rows = self._ask("SELECT state, COUNT(*) FROM objects GROUP BY state")
        return {"received": 0, "done": 0, "refused": 0, "failed": 0} | {str(name): int(str(n)) for name, n in rows}

    def count_unsent(self) -> dict[str, tuple[int, float]]:
        """Return, by destination, how many results wait for it, and since when the oldest was received (s of 1970)."""
        rows = self._ask(
            "SELECT destination, COUNT(*), MIN(received_at) FROM sendings JOIN objects ON objects.id = object "
            "WHERE sendings.state != 'sent' GROUP BY destination"
        )
        return {str(name): (int(str(count)), float(str(oldest))) for name, count, oldest in rows}

    def list_since(self, begin: float, limit: int) -> list[Line]:
        """Return the objects received since a time, seconds since 1970, the newest first."""
        rows = self._ask(
            "SELECT objects.id, sender, received_at, ended_at, objects.state, "
            "NULLIF(TRIM(COALESCE(objects.reason, '') || ' ' || COALESCE(MAX(sendings.reason), '')), ''), "
            "COALESCE(SUM(sendings.state = 'sent'), 0), COALESCE(SUM(sendings.state != 'sent'), 0), "
            "COALESCE(SUM(commitment = 'done'), 0), COALESCE(SUM(commitment NOT IN ('none', 'done')), 0) "
            "FROM objects LEFT JOIN sendings ON object = objects.id "
            "WHERE received_at >= ? GROUP BY objects.id ORDER BY objects.id DESC LIMIT ?",
            (begin, limit),
        )
        return [Line(*row) for row in rows]  # type: ignore[arg-type]
