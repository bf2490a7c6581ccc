"""One session of rows and of traces: prints the tables and writes RESULTS.md and the JSON when the last is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import train_step

from pycircuit.bench import machine_rates, report, sections, whole_trace
from pycircuit.bench.runner import Options
from pycircuit.bench.session import Session

HERE = Path(__file__).parent
SESSION = Session(Options(budget=0.7))
TRACES: list[whole_trace.Traced] = []
STEPS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-results", default=str(HERE / "results" / "cpu.json"), help="where the JSON goes")
    parser.addoption(
        "--trace-results", default=str(HERE / "results" / "trace-cpu.json"), help="where traces' JSON goes"
    )
    parser.addoption(
        "--train-results", default=str(HERE / "results" / "train-cpu.json"), help="where the training step's JSON goes"
    )
    parser.addoption("--markdown-results", default=str(HERE / "RESULTS.md"), help="where the tables go")


@pytest.fixture(scope="session")
def session() -> Session:
    return SESSION


@pytest.fixture(scope="session")
def traces() -> list[whole_trace.Traced]:
    return TRACES


@pytest.fixture(scope="session")
def steps() -> list[dict[str, Any]]:
    return STEPS


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    markdown = Path(config.getoption("--markdown-results"))
    if SESSION.results:
        results = SESSION.report()
        terminalreporter.write_line(report.table(results.results))
        terminalreporter.write_line(report.tally(results.results))
        results.save(Path(config.getoption("--json-results")))
        sections.put(markdown, "ops", report.markdown(results))
    if TRACES:
        rates = SESSION.rate(TRACES[0].threads)
        text = whole_trace.markdown(TRACES, rates.float32)
        terminalreporter.write_line(text)
        document = {
            "machine": machine_rates.facts(),
            "rates": machine_rates.as_json(rates),
            "traces": [t.as_json() for t in TRACES],
        }
        Path(config.getoption("--trace-results")).write_text(json.dumps(document, indent=1) + "\n")
        sections.put(markdown, "trace", text)
    for step in STEPS:
        text = train_step.markdown(step)
        terminalreporter.write_line(text)
        Path(config.getoption("--train-results")).write_text(json.dumps(step, indent=1) + "\n")
        sections.put(markdown, "train", text)
