"""One session of rows and of traces: prints the tables and writes RESULTS.md and the JSON when the last is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pycircuit.bench import machine, report, sections, trace
from pycircuit.bench.runner import Options
from pycircuit.bench.session import Session

HERE = Path(__file__).parent
SESSION = Session(Options(budget=0.7))
TRACES: list[trace.Traced] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-results", default=str(HERE / "results" / "cpu.json"), help="where the JSON goes")
    parser.addoption(
        "--trace-results", default=str(HERE / "results" / "trace-cpu.json"), help="where traces' JSON goes"
    )
    parser.addoption("--markdown-results", default=str(HERE / "RESULTS.md"), help="where the tables go")


@pytest.fixture(scope="session")
def session() -> Session:
    return SESSION


@pytest.fixture(scope="session")
def traces() -> list[trace.Traced]:
    return TRACES


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    markdown = Path(config.getoption("--markdown-results"))
    if SESSION.results:
        found = SESSION.report()
        terminalreporter.write_line(report.table(found.results))
        terminalreporter.write_line(report.tally(found.results))
        found.save(Path(config.getoption("--json-results")))
        sections.put(markdown, "ops", report.markdown(found))
    if TRACES:
        rates = SESSION.rate(TRACES[0].threads)
        text = trace.markdown(TRACES, rates.float32)
        terminalreporter.write_line(text)
        whole = {"machine": machine.facts(), "rates": machine.as_json(rates), "traces": [t.as_json() for t in TRACES]}
        Path(config.getoption("--trace-results")).write_text(json.dumps(whole, indent=1) + "\n")
        sections.put(markdown, "trace", text)
