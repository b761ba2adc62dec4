"""Items of the stages of ``make gpu``, and the process that runs them one after the other.

    python bench/gpu_worker.py gpu_check OUT [--dry-run]

Item names come in as lines of JSON. Records go out the same way on the original standard output;
what an item prints goes to standard error. An item that raises becomes a record. After a fault of
the device the process is useless, because every later call of CUDA repeats the fault, so it says so
and ends. ``gpu.py`` then starts another one, as after a crash, and it kills one that hangs.
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

# Imported by fastvdm, its tests and the peer, possibly missing there, and used by no item.
UNCALLED = ("huggingface_hub", "tqdm", "PIL", "PIL.Image")


class _Nothing:
    """Replaces each name of a module that is not installed; it can be a base class."""

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()


class _Empty(types.ModuleType):
    __path__: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type[_Nothing]:
        if name.startswith("__"):  # e.g. inspection of the module
            raise AttributeError(name)
        return _Nothing


def stand_in(names: Sequence[str] = UNCALLED) -> list[str]:
    """Install empty modules for those that are missing; return their names."""
    absent = []
    for name in names:
        top = name.split(".")[0]
        if top in absent or (top not in sys.modules and importlib.util.find_spec(top) is None):
            sys.modules[name] = _Empty(name)
            absent.append(name)
    return absent


class Skip(Exception):
    """The item cannot run here; the message says why."""


@dataclass(frozen=True)
class Context:
    """The folder for a stage's files, and whether its device is simulated."""

    out: Path
    dry: bool = False


@dataclass(frozen=True)
class Item:
    """One question. ``run(without)`` returns what is worth recording and raises if it finds a
    fault. ``without`` names parts of it that crashed before (``note``)."""

    name: str  # "kind/what"
    run: Callable[[tuple[str, ...]], dict[str, Any] | None]
    limit: float = 60.0  # seconds after which it counts as hung
    alone: bool = False  # it is timed, or needs all memory
    environment: tuple[tuple[str, str], ...] = ()  # for the process, e.g. another ptxas


def note(text: str) -> None:
    """Announce the next part of the item, so that a crash can be attributed to it."""
    _send(note=text)


_channel: Any = None


def _send(**record: Any) -> None:
    if _channel is not None:
        _channel.write(json.dumps(record, default=str) + "\n")
        _channel.flush()


def _settle() -> None:
    """Wait for the device, so that a fault is attributed to the item that launched it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _tidy() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def attempt(item: Item, without: tuple[str, ...]) -> dict[str, Any]:
    """Run an item and return its record. The verdict is ok, failed, skipped or crashed."""
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
    """The items of a stage by name, in order, after preparing this process to run them."""
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
        # On a simulated device bf16 is fp32, so items occur twice.
        if named.setdefault(item.name, item) is not item and not context.dry:
            raise ValueError(f"two items of {module} are called {item.name}")
    return named


if __name__ == "__main__":
    sys.modules["gpu_worker"] = sys.modules["__main__"]  # so that Skip and note exist only once
    sys.exit(main())
