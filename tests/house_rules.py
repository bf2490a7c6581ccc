"""The rules that tests/test_house.py holds the tree to, each a function from sources to sentences of what to do."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx

LONGEST_FILE, LONGEST_FUNCTION, SHARED_LINES = 400, 60, 10

NO_NAMES = {
    "at", "one", "each", "found", "held", "kept", "given", "told", "asked", "said", "take", "let", "here", "some",
    "how", "whole", "rest", "part", "room", "piece",
}  # fmt: skip
NO_OPENINGS = ["what", "of", "how", "whether", "where", "which", "that"]

# Packages and modules of pycircuit from the ground up: each imports what stands before it, and itself.
LAYERS = (
    ("_native", "command_interrupt"),
    ("files",),
    ("ops", "progress"),
    ("kernels",),
    ("transcoders",),
    ("model",),
    ("graph",),
    ("labels",),
    ("trace",),
    ("interventions", "training"),
    ("examples",),
    ("demo",),
    ("loading",),
    ("page", "truth"),
    ("pycircuit",),  # the public names
    ("bench",),
    ("doctor", "integrations"),
    ("cli",),
    ("__main__",),
)


@dataclass(frozen=True)
class Source:
    """A Python file. path: relative to the root of the repository."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def module(self) -> str:
        parts = list(self.path.with_suffix("").parts)
        if parts[0] == "kernels":
            parts.insert(0, "pycircuit")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def in_package(self) -> bool:
        return self.path.parts[0] in ("pycircuit", "kernels")

    def place(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


# Language


def bindings(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every name that a file gives: to variables, arguments, fields, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node, node.asname


def names_that_are_none(sources: list[Source]) -> list[str]:
    return [
        f"{source.place(node)}: {name!r} is no name; say what the thing is"
        for source in sources
        for node, name in bindings(source.tree)
        if name.lower().strip("_") in NO_NAMES
    ]


def docstrings_that_do_not_name(sources: list[Source]) -> list[str]:
    broken = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                words = re.findall(r"[A-Za-z']+", first.lower())
                if words and (words[0] in NO_OPENINGS or words[:2] == ["the", "same"]):
                    broken.append(f"{source.place(node)}: begins with {first[:40]!r}; name the thing, or what it does")
    return broken


# Sizes


def files_too_long(sources: list[Source]) -> list[str]:
    lines = {source.path: source.text.count("\n") for source in sources}
    return [
        f"{path}: {n} lines, {LONGEST_FILE} at most; split it by subject"
        for path, n in lines.items()
        if n > LONGEST_FILE
    ]


def functions_too_long(sources: list[Source]) -> list[str]:
    broken = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    broken.append(f"{source.place(node)}: {node.name} has {length} lines, {LONGEST_FUNCTION} at most")
    return broken


def shared_lines(sources: list[Source]) -> list[str]:
    """Places that share ten lines or more: blank lines, imports, signatures, comments and docstrings aside."""
    windows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for source in sources:
        skipped = set()
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import | ast.ImportFrom) or (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            ):
                skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            elif isinstance(node, ast.FunctionDef):  # signatures that say the same are meant to be alike
                skipped.update(range(node.lineno, node.body[0].lineno))
        lines = [
            (number, line.strip())
            for number, line in enumerate(source.text.split("\n"), 1)
            if number not in skipped and line.strip(" )]},#") and not line.strip().startswith("#")
        ]
        for first in range(len(lines) - SHARED_LINES + 1):
            block = lines[first : first + SHARED_LINES]
            windows[tuple(line for _, line in block)].append(f"{source.path}:{block[0][0]}")
    return [f"{' and '.join(places)} share {SHARED_LINES} lines" for places in windows.values() if len(places) > 1]


# Layout


def file_names_used_twice(sources: list[Source]) -> list[str]:
    places = defaultdict(list)
    for source in sources:
        path = source.path
        if source.in_package and "formats" not in path.parts and path.parts[0] != "kernels" and path.stem[:2] != "__":
            places[path.name].append(str(path))
    return [f"{' and '.join(paths)} have one name; say what each holds" for paths in places.values() if len(paths) > 1]


def imports(source: Source, modules: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Modules of pycircuit that a file imports, anywhere in it; imports for type checkers aside."""
    package = source.module.split(".")
    if source.path.name != "__init__.py":
        package = package[:-1]
    for node in runtime_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names if alias.name.split(".")[0] == "pycircuit")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin.split(".")[0] == "pycircuit":
                for alias in node.names:
                    name = f"{origin}.{alias.name}"
                    yield node, name if name in modules else origin


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from runtime_nodes(child)


def import_edges(sources: list[Source]) -> Iterator[tuple[Source, ast.AST, str]]:
    modules = {source.module for source in sources if source.in_package} | {"pycircuit._native"}
    for source in sources:
        if source.in_package:
            yield from ((source, node, name) for node, name in imports(source, modules))


def arrows_that_run_up(sources: list[Source]) -> list[str]:
    level = {name: n for n, names in enumerate(LAYERS) for name in names}
    broken = []
    for source, node, imported in import_edges(sources):
        importer, target = (name.split(".")[1] if "." in name else name for name in (source.module, imported))
        for name in {importer, target} - set(level):
            broken.append(f"{source.place(node)}: {name} has no place in LAYERS of tests/house_rules.py")
        if importer != target and level.get(target, 0) >= level.get(importer, len(LAYERS)):
            broken.append(f"{source.place(node)}: {importer} imports {target}, which stands above it or beside it")
    return broken


def import_circles(sources: list[Source]) -> list[str]:
    graph = networkx.DiGraph(
        (source.module, name) for source, _, name in import_edges(sources) if source.module != name
    )
    circles = [sorted(c) for c in networkx.strongly_connected_components(graph) if len(c) > 1]
    return [f"{', '.join(circle)} import each other" for circle in circles]


def tests_that_import_tests(sources: list[Source]) -> list[str]:
    tests = {source.path.stem for source in sources if source.path.stem.startswith("test_")}
    broken = []
    for source in sources:
        for node in ast.walk(source.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if source.path.parts[0] == "tests" and tests & {name.split(".")[-1] for name in names}:
                broken.append(f"{source.place(node)}: imports a test; what two share stands in a module beside them")
    return broken


# Objects


def fields_set_late(sources: list[Source]) -> list[str]:
    """Fields that a method adds to an object which its `__init__`, or a base's, has not given it."""
    classes = {n.name: n for source in sources for n in ast.walk(source.tree) if isinstance(n, ast.ClassDef)}
    broken = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and "__init__" in methods(node):
                known = known_fields(node, classes)
                broken += [
                    f"{source.place(place)}: {node.name}.{name} is first set in {method.name}; set it in __init__"
                    for method in methods(node).values()
                    for place, name in fields(method)
                    if name not in known
                ]
    return broken


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}


def known_fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Names that a class declares or sets in `__init__`, and its bases do; names of its properties."""
    known = set(methods(node)) | {name for _, name in fields(methods(node).get("__init__", ast.Pass()))}
    for child in node.body:
        if not isinstance(child, ast.FunctionDef):
            known |= {name for _, name in bindings(child)}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            known |= known_fields(classes[base.id], classes)
    return known


def fields(method: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(method):
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node, node.attr


def functions_that_hide_packages(package: object, names: list[str]) -> list[str]:
    """Names of subpackages that something else than the package answers to."""
    kinds = {name: type(getattr(package, name, package)).__name__ for name in names}
    return [f"{name} is a {kind} and a package; packages are nouns" for name, kind in kinds.items() if kind != "module"]


RULES = (
    names_that_are_none,
    docstrings_that_do_not_name,
    files_too_long,
    functions_too_long,
    shared_lines,
    file_names_used_twice,
    arrows_that_run_up,
    import_circles,
    tests_that_import_tests,
    fields_set_late,
)


def sources_of(root: Path) -> list[Source]:
    folders = ("pycircuit", "kernels", "benchmarks", "scripts", "tests")
    paths = sorted(path.relative_to(root) for folder in folders for path in (root / folder).rglob("*.py"))
    return [Source(path, (root / path).read_text()) for path in paths]


def main() -> int:
    sources = sources_of(Path(__file__).parents[1])
    broken = [sentence for rule in RULES for sentence in rule(sources)]
    print("\n".join(broken) or "The house is in order")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
