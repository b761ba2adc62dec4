"""The videos in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from fastvdm.video.arrays import ARRAYS
from fastvdm.video.pictures import PICTURES, frame_files

FILES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".webp"),
)
SUFFIXES = (*FILES, *ARRAYS)
_SIDECAR = ".cond.npy"
_VECTORS = "vectors.npz"


def list_videos(folder: str | os.PathLike[str]) -> list[Path]:
    """All videos under ``folder``, sorted by path: files, and folders of frames.

    A folder of frames directly contains pictures (png, jpg, bmp) and no video anywhere below it, so
    a picture next to videos does not count. Hidden files and folders are left out, as are
    ``*.cond.npy`` and ``vectors.npz``, which belong to videos.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder has no video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    files, folders_of_frames, seen = [], [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        videos = (Path(place, name) for name in names if _is_video(name))
        files += [path for path in videos if path.is_file()]
        if any(Path(name).suffix.lower() in PICTURES for name in names) and frame_files(place):
            folders_of_frames.append(Path(place))
    above = {parent for path in (*files, *folders_of_frames) for parent in path.parents}
    found = sorted([*files, *(path for path in folders_of_frames if path not in above)])
    if not found:
        raise ValueError(f"no video ({', '.join(SUFFIXES)}, or a folder of frames) under {folder}")
    return found


def _is_video(name: str) -> bool:
    lower = name.lower()
    if name.startswith(".") or lower.endswith(_SIDECAR) or lower == _VECTORS:
        return False
    return lower.endswith(SUFFIXES)


def identity(path: Path) -> int:
    """A number that changes if files of the video are added or change size: its bytes; for a folder
    of frames the sum of the bytes and of the number of files."""
    if not path.is_dir():
        return path.stat().st_size
    files = frame_files(path)
    return sum(p.stat().st_size for p in files) + len(files)


def beside(path: Path, suffix: str) -> Path:
    """The file next to a video: ``clip.txt`` for ``clip.mp4`` and for the folder ``clip``."""
    return path.with_name((path.name if path.is_dir() else path.stem) + suffix)
