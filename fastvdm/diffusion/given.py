"""A ``Condition`` in the form that sampling steps need: checked against a shape, on the device."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion.condition import Condition
from fastvdm.diffusion.downsample import Downsample, bilinear_downsample, norm_squared


class Given:
    """A ``Condition`` checked against the shape (B, C, F, H, W) of the video, on the device.

    Raises:
        ValueError: sizes or places do not fit the shape.
        TypeError: places are not ints.
    """

    def __init__(self, condition: Condition, shape: tuple[int, ...], device, dtype) -> None:
        f = shape[2]
        self.limited = condition.guidance_limit == "stable"
        # The weights are numbers or "auto"; 0 without such a condition.
        self.weight: float | str = 0.0  # reconstruction guidance weight w_r
        self.low_weight: float | str = 0.0  # in units of 1/|D|^2
        self.norm_squared = torch.ones(1)  # |D|^2, (1,) or (B,)
        # Number of all values of a video and of its known ones, (1,) or (B,); of frames if whole
        # frames are known.
        self.count = torch.tensor([float(f)], dtype=torch.float64)
        self.num_known = torch.zeros(1, dtype=torch.float64)
        self.replacement = condition.replacement
        self.clip_before_loss = condition.clip_before_loss
        self.known: Tensor | None = None
        self.slot: Tensor | None = None
        self.mask: Tensor | None = None  # bool: which values of ``known`` are known
        self.low_res: Tensor | None = None
        self.low_slot: Tensor | None = None
        self._down: Downsample | None = None
        if condition.frames is not None:
            self._set_known(condition, shape, device, dtype)
        if condition.low_res is not None:
            low = condition.low_res
            index = _indices(condition.low_res_index, low.shape[2], f, "low_res_index")
            self._set_low_res(condition, shape, index, device, dtype)
            self.low_slot = _slots(index, f, device)
            self._index = torch.tensor(index, device=device)
            self.low_weight = condition.low_res_weight
        active = self.weight != 0 or self.low_weight != 0
        self.guided = condition.method == "reconstruction" and active

    def _set_known(self, condition, shape, device, dtype) -> None:
        frames, f = condition.known_values(), shape[2]
        if condition.mask is None:
            index = _indices(condition.frame_index, frames.shape[2], f, "frame_index")
            self.num_known += len(index)
        else:
            index = list(range(f))
            self.mask = condition.mask.to(device)
            self.num_known = self.mask.cpu().double().mean((1, 2, 3, 4)) * f
        _check_video(frames, (*shape[:2], len(index), *shape[3:]), "frames")
        self.known, self.slot = _send(frames, device, dtype), _slots(index, f, device)
        if bool((self.num_known < f).any()):
            self.weight = condition.guidance_weight

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
            # A caller's D may differ between samples, as a mask does.
            same = condition.downsample == "bilinear"
            self.norm_squared = norm_squared(self._down, zeros[:1] if same else zeros)

    @property
    def has_low_res(self) -> bool:
        return self.low_res is not None

    @property
    def autograd_low_res(self) -> bool:
        """Whether D is something other than the average pooling that the kernel implements."""
        return self._down is not None

    def targets(self) -> dict[str, Tensor | None]:
        """The arguments of ``guidance_seed`` for the terms that the kernel computes itself."""
        out: dict[str, Tensor | None] = self.frames()
        if self.low_res is not None and self._down is None:
            out |= {"low_res": self.low_res, "low_slot": self.low_slot}
        return out

    def frames(self) -> dict[str, Tensor | None]:
        """The arguments of the kernels for whole known frames."""
        return {} if self.mask is not None else {"known": self.known, "slot": self.slot}

    def seed_of_pixels(
        self, z: Tensor, model_out: Tensor, x_hat: Tensor, coef: Tensor, seed: Tensor
    ) -> Tensor:
        """Add the term of the known pixels of a mask to the ``seed`` of ``guidance_seed``."""
        assert self.mask is not None and self.known is not None
        p_z, p_m, scale = (coef[:, i].reshape(-1, 1, 1, 1, 1) for i in (0, 1, 2))
        here = self.mask
        if self.clip_before_loss:  # saturated values get no gradient
            here = here & ((p_z * z + p_m * model_out.to(z.dtype)).abs() <= 1)
        pixels = torch.where(here, 2 * scale * (x_hat - self.known), 0)
        return (seed.to(z.dtype) + pixels).to(seed.dtype)

    def extra_gradient(self, z: Tensor, model_out: Tensor, coef: Tensor) -> Tensor:
        """d||y - D(x_hat)||^2/dx_hat for any differentiable D, by autograd through D alone.

        The direction is D^T(2(D x_hat - y)). A caller's D costs these few extra launches.
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


def check_factor(condition: Condition, size: Sequence[int]) -> float:
    """The factor between (H, W) and ``low_res``; 1 unless D is averaging.

    Raises:
        ValueError: averaging would split pixels, or the blocks of pixels are not square.
    """
    if condition.low_res is None or condition.downsample != "average":
        return 1.0
    low = tuple(condition.low_res.shape[3:])
    factors = {n // s if n % s == 0 else 0 for n, s in zip(size, low)}
    if len(factors) > 1 or 0 in factors:
        raise ValueError(f"downsample='average' needs one whole factor, got {tuple(size)} to {low}")
    return float(factors.pop())


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


def _check_video(video: Tensor, expected: tuple[int, ...], name: str) -> None:
    if tuple(video.shape) != expected:
        raise ValueError(f"{name} must be {expected}, got {tuple(video.shape)}")


def _send(video: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    video = video.detach()
    video = video.clone() if video.is_inference() else video
    return video.to(device, dtype).contiguous()


def _slots(index: list[int], frames: int, device: torch.device) -> Tensor:
    """(F,) int32: the index of each frame among the given ones, -1 for the others."""
    slots = torch.full((frames,), -1, dtype=torch.int32)
    slots[torch.tensor(index)] = torch.arange(len(index), dtype=torch.int32)
    return slots.to(device)
