"""The wheel, in an environment with nothing but what it asks for: no triton, no GPU, no compiler."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import OPS

ROOT = Path(__file__).parents[1]
NEEDS = ("torch", "numpy", "typer", "rich", "safetensors", "psutil", "pyyaml", "transformers")
# What the tests have and a user may not: it must be missing in the environment for the tests to mean anything.
ABSENT = ("triton", "pytest", "hypothesis", "pybind11")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    words = [str(c) for c in command]
    done = subprocess.run(words, capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without CUDA, in a build directory that is kept: the second time nothing is compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = ("-C", "build-dir=build/wheel-{wheel_tag}", "-C", "cmake.define.PYCIRCUIT_CUDA=OFF")
    _run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ROOT,
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        *settings,
        cwd=ROOT,
    )
    (found,) = folder.glob("*.whl")
    return found


def _closure(names: tuple[str, ...]) -> set[str]:
    """These distributions and what they require here, triton aside: a torch for GPUs asks for it."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in found or name in ABSENT:
            continue
        found.add(name)
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name.lower().replace("_", "-"))
    return found


def _link(name: str, into: Path) -> None:
    """The distribution's top-level files and folders, seen from another environment."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return
    for top in {f.parts[0] for f in files} - {"..", "__pycache__"}:
        source, target = Path(str(distribution(name).locate_file(top))), into / top
        if not target.exists():
            target.symlink_to(source)


@pytest.fixture(scope="module")
def inside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of the new environment, in an empty folder, with a PATH that holds the environment alone."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "env", with_pip=False, symlinks=True)
    python = home / "env" / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for name in _closure(NEEDS):
        _link(name, site)
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "LD_")) or k == "TMPDIR"}
    environment = {**kept, "PATH": str(python.parent), "HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}

    def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
        return _run(python.parent / program, *args, cwd=home, env=environment)

    return run


def test_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("py.typed", "_native.pyi", "kernels/__init__.py", *(f"kernels/{p.name}" for p in _kernels())):
        assert f"pycircuit/{name}" in names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pycircuit").rglob("*.py")}
    assert modules <= names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert sum(n.startswith("pycircuit/_native.") and n.endswith((".so", ".pyd")) for n in names) == 1
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"pycircuit"}
    assert [n for n in names if n.endswith((".cpp", ".h", ".cu", ".txt")) and "dist-info" not in n] == []


def _kernels() -> list[Path]:
    return sorted((ROOT / "kernels").glob("*.py"))


def test_imports_alone_and_computes(inside: Run) -> None:
    code = f"""
import shutil, sys
from importlib.util import find_spec
import torch
import pycircuit as pc
for name in {ABSENT!r}:
    assert find_spec(name) is None, name
assert not [c for c in ("cc", "gcc", "c++", "g++", "clang", "nvcc") if shutil.which(c)]
assert not torch.cuda.is_available()
assert not {{"typer", "rich"}} & set(sys.modules), "only the command line needs them"
features = pc.ops.encode(torch.eye(3), torch.eye(3), torch.zeros(3), pc.ReLU())
assert pc.last_run().implementation == "native"
assert torch.equal(pc.ops.decode(features, torch.eye(3)), torch.eye(3))
print(pc.__file__)
"""
    assert str(ROOT) not in inside("python", "-c", code).stdout


def test_doctor_says_what_runs_and_why(inside: Run) -> None:
    printed = inside("pycircuit", "doctor").stdout
    assert "triton: triton is not installed" in printed
    found = json.loads(inside("pycircuit", "doctor", "--json").stdout)
    assert found["isas"] == dict(native_isas())
    assert found["triton"] is None and found["gpus"] == [] and found["native"]["cuda"] is None
    best = [name for name, supported in native_isas() if supported][-1]
    assert list(found["ops"]) == list(OPS)
    for op in found["ops"].values():
        assert (op["cpu"]["implementation"], op["cpu"]["isa"]) == ("native", best)
        assert op["cpu"]["others"]["triton"].startswith("triton is not installed")


def test_module_is_the_command(inside: Run) -> None:
    assert inside("python", "-m", "pycircuit", "--version").stdout == inside("pycircuit", "--version").stdout


def test_bench_from_the_wheel(inside: Run) -> None:
    printed = inside(
        "pycircuit", "bench", "--row", "edge_scores/small/b64-plt", "--quick", "--json", "here.json"
    ).stdout
    assert "edge_scores/small/b64-plt" in printed and "of floor" in printed
    assert "edge_scores/small/b64-plt" in inside("pycircuit", "bench", "compare", "here.json", "here.json").stdout


@pytest.mark.parametrize("folder", ["pycircuit", "kernels", "benchmarks"])
def test_syntax_of_the_oldest_python(folder: str) -> None:
    """What the package says it needs is what its sources can be read by."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
