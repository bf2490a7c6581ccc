"""Run of several rows, and the rates that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import machine_rates
from .catalog import Row
from .machine_rates import Rates
from .report import Report
from .runner import Drive, Options, Result, judge, measure, plain_drive


@dataclass
class Session:
    """Rows measured in a run; rates are measured once per number of threads, before the first row that needs them."""

    options: Options = field(default_factory=Options)
    seconds: float = 0.6
    rates: dict[int, Rates] = field(default_factory=dict)
    measured: list[tuple[Row, Result]] = field(default_factory=list)

    def rate(self, threads: int) -> Rates:
        if threads not in self.rates:
            self.rates[threads] = machine_rates.measure(threads, self.seconds)
        return self.rates[threads]

    def run(self, row: Row, threads: int, drive: Drive = plain_drive) -> Result:
        result = measure(row, threads, self.rate(threads), self.options, drive)
        if result.best:
            self.rates[threads] = self.rates[threads].raised(**result.best)
        self.measured.append((row, result))
        return result

    @property
    def results(self) -> list[Result]:
        """Results against the best rates of the run, not only of its beginning."""
        return [judge(row, result, self.rates[result.threads]) for row, result in self.measured]

    def report(self) -> Report:
        return Report.of(self.rates, self.results)


def plan(rows: Sequence[Row], threads: Sequence[int] | None = None) -> Iterator[tuple[Row, int]]:
    """(row, threads) for the given numbers of threads; by default all threads, and one where the row is cheap."""
    everything = machine_rates.all_threads()
    for row in rows:
        counts = threads or ([everything, 1] if row.single and everything > 1 else [everything])
        yield from ((row, count) for count in counts)
