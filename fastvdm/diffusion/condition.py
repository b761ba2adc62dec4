"""What is known about the video to be drawn, and how sampling enforces it.

Known are frames at given places (prediction, interpolation, infill: Eq. 7), pixels in a mask
(inpainting), a low-resolution version of the video (Eq. 8), or both (Ho et al. 2022, §3.1).
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
Known = Literal["average", "bilinear"]  # the downsamplings D of this package


@dataclass(frozen=True)
class Condition:
    """Known frames or pixels, a low-resolution video, or both; and the method that enforces them.

    Args:
        frames: (B, C, K, H, W) known frames x^a in [-1, 1].
        frame_index: the places of the K frames in the video, in the order of ``frames``, each once.
            Negative places count from the end. The default is the first K (prediction); ``[0, -1]``
            is interpolation.
        mask: the known values of ``frames``, if not all are known (inpainting): 1 or True where
            known, 0 or False elsewhere, as bool or numbers. It has five axes, each of size 1 or of
            the size in ``frames``. ``frames`` then has all F frames of the video, and
            ``frame_index`` is not given. The values at unknown places are ignored.
        low_res: (B, C, L, h, w) a low-resolution video in [-1, 1].
        low_res_index: the places of its L frames in the video; the first L by default.
        downsample: D of Eq. 8: "average" pooling (default; the kernel has its adjoint), "bilinear",
            or any differentiable callable on (B, C, L, H, W).
        method: "reconstruction" computes x_tilde of Eqs. 7 and 8, and replaces z^a as well.
            "replacement" only replaces z^a; it lacks the term that makes the rest of the video
            consistent with what is known.
        guidance_weight: reconstruction guidance weight w_r of the known frames. As in the paper,
            the squared error is summed over all elements. "auto" (default) is 2 F/n for n known
            frames of F: 32 for 1 of 16, where the paper uses 50, and 6.4 for 5 of 16, where it uses
            9. It is lowered in the steps where it would overshoot in what all frames share. 1 is
            the derived value; 0 equals replacement and costs no more.
        low_res_weight: weight of the low resolution in units of 1/|D|^2, where |D| is the largest
            gain of D. For averaging over k x k pixels |D|^2 is 1/k^2; for any other D it is
            measured, at random values in [-1, 1] if D is not linear. "auto" (default) removes the
            error of each step at once; it is 1 in the last step.
        guidance_limit: "stable" (default) lowers both weights in the steps where they would amplify
            an error (``fastvdm.diffusion.stability``), with a warning if a number was given. "none"
            uses numbers as given, and for "auto" 2 F/n and 1.
        replacement: how z^a_s is drawn: "marginal" from q(z_s | x^a) (default, the method as the
            paper introduces it) or "posterior" from q(z_s | x^a, z^a_t), the paper's alternative.
            "posterior" is the weaker one without guidance and sometimes the better one with it.
        clip_before_loss: clamp x_hat to [-1, 1] before the error is computed. Saturated pixels then
            get no gradient, so the default is False; the paper does not say.

    Raises:
        ValueError: nothing is known; places are out of range or repeated; sizes do not fit; a
            weight is negative or not finite; a guidance option is given with "replacement"; known
            values are NaN or infinite; the mask has values other than 0 and 1 or another shape, is
            given with ``frame_index``, or selects nothing.
        TypeError: an option has the wrong type.

    Example:
        >>> import torch
        >>> from fastvdm import UNet3D
        >>> from fastvdm.diffusion import Condition, sample
        >>> first = torch.rand(1, 3, 1, 16, 16) * 2 - 1  # one known frame
        >>> network = UNet3D(16, dim_mults=(1, 2), attn_heads=2)
        >>> sample(network, (1, 3, 4, 16, 16), num_steps=8, condition=Condition(first)).shape
        torch.Size([1, 3, 4, 16, 16])
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
        """``frames``, with zeros where a mask marks values as unknown."""
        if self.mask is None or self.frames is None:
            return self.frames
        return torch.where(self.mask.to(self.frames.device), self.frames, 0)

    def _refuse(self, names: Sequence[str], what: str) -> None:
        """Refuse options that have no effect; the class attributes are their defaults."""
        for name in names:
            if getattr(self, name) != getattr(Condition, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is of {what}")


def _mask(mask: Any, frames: Tensor | None, frame_index: Sequence[int] | None) -> Tensor:
    """Check the mask and convert it to bool.

    Raises:
        ValueError: see ``Condition``.
        TypeError: see ``Condition``.
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
    """With clipping, all drawn values are in [-1, 1], so known values must be too.

    Raises:
        ValueError: there are values outside that range, or NaN.
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
