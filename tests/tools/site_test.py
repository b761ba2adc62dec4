"""The site of docs/: it builds strictly, every link and anchor leads somewhere, in the tree and in
the site, nothing of it comes from elsewhere, every public name has its entry in the reference.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import fastvdm.ops
import fastvdm.reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]
API = sorted((ROOT / "docs" / "api").glob("*.md"))

# -- links in the tree, as whoever reads the Markdown follows them --------------------------------

FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def slug(heading: str) -> str:
    """The anchor of a heading, as git hosts make it; mkdocs.yml has the same."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCED.sub("", page.read_text()), re.M):
        name = slug(heading)
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    # Of the reference, and of the command line, the headings are made by the build.
    for path in re.findall(r"^::: (\S+)", page.read_text(), re.M):
        names |= {path, path.rpartition(".")[2]}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_and_anchor_leads_somewhere(page):
    for target in map("".join, LINK.findall(FENCED.sub("", page.read_text()))):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor and not (there.name == "command-line.md" and anchor.startswith("fastvdm-")):
            assert anchor in anchors(there), target


# -- the site -------------------------------------------------------------------------------------


class Html(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.ids |= {v for v in (values.get("id"), values.get("name") if tag == "a" else None) if v}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and values.get("href"):
            self.resources.append(values["href"])
        elif values.get("src"):
            self.resources.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built strictly: a warning, of a broken link, a missing anchor or an unlisted page, is an
    error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("typer")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_links_of_the_site_lead_somewhere_in_it(site):
    pages = {path: Html(path.read_text()) for path in site.rglob("*.html")}
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of wherever the site is
            continue
        for target in page.links:
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / unquote(file)).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), (path.name, target)
            if anchor and there in pages:
                assert unquote(anchor) in pages[there].ids | {"__top"}, (path.name, target)


def test_the_site_fetches_nothing(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        far = [r for r in Html(text).resources if re.match(r"(https?:)?//", r)]
        far += re.findall(r"import[ (]['\"]https?:[^'\"]+|\b(?:cdnjs|jsdelivr|unpkg)\b", text)
        assert not far, path.name
    sheets = [*site.rglob("*.css")]
    assert sheets and not [p for p in sheets if re.search(r"url\(['\"]?https?:", p.read_text())]


def test_the_site_has_every_page_and_no_code(site):
    for page in [*ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        below = page.relative_to(ROOT / "docs" if "docs" in page.parts else ROOT)
        assert (site / below).with_suffix(".html").is_file(), page
    assert not [*site.rglob("*.py")]


def test_the_page_of_the_command_line_has_every_option(site):
    import typer

    from fastvdm.cli import commands, training  # noqa: F401  they register themselves
    from fastvdm.cli.app import app

    text = (site / "api" / "command-line.html").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        assert f'id="fastvdm-{name}"' in text
        for parameter in command.params:
            if parameter.param_type_name == "option" and not getattr(parameter, "hidden", False):
                assert parameter.opts[0] in text, (name, parameter.opts)


# -- the reference --------------------------------------------------------------------------------

MODULES = [
    "fastvdm",
    "fastvdm.bundle",
    "fastvdm.diffusion",
    "fastvdm.diffusion.joint",
    "fastvdm.export",
    "fastvdm.info",
    "fastvdm.metrics",
    "fastvdm.parallel",
    "fastvdm.testing",
    "fastvdm.text",
    "fastvdm.training",
    "fastvdm.unet",
    "fastvdm.video",
]
for package in (fastvdm.ops, fastvdm.reference):
    found = pkgutil.iter_modules(package.__path__)
    MODULES += [f"{package.__name__}.{m.name}" for m in found if not m.name.startswith("_")]

# What the files of ops share among themselves, and what no one looks up.
SHARED = {
    "fastvdm.__version__",
    *(f"fastvdm.ops.attention_block.{n}" for n in ("attention",)),
    *(f"fastvdm.ops.axis_attention.{n}" for n in ("attend", "merged", "sequence", "table_rows")),
    "fastvdm.ops.linear_attention_block.exceeds_registers",
    "fastvdm.ops.norm_act.check_stats",
    *(f"fastvdm.ops.space_conv.{n}" for n in ("check_conv", "choose", "convolve")),
    "fastvdm.ops.temporal_block.exceeds_registers",
}


def public() -> dict[str, Any]:
    """Every public name: those of ``__all__``, or what the module defines without an underscore."""
    names = {}
    for name in MODULES:
        module = importlib.import_module(name)
        own = (n for n, v in vars(module).items() if getattr(v, "__module__", None) == name)
        for n in getattr(module, "__all__", None) or [n for n in own if not n.startswith("_")]:
            names[f"{name}.{n}"] = getattr(module, n)
    return {name: value for name, value in names.items() if name not in SHARED}


def entries() -> list[str]:
    return [e for page in API for e in re.findall(r"^::: (\S+)", page.read_text(), re.M)]


def test_every_entry_of_the_reference_is_there_once():
    assert not [e for e, count in Counter(entries()).items() if count > 1]
    for entry in entries():
        pkgutil.resolve_name(entry)


def test_every_public_name_is_on_one_page_of_the_reference():
    """A name that several modules export is one object, and has one entry."""
    listed = [pkgutil.resolve_name(entry) for entry in entries()]
    missing = [n for n, value in public().items() if not any(value is other for other in listed)]
    assert not missing, f"no entry in docs/api: {missing}"
    assert len({id(value) for value in listed}) == len(listed)


def test_shared_names_are_there():
    for name in SHARED:
        pkgutil.resolve_name(name)


def test_a_page_that_speaks_of_the_peer_says_who_it_is():
    for page in ROOT.glob("docs/**/*.md"):
        text = FENCED.sub("", page.read_text())
        if first := re.search(r"\bpeer\b", text):
            who = text.find("github.com/lucidrains/video-diffusion-pytorch")
            assert -1 < who < first.start() + 200, page.name
