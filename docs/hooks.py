"""What mkdocs does beside docs/: pages from elsewhere in the tree, links, the command line.

A page of the tree outside docs/ stands in the site under its own path. Links are written as they
hold in the tree, ``../bench/RESULTS.md``, and are rewritten here to hold in the site. A link to a
file that the site does not have, such as a source file, becomes its text.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension, Parameters
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/RESULTS.md")
OUTSIDE_FOLDERS = ("bench/results/*.md", "bench/results/*.png", "bench/results/*.gif")
OUTSIDE_FOLDERS += ("bench/results/*.svg",)
NOTEBOOK = "quickstart.ipynb"
COMMANDS = "<!-- every command and its options, made from the program when the site is built -->"

FENCED = re.compile(r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ \t]*$", re.M | re.S)
SCRIPT = re.compile(r"<script type=\"module\">(?:(?!</script>).)*https://.*?</script>", re.S)
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def outside() -> list[str]:
    """The files of the tree outside docs/ that the site has, relative to the root."""
    found = [path for path in OUTSIDE if (ROOT / path).is_file()]
    for pattern in OUTSIDE_FOLDERS:
        found += sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern))
    return found


def place_in_tree(uri: str) -> str:
    """The path of a page of the site in the tree."""
    return uri if uri in outside() else f"docs/{uri}"


def place_in_site(path: str) -> str | None:
    """The page or picture of the site that a path of the tree is, if it is one."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return path if path in outside() else None


def prose(text: str) -> Iterator[tuple[bool, str]]:
    """The page in pieces: whether it is prose, and the piece. Fenced blocks are none."""
    last = 0
    for block in FENCED.finditer(text):
        yield True, text[last : block.start()]
        yield False, block.group()
        last = block.end()
    yield True, text[last:]


def rewrite_links(text: str, uri: str) -> str:
    """The Markdown of a page with links that hold in the site."""
    here = place_in_tree(uri)

    def rewrite(match: re.Match[str]) -> str:
        mark, label, whole = match.group("mark", "text", "target")
        target, hash_, anchor = whole.partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        page = place_in_site(path)
        if page is None:
            # What is not in the tree either stays, and ends a strict build.
            return label if (ROOT / path).exists() else match.group()
        relative = posixpath.relpath(page, posixpath.dirname(uri) or ".")
        return f"{mark}[{label}]({relative}{hash_}{anchor})"

    return "".join(LINK.sub(rewrite, piece) if plain else piece for plain, piece in prose(text))


# -- what mkdocs calls ----------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    if (Path(config.docs_dir) / NOTEBOOK).is_file():
        start = next(section["Start"] for section in config.nav if "Start" in section)
        if NOTEBOOK not in start:
            start.insert(start.index("install.md") + 1, NOTEBOOK)
    return config


def on_files(files: Any, config: Any) -> Any:
    for path in outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_line())
    return rewrite_links(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A notebook comes as HTML: with the links that hold in the tree, and with a script that would
    fetch Mermaid from elsewhere."""
    here = page.file.src_uri

    def rewrite(match: re.Match[str]) -> str:
        target, hash_, anchor = match.group(1).partition("#")
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(here), target))
        there = files.get_file_from_path(place_in_site(path) or "") if target else None
        return (
            f'href="{there.url_relative_to(page.file)}{hash_}{anchor}"' if there else match.group()
        )

    if not here.endswith(".ipynb"):
        return html
    html = SCRIPT.sub("", html)
    return re.sub(r'href="(?![a-z]+:)([^"]+)"', rewrite, html)


class Signatures(Extension):
    """``UNet3D`` takes what its configuration takes (``built_from`` in fastvdm/unet/config.py);
    fields of ``TrainConfig`` are declared as ``_of(panel, default, help)``."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        if pkg.path != "fastvdm":
            return
        build = pkg["unet.network.FactorizedUNet"].members["__init__"]
        config = pkg["unet.config.UNetConfig"].members["__init__"]
        own = [p for p in build.parameters if p.name == "self"]
        build.parameters = Parameters(*own, *(p for p in config.parameters if p.name != "self"))
        for field in pkg["training.config.TrainConfig"].members["__init__"].parameters:
            declared = getattr(field.default, "arguments", ())
            if len(declared) > 1:
                field.default = "{}" if str(declared[1]) == "dict" else declared[1]


# -- the command line -----------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, as Markdown."""
    os.environ.setdefault("TERM", "dumb")
    import typer

    from fastvdm.cli import commands, training  # noqa: F401  they register themselves
    from fastvdm.cli.app import app

    group = typer.main.get_command(app)
    context = group.make_context("fastvdm", ["info"], resilient_parsing=True)
    parts = []
    for name in sorted(group.commands):
        command = group.commands[name]
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## fastvdm {name}", f"    fastvdm {name} {usage}"]
        parts += [re.sub(r"\n(?!\n)", " ", command.help or "").strip()]
        panels: dict[str, list[str]] = {}
        for parameter in command.get_params(context):
            if not (record := parameter.get_help_record(context)):
                continue
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or usual
            panels.setdefault(panel, []).append(f"- `{record[0]}`: {escaped(record[1])}")
        for panel, rows in panels.items():
            parts += [f"**{panel}**", "\n".join(rows)]
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))
