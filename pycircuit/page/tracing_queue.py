"""Traces of the page: one at a time in a thread, the others wait; each reports its progress and can be cancelled.

A trace runs in a thread of the server, beside which a second process would have to hold the model once more. Its
progress report is called at every step, and raises where the trace was cancelled: pc.attribute then ends and frees
what it has.
"""

from __future__ import annotations

import contextvars
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pycircuit.graph import Graph

from .graph_folder import message_of
from .trace_request import TraceRequest

OP = "page"
MOST_WAITING = 16
_REMEMBERED = 64  # traces that have ended

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class TraceCancelled(Exception):
    """Raised inside a trace that was cancelled."""


class QueueFull(Exception):
    """Too many traces wait."""


@dataclass(eq=False)
class TraceJob:
    """A trace that was asked for. changes: counts its events, of which only the newest is kept."""

    id: str
    request: TraceRequest
    state: State = "waiting"
    event: dict[str, Any] = field(default_factory=lambda: {"phase": "waiting", "done": 0, "total": 0})
    changes: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def report(self, phase: str, done: int, total: int) -> None:
        """Keep the progress; end the trace if it was cancelled."""
        if self.cancelled.is_set():
            raise TraceCancelled
        self.tell({"phase": phase, "done": done, "total": total})

    def tell(self, event: dict[str, Any], state: State | None = None) -> None:
        """Make an event the newest. The state is set last: who sees the end sees the last event."""
        self.event = event
        self.changes += 1
        self.state = self.state if state is None else state


class TracingQueue:
    """Traces in order. trace: makes a graph of a request and reports; save: keeps it and returns its file's name."""

    def __init__(
        self,
        trace: Callable[[TraceRequest, Callable[[str, int, int], None]], Graph],
        save: Callable[[TraceRequest, Graph], str],
    ) -> None:
        self._trace, self._save = trace, save
        self._jobs: OrderedDict[str, TraceJob] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: TraceRequest) -> TraceJob:
        """Add a trace to the queue."""
        with self._changed:
            if self._closed or sum(job.state == "waiting" for job in self._jobs.values()) >= MOST_WAITING:
                raise QueueFull(f"{OP}: at most {MOST_WAITING} traces can wait; cancel one or wait")
            job = TraceJob(secrets.token_urlsafe(9), request)
            self._jobs[job.id] = job
            for old in [job.id for job in self._jobs.values() if job.ended][:-_REMEMBERED]:
                del self._jobs[old]
            if self._thread is None:
                context = contextvars.copy_context()
                self._thread = threading.Thread(
                    target=context.run, args=(self._run,), name="pycircuit-traces", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
            return job

    def job(self, identifier: str) -> TraceJob:
        """Return a trace; KeyError if there is none."""
        with self._changed:
            if identifier not in self._jobs:
                raise KeyError(f"{OP}: a trace must be one of the queue's, got {identifier[:40]!r}")
            return self._jobs[identifier]

    def jobs(self) -> list[TraceJob]:
        """Return the traces that wait or run, and those that ended last."""
        with self._changed:
            return list(self._jobs.values())

    def cancel(self, identifier: str) -> TraceJob:
        """Cancel a trace: a waiting one at once, a running one at its next step."""
        job = self.job(identifier)
        with self._changed:
            job.cancelled.set()
            if job.state == "waiting":
                job.tell({"cancelled": True}, "cancelled")
        return job

    def close(self, seconds: float = 3.0) -> None:
        """Cancel everything and wait for the running trace to end."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.cancelled.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                graph = self._trace(job.request, job.report)
                job.report("saving", 0, 1)
                job.tell({"graph": self._save(job.request, graph)}, "done")
            except TraceCancelled:
                job.tell({"cancelled": True}, "cancelled")
            except Exception as error:
                job.tell({"error": message_of(error)}, "failed")

    def _next(self) -> TraceJob | None:
        """Wait for a trace and return it; None at the end."""
        with self._changed:
            while not self._closed:
                job = next((job for job in self._jobs.values() if job.state == "waiting"), None)
                if job is not None:
                    job.tell({"phase": "starting", "done": 0, "total": 0}, "running")
                    return job
                self._changed.wait()
            return None
