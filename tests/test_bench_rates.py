"""Rates of this machine: what is measured, and the refusal of rows that are faster than it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pycircuit import _native
from pycircuit.bench import inputs, library_rates, machine_rates, report
from pycircuit.bench.catalog import Row
from pycircuit.bench.library_rates import PROBE, Size
from pycircuit.bench.machine_rates import Probe, Rates
from pycircuit.bench.runner import Options
from pycircuit.bench.session import Session
from pycircuit.bench.shapes import Shape
from pycircuit.ops import native
from pycircuit.ops.dispatch import PARTS_ISAS, native_isas

pytestmark = pytest.mark.usefixtures("one_thread")

SUPPORTED = [index for index, (_, supported) in enumerate(native_isas()) if supported]
LANES = {"baseline": 4, "v3": 8, "v4": 16, "bf16": 16, "amx": 16}
TINY = Shape("tiny", 3, 32, 4, 2, 8, 96, 6, 12, 40, "cpu")
ROW = Row("decode", "tiny", "plt", lambda g: inputs.decode(g, TINY, 12, None), needs=0)
SLOW = Rates(threads=1, float32=1e3, bfloat16=1e3, copy=1e3, read=1e3)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("threads", [1, 2])
def test_multiply_adds_are_done_and_counted(isa: int, threads: int) -> None:
    lanes = LANES[native_isas()[isa][0]]
    start = [0.5 + 0.01 * chain for chain in range(12)]
    for rounds in (0, 1, 50):
        ends = start
        for _ in range(rounds):
            ends = [x * 0.999 + 0.001 for x in ends]
        work, total = _native.multiply_adds(isa, rounds, threads)
        assert work == 2 * lanes * len(start) * rounds * threads
        assert total == pytest.approx(threads * lanes * sum(ends), rel=1e-5)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 127, 128, 129, 1_000, 33_333])
def test_streams_read_what_they_count(isa: int, threads: int, count: int) -> None:
    """Most of the array, from its begin on; a line or two of each stream may be left."""
    data = torch.randint(-8, 9, (count,), generator=torch.Generator().manual_seed(count)).float()
    work, total = _native.stream_read(isa, data.data_ptr(), count, threads)
    read = int(work) // 4
    assert count - threads * 8 * 16 * 2 < read <= count and read % (8 * 16) == 0
    assert total == float(data[:read].sum())


def test_every_library_is_measured() -> None:
    names = list(library_rates.libraries())
    measured = library_rates.rates(1, seconds=0.01)
    assert list(measured) == names and len(names) >= 2
    assert f"{library_rates.torch_blas()} (torch)" in names and f"{library_rates.numpy_blas()} (numpy)" in names
    assert ("oneDNN (torch)" in names) == torch.backends.mkldnn.is_available()
    for by_size in measured.values():
        assert {"256 x 256 x 256", str(PROBE)} <= set(by_size)
        assert all(1e7 < rate < 1e14 for rate in by_size.values())


def test_our_own_product_is_one_more_library(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(48, 40, 56)
    monkeypatch.setattr(native, "product", lambda a, b, out, parts: torch.mm(a, b, out=out))
    with library_rates.opened("pycircuit", 1) as product:
        assert product(size) > 0
    monkeypatch.setattr(native, "product", lambda a, b, out, parts: torch.mm(a, b, out=out).mul_(1.001))
    with library_rates.opened("pycircuit", 1) as product, pytest.raises(ArithmeticError, match="48 x 40 x 56 is wrong"):
        product(size)


def test_numpy_runs_with_the_threads_and_cores_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what pins our own threads: the server's would inherit it."""
    script = "import json, os, sys\nnames = ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_PROC_BIND')\n"
    script += "sys.stdin.readline()\nprint(sum((os.environ.get(n) or 'none') == '3' for n in names))\n"
    (tmp_path / "numpy_product.py").write_text(script)
    monkeypatch.setattr(library_rates, "__file__", str(tmp_path / "library_rates.py"))
    monkeypatch.setenv("OMP_PROC_BIND", "3")
    with library_rates._in_numpy(3) as product:
        assert product(PROBE) == 2
    if hasattr(os, "sched_getaffinity"):
        assert set(os.sched_getaffinity(0)) <= set(library_rates._cores())


def test_rates_name_their_best() -> None:
    rates = Rates(1, 3.0, 1.0, 1.0, 2.0, {"a": {"s": 3.0, "t": 1.0}, "b": {"s": 2.0, "t": 2.0}}, {"v3": 4.0, "v4": 6.0})
    assert (rates.fastest, rates.fastest_at("s"), rates.fastest_at("t"), rates.fastest_at("u")) == ("a", "a", "b", "")
    assert rates.peak == 6.0 and "(a), 0 in registers" in str(rates)
    raised = rates.raised(float32=5.0, copy=0.5, read=9.0)
    assert (raised.float32, raised.copy, raised.read, raised.products) == (5.0, 1.0, 9.0, rates.products)
    assert SLOW.fastest == "" and SLOW.peak is None and "registers" not in str(SLOW)


def test_the_matrix_rate_is_the_best_librarys() -> None:
    rates = machine_rates.measure(1, seconds=0.01)
    assert rates.float32 == max(rate for by_size in rates.products.values() for rate in by_size.values())
    assert set(rates.multiply_adds) == {native_isas()[index][0] for index in SUPPORTED} - set(PARTS_ISAS)
    assert all(1e8 < rate < 1e13 for rate in rates.multiply_adds.values())


def test_a_server_of_products_is_not_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds of work while the clock runs: one by this process, two by one that it started."""
    ticks = os.sysconf("SC_CLK_TCK")
    done = iter([(0, 0.0, 0.0), (3 * ticks, 1.0, 2.0)])

    def stat(path: str) -> list[str]:
        total, own, children = next(done)
        times = SimpleNamespace(user=own, system=0.0, children_user=children, children_system=0.0)
        monkeypatch.setattr(os, "times", lambda: times)
        return [f"cpu {total} 0 0 0 0 0 0 0 0 0"]

    monkeypatch.setattr(machine_rates, "_lines", stat)
    assert machine_rates.Others().cores() == 0


def test_a_probe_measures_with_the_best_library(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []

    @contextmanager
    def fake(name: str, threads: int) -> Iterator[Callable[[Size], float]]:
        opened.append((name, threads))
        yield lambda size: size.operations / 7e9

    monkeypatch.setattr(library_rates, "opened", fake)
    rates = Rates(1, 2.0, 1.0, 1.0, 1.0, {"slow": {str(PROBE): 1.0}, "fast": {str(PROBE): 2.0}})
    with machine_rates.probe(rates) as probe:
        probe.sample()
    assert opened == [("fast", 1)] and probe.best["float32"] == pytest.approx(7e9) and 1e8 < probe.best["read"] < 1e13


@pytest.fixture
def blind_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe that measures next to nothing beside a row."""

    @contextmanager
    def fake(rates: Rates) -> Iterator[Probe]:
        probe = Probe(lambda size: size.operations / 1e3, torch.ones(1))
        monkeypatch.setattr(probe, "sample", lambda: None)
        yield probe

    monkeypatch.setattr(machine_rates, "probe", fake)


@pytest.mark.usefixtures("blind_probe")
def test_a_row_above_its_floor_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "measure", lambda threads: SLOW)
    session = Session(Options(budget=0.005), rates={1: SLOW})
    result = session.run(ROW, 1)
    assert result.times == {} and result.failed is not None
    for phrase in ("got ", "% of the floor", "0.0 GB/s", "memory rate", "measure again on a quiet machine"):
        assert phrase in result.failed
    for text in (report.table(session.results), report.markdown(session.report())):
        assert "decode/tiny/plt" in text and "WRONG: its floor must be below its time" in text and " ms" in text


@pytest.mark.usefixtures("blind_probe")
def test_rates_are_measured_again_before_a_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Rates(threads=1, float32=1e13, bfloat16=1e13, copy=1e13, read=9e12)
    monkeypatch.setattr(machine_rates, "measure", lambda threads: quiet)
    session = Session(Options(budget=0.005), rates={1: SLOW})
    result = session.run(ROW, 1)
    assert result.failed is None and 0 < result.share < 1
    assert session.rates[1].copy == 1e13 and session.results[0].floor == result.floor


def test_committed_results_render() -> None:
    committed = report.load(Path(__file__).parents[1] / "benchmarks" / "results" / "cpu.json")
    text = report.markdown(committed)
    assert "## encode" in text and all(str(rates) in text for rates in committed.rates.values())
    assert ("## The machine" in text) == any(rates.products for rates in committed.rates.values())


def test_the_machine_has_a_section() -> None:
    rates = Rates(2, 3e9, 1e9, 1e9, 2e9, {"MKL": {"s": 3e9, "t": 1e9}, "oneDNN": {"s": 2e9}}, {"v3": 4e9})
    text = report.markdown(report.Report.of({2: rates}, []))
    assert (
        "| threads | library | s | t |" in text and "| 2 | MKL | 3 | 1 |" in text and "| 2 | oneDNN | 2 | - |" in text
    )
    assert "| 2 | v3 4 | 3 by MKL, 75% of the best in registers | 1 | 1.0 | 2.0 |" in text


def test_a_torch_read_is_measured_without_the_native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "native_isas", lambda: ())
    source: Tensor = torch.ones(1 << 16)
    assert [read(source) for read in machine_rates._readers()] == [source.nbytes, source.nbytes]
    assert machine_rates._multiply_add_rates(1, 0.01) == {}


WITHOUT_CORE = """
import importlib.util, sys
find_spec = importlib.util.find_spec
sys.modules["pycircuit._native"] = None
importlib.util.find_spec = lambda name: None if name == "pycircuit._native" else find_spec(name)
from pycircuit import doctor
report = doctor.examine()
assert report["native"] is None and "pycircuit" not in report["rates"][0]["products"]
print(dict(doctor.lines(report))["kernels"])
"""


def test_doctor_describes_a_package_without_its_core() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYCIRCUIT_PRODUCT"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_CORE], capture_output=True, text=True, env=environment)
    assert done.stdout == "not built; reinstall with a compiler\n", done.stderr
