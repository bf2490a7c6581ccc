"""Source distribution from a used tree, and its wheel in an environment without triton, GPU or compiler."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.requirements import Requirement

from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import OPS

ROOT = Path(__file__).parents[2]
NEEDS = ("torch", "numpy", "typer", "rich", "safetensors", "psutil", "pyyaml", "transformers")
# Packages that the tests have and a user may not: they must be missing in the environment.
ABSENT = ("triton", "pytest", "hypothesis", "pybind11")

# What a used working tree holds beside the sources.
UNWANTED = (
    ".venv-x/lib/pycircuit/module.py",
    ".venv-x/lib/csrc/kernel.cpp",
    "node_modules/pycircuit/index.js",
    "docs/node_modules/left/index.js",
    "page/node_modules/right/index.ts",
    "build-x/pycircuit/module.py",
    "build/pycircuit/module.py",
    "benchmarks/results/new.json",
    "kernels/__pycache__/module.pyc",
    "pycircuit/_native.so",
    "pycircuit/.mypy_cache/data.json",
    "scratch.py",
)
IGNORED = (".git", ".venv*", ".*_cache", "__pycache__", "build", "build-*", "dist", "node_modules", "*.so")
SOURCES = (".py", ".pyi", ".cpp", ".css", ".h", ".js", ".md", ".svg", ".ts", ".tsx")
SDIST_FOLDERS = ("csrc", "docs", "kernels", "page", "pycircuit", "scripts", "tests")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    words = [str(c) for c in command]
    done = subprocess.run(words, capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a tree with an environment, npm's packages and build folders in it."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED))
    for name in UNWANTED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("unwanted")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    _run(sys.executable, "-c", code, folder, cwd=tree)
    (path,) = folder.glob("*.tar.gz")
    return path


def _contents(sdist: Path) -> dict[str, bytes]:
    """The files of a source distribution, by their path below its top folder."""
    with tarfile.open(sdist) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {file.name.partition("/")[2]: archive.extractfile(file).read() for file in files}  # type: ignore[union-attr]


def _unpack(contents: dict[str, bytes], folder: Path) -> None:
    """Write what has changed: the compiler then compiles only that."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in contents:
            path.unlink()
    for name, data in contents.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution, without CUDA or optimisation. Its build folder stays, for the next run."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    settings = ("-C", f"build-dir={build}/sdist-wheel-{{wheel_tag}}", "-C", "cmake.define.PYCIRCUIT_CUDA=OFF")
    settings += (
        "-C",
        "cmake.build-type=Debug",
    )  # compiles in a third of the time; `make package` builds it as users do
    options = ("--no-deps", "--no-build-isolation", "-w", folder)
    with FileLock(build / "sdist-wheel.lock"):  # workers of one run share the folder
        source = build / "sdist-source"
        _unpack(_contents(sdist), source)
        _run(sys.executable, "-m", "pip", "wheel", source, *options, *settings, cwd=source)
    (path,) = folder.glob("*.whl")
    return path


def _closure(names: tuple[str, ...]) -> set[str]:
    """These distributions and what they require here, without triton, which a torch for GPUs requires."""
    closure: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in closure or name in ABSENT:
            continue
        closure.add(name)
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name.lower().replace("_", "-"))
    return closure


def _link(name: str, into: Path) -> None:
    """Link the distribution's top-level files and folders into another environment."""
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
    """A function that runs a program of a new environment, in an empty folder, with no other program on PATH."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "env", with_pip=False, symlinks=True)
    python = home / "env" / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for name in _closure(NEEDS):
        _link(name, site)
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    inherited = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "LD_")) or k == "TMPDIR"}
    environment = {**inherited, "PATH": str(python.parent), "HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}

    def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
        return _run(python.parent / program, *args, cwd=home, env=environment)

    return run


def test_sdist_holds_the_sources_and_no_more(sdist: Path) -> None:
    names = set(_contents(sdist))
    assert names.isdisjoint(UNWANTED)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not [folder for folder in folders if folder.startswith((".", "build", "node_modules", "__pycache__"))]
    sources = {"README.md", "LICENSE", "CMakeLists.txt", "pyproject.toml", "mkdocs.yml"}
    for folder in SDIST_FOLDERS:
        paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
        sources |= {path.relative_to(ROOT).as_posix() for path in paths if "node_modules" not in path.parts}
    assert sources <= names
    assert {name.split("/")[0] for name in names if "/" in name} == set(SDIST_FOLDERS)
    assert sdist.stat().st_size < 8e6


def test_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    page = [f"page/static/{name}" for name in ("index.html", "page.js", "page.css")]
    for name in ("py.typed", "_native.pyi", "kernels/__init__.py", *page, *(f"kernels/{p.name}" for p in _kernels())):
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


NESTED = """
from importlib.util import find_spec
import pycircuit
print([name for name in ("pycircuit", "kernels.kernels", "tests", "benchmarks") if find_spec(f"pycircuit.{name}")])
"""


def test_package_is_not_inside_itself(inside: Run) -> None:
    """Neither in the editable install nor from the wheel."""
    assert _run(sys.executable, "-c", NESTED).stdout.strip() == "[]"
    assert inside("python", "-c", NESTED).stdout.strip() == "[]"


USER_SCRIPT = """\
import pycircuit as pc

model = pc.load("demo")
graph = pc.attribute(model, "the capital of Texas is", progress=False)
result = pc.intervene(model, "the capital of Texas is", [pc.Intervention(0, 1, 2, value=0.0)])
reveal_type(model)
reveal_type(graph)
reveal_type(graph.features)
reveal_type(graph.prune())
reveal_type(result.probabilities)
pc.attribute(model, "the capital of Texas is", max_featurs=3)
pc.load("demo", reads="mlp")
pc.train(model, ["the capital of Texas is"], features=8, writes="mlp")
pc.intervene(model, "the capital of Texas is", [], freeze="everything")
"""
# Packages of no type that the script sees. To check them takes five times as long as all others together.
UNCHECKED = (
    "transformers",
    "huggingface_hub",
    "sympy",
    *(f"torch.{name}" for name in ("_dynamo", "_export", "_functorch", "_inductor", "ao", "distributed", "fx", "onnx")),
)
# By line; mypy names the argument, or the type that it must have.
ERRORS = {11: '"max_featurs"', 12: "Literal['hook_resid_mid'", 13: "Literal['mlp_out', 'mlp_raw']", 14: '"intervene"'}
REVEALED = (
    "pycircuit.model.replacement.ReplacementModel",
    "pycircuit.graph.graph.Graph",
    "torch._tensor.Tensor",
    "pycircuit.graph.prune.Pruned",
    "torch._tensor.Tensor",
)


def test_mypy_sees_the_types_of_an_installed_wheel(inside: Run, tmp_path: Path) -> None:
    python = inside("python", "-c", "import sys; print(sys.executable)").stdout.strip()
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    modules = ",".join(f"{name}.*" for name in UNCHECKED)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[mypy-{modules}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", python]
    command += ["--cache-dir", str(ROOT / "build" / "mypy-of-a-user"), "script.py"]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    for line, revealed in enumerate(REVEALED, 6):
        assert f'script.py:{line}: note: Revealed type is "{revealed}"' in checked.stdout, checked.stderr
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(ERRORS), checked.stdout
    for error, (line, culprit) in zip(errors, ERRORS.items(), strict=True):
        assert error.startswith(f"script.py:{line}: ") and culprit in error


def test_doctor_says_which_implementation_runs(inside: Run) -> None:
    printed = inside("pycircuit", "doctor").stdout
    assert "triton: triton is not installed" in printed
    report = json.loads(inside("pycircuit", "doctor", "--json").stdout)
    assert report["isas"] == dict(native_isas())
    assert report["triton"] is None and report["gpus"] == [] and report["native"]["cuda"] is None
    best = [name for name, supported in native_isas() if supported][-1]
    assert list(report["ops"]) == list(OPS)
    for op in report["ops"].values():
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
    """The oldest Python that the package names can parse its sources."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
