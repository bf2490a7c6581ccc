"""Edits of graphs - labels, pins, groups, layouts - with their history, in one SQLite file beside the graphs."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .edit_document import checked_document

FILE = ".pycircuit-page.sqlite"
OP = "page"
KEPT_STEPS = 500  # of a graph's history
_APPLICATION, _VERSION = 0x70794369, 1
_SCHEMA = (
    "CREATE TABLE graphs (name TEXT PRIMARY KEY, revision INTEGER NOT NULL, step INTEGER NOT NULL)",
    "CREATE TABLE steps (name TEXT NOT NULL, step INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (name, step))",
)


class EditConflict(Exception):
    """An edit of a revision that is no longer the newest. state: the newest."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(f"{OP}: an edit must be of the newest revision, {state['revision']}; load it and edit again")
        self.state = state


class Edits:
    """Documents of edits by a graph's name. Every change is on disk before it is answered.

    initial: makes the document of a graph before its first edit.
    """

    def __init__(self, folder: Path, initial: Callable[[str], dict[str, Any]]) -> None:
        self.path = folder / FILE
        self.initial = initial
        self._lock = threading.Lock()

    def state(self, name: str) -> dict[str, Any]:
        """Return the revision, the document, and whether there is something to undo and redo."""
        initial = self.initial(name)
        if not self.path.exists():
            return _state(0, initial, False, False)
        with self._lock, self._connection() as connection:
            return _read_state(connection, name, initial)

    def replace(self, name: str, revision: object, document: object) -> dict[str, Any]:
        """Make a document the newest; EditConflict if someone else's is newer than `revision`."""
        checked, initial = checked_document(document), self.initial(name)
        with self._lock, self._connection() as connection:
            state = _require_newest(connection, name, revision, initial)
            if state["document"] == checked:
                return state
            _, step = _position(connection, name)
            connection.execute("DELETE FROM steps WHERE name = ? AND step > ?", (name, step))
            connection.execute("DELETE FROM steps WHERE name = ? AND step <= ?", (name, step - KEPT_STEPS))
            connection.execute("INSERT INTO steps VALUES (?, ?, ?)", (name, step + 1, json.dumps(checked)))
            _move(connection, name, state["revision"] + 1, step + 1)
            return _read_state(connection, name, initial)

    def undo(self, name: str, revision: object) -> dict[str, Any]:
        """Go back by one document."""
        return self._walk(name, revision, -1)

    def redo(self, name: str, revision: object) -> dict[str, Any]:
        """Go forward by one document."""
        return self._walk(name, revision, 1)

    def _walk(self, name: str, revision: object, by: int) -> dict[str, Any]:
        initial = self.initial(name)
        with self._lock, self._connection() as connection:
            state = _require_newest(connection, name, revision, initial)
            if not state["can_undo" if by < 0 else "can_redo"]:
                return state
            _, step = _position(connection, name)
            _move(connection, name, state["revision"] + 1, step + by)
            return _read_state(connection, name, initial)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Open the file, which is committed at the end or left as it was."""
        if self.path.is_symlink():
            raise ValueError(f"{OP}: {FILE} must be a file of the folder's own, got a link; remove it")
        try:
            with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as connection:
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    _prepare(connection)
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise OSError(f"{OP}: {FILE} must be a file of edits that can be written, got: {error}") from None


def _prepare(connection: sqlite3.Connection) -> None:
    """Create the tables of a new file, or require that they are ours."""
    tables = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")]
    if not tables:
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        for statement in _SCHEMA:
            connection.execute(statement)
    elif tables != list(_SCHEMA):
        raise ValueError(f"{OP}: {FILE} must be a file of edits of this version, got another database; move it away")


def _position(connection: sqlite3.Connection, name: str) -> tuple[int, int]:
    """Return the revision and the step of a graph, zeros before its first edit."""
    row = connection.execute("SELECT revision, step FROM graphs WHERE name = ?", (name,)).fetchone()
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


def _move(connection: sqlite3.Connection, name: str, revision: int, step: int) -> None:
    connection.execute("INSERT OR REPLACE INTO graphs VALUES (?, ?, ?)", (name, revision, step))


def _read_state(connection: sqlite3.Connection, name: str, initial: dict[str, Any]) -> dict[str, Any]:
    revision, step = _position(connection, name)
    near = connection.execute(
        "SELECT step, document FROM steps WHERE name = ? AND step BETWEEN ? AND ?", (name, step - 1, step + 1)
    )
    documents = dict(near.fetchall())
    document = json.loads(documents[step]) if step in documents else initial
    can_undo = step == 1 or step - 1 in documents
    return _state(revision, document, can_undo, step + 1 in documents)


def _state(revision: int, document: dict[str, Any], can_undo: bool, can_redo: bool) -> dict[str, Any]:
    return {"revision": revision, "document": document, "can_undo": can_undo, "can_redo": can_redo}


def _require_newest(
    connection: sqlite3.Connection, name: str, revision: object, initial: dict[str, Any]
) -> dict[str, Any]:
    state = _read_state(connection, name, initial)
    if type(revision) is not int:
        raise TypeError(f"{OP}: revision must be an int, got {type(revision).__name__}")
    if revision != state["revision"]:
        raise EditConflict(state)
    return state
