"""One session of rows: prints the table and writes RESULTS.md and the JSON when the last row is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycircuit.bench import report
from pycircuit.bench.runner import Options
from pycircuit.bench.session import Session

HERE = Path(__file__).parent
SESSION = Session(Options(budget=0.7))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-results", default=str(HERE / "results" / "cpu.json"), help="where the JSON goes")
    parser.addoption("--markdown-results", default=str(HERE / "RESULTS.md"), help="where the tables go")


@pytest.fixture(scope="session")
def session() -> Session:
    return SESSION


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not SESSION.results:
        return
    found = SESSION.report()
    terminalreporter.write_line(report.table(found.results))
    terminalreporter.write_line(report.tally(found.results))
    found.save(Path(config.getoption("--json-results")))
    Path(config.getoption("--markdown-results")).write_text(report.markdown(found))
