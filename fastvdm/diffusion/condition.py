"""What is known about the video to be drawn, and how sampling is held to it.

Frames at given places (prediction, interpolation, infill: Eq. 7), a low-resolution version (Eq. 8),
or both (Ho et al. 2022, §3.1).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Downsample = Callable[[Tensor], Tensor]  # (B, C, L, H, W) -> (B, C, L, h, w), differentiable


def average_downsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average pooling over blocks: (B, C, F, H, W) -> (B, C, F, *size), whole factors."""
    return F.avg_pool3d(x, (1, x.shape[3] // size[0], x.shape[4] // size[1]))


def bilinear_downsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """torch's bilinear interpolation per frame, without antialiasing (at factor 2 = averaging)."""
    b, c, f = x.shape[:3]
    images = x.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return small.unflatten(0, (b, f)).transpose(1, 2)


class Given:
    """A ``Condition`` checked against a shape and moved to the device: what a step needs."""

    def __init__(self, condition: Condition, shape: tuple[int, ...], device, dtype) -> None:
        f = shape[2]
        self.limited = condition.guidance_limit == "stable"
        # Numbers, or "auto"; 0 where there is nothing of the kind.
        self.weight: float | str = 0.0  # w_r
        self.low_weight: float | str = 0.0  # in units of 1/|D|^2
        self.norm_squared = torch.ones(1)  # |D|^2, one or (B,)
        self.num_frames, self.num_known = f, 0
        self.replacement = condition.replacement
        self.clip_before_loss = condition.clip_before_loss
        self.known: Tensor | None = None
        self.slot: Tensor | None = None
        self.low_res: Tensor | None = None
        self.low_slot: Tensor | None = None
        self._down: Downsample | None = None
        if condition.frames is not None:
            index = _indices(condition.frame_index, condition.frames.shape[2], f, "frame_index")
            _check_video(condition.frames, (*shape[:2], len(index), *shape[3:]), "frames")
            self.known, self.slot = _send(condition.frames, device, dtype), _slots(index, f, device)
            self.num_known = len(index)
            if self.num_known < f:
                self.weight = condition.guidance_weight
        if condition.low_res is not None:
            low = condition.low_res
            index = _indices(condition.low_res_index, low.shape[2], f, "low_res_index")
            self._set_low_res(condition, shape, index, device, dtype)
            self.low_slot = _slots(index, f, device)
            self._index = torch.tensor(index, device=device)
            self.low_weight = condition.low_res_weight
        active = self.weight != 0 or self.low_weight != 0
        self.guided = condition.method == "reconstruction" and active

    def _set_low_res(self, condition, shape, index, device, dtype) -> None:
        low = condition.low_res
        size = (low.shape[3], low.shape[4])
        _check_video(low, (*shape[:2], len(index), *size), "low_res")
        self.low_res = _send(low, device, dtype)
        if condition.downsample == "average":
            self.norm_squared /= check_factor(condition, shape[3:]) ** 2
            return
        if condition.downsample == "bilinear":
            self._down = lambda x: bilinear_downsample(x, size)
        else:
            self._down = condition.downsample
        zeros = torch.zeros((*shape[:2], len(index), *shape[3:]), device=device, dtype=dtype)
        trial = self._down(zeros)
        if not isinstance(trial, Tensor) or trial.shape != low.shape:
            got = tuple(trial.shape) if isinstance(trial, Tensor) else type(trial).__name__
            raise ValueError(f"downsample gives {got}, low_res is {tuple(low.shape)}")
        if condition.low_res_weight != 0:
            # a D of one's own may do something else with every sample, as a mask does
            same = condition.downsample == "bilinear"
            self.norm_squared = _norm_squared(self._down, zeros[:1] if same else zeros)

    @property
    def has_low_res(self) -> bool:
        return self.low_res is not None

    @property
    def autograd_low_res(self) -> bool:
        """Whether D is not the average pooling that the kernel knows."""
        return self._down is not None

    def targets(self) -> dict[str, Tensor | None]:
        """The arguments of ``guidance_seed`` that the kernel resolves by itself."""
        out = {"known": self.known, "slot": self.slot}
        if self.low_res is not None and self._down is None:
            out |= {"low_res": self.low_res, "low_slot": self.low_slot}
        return out

    def extra_gradient(self, z: Tensor, model_out: Tensor, coef: Tensor) -> Tensor:
        """d||y - D(x_hat)||^2/dx_hat for any differentiable D, by autograd through D alone.

        The direction D^T(2(D x_hat - y)); these few launches are the price of a D of one's own.
        """
        assert self._down is not None and self.low_res is not None
        p_z, p_m = (coef[:, i].reshape(-1, 1, 1, 1, 1) for i in (0, 1))
        x_hat = p_z * z + p_m * model_out.to(z.dtype)
        if self.clip_before_loss:
            x_hat = x_hat.clamp(-1, 1)
        with torch.enable_grad():
            x_hat.requires_grad_()
            residual = self._down(x_hat[:, :, self._index]) - self.low_res
            (gradient,) = torch.autograd.grad(residual.square().sum(), x_hat)
        return gradient


@dataclass(frozen=True)
class Condition:
    """Known frames, a low-resolution video, or both; and the method that enforces them.

    Args:
        frames: (B, C, K, H, W) known frames x^a in [-1, 1].
        frame_index: their K places in the video, each once, in the order of ``frames``; negative
            counts from the end. The first K by default (prediction). ``[0, -1]`` is interpolation.
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
            values.
    """

    frames: Tensor | None = None
    frame_index: Sequence[int] | None = None
    low_res: Tensor | None = None
    low_res_index: Sequence[int] | None = None
    downsample: Literal["average", "bilinear"] | Downsample = "average"
    method: Literal["reconstruction", "replacement"] = "reconstruction"
    guidance_weight: float | Literal["auto"] = "auto"
    low_res_weight: float | Literal["auto"] = "auto"
    guidance_limit: Literal["stable", "none"] = "stable"
    replacement: Literal["marginal", "posterior"] = "marginal"
    clip_before_loss: bool = False

    def __post_init__(self) -> None:
        if self.frames is None and self.low_res is None:
            raise ValueError("a Condition needs frames, low_res or both")
        if self.method not in ("reconstruction", "replacement"):
            raise ValueError(f"method must be reconstruction|replacement, got {self.method!r}")
        if self.replacement not in ("marginal", "posterior"):
            raise ValueError(f"replacement must be marginal|posterior, got {self.replacement!r}")
        for name in ("guidance_weight", "low_res_weight"):
            object.__setattr__(self, name, _weight(name, getattr(self, name)))
        of_frames = ("guidance_weight", "replacement")
        of_low_res = ("low_res_weight", "downsample")
        if self.frames is None:
            self._refuse(of_frames, f"known frames: here are {' and '.join(of_low_res)}")
        if self.low_res is None:
            self._refuse(of_low_res, f"a low-resolution video: here are {' and '.join(of_frames)}")
        if self.guidance_limit not in ("stable", "none"):
            raise ValueError(f"guidance_limit must be stable|none, got {self.guidance_limit!r}")
        if self.low_res is not None and self.method == "replacement":
            raise ValueError("a low-resolution video cannot be replaced: method='reconstruction'")
        if self.method == "replacement":
            weight = ("guidance_weight",) * (self.guidance_weight != 0)
            self._refuse((*weight, "guidance_limit", "clip_before_loss"), "method='reconstruction'")
        if not callable(self.downsample) and self.downsample not in ("average", "bilinear"):
            raise ValueError(
                f"downsample must be average|bilinear|callable, got {self.downsample!r}"
            )
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
            if not bool(torch.isfinite(video).all()):
                raise ValueError(f"{name} holds NaN or infinite values")

    def _refuse(self, names: Sequence[str], what: str) -> None:
        """Options that would do nothing; the class holds their defaults."""
        for name in names:
            if getattr(self, name) != getattr(Condition, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is of {what}")

    def prepare(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Given:
        """Checks this condition against the shape (B, C, F, H, W) to be drawn."""
        return Given(self, shape, device, dtype)


def _indices(index: Sequence[int] | None, count: int, frames: int, name: str) -> list[int]:
    given = list(range(count)) if index is None else _places(index, name)
    if len(given) != count:
        raise ValueError(f"{name} must name {count} frames, got {len(given)}")
    for i in given:
        if not -frames <= i < frames:
            raise ValueError(f"{name} must be within the {frames} frames of the video, got {i}")
    places = [i % frames for i in given]
    if len(set(places)) < count:
        raise ValueError(f"{name} names a frame twice: {given}")
    return places


def _places(index: Any, name: str) -> list[int]:
    try:
        places = [operator.index(i) for i in index if not isinstance(i, bool)]
        if len(places) == len(index):
            return places
    except TypeError:
        pass
    raise TypeError(f"{name} must be a sequence of ints, got {index!r}")


def _weight(name: str, value: Any) -> float | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or 'auto', got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, or 'auto', got {value}")
    return number


def check_factor(condition: Condition, size: Sequence[int]) -> float:
    """By how much (H, W) is larger than ``low_res``; any factor but of averaging is 1.

    Raises:
        ValueError: averaging over parts of pixels, or a size that is not square blocks of them.
    """
    if condition.low_res is None or condition.downsample != "average":
        return 1.0
    low = tuple(condition.low_res.shape[3:])
    factors = {n // s if n % s == 0 else 0 for n, s in zip(size, low)}
    if len(factors) > 1 or 0 in factors:
        raise ValueError(f"downsample='average' needs one whole factor, got {tuple(size)} to {low}")
    return float(factors.pop())


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


def _norm_squared(down: Downsample, zeros: Tensor) -> Tensor:
    """(B,) |D|^2, the largest ||D v||^2/||v||^2, by power iteration; of the slope of D where it has
    one. 1 for a sample that D does not look at.

    Raises:
        ValueError: D is not differentiable, not finite, or does not depend on its input.
    """
    g = torch.Generator().manual_seed(0)
    at, v = torch.rand((2, *zeros.shape), generator=g, dtype=zeros.dtype).to(zeros.device)
    at = 2 * at - 1
    v, step = v + 1, 0.01  # averages are largest on constants
    with torch.enable_grad():
        at.requires_grad_()
        value = down(at)
        if not value.requires_grad:
            raise ValueError("downsample must be differentiable: its output has no gradient")
        size = _size(v)
        gain = torch.zeros(len(v))
        for _ in range(16):
            v = v / size.to(v).clamp_min(1e-30)
            slope = (down(at.detach() + step * v).detach() - value.detach()) / step  # J v
            (v,) = torch.autograd.grad(
                value, at, slope, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            size = _size(v)
            before, gain = gain, size.flatten().double().cpu()
            if bool(((gain - before).abs() <= 1e-3 * gain).all()):
                break
    if not bool(torch.isfinite(gain).all()) or not bool((gain > 0).any()):
        raise ValueError(
            "downsample must depend on its input and be finite, its largest gain is "
            f"{float(gain.max())}"
        )
    return torch.where(gain > 0, gain, 1.0)


def _size(v: Tensor) -> Tensor:
    """(B, 1, 1, 1, 1) root mean square of every sample."""
    return v.square().mean((1, 2, 3, 4), keepdim=True).sqrt()


def _check_video(video: Tensor, expected: tuple[int, ...], name: str) -> None:
    if tuple(video.shape) != expected:
        raise ValueError(f"{name} must be {expected}, got {tuple(video.shape)}")


def _send(video: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    video = video.detach()
    video = video.clone() if video.is_inference() else video
    return video.to(device, dtype).contiguous()


def _slots(index: list[int], frames: int, device: torch.device) -> Tensor:
    """(F,) int32: the place of each frame among the given ones, -1 for the others."""
    slots = torch.full((frames,), -1, dtype=torch.int32)
    slots[torch.tensor(index)] = torch.arange(len(index), dtype=torch.int32)
    return slots.to(device)
