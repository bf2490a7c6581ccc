"""What a stranger gets: the wheel, the README's example, and files that Python 3.10 can read."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("cmake", "ninja", "c++", "g++", "clang++")


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
        promised = re.findall(r"print\(.*?\)\s+# (\w+[(.].*)", block)
        said = capsys.readouterr().out.splitlines()
        assert promised and said[: len(promised)] == promised


@pytest.mark.parametrize("package", ["pycircuit", "kernels", "benchmarks"])
def test_syntax_of_python_310(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        ast.parse(file.read_text(), str(file), feature_version=(3, 10))


def test_only_the_command_line_needs_typer_and_rich() -> None:
    program = (
        "import sys, pycircuit, pycircuit.doctor, pycircuit.bench.session; print(*{'typer', 'rich'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel .` does, but with the tools that are here: an isolated build would fetch them again."""
    out = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", f"-Cbuild-dir={ROOT / 'build' / 'wheel'}", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("py.typed", "_native.pyi", "cli.py", "bench/rows.py", "kernels/__init__.py", "kernels/encode.py"):
        assert f"pycircuit/{wanted}" in names
    assert any(re.fullmatch(r"pycircuit/_native\..*\.(so|pyd)", name) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    stray = [n for n in names if not n.startswith(("pycircuit/", "pycircuit-")) or n.endswith((".cpp", ".h", ".cu"))]
    assert stray == []


@pytest.mark.slow
def test_wheel_works_without_triton_or_compiler(wheel: Path, tmp_path: Path) -> None:
    """A new environment that sees this one's packages one by one, without triton, and a PATH with nothing on it."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    _borrow(site)
    zipfile.ZipFile(wheel).extractall(site)
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}

    def say(*arguments: str) -> str:
        command = [python, "-W", "error", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = f"import shutil, pycircuit; print(pycircuit.__file__, any(map(shutil.which, {TOOLS})))"
    assert say("-c", program).split() == [str(site / "pycircuit" / "__init__.py"), "False"]
    found = json.loads(say("-m", "pycircuit", "doctor", "--json"))
    assert found["triton"] is None and found["gpus"] == []
    for plan in found["ops"].values():
        assert plan["cpu"]["implementation"] == "native"
        assert "triton is not installed" in plan["cpu"]["others"]["triton"]
    assert "decode/small/plt" in say(
        "-m", "pycircuit", "bench", "--row", "decode/small/plt", "--quick", "--threads", "1"
    )


def _borrow(site: Path) -> None:
    """Links to every installed package but triton and ourselves."""
    import torch

    for entry in Path(torch.__file__).parents[1].iterdir():
        if not re.match(r"(triton|pycircuit|_pycircuit|__pycache__|.*\.pth$)", entry.name):
            target = site / entry.name
            if not target.exists():
                target.symlink_to(entry)
