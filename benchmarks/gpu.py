"""All measurements of a machine with a GPU in seven and a half minutes: install, compile, measure, trace, test, tune.

    make gpu [RESULTS=dir] [SECTION=names], or without make: python3 benchmarks/gpu.py --results dir --commit hash

Needs no network. Every section is a process of its own, and dir/gpu.json is rewritten after each. A section that
breaks, is cut off or is red is marked there, and the next ones still run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_files import ROOT, SECONDS, TOTAL, write_json
from gpu_report import table

DRY_RUN = "dry run: interpreted on the CPU at tiny shapes, not a GPU figure"
NO_GPU = "gpu: needs a CUDA device, found none; run it where one is, or pass --device cpu for a dry run"
HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"
SECTION_SCRIPT = ROOT / "benchmarks" / "gpu_sections.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
INSTALL_LIMIT = 2  # times its planned seconds; later sections have less by what it takes longer
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    results = ROOT / "benchmarks" / "results" / "gpu"
    parser.add_argument("--results", type=Path, default=results, help="folder of gpu.json, log.txt, tests.xml, ...")
    parser.add_argument("--section", choices=SECONDS, nargs="+", help="run only these")
    parser.add_argument("--commit", help="hash of the measured commit, where there is no .git")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=f"cpu is a {DRY_RUN}")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-gpu", help="where to install the checkout")
    parser.add_argument("--installed", action="store_true", help="use the Python that runs this as it is")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder or file of tests to run")
    return parser.parse_args(arguments)


def stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def commit() -> str:
    """Hash of the checkout's commit, or why it is not known."""
    if shutil.which("git") is None:
        return "not known: no git, and no --commit"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip() or "not known: no git checkout, and no --commit"


@dataclass(frozen=True, eq=False)
class Job:
    """Process of this run: when it started, and where its log starts."""

    name: str
    process: subprocess.Popen[bytes]
    begin: float
    log_offset: int


class Run:
    """One call of the script: its report, log, schedule and processes."""

    def __init__(self, options: argparse.Namespace, begin: float) -> None:
        self.options, self.begin = options, begin
        self.results = options.results.resolve()
        self.results.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="pycircuit-gpu-"))
        self.log = (self.results / "log.txt").open("wb")
        self.running: list[Job] = []
        self.report: dict[str, Any] = {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": options.commit or commit(),
            "dry_run": DRY_RUN if options.device == "cpu" else None,
            "sections": {},
            "red": [],
        }

    def write(self) -> None:
        """Write the report so far to gpu.json."""
        self.report["seconds"] = round(time.monotonic() - self.begin, 1)
        write_json(self.results / "gpu.json", self.report)

    def start(self, name: str, command: list[Any], limit: float, **changes: str) -> Job:
        """Start a process in a group of its own that writes to the log; all share Triton's binaries."""
        changes |= {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(self.scratch / "triton")}
        changes["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        if self.options.device == "cpu":
            changes["TRITON_INTERPRET"] = "1"
        self.report["sections"][name] = {"state": "running", "limit": round(limit, 1)}
        offset = os.lseek(self.log.fileno(), 0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | changes, stdout=self.log, stderr=self.log, start_new_session=True
        )
        job = Job(name, process, time.monotonic(), offset)
        self.running.append(job)
        self.write()
        return job

    def start_section(self, name: str, python: str, limit: float, **changes: str) -> Job:
        words = ["--device", self.options.device, "--seconds", str(max(limit - GRACE, 1.0)), "--out", self.saved(name)]
        words += ["--results", self.results, "--tests", self.options.tests.resolve()]
        return self.start(name, [python, SECTION_SCRIPT, name, *words], limit, **changes)

    def saved(self, name: str) -> Path:
        """File that a section writes after every result."""
        return self.scratch / f"{name}.json"

    def finish(self, job: Job, limit: float) -> bool:
        """Wait for a process, end it at its limit and write what it saved; True if it finished."""
        try:
            status = job.process.wait(max(limit, 0.1))
            state = f"failed: exit status {status}" if status else "finished"
        except subprocess.TimeoutExpired:
            state = f"cut off after {time.monotonic() - job.begin:.0f} s"
        end(job.process)
        self.collect(job, state)
        self.write()
        return state == "finished"

    def collect(self, job: Job, state: str) -> None:
        """Add to the report how a process ended and what it saved."""
        self.running.remove(job)
        path, entry = self.saved(job.name), self.report["sections"][job.name]
        entry |= {"state": state, "seconds": round(time.monotonic() - job.begin, 1)}
        entry["results"] = json.loads(path.read_text()) if path.exists() else {}
        if state != "finished":
            text = (self.results / "log.txt").read_bytes()[job.log_offset :]
            entry["log"] = text.decode(errors="replace")[-2000:]
            self.report["red"].append(f"{job.name}: {state}")
        self.report["red"] += [f"{job.name}: {why}" for why in entry["results"].get("red", [])]

    def install(self, limit: float) -> tuple[str, dict[str, str]]:
        """Install while the kernels compile; return the Python of the sections and the changes to its environment.

        If the install fails, the report is red, and the sections run from the checkout, without the native core.
        """
        without = {"PYTHONPATH": str(linked_checkout(self.scratch / "checkout"))}
        folder = self.options.environment.resolve()
        compiling = self.start_section("compile", sys.executable, limit, **without)
        command = [sys.executable, ROOT / "benchmarks" / "gpu_install.py", folder]
        installing = self.start("install", command, INSTALL_LIMIT * limit)
        waiting, installed = {compiling: limit, installing: INSTALL_LIMIT * limit}, False
        while waiting:
            for job, seconds in list(waiting.items()):
                if job.process.poll() is not None or time.monotonic() > job.begin + seconds:
                    finished = self.finish(job, 0)
                    installed |= finished and job is installing
                    del waiting[job]
            time.sleep(0.1)
        return (str(folder / "bin" / "python"), {}) if installed else (sys.executable, without)

    def sections(self) -> None:
        """Run every section in turn; time that one does not use goes to the next ones."""
        names, python, changes = self.options.section or list(SECONDS), sys.executable, {}
        if not self.options.installed:  # kernels are compiled beside the install
            names = ["compile", *(name for name in names if name != "compile")]
        scale, planned = self.options.seconds / sum(SECONDS[name] for name in names), self.begin
        for number, name in enumerate(names):
            planned += SECONDS[name] * scale
            limit = planned - time.monotonic()
            if number or self.options.installed:
                self.finish(self.start_section(name, python, limit, **changes), limit)
            else:
                python, changes = self.install(limit)

    def run(self) -> int:
        """Run all sections and return the exit status; a signal writes the report and ends the processes."""
        self.write()
        try:
            self.sections()
        except SystemExit as stopped:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            jobs = list(self.running)
            for job in jobs:
                self.collect(job, "stopped from outside")
            self.report["red"].append(f"stopped from outside by signal {int(stopped.code or 0) - 128}")
            self.write()
            for job in jobs:
                end(job.process)
        self.log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        print(f"{self.results / 'gpu.json'}\n{table(self.report)}", flush=True)
        return 1 if self.report["red"] else 0


def linked_checkout(folder: Path) -> Path:
    """Folder from which pycircuit and its kernels can be imported although nothing is installed."""
    package, about = folder / "pycircuit", folder / "pycircuit-0.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pycircuit\nVersion: 0\n")  # read by pycircuit
    for source in (*(ROOT / "pycircuit").iterdir(), ROOT / "kernels"):
        (package / source.name).symlink_to(source)
    return folder


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)


def main(arguments: list[str]) -> int:
    begin, options = time.monotonic(), parse(arguments)
    if options.device == "cuda" and subprocess.run([sys.executable, "-c", HAS_GPU], check=False).returncode:
        print(NO_GPU, file=sys.stderr)
        return 2
    for number in SIGNALS:
        signal.signal(number, stop)
    return Run(options, begin).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
