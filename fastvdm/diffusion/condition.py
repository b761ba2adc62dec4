"""What is known about the video to be drawn, and how sampling is held to it.

Frames at given places (prediction, interpolation, infill: Eq. 7) or the pixels of a mask
(inpainting), a low-resolution version (Eq. 8), or both (Ho et al. 2022, §3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from fastvdm.diffusion.downsample import Downsample
from fastvdm.runtime.choices import check_choice

Method = Literal["reconstruction", "replacement"]
Limit = Literal["stable", "none"]
Replacement = Literal["marginal", "posterior"]
Known = Literal["average", "bilinear"]  # the D of this package


@dataclass(frozen=True)
class Condition:
    """Known frames or pixels, a low-resolution video, or both; and the method that enforces them.

    Args:
        frames: (B, C, K, H, W) known frames x^a in [-1, 1].
        frame_index: their K places in the video, each once, in the order of ``frames``; negative
            counts from the end. The first K by default (prediction). ``[0, -1]`` is interpolation.
        mask: which values of ``frames`` are known, where not all are (inpainting): 1 or True at
            known ones, 0 or False elsewhere, bool or any numbers. Five axes, each of 1 or of the
            size of ``frames``, which then has all F frames of the video and no ``frame_index``;
            what it holds at unknown places is not looked at.
        low_res: (B, C, L, h, w) a low-resolution video.
        low_res_index: the L frames it belongs to; the first L by default.
        downsample: D of Eq. 8: "average" pooling (default; its adjoint is in the kernel),
            "bilinear", or any differentiable callable on (B, C, L, H, W).
        method: "reconstruction": x_tilde of Eqs. 7-8, with z^a replaced as well. "replacement":
            replaced only, which lacks the term that ties the rest of the video to what is known.
        guidance_weight: w_r of the known frames. The squared error is a sum over all elements, as
            in the paper. "auto" (default) is 2 F/n for n known frames of F: 32 for 1 of 16, where
            the paper takes 50, and 6.4 for 5 of 16, where it takes 9; less in the steps where that
            would carry what all frames share beyond the known ones. 1 is the derived value; 0 is
            replacement at the price of replacement.
        low_res_weight: of the low resolution, in units of 1/|D|^2, the square of the largest gain
            of a linear D (1/k^2 for averaging by k; measured for any other, at random values in
            [-1, 1] where it is not linear). "auto" (default) ends the error of every step at once;
            in the last step that is 1.
        guidance_limit: "stable" (default) lowers both weights in the steps where they would amplify
            an error (``fastvdm.diffusion.stability``); a warning says so where a number was asked
            for. "none" takes numbers as they are, and "auto" as 2 F/n and 1.
        replacement: how z^a_s is drawn: "marginal", q(z_s | x^a) (default, the method as the paper
            introduces it), or "posterior", q(z_s | x^a, z^a_t), its alternative: the weaker one
            without guidance, at times the better one with it.
        clip_before_loss: clamp x_hat to [-1, 1] before the error is taken. Saturated pixels then
            get no gradient, so the default is not to; the paper does not say.

    Raises:
        ValueError, TypeError: nothing known, places out of range or twice, sizes that do not fit,
            a negative or non-finite weight, a guidance option with replacement, NaN or infinite
            values at known places, a mask of other values than 0 and 1, of another shape, beside a
            ``frame_index`` or of nothing.
    """

    frames: Tensor | None = None
    frame_index: Sequence[int] | None = None
    low_res: Tensor | None = None
    low_res_index: Sequence[int] | None = None
    downsample: Known | Downsample = "average"
    method: Method = "reconstruction"
    guidance_weight: float | Literal["auto"] = "auto"
    low_res_weight: float | Literal["auto"] = "auto"
    guidance_limit: Limit = "stable"
    replacement: Replacement = "marginal"
    clip_before_loss: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.frames is None and self.low_res is None:
            raise ValueError("a Condition needs frames, low_res or both")
        check_choice("method", self.method, Method)
        check_choice("replacement", self.replacement, Replacement)
        check_choice("guidance_limit", self.guidance_limit, Limit)
        for name in ("guidance_weight", "low_res_weight"):
            object.__setattr__(self, name, _weight(name, getattr(self, name)))
        of_frames = ("guidance_weight", "replacement")
        of_low_res = ("low_res_weight", "downsample")
        if self.frames is None:
            self._refuse(of_frames, f"known frames: here are {' and '.join(of_low_res)}")
        if self.low_res is None:
            self._refuse(of_low_res, f"a low-resolution video: here are {' and '.join(of_frames)}")
        if self.low_res is not None and self.method == "replacement":
            raise ValueError("a low-resolution video cannot be replaced: method='reconstruction'")
        if self.method == "replacement":
            weight = ("guidance_weight",) * (self.guidance_weight != 0)
            self._refuse((*weight, "guidance_limit", "clip_before_loss"), "method='reconstruction'")
        if not callable(self.downsample):
            check_choice("downsample, unless it is a function,", self.downsample, Known)
        for index, video, name in (
            (self.frame_index, self.frames, "frame_index"),
            (self.low_res_index, self.low_res, "low_res_index"),
        ):
            if index is not None and video is None:
                raise ValueError(f"{name} without its video")
        for video, name in ((self.frames, "frames"), (self.low_res, "low_res")):
            if video is None:
                continue
            if not isinstance(video, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(video).__name__}")
            if video.ndim != 5 or video.shape[2] < 1:
                raise ValueError(f"{name} must be (B, C, K, H, W), got {tuple(video.shape)}")
            if not video.is_floating_point():
                raise TypeError(f"{name} must be floating point in [-1, 1], got {video.dtype}")
        if self.mask is not None:
            object.__setattr__(self, "mask", _mask(self.mask, self.frames, self.frame_index))
        for video, name in ((self.known_values(), "frames"), (self.low_res, "low_res")):
            if video is not None and not bool(torch.isfinite(video).all()):
                raise ValueError(f"{name} holds NaN or infinite values")

    def known_values(self) -> Tensor | None:
        """``frames``, with zeros at the places that a mask leaves out."""
        if self.mask is None or self.frames is None:
            return self.frames
        return torch.where(self.mask.to(self.frames.device), self.frames, 0)

    def _refuse(self, names: Sequence[str], what: str) -> None:
        """Options that would do nothing; the class holds their defaults."""
        for name in names:
            if getattr(self, name) != getattr(Condition, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is of {what}")


def _mask(mask: Any, frames: Tensor | None, frame_index: Sequence[int] | None) -> Tensor:
    """The mask as bool.

    Raises:
        ValueError, TypeError: see ``Condition``.
    """
    if frames is None:
        raise ValueError("mask says which values of frames are known: there are no frames")
    if frame_index is not None:
        raise ValueError(
            "give mask or frame_index, not both: a mask is of all frames of the video, and knows "
            "a whole frame where it is 1 on all of it"
        )
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    shape = tuple(mask.shape)
    if mask.ndim != 5 or any(m not in (1, n) for m, n in zip(shape, frames.shape)):
        raise ValueError(
            f"mask must have five axes, each of 1 or as frames, {tuple(frames.shape)}, got {shape}"
        )
    known = mask.detach() != 0
    if mask.dtype != torch.bool and not torch.equal(known.to(mask.dtype), mask):
        raise ValueError("mask must be 1 where a value is known and 0 elsewhere, nothing between")
    if not bool(known.any()):
        raise ValueError("mask must know something: it is 0 everywhere")
    return known


def _weight(name: str, value: Any) -> float | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or 'auto', got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, or 'auto', got {value}")
    return number


def check_range(name: str, video: Tensor | None, clip: str | None) -> None:
    """With clipping everything drawn is in [-1, 1], and so must be what is known.

    Raises:
        ValueError: values beyond, or NaN.
    """
    if video is None or clip is None or video.numel() == 0:
        return
    most = float(video.detach().abs().max())
    if not most <= 1.001:
        raise ValueError(
            f"{name} must be in [-1, 1], where clip={clip!r} keeps the video, but has values up to "
            f"{most:.4g}: scale 0..255 by x / 127.5 - 1 and 0..1 by x * 2 - 1; latents need "
            "clip=None"
        )
