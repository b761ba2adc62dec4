"""What a stage of ``make gpu`` is made of, and the process that runs it, one item after the other.

    python bench/gpu_worker.py gpu_check OUT [--dry-run]

Item names come in, a line of JSON each; records go out the same way, on what was the standard
output: the prints of an item go to the standard error. An item that raises is a record. A fault of
the device makes the process useless, as every later call of CUDA repeats it, so it says so and
ends; ``gpu.py`` starts another one, as it does after a crash, and kills one that hangs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_pack import PACK, ROOT, adopt

# What fastvdm, its tests and the peer import, a machine with a GPU may not have, and no item calls.
UNCALLED = ("huggingface_hub", "tqdm", "PIL", "PIL.Image")


class _Nothing:
    """Stands for each name of a module that is not installed; may be a base class."""

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()


class _Empty(types.ModuleType):
    __path__: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type[_Nothing]:
        if name.startswith("__"):  # who asks what kind of a module this is
            raise AttributeError(name)
        return _Nothing


def stand_in(names: Sequence[str] = UNCALLED) -> list[str]:
    """Modules without content for those that are not installed, and which these are."""
    absent = []
    for name in names:
        top = name.split(".")[0]
        if top in absent or (top not in sys.modules and importlib.util.find_spec(top) is None):
            sys.modules[name] = _Empty(name)
            absent.append(name)
    return absent


class Skip(Exception):
    """The item cannot run here; says why."""


@dataclass(frozen=True)
class Context:
    """Where a stage leaves files, and whether its device is made up."""

    out: Path
    dry: bool = False


@dataclass(frozen=True)
class Item:
    """One thing to find out. ``run(without)`` returns what is worth recording, and raises where it
    finds a fault; ``without`` names parts of it that crashed before (``note``)."""

    name: str  # "kind/what"
    run: Callable[[tuple[str, ...]], dict[str, Any] | None]
    limit: float = 60.0  # seconds after which it counts as hung
    alone: bool = False  # it is timed, or needs the memory
    environment: tuple[tuple[str, str], ...] = ()  # of the process, e.g. another ptxas


def note(text: str) -> None:
    """Say which part of the item comes now: should it crash, that is what did it."""
    _send(note=text)


_channel: Any = None


def _send(**record: Any) -> None:
    if _channel is not None:
        _channel.write(json.dumps(record, default=str) + "\n")
        _channel.flush()


def _settle() -> None:
    """Wait for the device: a fault belongs to the item that launched it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _tidy() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def attempt(item: Item, without: tuple[str, ...]) -> dict[str, Any]:
    """Run it; its record. The verdict is ok, failed, skipped or crashed."""
    start, record = time.perf_counter(), {"verdict": "ok"}
    try:
        record |= item.run(without) or {}
        _settle()
    except Skip as reason:
        record |= {"verdict": "skipped", "why": str(reason)}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        record |= {
            "verdict": "failed",
            "why": f"{type(error).__name__}: {str(error)[:800]}",
            "at": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames],
        }
        traceback.print_exc()
    record["seconds"] = round(time.perf_counter() - start, 3)
    try:
        _settle()
        _tidy()
    except Exception as error:
        record |= {"verdict": "crashed", "why": f"{type(error).__name__}: {error}"[:800]}
    return record


def main() -> int:
    global _channel
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    _channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[:0] = [str(ROOT / p) for p in (".", "bench", "tests", "tests/ops")]
    if not args.dry_run and (PACK / "triton.json").exists():
        adopt(PACK)
    items = load(args.module, Context(args.out, args.dry_run))
    _send(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        record = attempt(items[asked["item"]], tuple(asked["without"]))
        _send(**record)
        if record["verdict"] == "crashed":
            return 3
    return 0


def load(module: str, context: Context) -> dict[str, Item]:
    """The items of a stage by name, in order, in a process that is ready to run them."""
    if absent := stand_in():
        print(f"not installed, and not needed: {', '.join(absent)}", file=sys.stderr)
    if context.dry:
        import gpu_dry

        gpu_dry.start(context.out)
    found = importlib.import_module(module)
    if hasattr(found, "prepare"):
        found.prepare()
    named: dict[str, Item] = {}
    for item in found.items(context):
        # On a made-up device bf16 is fp32, and comes twice.
        if named.setdefault(item.name, item) is not item and not context.dry:
            raise ValueError(f"two items of {module} are called {item.name}")
    return named


if __name__ == "__main__":
    sys.modules["gpu_worker"] = sys.modules["__main__"]  # one Skip, one note
    sys.exit(main())
