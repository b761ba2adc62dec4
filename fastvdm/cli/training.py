"""The training commands: train, config, check, push."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import signal
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from fastvdm.cli.app import app, echo
from fastvdm.cli.options import Weights
from fastvdm.cli.run import check_positive
from fastvdm.runtime.optional import require
from fastvdm.training.config import TYPES, TrainConfig, choices_of, default_of, kinds_of
from fastvdm.unet.folder import json_object, read_json

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", dict: "JSON", bool: None}


def _parameters() -> list[inspect.Parameter]:
    """An option for every field of ``TrainConfig``, without a default."""
    made = []
    for f in fields(TrainConfig):
        if f.name == "output":
            continue
        flag = f"--{f.name.replace('_', '-')}"
        (kind,) = kinds_of(f.name)
        words, default = choices_of(f.name), default_of(f)
        if words:
            metavar: str | None = "|".join(words)
        elif isinstance(default, tuple) or getattr(kind, "__origin__", None) is tuple:
            metavar = "A,B" if f.name != "trackers" else "NAME,..."
        else:
            metavar = _METAVARS[getattr(kind, "__origin__", kind)]
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            metavar=metavar,
            help=f.metadata["help"],
            show_default=_shown(default),
            rich_help_panel=f.metadata["group"],
        )
        is_optional = type(None) in get_args(TYPES[f.name])  # then "none" can be typed
        typed = kind if kind in (bool, int, float) and not is_optional else str
        made.append(
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                annotation=Annotated[typed | None, option],
            )
        )  # fmt: skip
    return made


def _shown(default: Any) -> str | bool:
    """A default as the user would type it; False if there is none to show."""
    if default in (None, "", {}):
        return False
    if isinstance(default, tuple):
        return ",".join(v if isinstance(v, str) else f"{v:g}" for v in default)
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def parse(name: str, value: Any) -> Any:
    """Convert the text typed for a field to the value that ``TrainConfig`` takes.

    Raises:
        ValueError: it is not a JSON object, a number or a list of numbers, as the field needs.
    """
    if not isinstance(value, str):
        return value
    if value == "none" and type(None) in get_args(TYPES[name]):
        return None
    (kind,) = kinds_of(name)
    origin, flag = get_origin(kind) or kind, f"--{name.replace('_', '-')}"
    if origin is dict:
        return json_object(flag, value)
    if origin in (int, float):
        try:
            return origin(value)
        except ValueError:
            raise ValueError(f"{flag} takes a number or none, got {value!r}") from None
    if origin is not tuple:
        return value
    parts = [p.strip() for p in re.split(r"[,x]", value.strip("[]() "))]
    inner = kind.__args__[0]
    if inner is str:
        return tuple(value.split(","))
    try:
        numbers = tuple(inner(p) for p in parts)
    except ValueError:
        raise ValueError(f"{flag} takes numbers, got {value!r}") from None
    return numbers * 2 if name == "size" and len(numbers) == 1 else numbers


def read_config(path: Path) -> dict[str, Any]:
    """Read the fields in a .yaml or .json file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not contain fields and values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} for --config")
    if path.suffix == ".json":
        return read_json(path)
    text = path.read_text(encoding="utf-8")
    yaml = require("yaml", "train")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """Reads 1e-4 as a number and no as a word, as YAML 1.2 does."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":bool")]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    tag = "tag:yaml.org,2002:"
    number = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver(f"{tag}float", number, list("-+0123456789"))
    Loader.add_implicit_resolver(f"{tag}bool", re.compile("^(true|false)$"), list("tf"))
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold fields and values, got {type(value).__name__}")
    return value


def train(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder of the run: checkpoints, log, samples.")
    ],
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUTPUT.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON file with any of these options, as fastvdm config prints it.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, do one step, write nothing.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print no banner and no progress bar.")
    ] = False,
    **values: Any,
) -> None:
    """Train a model on a folder of videos.

    Several GPUs: accelerate launch -m fastvdm.cli train ... A run that was stopped or killed
    continues exactly: fastvdm train OUTPUT --resume. Ctrl-C and SIGTERM finish the step, save and
    end; SIGUSR1 saves.
    """
    if hasattr(signal, "SIGUSR1"):  # there is nothing to save before the first step
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Imported here because it imports accelerate.
    training = importlib.import_module("fastvdm.training.trainer")
    given = {name: parse(name, value) for name, value in values.items() if value is not None}
    stored = output / "config.json"
    if resume and not stored.is_file() and not ("data" in given or config):
        raise FileNotFoundError(f"no run to resume in {output}")
    base: Mapping[str, Any] = {}
    if config is not None:
        base = read_config(config)
    elif resume and stored.is_file():
        base = read_config(stored)
    settings = TrainConfig.create({**base, **given, "output": str(output)})
    # Do not download what a stored configuration names: somebody else may have written it.
    fetch = not resume or config is not None or "text_encoder" in given
    trainer = training.Trainer(settings, resume=resume, fetch=fetch, progress=not quiet)
    try:
        if dry_run:
            done = trainer.dry_run()
            memory = f", {done['peak_memory'] / 1e9:.1f} GB" if "peak_memory" in done else ""
            line = f"one step took {done['seconds']:.2f} s{memory}; nothing was written"
        else:
            line = _told(trainer, trainer.run())
        if trainer.is_main:
            echo(line)
    finally:
        trainer.accelerator.end_training()
    if trainer.stopped_by is not None:
        raise typer.Exit(130 if trainer.stopped_by == "Ctrl-C" else 143)


def _told(trainer: Any, last: Path) -> str:
    """The last lines that a run prints."""
    c, lines = trainer.config, []
    if trainer.skipped:
        bad = trainer.output.path / "bad-clips.csv"
        lines.append(f"{trainer.skipped} clips were skipped; {bad} names what is wrong")
    if trainer.stopped_by is not None:
        lines.append(
            f"stopped by {trainer.stopped_by} at step {trainer.step} of {c.steps}, saved in "
            f"{last}; go on with: fastvdm train {c.output} --resume"
        )
    else:
        lines.append(str(last))
    return "\n".join(lines)


def _with_fields(command: Any) -> Any:
    """``train`` with the generated options instead of ``**values``."""
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    parameters = [*own, *_parameters()]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


app.command()(_with_fields(train))


@app.command()
def config(
    preset: Annotated[
        str | None, typer.Option(help="Fill in the recipe of a model of the paper.")
    ] = None,
) -> None:
    """Print the options of train with defaults and meaning, as a YAML file."""
    values = TrainConfig.create({"output": ""} | ({"preset": preset} if preset else {}))
    group = None
    for f in fields(TrainConfig):
        if f.name == "output":
            continue
        if f.metadata["group"] != group:
            echo("\n" * (group is not None) + f"# {f.metadata['group']}")
            group = f.metadata["group"]
        value = getattr(values, f.name)
        text = json.dumps(list(value) if isinstance(value, tuple) else value)
        words = "|".join(choices_of(f.name))
        echo(f"{f.name + ': ' + text:<32} # {f.metadata['help']}{f' {words}' if words else ''}")


@app.command()
def check(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder of videos; its subfolders are searched too."),
    ],
    num_workers: Annotated[int, typer.Option(help="Videos to decode at a time.")] = 2,
    all_: Annotated[bool, typer.Option("--all", help="List good videos too.")] = False,
) -> None:
    """Decode every video of a folder to its end and list those with a problem (exit code 1)."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from fastvdm import video as files

    check_positive(num_workers=num_workers)
    total = len(files.list_videos(folder))
    reports = list(tqdm(files.check_folder(folder, num_workers), total=total, unit="video"))
    bad = [r for r in reports if r.problem is not None]
    table = Table("video", "frames", "fps", "size", "turned", "codec", "problem")
    for r in reports if all_ else bad:
        size = f"{r.width} x {r.height}" if r.width else ""
        rate = f"{r.fps:.4g}" if r.fps else ""
        turned = f"{r.rotation or ''}{' mirrored' if r.mirrored else ''}".strip()
        name = str(Path(r.path).relative_to(folder))
        problem = (r.problem or "").removeprefix(f"{Path(r.path).absolute()} ")
        table.add_row(name, str(r.frames), rate, size, turned, r.codec or "", problem)
    if table.row_count:
        Console().print(table)
    frames = sum(r.frames for r in reports)
    echo(f"{len(reports)} videos, {frames} frames; {len(bad)} with a problem")
    if bad:
        raise typer.Exit(1)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Training output or model folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name on the hub: user/name.")],
    weights: Weights = "ema",
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Name of the text encoder on the hub, if the run used a folder."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
) -> None:
    """Upload a model with its settings and a model card to the Hugging Face hub."""
    from fastvdm.training.hub import push_run

    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    echo(push_run(run, name, ema=weights == "ema", private=private, text_encoder=text_encoder))
