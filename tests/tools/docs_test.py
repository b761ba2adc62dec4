"""Every block of the README and of docs/ runs: Python as it stands, block after block in an empty
folder, the page on many devices in two processes; command lines parsed, and run at a small size.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peer import peer_or_skip

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TRAINING = ROOT / "docs" / "training.md"
# The README's sizes are those of a real run; these take seconds.
SMALLER = {
    "README.md": {
        "dim=64": "dim=8",
        "dim_mults=(1, 2, 4, 8)": "dim_mults=(1, 2)",
        "image_size=64": "image_size=16",
        "num_frames=16": "num_frames=4",
        "timesteps=1000": "timesteps=4",
        "train_num_steps=100_000": "train_num_steps=1",
        "[None, :, :5]": "[None, :, :2]",
        "num_steps=64": "num_steps=2",
    }
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def run_python(page: Path) -> None:
    text = page.read_text()
    names: dict = {"__name__": "docs"}
    sizes = SMALLER.get(page.name, {})
    assert all(size in text for size in sizes), "the README has other sizes now"
    for match in FENCED.finditer(text):
        if match.group(1) == "python":
            line = text[: match.start()].count("\n") + 1
            source = "\n" * line + match.group(2)  # a traceback then names the page's line
            for size, small in sizes.items():
                source = source.replace(size, small)
            exec(compile(source, str(page), "exec"), names)


# What the page on deployment compiles and exports, the network's own tests do as well.
SLOW = {"deployment.md": pytest.mark.slow}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.relative_to(ROOT).as_posix(), marks=SLOW.get(p.name, ()))
        for p in PAGES
        if "```python" in p.read_text()
    ],
)
def test_code_blocks_run(page, ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "from video_diffusion_pytorch import" in page.read_text():
        from fastvdm.video import write_video

        monkeypatch.setitem(sys.modules, "video_diffusion_pytorch", peer_or_skip())
        if not torch.cuda.is_available():  # the peer's Trainer calls it on every batch
            monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *a, **k: self)
        write_video("gifs/0.gif", torch.rand(3, 4, 16, 16))
    if page.name == "distributed.md":
        ranks.run(page_worker, 2, tmp_path, page)
    else:
        run_python(page)


def page_worker(rank: int, world: int, page: Path) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    try:
        run_python(page)
    finally:
        del os.environ["WORLD_SIZE"]


def test_every_block_is_of_a_kind_that_is_run():
    for page in PAGES:
        for match in FENCED.finditer(page.read_text()):
            kind, body = match.groups()
            runs = body.startswith(("fastvdm ", "accelerate launch "))
            # The one that is neither is a listing of a run's output folder.
            assert kind == "python" or runs or body.startswith("runs/clips/"), (page.name, body)


def command_lines(pages: list[Path]) -> list[list[str]]:
    """The arguments of ``fastvdm`` in every block of command lines, and in the prose."""
    found = []
    for page in pages:
        text = page.read_text()
        blocks = "\n".join(body for kind, body in FENCED.findall(text) if not kind)
        prose = re.findall(r"`(fastvdm \w+ [^`\n]+)`", FENCED.sub("", text))
        for line in [*blocks.splitlines(), *prose]:
            line = re.sub(
                r"^(accelerate launch|torchrun) --n\S+ \d+ -m fastvdm\.cli", "fastvdm", line
            ).split(" > ")[0]
            if line.startswith("fastvdm "):
                found.append(shlex.split(line, comments=True)[1:])
    return found


def test_command_lines_parse():
    typer = pytest.importorskip("typer")
    from fastvdm.cli import commands as drawing
    from fastvdm.cli import training

    assert training.app is drawing.app
    commands = typer.main.get_command(drawing.app).commands
    whole = {"check": 2, "config": 1, "info": 1}  # in prose a command may stand without arguments
    lines = [line for line in command_lines(PAGES) if line[0] in commands]
    lines = [line for line in lines if len(line) >= whole.get(line[0], 3)]
    assert {line[0] for line in lines} | {"info"} == commands.keys()
    for name, *arguments in lines:
        commands[name].make_context(name, arguments)  # raises for what the command does not take
    with pytest.raises(Exception, match="No such option"):
        commands["export"].make_context("export", ["MODEL", "--no-such-option", "1"])


SMALL = {
    "sample": ["--num", "1", "--steps", "2"],
    "extend": ["--num-frames", "5", "--overlap", "2", "--steps", "2"],
    "interpolate": ["--factor", "2", "--steps", "2"],
    "upscale": ["--low-size", "8", "--frameskip", "2", "--steps", "2"],
}  # the last of two equal options counts


def test_command_lines_run(tmp_path, monkeypatch):
    """Train, resume, sample and the rest as the page on training has them, at sizes that take
    seconds. Exporting is ``tests/network/export_test.py``'s, a preset on eight GPUs nobody's."""
    for name in ("typer", "av", "accelerate"):
        pytest.importorskip(name)
    from fastvdm.cli import main
    from fastvdm.video import read_video, write_video

    monkeypatch.chdir(tmp_path)
    write_video("videos/0.mp4", torch.rand(3, 4, 16, 16))
    write_video("in.mp4", torch.rand(3, 3, 16, 16))
    network = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "resnet_groups": 4}
    small = ["--num-frames", "4", "--size", "16", "--batch-size", "1", "--steps", "1", "--quiet"]
    ran = set()
    for name, *arguments in command_lines([TRAINING]):
        if name not in (*SMALL, "train") or len(arguments) < 2:
            continue
        if "--preset" in arguments or "--config" in arguments:
            continue
        arguments = ["runs/clips" if a == "MODEL" else a for a in arguments]
        if name != "train":
            arguments += [*SMALL[name], "--overwrite"]
        elif "--resume" in arguments:
            arguments += ["--steps", "2", "--quiet"]
        else:
            arguments += [*small, "--model", json.dumps(network)]
        assert main([name, *arguments, "--device", "cpu"]) == 0, (name, arguments)
        ran.add(name)
    assert ran == {*SMALL, "train"}
    assert Path("runs/clips/checkpoints/step-00000002/ema/config.json").is_file()
    assert read_video("out.gif").shape == (3, 4, 16, 16) and read_video("out.mp4").isfinite().all()


def test_make_targets_and_scripts_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text()
        for target in re.findall(r"(?:^ {4}|`)make ([a-z][a-z0-9-]*)", text, re.M):
            rule = rf"^(?:[a-z0-9-]+ )*{target}(?: [a-z0-9-]+)*:"
            assert re.search(rule, makefile, re.M), f"{page.name}: make {target}"
        for script in re.findall(r"python (\S+\.py)\b", text):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


# -- messages -------------------------------------------------------------------------------------

HOLE = "\0"  # what an f-string fills in; a page writes <...>


def literals() -> Iterator[str]:
    """Every string of the package, its kernels and its build."""
    for pattern in ("fastvdm/**/*.py", "kernels/**/*.py", "csrc/*.py", "setup.py"):
        for file in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in node.values)
                    yield "".join(part if isinstance(part, str) else HOLE for part in parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    for file in ROOT.glob("csrc/**/*.cpp"):
        yield from re.findall(r'"((?:[^"\\\n]|\\.)*)"', file.read_text())


def test_messages_are_those_of_the_source():
    """A quoted line of the page on trouble is part of one message; torch's own are marked."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^> (.+)$", text, re.M)
    assert len(quoted) > 60
    known = [re.sub(r"\s+", " ", literal) for literal in literals()]
    for line in quoted:
        message = re.fullmatch(r"(torch: )?`([^`]+)`", line)
        assert message, line
        if not message.group(1):
            fragment = message.group(2).replace("<...>", HOLE)
            assert any(fragment in literal for literal in known), line
