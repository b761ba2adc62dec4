"""The map in CONTRIBUTING.md is the tree, and imports only go down.

``python tests/tools/tree_test.py`` prints which packages each package imports.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FOLDERS = {p.name for p in (ROOT / "tests").iterdir()}
OPS = {p.stem for p in (ROOT / "fastvdm" / "ops").glob("[!_]*.py")}


def blocks() -> list[list[str]]:
    """The paths of each indented block under "The map": homes of an op, shared files, packages."""
    section = PAGE.split("## The map\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^ {4}.*\n)+", section, re.M)
    return [[p for line in b.splitlines() for p in line[4:].split("  ")[0].split()] for b in found]


HOMES, SHARED, PACKAGES = blocks()


def files(pattern: str) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern)}


# -- the map --------------------------------------------------------------------------------------


def test_a_file_is_named_after_its_op_or_named_as_shared():
    shared = set().union(*map(files, SHARED))
    names = "|".join(map(re.escape, OPS))
    for home in HOMES:
        pattern = re.escape(home).replace(r"\*", "*")
        pattern = pattern.replace("<op>*", f"(?:{names})(?:_\\w+)?").replace("<op>", f"(?:{names})")
        own = re.compile(pattern.replace("/*", r"/\w+"))
        there = files(re.sub(r"<op>\*?", "*", home)) - {home.replace("<op>", "__init__")}
        strange = sorted(f for f in there - shared if not own.fullmatch(f))
        assert not strange, f"neither {home} nor in the map of CONTRIBUTING.md: {strange}"


def test_what_the_map_names_exists():
    missing = [p for p in SHARED + PACKAGES if not files(p)]
    missing += [home for home in HOMES if not files(re.sub(r"<op>\*?", "*", home))]
    assert not missing, f"in the map of CONTRIBUTING.md, not in the tree: {missing}"
    assert not {p for p in SHARED if "<op>" in p}


def test_every_op_has_a_test():
    assert "tests/ops/<op>_test.py" in HOMES
    missing = sorted(op for op in OPS if not (ROOT / "tests" / "ops" / f"{op}_test.py").is_file())
    assert not missing, f"no tests/ops/<op>_test.py: {missing}"


@pytest.mark.parametrize(
    "file, pattern",
    [
        ("tests/conftest.py", r"^LONGEST = \((.*?)^\)"),  # what starts first
        ("Makefile", r"^ISA_TESTS := .*?_test.py,(.*?)\)"),
        (".ci/variant.py", r"^TESTS = \{(.*?)^\}"),
    ],
)
def test_lists_of_test_files_name_files(file, pattern):
    (listed,) = re.findall(pattern, (ROOT / file).read_text(), re.M | re.S)
    names = set(re.findall(r"\w+", re.sub(r'"(sanitize|bf16)"|_test\.py|#.*', "", listed)))
    assert len(names) > 2
    assert not {n for n in names - FOLDERS if not files(f"tests/*/{n}_test.py")}


def test_every_package_is_in_the_map():
    top = {p.as_posix() for p in MODULES.values()}
    unknown = sorted(path for path in top if level(path) is None)
    assert not unknown, f"not in the map of CONTRIBUTING.md: {unknown}"


def test_files_above_400_lines_are_those_that_are_named():
    section = PAGE.split("## Files above 400 lines\n")[1].split("\n## ")[0]
    named = [re.findall(r"`(\S+)`", row.split("|")[1]) for row in section.splitlines()[2:]]
    folders = ("fastvdm", "kernels", "csrc", "bench", "tests", "examples")
    patterns = [f"{folder}/**/*.{kind}" for folder in folders for kind in ("py", "cpp", "h", "cu")]
    long = {f for f in set().union(*map(files, patterns)) if f.split("/")[:2] != KERNELS_LINK}
    long = {f for f in long if len((ROOT / f).read_text().splitlines()) > 400}
    fitting = {p: files(p) & long for row in named for p in row}
    assert not (extra := long - set().union(*fitting.values())), f"above 400 lines: {extra}"
    assert not (gone := [p for p, fit in fitting.items() if not fit]), f"not above 400: {gone}"


# -- imports --------------------------------------------------------------------------------------

KERNELS_LINK = ["fastvdm", "kernels"]  # a link to kernels/, a file where there are no links


def modules() -> dict[str, Path]:
    """The path of each module of the package, relative to the root."""
    found = {}
    for file in sorted(ROOT.glob("fastvdm/**/*.py")) + sorted(ROOT.glob("kernels/**/*.py")):
        path = file.relative_to(ROOT)
        parts = [*path.parts[:-1], path.stem]
        if parts[:2] != KERNELS_LINK:
            parts = parts if parts[0] == "fastvdm" else ["fastvdm", *parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports: in functions and for type checkers, too. What
    dispatch loads by its name at the first call of an op is no import."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found & MODULES.keys()


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def level(path: str) -> str | None:
    """The line of the map that a module belongs to."""
    return next((p for p in PACKAGES if path == p or p.endswith("/") and path.startswith(p)), None)


def package(module: str) -> str:
    line = level(MODULES[module].as_posix())
    assert line is not None
    return line


def test_imports_only_go_down():
    order = {line: i for i, line in enumerate(PACKAGES)}
    upward = {
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if order[package(other)] > order[package(name)]
    }
    assert not upward


def test_no_module_imports_itself_through_others():
    left = dict(GRAPH)
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, f"in a circle, or above one: {sorted(left)}"


if __name__ == "__main__":
    for line in PACKAGES:
        used = {package(o) for m, others in GRAPH.items() if package(m) == line for o in others}
        print(f"{line:<24}", *(p for p in PACKAGES if p in used - {line}))
