"""The output folder of a run: its contents, and checks before writing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastvdm.bundle import atomic_directory, checkpoints, remove_unfinished
from fastvdm.runtime.optional import require
from fastvdm.training.config import TrainConfig
from fastvdm.training.log import write_text
from fastvdm.unet.folder import read_json


class Output:
    """``config.json``, ``checkpoints/step-N`` and ``bad-clips.csv`` in the folder of a run.

    Raises:
        FileExistsError: the folder has checkpoints and the run does not resume.
        ValueError: the run in the folder cannot continue as ``config``.
        OSError: the folder cannot be written.
    """

    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.config, self.path = config, Path(config.output)
        self.found = checkpoints(self.path)
        self._lock: Any = None
        self._is_own = False  # whether this object has written a checkpoint
        stored = self.path / "config.json"
        if self.found and not resume:
            raise FileExistsError(f"{self.path} holds a run: resume it or choose another output")
        if self.found and stored.is_file():  # a run without a checkpoint has nothing to lose
            config.check_resumable(read_json(stored))
        _check_writable(self.path)

    def check_space(self, size: int) -> None:
        """Raise OSError if a checkpoint of ``size`` bytes does not fit besides another one."""
        folder = _existing(self.path)
        free, wanted = shutil.disk_usage(folder).free, size * (1 if self.found else 2)
        if free < wanted:
            raise OSError(
                f"{self.path}: {free / 1e9:.1f} GB are free, two checkpoints of this network take "
                f"{2 * size / 1e9:.1f} GB"
            )

    def start(self) -> None:
        """Make the folder, take it until ``end``, write the configuration, remove what a killed
        process left.

        Raises:
            FileExistsError: another run has the folder, or has made checkpoints since.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if not self._is_own and checkpoints(self.path) != self.found:
            self.end()
            raise FileExistsError(
                f"another run has written to {self.path} since: resume it or choose another output"
            )
        remove_unfinished(self.path / "checkpoints")
        if not self.found:  # left by a run that failed before its first checkpoint
            for name in ("validation.csv", "bad-clips.csv"):
                (self.path / name).unlink(missing_ok=True)
        write_text(self.path / "config.json", json.dumps(asdict(self.config), indent=2))

    def _take(self) -> None:
        """Lock the folder. The lock ends with the process, however it ends."""
        filelock = require("filelock", "train")
        self._lock = filelock.FileLock(self.path / ".lock", thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise FileExistsError(
                f"another run is writing to {self.path}: stop it or choose another output"
            ) from None
        except OSError:
            pass  # a file system without locks

    def end(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        return found[-1] if (found := checkpoints(self.path)) else None

    def place(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def write(self, step: int, state: dict[str, Any], weights: Callable[[Path], None]) -> None:
        """Write one checkpoint, completely or not at all, and delete old ones.

        Raises:
            OSError: it cannot be written; the message names the last one.
        """
        target = self.place(step)
        self._is_own = True
        try:
            with atomic_directory(target) as folder:
                weights(folder)
                torch.save(state, folder / "state.pt")
        except (OSError, SafetensorError, RuntimeError) as error:
            # Errors of torch.save have no type of their own.
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(
                f"the checkpoint of step {step} cannot be written: {error}. The last whole one is "
                f"{self.last or 'none'}"
            ) from error
        for old in checkpoints(self.path)[: -self.config.keep]:
            # A folder that is being deleted must not look like a checkpoint.
            old.rename(old.with_name(f".{old.name}-old"))
        remove_unfinished(target.parent)

    # -- clips that could not be read -------------------------------------------------------------

    def known_bad(self) -> set[str]:
        """The videos listed in ``bad-clips.csv``."""
        return {row[1] for row in self._bad_rows() if len(row) == 3} if self.found else set()

    def _bad_rows(self) -> list[list[str]]:
        file = self.path / "bad-clips.csv"
        if not file.is_file():
            return [["step", "video", "error"]]
        with open(file, encoding="utf-8", newline="") as lines:
            return list(csv.reader(lines))

    def add_bad(self, step: int, errors: dict[str, str]) -> None:
        """Append videos with their errors."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerows([*self._bad_rows(), *((step, *error) for error in errors.items())])
        write_text(self.path / "bad-clips.csv", text.getvalue())


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _check_writable(path: Path) -> None:
    folder = _existing(path)
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path} cannot be written: {folder}: {error.strerror}") from None
