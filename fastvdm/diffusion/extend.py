"""Videos longer, denser in time or larger than one network call: a window that moves along them.

Each window is one conditional ``sample``: what is given inside it, plus the frames that the windows
before it have drawn, are known (Ho et al. 2022, §3.1 and §4.3.3). Only one window is in memory on
the device at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion.defaults import clip_for
from fastvdm.diffusion.denoiser import Model
from fastvdm.diffusion.sample import sample
from fastvdm.diffusion.windows import (
    Timeline,
    blocks,
    check_steps,
    check_video,
    check_window,
    collect,
)


def extend_blocks(
    model: Model,
    video: Tensor,
    num_frames: int,
    *,
    window: int,
    overlap: int = 1,
    seed: int | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """The new frames of ``extend``, one (B, C, <= window - overlap, H, W) block after the other.

    Memory does not grow with ``num_frames``: write each block out and drop it.
    """
    check_video(video, "video")
    given = video.shape[2]
    if num_frames <= given:
        raise ValueError(f"num_frames must exceed the {given} frames given, got {num_frames}")
    check_window(window, overlap, num_frames)
    if overlap < 1:
        raise ValueError("overlap must be at least 1: without it nothing ties the blocks together")
    if overlap > given:
        raise ValueError(f"overlap {overlap} exceeds the {given} frames given")
    if num_frames < window:
        raise ValueError(f"num_frames must be at least the window {window}, got {num_frames}")
    places = range(given)
    if given > window:  # older frames can be in no window
        places, video = range(given - window, given), video[:, :, -window:]
    timeline = Timeline(num_frames, video, places)
    b, c, _, h, w = video.shape
    return blocks(
        model,
        timeline,
        (b, c, h, w),
        start=given,
        window=window,
        overlap=overlap,
        seed=seed,
        options=options,
    )


def extend(
    model: Model,
    video: Tensor,
    num_frames: int,
    *,
    window: int,
    overlap: int = 1,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """Continues a video block-autoregressively to any length (paper §3.1, Table 6).

    Args:
        model: as for ``sample``.
        video: (B, C, F, H, W) in [-1, 1]; kept as it is.
        num_frames: frames of the result.
        window: frames of one network call, what it was trained on (16).
        overlap: frames of the past that a window is conditioned on. The paper conditions BAIR on 1
            and Kinetics on 5 in prediction and does not say for extension; 1 is the default.
        seed: an int; each window gets a stream of its own.
        options: ``method``, ``guidance_weight``, ``guidance_limit``, ``replacement`` and
            ``clip_before_loss`` as in ``Condition``; all others go to ``sample``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU. The device holds one window at a time; with
        ``extend_blocks`` the result need not be in memory either.

    Raises:
        ValueError: fewer frames asked than given, a window or overlap out of range.
    """
    new = extend_blocks(
        model, video, num_frames, window=window, overlap=overlap, seed=seed, **options
    )
    return collect(new, video)


def interpolate_frames(
    model: Model,
    video: Tensor,
    factor: int,
    *,
    window: int,
    overlap: int = 1,
    num_frames: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """Raises the frame rate: frame i of ``video`` becomes frame ``factor * i`` of the result, the
    frames between are drawn (paper §3.1: x^a are the low-rate frames).

    Args:
        model: trained at the higher frame rate.
        factor: at least 2.
        window: frames of one network call.
        overlap: frames before the first missing one that the next window sees, 0 as 1; a
            window draws up to the last given frame in it, so ``factor <= window - overlap``
            unless one window holds all that is given.
        num_frames: of the result; (F - 1) * factor + 1 by default, which ends on a given frame.
        options: as for ``extend``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU.

    Raises:
        ValueError: a factor, window, overlap or number of frames out of range, or a factor above
            ``window - overlap``.
    """
    check_video(video, "video")
    if factor < 2:
        raise ValueError(f"factor must be at least 2, got {factor}")
    b, c, f, h, w = video.shape
    length = (f - 1) * factor + 1 if num_frames is None else num_frames
    overlap = check_steps("factor", factor, f, length, window, overlap)
    drawn = blocks(
        model,
        Timeline(length, video, range(0, f * factor, factor)),
        (b, c, h, w),
        start=0,
        window=window,
        overlap=overlap,
        seed=seed,
        options=options,
    )
    return collect(drawn, None)


def upscale(
    model: Model,
    low_res: Tensor,
    size: tuple[int, int],
    *,
    window: int,
    overlap: int = 1,
    frameskip: int = 1,
    num_frames: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """Draws a video whose downsampled version is ``low_res``, by Eq. 8 and autoregression.

    The network is an ordinary unconditional one of the larger size: it knows nothing of the low
    resolution (paper Fig. 2).

    Args:
        model: draws (B, C, window, *size).
        low_res: (B, C, L, h, w) in [-1, 1].
        size: (H, W) of the result.
        window, overlap: as for ``extend``; the paper's network has 9 frames and its overlap is not
            given.
        frameskip: low-resolution frame i is frame ``frameskip * i`` of the result; above 1 a window
            draws up to the last of them in it, so ``frameskip <= window - overlap``.
        num_frames: of the result, L * frameskip by default; the last ``frameskip - 1`` then have no
            low-resolution frame after them.
        options: as for ``extend``; ``downsample`` and ``low_res_weight`` as in ``Condition``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU.

    Raises:
        ValueError: sizes, a window or an overlap out of range, or such a frameskip too large.
    """
    return collect(
        _upscale(model, low_res, size, window, overlap, frameskip, num_frames, seed, options), None
    )


def _upscale(
    model: Model,
    low_res: Tensor,
    size: tuple[int, int],
    window: int,
    overlap: int,
    frameskip: int,
    num_frames: int | None,
    seed: int | None,
    options: dict[str, Any],
) -> Iterator[Tensor]:
    """The windows of ``upscale``; everything is checked, nothing drawn yet."""
    check_video(low_res, "low_res")
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size must be (H, W), got {size!r}")
    b, c, count = low_res.shape[:3]
    if size[0] < low_res.shape[3] or size[1] < low_res.shape[4]:
        raise ValueError(f"size {tuple(size)} is below that of low_res {tuple(low_res.shape)}")
    length = count * frameskip if num_frames is None else num_frames
    overlap = check_steps("frameskip", frameskip, count, length, window, overlap)
    places = range(0, count * frameskip, frameskip)
    return blocks(
        model,
        Timeline(length, low_res=low_res, low_places=places),
        (b, c, *size),
        start=0,
        window=window,
        overlap=overlap,
        seed=seed,
        options=options,
    )


def cascade(
    base: Model,
    upsampler: Model,
    shape: Sequence[int],
    size: tuple[int, int],
    *,
    window: int,
    overlap: int = 1,
    frameskip: int = 4,
    seed: int | None = None,
    base_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The two-stage cascade of Fig. 2: a coarse video, then one larger and denser in time.

    In the paper 16x64x64 at frameskip 4 by ``base``, then 64x128x128 at frameskip 1 by a 9-frame
    network: ``cascade(base, sr, (1, 3, 16, 64, 64), (128, 128), window=9)``.

    Args:
        shape: (B, C, F, h, w) of the coarse video. size: (H, W) of the result.
        base_options: of the first ``sample``; ``options``: of the second stage, as for ``upscale``.

    Returns:
        (coarse (B, C, F, h, w), fine (B, C, F * frameskip, H, W)).

    Raises:
        ValueError, TypeError: as ``upscale``, before anything is drawn.
    """
    first = dict(base_options or {})
    clips = [
        clip_for(stage, chosen.get("clip", "auto"))
        for stage, chosen in ((base, first), (upsampler, options))
    ]
    if clips[0] is None and clips[1] is not None:
        raise ValueError(
            "base_options clip=None draws beyond [-1, 1]: the second stage needs it too"
        )
    later = None if seed is None else seed + 1
    plan = (size, window, overlap, frameskip, None, later, options)
    if len(shape) == 5:  # checked before the first stage is drawn for nothing
        _upscale(upsampler, torch.zeros(tuple(shape)), *plan)
    coarse = sample(base, shape, seed=seed, **first)
    return coarse, collect(_upscale(upsampler, coarse, *plan), None)
