"""Videos that Pillow reads: animated webp files, and folders with one picture per frame."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastvdm.runtime.optional import require
from fastvdm.video.index import Timeline, VideoReadError, state

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


def frame_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures directly in a folder, in natural order: frame2 before frame10."""
    found = [
        p
        for p in Path(folder).iterdir()
        if p.suffix.lower() in PICTURES and not p.name.startswith(".") and p.is_file()
    ]
    return sorted(found, key=lambda p: (_natural(p.name), p.name))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


class FolderSource:
    """A folder that directly contains the frames of one video. It has no times."""

    def __init__(
        self, path: str | os.PathLike[str], finish: Callable[[np.ndarray], Tensor]
    ) -> None:
        self.path, self.finish = Path(path), finish
        self.files = frame_files(path)
        if not self.files:
            raise VideoReadError(f"{path} is a folder without pictures ({', '.join(PICTURES)})")

    def timeline(self) -> Timeline:
        return Timeline(len(self.files))

    def decodable(self) -> int:
        return sum(1 for _ in _until_error(self._picture, len(self.files)))

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        size = self._size()
        found = []
        for number in numbers:
            pixels = self._picture(number)
            if pixels.shape[:2] != size:
                raise VideoReadError(
                    f"{self.files[number]} has {pixels.shape[1]} x {pixels.shape[0]} pixels, the "
                    f"first frame of the folder {size[1]} x {size[0]}"
                )
            found.append(self.finish(pixels))
        return found

    def _size(self) -> tuple[int, int]:
        """(H, W) of the first frame as displayed, from its header."""
        with _image(self.files[0]) as image:
            try:
                # The EXIF of a png may follow the picture; Pillow would decode it to look there.
                exif = image.getexif() if image.format == "JPEG" or "exif" in image.info else {}
            except (OSError, SyntaxError, ValueError):
                exif = {}
            if exif.get(0x0112, 1) >= 5:  # the orientation tag
                return image.size
            return image.size[::-1]

    def _picture(self, number: int) -> np.ndarray:
        path = self.files[number]
        with _image(path) as image:
            try:
                return _pixels(require("PIL.ImageOps", "video").exif_transpose(image))
            except (OSError, SyntaxError, ValueError) as error:
                raise VideoReadError(f"{path} is not a readable picture: {error}") from error


class WebpSource:
    """A webp file, animated or not."""

    def __init__(
        self, path: str | os.PathLike[str], finish: Callable[[np.ndarray], Tensor]
    ) -> None:
        self.path, self.finish = Path(path), finish

    def timeline(self) -> Timeline:
        return _webp_timeline(*state(self.path))

    def decodable(self) -> int:
        return self.timeline().length

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        found = []
        with _image(self.path) as image:
            for number in numbers:
                try:
                    image.seek(number)
                    found.append(self.finish(_pixels(image)))
                except (OSError, EOFError, ValueError):
                    break
        return found


@lru_cache(maxsize=1 << 16)
def _webp_timeline(path: str, size: int, changed: int) -> Timeline:
    times, now = [], 0
    with _image(Path(path)) as image:
        if image.n_frames == 1:
            return Timeline(1)
        for number in range(image.n_frames):
            try:
                image.seek(number)
                image.load()  # the duration of a frame is known only after decoding
            except (OSError, EOFError, ValueError):
                break
            times.append(now)
            now += max(1, round(image.info.get("duration", 0)))
    return Timeline(len(times), times, now, Fraction(1, 1000))


def _until_error(read: Callable[[int], Any], count: int) -> Any:
    for number in range(count):
        try:
            yield read(number)
        except VideoReadError:
            return


def _image(path: Path) -> Any:
    image_module = require("PIL.Image", "video")
    try:
        return image_module.open(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no video file at {path}") from None
    except (OSError, ValueError, image_module.DecompressionBombError) as error:
        raise VideoReadError(f"{path} is not a readable picture: {error}") from error


def _pixels(image: Any) -> np.ndarray:
    """(H, W, 3) uint8, or (H, W, 4) if the picture has transparency."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them
        levels = np.asarray(image)
        if levels.size and (levels.min() < 0 or levels.max() > 0xFFFF):
            raise ValueError("more than 16 bits a channel")
        grey = (levels.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
