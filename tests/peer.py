"""The peer, ``video-diffusion-pytorch`` (lucidrains), in the two versions that fastvdm reads.

``import_peer("0.7.0")`` and ``import_peer("0.6.3")`` return the peer's module with ``Unet3D``,
``GaussianDiffusion`` and ``Trainer``. A pip-installed version is imported as usual. Another one
comes from a folder that ``make peer`` fills (``.peer/<version>``, or the variable
``FASTVDM_PEER063`` / ``FASTVDM_PEER070``); both can be imported in one process.

The peer imports torchvision for its GIF data set. If torchvision is missing, the stand-in at the
end of this file replaces it during that import; a real one is never shadowed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAME = "video_diffusion_pytorch"
VERSIONS = ("0.6.3", "0.7.0")
ROOT = Path(__file__).resolve().parents[1]


class PeerMissing(ImportError):
    """This version of the peer is not on the machine; the message says how to get it."""


def peer_folder(version: str) -> Path:
    """Where an unpacked peer of this version is looked for."""
    variable = f"FASTVDM_PEER{version.replace('.', '')}"
    return Path(os.environ.get(variable) or ROOT / ".peer" / version)


def import_peer(version: str = "0.7.0") -> ModuleType:
    """The peer's module: ``.Unet3D``, ``.GaussianDiffusion``, ``.Trainer`` and its helpers.

    Raises:
        ValueError: not one of ``VERSIONS``.
        PeerMissing: neither installed nor unpacked.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    alias = f"peer_{version.replace('.', '_')}"
    if alias in sys.modules:
        return sys.modules[alias]
    with _torchvision(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _installed() == version:
            module = importlib.import_module(f"{NAME}.{NAME}")
        else:
            module = _load(peer_folder(version), alias, version)
    sys.modules[alias] = module
    return module


def peer_or_skip(version: str = "0.7.0") -> ModuleType:
    """``import_peer``, or a skip with the reason (an error under FASTVDM_REQUIRE_PEER=1)."""
    import pytest

    try:
        return import_peer(version)
    except PeerMissing as error:
        if os.environ.get("FASTVDM_REQUIRE_PEER") == "1":
            raise
        pytest.skip(str(error), allow_module_level=True)


def _installed() -> str | None:
    try:
        return importlib.metadata.version(NAME.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(folder: Path, alias: str, version: str) -> ModuleType:
    """Load the peer from ``folder`` under a name of its own, beside another installed version."""
    package = folder / NAME
    if not (package / f"{NAME}.py").is_file():
        raise PeerMissing(
            f"video-diffusion-pytorch {version} is neither installed nor in {folder} (make peer)"
        )
    before = {k: v for k, v in sys.modules.items() if k == NAME or k.startswith(f"{NAME}.")}
    for key in before:
        del sys.modules[key]
    # Its small dependencies may have been unpacked beside it; installed ones come first.
    sys.path.append(str(folder))
    try:
        shell = ModuleType(NAME)
        shell.__path__ = [str(package)]
        sys.modules[NAME] = shell
        spec = importlib.util.spec_from_file_location(alias, package / f"{NAME}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[alias]
            if isinstance(error, ModuleNotFoundError):
                raise PeerMissing(f"the peer in {folder} lacks {error.name} (make peer)") from error
            raise
    finally:
        sys.path.remove(str(folder))
        for key in [k for k in sys.modules if k == NAME or k.startswith(f"{NAME}.")]:
            del sys.modules[key]
        sys.modules.update(before)
    return module


# The stand-in: the few torchvision names that the peer touches.


@contextmanager
def _torchvision() -> Iterator[None]:
    """The stand-in in ``sys.modules`` while the peer is imported, unless a real one works."""
    try:
        importlib.import_module("torchvision.transforms")
        real = True
    except (ImportError, RuntimeError, OSError):  # absent, or built for another torch
        real = False
    if real:
        yield
        return
    before = {k: m for k, m in sys.modules.items() if k.split(".")[0] == "torchvision"}
    for key in before:
        del sys.modules[key]
    package, transforms, utils = map(
        ModuleType, ("torchvision", "torchvision.transforms", "torchvision.utils")
    )
    for item in (Compose, Resize, CenterCrop, ToTensor, ToPILImage, Lambda, RandomHorizontalFlip):
        setattr(transforms, item.__name__, item)
    package.__path__ = []
    package.transforms, package.utils = transforms, utils  # type: ignore[attr-defined]
    names = {m.__name__: m for m in (package, transforms, utils)}
    sys.modules.update(names)
    try:
        yield
    finally:
        for key in names:
            sys.modules.pop(key, None)
        sys.modules.update(before)


class Compose:
    """The transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> Any:
        for transform in self.transforms:
            x = transform(x)
        return x


class Lambda:
    def __init__(self, lambd: Callable[[Any], Any]) -> None:
        self.lambd = lambd

    def __call__(self, x: Any) -> Any:
        return self.lambd(x)


class RandomHorizontalFlip:
    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1).item() >= self.p:
            return image
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class Resize:
    """An int scales the shorter side to ``size``; a pair (height, width) sets both. Bilinear."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        w, h = image.size
        if isinstance(self.size, int):
            short = min(w, h)
            h, w = int(self.size * h / short), int(self.size * w / short)
        else:
            h, w = self.size
        return image.resize((w, h), Image.Resampling.BILINEAR)


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        w, h = image.size
        left, top = round((w - self.size) / 2), round((h - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """A PIL image or a uint8 (H, W[, C]) array to a float tensor (C, H, W) in [0, 1]."""

    def __call__(self, image: Any) -> Tensor:
        a = np.array(image)
        a = a[..., None] if a.ndim == 2 else a
        t = torch.from_numpy(a).permute(2, 0, 1).contiguous()
        return t.float() / 255 if t.dtype == torch.uint8 else t.float()


class ToPILImage:
    """A float (C, H, W) tensor in [0, 1] to an 8-bit image of mode L, RGB or RGBA."""

    def __call__(self, tensor: Tensor) -> Image.Image:
        a = (tensor.detach().cpu().float() * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a)
