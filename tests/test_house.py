"""The house: language, sizes, layout and objects of every Python file, by the rules of house_rules.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import house_rules
import pytest
from house_rules import RULES, Source

import pycircuit as pc

ROOT = Path(__file__).parents[1]
SOURCES = house_rules.sources_of(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[list[Source]], list[str]]) -> None:
    broken = rule(SOURCES)
    assert not broken, "\n".join(broken)


def test_no_function_hides_a_package() -> None:
    packages = [path.parent.relative_to(ROOT) for path in (ROOT / "pycircuit").rglob("__init__.py")]
    for package in packages:
        below = [other.name for other in packages if other.parent == package]
        module = importlib.import_module(".".join(package.parts))
        assert not house_rules.functions_that_hide_packages(module, below)


def test_public_names_are_all_that_dir_lists() -> None:
    assert dir(pc) == sorted(pc.__all__)


LONG = "def long():\n" + "".join(f"    x = {n}\n" for n in range(61))
SHARED = "def first():\n" + "".join(f"    x = {n}\n" for n in range(10))
BROKEN = {
    "names_that_are_none": {"pycircuit/graph/a.py": "found = 3"},
    "docstrings_that_do_not_name": {"kernels/a.py": '"""What it does."""'},
    "files_too_long": {"tests/a.py": "".join(f"x = {n}\n" for n in range(401))},
    "functions_too_long": {"benchmarks/a.py": LONG},
    "shared_lines": {"pycircuit/graph/a.py": SHARED, "pycircuit/trace/b.py": SHARED},
    "file_names_used_twice": {"pycircuit/graph/a.py": "", "pycircuit/trace/a.py": ""},
    "arrows_that_run_up": {"pycircuit/ops/a.py": "def f():\n    from pycircuit.trace import attribute"},
    "import_circles": {"pycircuit/ops/a.py": "from . import b", "pycircuit/ops/b.py": "from .a import x"},
    "tests_that_import_tests": {"tests/test_a.py": "from test_b import x", "tests/test_b.py": "x = 1"},
    "fields_set_late": {
        "pycircuit/graph/a.py": "class A:\n    def __init__(self): self.x = 1\n    def start(self): self.y = 2"
    },
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_sees_what_breaks_it(rule: Callable[[list[Source]], list[str]]) -> None:
    broken = [Source(Path(name), text) for name, text in BROKEN[rule.__name__].items()]
    assert rule(broken)
    assert [other.__name__ for other in RULES if other(broken)] == [rule.__name__]


def test_a_function_that_hides_a_package_is_seen() -> None:
    package: Any = type("package", (), {"train": staticmethod(len)})
    assert house_rules.functions_that_hide_packages(package, ["train"])
