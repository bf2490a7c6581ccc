"""The one script for a machine with a GPU: install, test, measure the card, time the ops, write JSON, print a table.

    make gpu [RESULTS=dir] [SECTION=tests|rates|encode|decode|attend_back|edge_scores|influence|tune_<op>]

Needs no network. Ends within ten minutes: every section has its share of them and leaves out what does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPS = ("encode", "decode", "attend_back", "edge_scores", "influence")
SECONDS = {"tests": 210, "rates": 20, "encode": 60, "decode": 30, "attend_back": 50, "edge_scores": 40, "influence": 30}
SECONDS |= {f"tune_{op}": 500 for op in OPS}  # one at a time, only when named; the rest of 600 is for the install
DRY_RUN = "dry run: interpreted on the CPU at tiny shapes, not a GPU figure"
NO_GPU = "gpu: needs a CUDA device, found none; run it where one is, or pass --device cpu for a dry run"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON goes")
    parser.add_argument("--section", choices=SECONDS, help="run this one only; tune_<op> runs only when named")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=f"cpu is a {DRY_RUN}")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-gpu", help="where to install the checkout")
    parser.add_argument("--installed", action="store_true", help="use the Python that runs this as it is")
    return parser.parse_args(arguments)


def install(environment: Path) -> Path:
    """The checkout, editable, in an environment that also sees the packages of the Python running this."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    # Not --system-site-packages: a Python that is itself in an environment would lend its base, not its packages.
    borrowed = [p for p in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))) if p]
    lines = "\n".join(f"import site; site.addsitedir({p!r})" for p in borrowed)
    (site / "zz_borrowed.pth").write_text(lines + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall", "-e", str(ROOT)]
    subprocess.run([*pip, *offline], check=True, env={**os.environ, "PATH": path})
    return python


def run_tests(device: str, budget: float) -> dict[str, Any]:
    """Every GPU test; in a dry run only that they are found, and that they skip with a reason."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=budget, check=False)
    except subprocess.TimeoutExpired as late:
        return {"passed": False, "output": f"not done after {budget:.0f} s", "tail": str(late.stdout)[-2000:]}
    print(done.stdout[-4000:], flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    passed = done.returncode == 0 and (counts.get("passed", 0) > 0 or device == "cpu")
    return {"passed": passed, "counts": counts, "tail": done.stdout[-2000:]}


def machine() -> dict[str, Any]:
    import torch
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        found |= {"multiprocessors": card.multi_processor_count, "compute": f"{card.major}.{card.minor}"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found | {"commit": head.stdout.strip() or "not a git checkout", "load": os.getloadavg()[0]}


def measure(device: str, section: str | None) -> dict[str, Any]:
    from gpu_measure import Timer, measure_op, measure_rates, tune

    report: dict[str, Any] = {"machine": machine(), "when": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    report |= {"dry_run": DRY_RUN if device == "cpu" else None, "rows": []}
    wanted = [section] if section else ["tests", "rates", *OPS]
    timer = Timer(device)
    if set(wanted) - {"tests"}:
        report["rates"] = measure_rates(timer)  # every floor needs them, whatever the section
    for name in wanted:
        begin = time.monotonic()
        timer.deadline = begin + SECONDS[name]
        if name == "tests":
            report["tests"] = run_tests(device, SECONDS[name])
            if not report["tests"]["passed"]:
                print("gpu: tests failed, so nothing is timed", flush=True)
                break  # no speed on red
        elif name.startswith("tune_"):
            report["tune"] = tune(timer, name.removeprefix("tune_"))
        elif name in OPS:
            report["rows"] += measure_op(timer, name, report["rates"])
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
    return report


def table(report: dict[str, Any]) -> str:
    lines = [report["dry_run"]] if report["dry_run"] else []
    for name, rate in report.get("rates", {}).items():
        lines.append(f"{name:<12}{rate:>10.1f} {'GB/s' if name == 'copy' else 'TFLOP/s'}")
    lines.append(f"{'op':<12}{'shape':<40}{'ms':>9}{'spread':>8}{'floor':>8}{'x ref':>8}{'x lib':>8}{'error':>10}")
    for row in report["rows"]:
        if "ms" not in row:
            lines.append(f"{row['op']:<12}{row['shape']:<40} {row.get('wrong') or row['skipped']}")
            continue
        library = f"{row['library_ratio']:>8.2f}" if row["library_ratio"] else f"{'-':>8}"
        lines.append(
            f"{row['op']:<12}{row['shape']:<40}{row['ms']:>9.3f}{row['spread']:>8.0%}{row['share_of_floor']:>8.0%}"
            f"{row['reference_ratio']:>8.2f}{library}{row['error']:>10.1e}"
        )
    for row in report.get("tune", []):
        lines.append(f"{row['shape']:<40} best {row['best_ms']:.3f} ms of {row['tried']}: {row['best']}")
        lines.append(f"{'':<40} recorded {row['chosen_ms']:.3f} ms: {row['chosen']}")
    if "tests" in report:
        lines.append(f"tests: {report['tests'].get('counts', report['tests'].get('output'))}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(NO_GPU, file=sys.stderr)
            return 2
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    if not options.installed:
        python = install(options.environment.resolve())
        again = [python, __file__, *arguments, "--installed", "--results", options.results.resolve()]
        return subprocess.run(again, check=False).returncode
    report = measure(options.device, options.section)
    options.results.mkdir(parents=True, exist_ok=True)
    kind = "dry-run" if report["dry_run"] else re.sub(r"\W+", "-", report["machine"]["gpu"]).lower()
    path = options.results / f"gpu-{kind}{'-' + options.section if options.section else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{path}\n{table(report)}", flush=True)
    right = report.get("tests", {"passed": True})["passed"] and not any("wrong" in row for row in report["rows"])
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
