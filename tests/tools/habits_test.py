"""What makes a repository usual: one version, tools pinned in one place, clean files."""

from __future__ import annotations

import re
import runpy
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from setuptools.config.pyprojecttoml import read_configuration

import fastvdm

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = "".join((ROOT / f"requirements-{name}.txt").read_text() for name in ("dev", "docs"))
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", REQUIREMENTS, re.M))
LINT = runpy.run_path(str(ROOT / ".ci" / "check.py"))["steps"]("lint", False, [])
(HOOKS,) = (
    r["hooks"] for r in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
)


def tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no git checkout")
    return [name for name in found.stdout.split("\0") if (ROOT / name).is_file()]


# -- tools ----------------------------------------------------------------------------------------


def test_hooks_and_lint_run_pinned_tools():
    """Hooks have no versions of their own: they run what requirements-dev.txt had installed."""
    installed = {name: metadata.distribution(name) for name in PINNED}
    assert {name: dist.version for name, dist in installed.items()} == PINNED
    programs = {
        file.name
        for dist in installed.values()
        for file in dist.files or ()
        if file.parent.name == "bin"
    }
    entries = [hook["entry"].split()[0] for hook in HOOKS]
    assert {hook["language"] for hook in HOOKS} == {"system"}
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    assert {Path(entry).name for entry in entries} <= programs
    named = [c[2].replace("_", "-") if c[1] == "-m" else c[0] for _, c, _ in LINT]
    assert {Path(name).name for name in named} <= programs


def test_pinned_tools_install_on_the_oldest_python():
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    wants = {name: metadata.metadata(name)["Requires-Python"] or "" for name in PINNED}
    assert not {name for name, want in wants.items() if oldest[1] not in SpecifierSet(want)}


def test_what_lint_checks_a_hook_checks():
    assert {name for name, _, _ in LINT} <= {hook["name"] for hook in HOOKS}


def test_lint_formats_every_cpp_file():
    (command,) = (command for name, command, _ in LINT if name == "clang-format")
    kinds = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
    assert {name for name in tracked() if Path(name).suffix in kinds} <= set(command)


def test_lint_checks_every_file_for_others_programs():
    checked = [a for _, command, _ in LINT if "check_jsonschema" in command for a in command]
    ours = {name for name in tracked() if re.fullmatch(r"\.github/.*\.ya?ml|.*\.cff", name)}
    assert len(ours) > 6 and sorted(ours) == sorted(ours.intersection(checked))
    assert len([a for a in checked if a in ours]) == len(ours)  # each by one schema


# -- version --------------------------------------------------------------------------------------


def test_every_place_names_the_same_version():
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## v?(\d+\.\d+\S*)(.*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert project["version"] == citation["version"] == newest[1] == fastvdm.__version__
    dates = re.findall(r"\d{4}-\d\d-\d\d", newest[2])
    assert dates in ([], [citation["date-released"]])
    holder = re.search(r"^Copyright \(c\) \d+ (.*)", (ROOT / "LICENSE").read_text(), re.M)
    assert holder is not None and project["authors"] == citation["authors"] == [{"name": holder[1]}]
    assert project["license"] == citation["license"]


# -- files ----------------------------------------------------------------------------------------


def test_text_ends_in_one_newline_and_lines_in_no_blank():
    unclean = []
    for name in tracked():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content and content:
            ends = content.endswith(b"\n") and not content.endswith(b"\n\n")
            if not ends or re.search(rb"[ \t\r]$", content, re.M):
                unclean.append(name)
    assert not unclean
