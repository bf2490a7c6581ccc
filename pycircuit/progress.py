"""Progress of a long run: one line that is rewritten in a terminal, or a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

Report = Callable[[str, int, int], None]  # phase, done, total

_FIRST_LINE = 1.0  # seconds before the first line in a terminal
_INTERVAL = {True: 0.1, False: 10.0}  # seconds between two lines, in a terminal and in a log
_RECENT = 120.0  # seconds of work that rates and the time left are estimated from
_MARKS = 60  # counts remembered over these seconds


class Progress:
    """A counter of work by phase. show: True writes to stderr, False is silent, a function is called at every step."""

    def __init__(self, show: bool | Report, stream: TextIO | None = None) -> None:
        if not isinstance(show, bool) and not callable(show):
            raise TypeError(
                f"progress must be True, False or a function (phase, done, total), got {type(show).__name__}"
            )
        self.report = None if isinstance(show, bool) else show
        self.stream = (stream or sys.stderr) if show is True else None
        self.start = time.perf_counter()
        self.recent: dict[str, deque[tuple[float, int]]] = {}  # times and counts of each phase, the earliest first
        self.terminal = getattr(self.stream, "isatty", bool)()  # streams of notebooks and loggers may lack it
        self.next = self.start + (_FIRST_LINE if self.terminal else _INTERVAL[False])
        self.open = False

    def step(
        self, phase: str, done: int, total: int, unit: str = "rows", note: Callable[[], str] | None = None
    ) -> None:
        """Report `done` of `total` in this phase; zero begins it. note: more text, called only if a line is due."""
        now = time.perf_counter()
        self._remember(phase, now, done)
        if self.report is not None:
            self.report(phase, done, total)
        if self.stream is None or now < self.next:
            return
        self.next = now + _INTERVAL[self.terminal]
        speed = self.rate(phase)
        left = f", {speed:.3g} {unit}/s, {(total - done) / speed:.0f} s left" if speed else ""
        self._write(f"{phase}: {done} of {total} {unit}{left}" + (f", {note()}" if note and done else ""))

    def rate(self, phase: str) -> float | None:
        """Units a second of a phase, over its last two minutes; None before two counts of it."""
        counts = self.recent.get(phase)
        if not counts or counts[-1][0] <= counts[0][0] or counts[-1][1] <= counts[0][1]:
            return None
        return (counts[-1][1] - counts[0][1]) / (counts[-1][0] - counts[0][0])

    def _remember(self, phase: str, now: float, done: int) -> None:
        """Remember a count of a phase, and forget those before the recent seconds; zero begins the phase again."""
        counts = self.recent.setdefault(phase, deque())
        if not done:
            counts.clear()
        if len(counts) > 1 and counts[-1][0] - counts[-2][0] < _RECENT / _MARKS:
            counts.pop()
        counts.append((now, done))
        while len(counts) > 2 and counts[1][0] <= now - _RECENT:
            counts.popleft()

    def say(self, line: str) -> None:
        """Write a line now, whatever the interval."""
        if self.stream is not None:
            self._write(line)
            self.close()

    def _write(self, line: str) -> None:
        assert self.stream is not None
        self.stream.write(f"\r\x1b[K{line}" if self.terminal else f"pycircuit: {line}\n")
        self.stream.flush()
        self.open = self.terminal

    def close(self) -> None:
        """End the terminal's line."""
        if self.open and self.stream is not None:
            self.stream.write("\n")
            self.stream.flush()
        self.open = False
