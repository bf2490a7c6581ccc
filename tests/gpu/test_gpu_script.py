"""benchmarks/gpu.py without a GPU: every section at tiny shapes, and every way in which a run can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pycircuit as pc
from pycircuit.ops.dispatch import multiplies_bfloat16
from pycircuit.ops.registry import OPS
from pycircuit.trace.precision import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ORDER = ("compile", "card", "plt", "tests", "clt", "long", "taped", "ops", "tune")

# Replaces the sections' script: it saves the states in gpu.json when it starts, then runs its code in `acts`.
STAND_IN = """
import json, os, signal, sys, time
name, words = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
report = json.load(open(os.path.join(words["--results"], "gpu.json")))
states = {key: entry["state"] for key, entry in report["sections"].items()}
json.dump({"states": states, "path": os.environ.get("PYTHONPATH"), "process": os.getpid()}, open(words["--out"], "w"))
exec(ACTS.get(name, ""))
"""


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


def standing_in(folder: Path, acts: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    """Start gpu.py with the replaced sections."""
    (folder / "section.py").write_text(f"ACTS = {acts!r}\n{STAND_IN}")
    code = "import gpu, pathlib, sys; gpu.SECTION_SCRIPT = pathlib.Path(sys.argv[1]); sys.exit(gpu.main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(folder / "section.py"), "--device", "cpu", "--results", str(folder)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(BENCHMARKS)}
    return subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, env=environment)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())


def test_no_gpu_is_a_clear_sentence(tmp_path: Path) -> None:
    done = script("--results", str(tmp_path / "results"), "--environment", str(tmp_path / "environment"))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: needs a CUDA device, found none")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing was installed or written first


def test_unknown_section_is_refused() -> None:
    done = script("--section", "everything")
    assert done.returncode == 2
    assert all(name in done.stderr for name in ORDER)


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that runs a section's dry run in this process and returns its results."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_sections

    monkeypatch.setattr(gpu_sections.signal, "signal", lambda *_: None)
    out = tmp_path / "section.json"

    def run(name: str, seconds: float = 600) -> dict[str, Any]:
        words = ["--device", "cpu", "--seconds", str(seconds), "--out", str(out), "--results", str(tmp_path)]
        assert gpu_sections.main([name, *words]) == 0
        return json.loads(out.read_text())

    return run


def test_the_schedule_fills_the_time(section: Any) -> None:
    from gpu_files import SECONDS, TOTAL

    assert tuple(SECONDS) == ORDER and sum(SECONDS.values()) == TOTAL < 450


def test_card(section: Any) -> None:
    results = section("card")
    products = [rates for name, rates in results.items() if name.startswith("product")]
    assert len(products) == 2
    for rates in products:
        errors = {name: rates[name]["error"] for name in ("no tensor cores", *PRECISIONS)}
        assert max(errors["no tensor cores"], errors["float32"]) < 1e-6 < errors["float32-fast"] < 2e-5
        assert 2e-5 < errors["tf32"] < 1e-3 < errors["bfloat16"] < 1e-2
        assert all(rates[name]["tflops"] > 0 for name in errors)
    transfers = results["transfers GB/s"]
    assert transfers["copy"] > 0 and "pin_memory" in transfers["D2H pinned"]["unavailable"]
    assert all(cost["us"] > 0 for cost in results["launches"].values())
    assert results["machine"]["torch"] and "nvidia-smi" in results["machine"]["nvidia-smi"]["unavailable"]


def test_compile_launches_every_kernel(section: Any) -> None:
    results = section("compile")
    assert results.pop("kernels") == {"unavailable": "the interpreter compiles nothing"}
    assert {name.split()[1] for name in results} >= set(OPS)
    assert all(task["failed"] == [] and task["seconds"] > 0 for task in results.values())


def test_end_to_end(section: Any, tmp_path: Path) -> None:
    results = section("plt")
    names = [name for name in results if "runs" in results[name]]
    # A warm-up, and runs of every precision of a CPU, of ten tokens and of gemma2b.
    assert [len(results[name]["runs"]) for name in names] == [1, 3, 3, 3] * 2
    for name in names:
        for run in results[name]["runs"]:
            tolerance = PRECISIONS[name.split()[1].replace("warm-up", "float32")].tolerance
            assert run["certificate"] < tolerance and 0 < sum(run["timings"].values()) <= run["seconds"]
    assert {run["rows"] - run["active"] for run in results[names[3]]["runs"]} == {10}  # every feature, ten outputs
    assert results["profile"]["operators"][0]["ms"] > 0 and results["profile"]["kernels"] == []
    assert (tmp_path / "profile-plt.json.gz").stat().st_size == results["profile"]["trace bytes"]
    assert "CUDA" in results["synchronisations"]["unavailable"]


def test_every_precision_that_there_is(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, words = pc.attribute, []

    def attribute(*arguments: Any, precision: str, **options: Any) -> pc.Graph:
        words.append(precision)
        return plain(*arguments, precision=precision, **options)

    monkeypatch.setattr(pc, "attribute", attribute)
    results = section("clt")
    assert words == ["float32"] * 3 + ["float32-fast"] * 2
    distance = results["gemma2b-clt float32-fast"]["agreement"]["largest distance"]
    assert 0 < distance < 1e-4 if multiplies_bfloat16() else distance == 0
    assert (
        results["gemma2b-clt float32-fast"]["agreement"]["shared rows"]
        == results["gemma2b-clt float32"]["runs"][0]["rows"]
    )


def test_traces_that_fail_or_break_the_law_are_red(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    plain, calls = pc.attribute, []

    def attribute(*arguments: Any, **options: Any) -> pc.Graph:
        calls.append(options)
        if len(calls) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        return plain(*arguments, **options)

    monkeypatch.setattr(pc, "attribute", attribute)
    strict = replace(PRECISIONS["float32"], tolerance=1e-12)
    monkeypatch.setitem(PRECISIONS, "float32", strict)
    results = section("clt")
    assert len(results[f"gemma2b-clt {LABEL}"]["runs"]) == 1
    assert [why.split(": ")[-1].split(" is ")[0] for why in results["red"]] == [
        "the certificate",
        "the certificate",
        "an illegal memory access was encountered",
    ]


def test_long_prompts_are_predicted_first(section: Any) -> None:
    results = section("long")
    for name in ("gemma2b-long", "gemma2b-long8k"):
        few = next(entry for key, entry in results.items() if key.startswith(f"{name} ") and key.endswith("rows again"))
        assert few["rows"] < results[f"{name} {LABEL}"]["runs"][0]["rows"]
        forward = few["timings"]["forward"]
        assert results[f"{name} predicted seconds"] == pytest.approx(forward + 4 * (few["seconds"] - forward))


def test_without_time_a_section_says_so(section: Any) -> None:
    results = section("long", seconds=1)
    assert results["gemma2b-long"]["skipped"].startswith("needs about 10 s, ")


def test_taped_baseline(section: Any) -> None:
    results = section("taped")
    for name in ("taped batch 4 float32", "taped batch 4 tf32"):
        taped = results[name]
        assert taped["largest distance of a row from ours"] < 1e-4 and taped["rows"] == 20
        assert taped["rows a second"] == pytest.approx(taped["rows"] / taped["sweep seconds"])
        assert taped["extrapolated seconds"]["basis"].startswith("not measured")


def test_ops_are_right_and_timed(section: Any) -> None:
    results = section("ops")
    assert {row["op"] for row in results["rows"]} == set(OPS)
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in results["rows"])
    assert set(results["rates"]) == {"fp32", "tf32", "bf16", "copy"}


def test_a_wrong_op_is_not_timed(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_measure

    monkeypatch.setattr(gpu_measure, "OPS", {"decode": OPS["decode"]})
    monkeypatch.setattr(gpu_measure, "deviation", lambda item, got: 0.5)
    results = section("ops")
    assert all("ms" not in row and row["wrong"] for row in results["rows"]) and len(results["red"]) == len(
        results["rows"]
    )
    assert "wrong, so not timed: 0.5" in results["red"][0]


def test_tuning_starts_from_the_recorded_choice(section: Any) -> None:
    for row in section("tune")["rows"]:
        assert next(iter(row["times_ms"])) == row["recorded"] and len(row["times_ms"]) == 2
        assert row["best"] == min(row["times_ms"], key=row["times_ms"].get)


def test_gpu_tests_are_collected(tmp_path: Path) -> None:
    """Without a card they skip, each with its reason; through the whole script, whose report is the last thing."""
    words = ["--section", "tests", "--tests", str(Path(__file__).with_name("test_triton.py")), "--commit", "abc"]
    done = script("--device", "cpu", "--installed", "--results", str(tmp_path), *words)
    report = report_of(tmp_path)
    assert done.returncode == 0 and report["red"] == [] and report["commit"] == "abc"
    assert "not a GPU figure" in report["dry_run"] and report["dry_run"] in done.stdout
    results = report["sections"]["tests"]["results"]
    assert set(results["counts"]) == {"skipped"} and results["counts"]["skipped"] >= len(OPS)
    assert all("needs a CUDA device" in outcome["why"] for outcome in results["outcomes"].values())
    assert "<testsuite" in (tmp_path / "tests.xml").read_text()


def test_a_red_test_marks_the_report(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    cases = "import pytest\n\n\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', [1, 2])\n"
    (tests / "test_red.py").write_text(cases + "def test_n(n):\n    assert n == 1\n")
    (tests / "test_broken.py").write_text("import nothing_of_this_name  # mark.gpu\n")
    words = ["--device", "cpu", "--installed", "--results", str(tmp_path), "--tests", str(tests), "--section", "tests"]
    done = script(*words)
    report = report_of(tmp_path)
    entry = report["sections"]["tests"]
    assert done.returncode == 1 and entry["state"] == "finished"
    assert entry["results"]["counts"] == {"passed": 1, "failed": 2}
    assert any("nothing_of_this_name" in outcome.get("why", "") for outcome in entry["results"]["outcomes"].values())
    assert len(report["red"]) == 1 and report["red"][0] in done.stdout


def test_no_gpu_tests_are_red(section: Any, tmp_path: Path) -> None:
    import gpu_sections

    words = ["--out", str(tmp_path / "out.json"), "--results", str(tmp_path), "--tests", str(tmp_path)]
    assert gpu_sections.main(["tests", *words]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["red"] == [f"no test is marked for a GPU in {tmp_path}"]


def test_no_section_stops_another(tmp_path: Path) -> None:
    """Not by an exception, not by its death, not by never ending; gpu.json is new after every one."""
    acts = {
        "plt": "raise RuntimeError('a card fell off')",
        "clt": "os.kill(os.getpid(), signal.SIGKILL)",
        "long": "time.sleep(60)",
    }
    run = standing_in(tmp_path, acts, "--installed", "--seconds", "15")
    assert run.wait(60) == 1
    report = report_of(tmp_path)
    states = {name: entry["state"] for name, entry in report["sections"].items()}
    assert tuple(states) == ORDER
    assert states.pop("plt") == "failed: exit status 1" and states.pop("clt") == "failed: exit status -9"
    assert states.pop("long").startswith("cut off after ") and set(states.values()) == {"finished"}
    assert "a card fell off" in report["sections"]["plt"]["log"]
    assert [why.split(":")[0] for why in report["red"]] == ["plt", "clt", "long"]
    for number, name in enumerate(ORDER):
        seen = report["sections"][name]["results"]["states"]
        assert set(seen) == set(ORDER[: number + 1])
        assert [other for other, state in seen.items() if state == "running"] == [name]


def test_a_signal_leaves_a_valid_report(tmp_path: Path) -> None:
    run = standing_in(tmp_path, {"plt": "time.sleep(60)"}, "--installed")
    deadline = time.monotonic() + 30
    while "plt" not in (report_of(tmp_path)["sections"] if (tmp_path / "gpu.json").exists() else {}):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # it has saved its result by now
    run.send_signal(signal.SIGTERM)
    assert run.wait(15) == 1
    report = report_of(tmp_path)
    states = {name: entry["state"] for name, entry in report["sections"].items()}
    assert states == {"compile": "finished", "card": "finished", "plt": "stopped from outside"}
    assert report["red"][-1] == f"stopped from outside by signal {int(signal.SIGTERM)}"
    with pytest.raises(ProcessLookupError):
        os.kill(report["sections"]["plt"]["results"]["process"], 0)


def test_a_failed_install_is_red_and_ends_nothing(tmp_path: Path) -> None:
    """Sections then import the package and its kernels from the checkout."""
    (tmp_path / "environment").write_text("a file where a folder should be")
    look = "print(sorted(p for p in os.listdir(os.environ['PYTHONPATH'] + '/pycircuit') if p in ('kernels', 'ops')))\n"
    look += "import importlib.metadata as m\n"
    look += "print(*(d.metadata['Name'] for d in m.distributions(path=[os.environ['PYTHONPATH']])), 'is known')"
    words = ("--environment", str(tmp_path / "environment"), "--section", "card")
    assert standing_in(tmp_path, {"card": look}, *words).wait(60) == 1
    report = report_of(tmp_path)
    states = {name: entry["state"] for name, entry in report["sections"].items()}
    assert states.pop("install").startswith("failed") and states == {"compile": "finished", "card": "finished"}
    log = (tmp_path / "log.txt").read_text()
    assert "['kernels', 'ops']" in log and "pycircuit is known" in log
    assert [why.split(":")[0] for why in report["red"]] == ["install"]


LABEL = "float32"
