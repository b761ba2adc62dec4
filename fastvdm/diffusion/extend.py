"""Draw videos that are longer, denser in time or larger than one network call, window by window.

Each window is one conditional ``sample``. Known in it are the given frames and the frames that
earlier windows have drawn (Ho et al. 2022, §3.1 and §4.3.3). Only one window at a time is in the
memory of the device.
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
    """Yield the new frames of ``extend`` in blocks of (B, C, <= window - overlap, H, W).

    Memory does not grow with ``num_frames`` if each block is written out and dropped. Arguments and
    errors are those of ``extend``.
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
    if given > window:  # a window never reaches back to older frames
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
    """Continue a video block-autoregressively to any length (paper §3.1, Table 6).

    Args:
        model: as for ``sample``.
        video: (B, C, F, H, W) in [-1, 1]; it is the beginning of the result.
        num_frames: frames of the result.
        window: frames per network call, as in training (16).
        overlap: known frames at the beginning of a window. In prediction the paper conditions on 1
            frame for BAIR and 5 for Kinetics; for extension it does not say. The default is 1.
        seed: an int; each window gets its own stream of noise.
        options: ``method``, ``guidance_weight``, ``guidance_limit``, ``replacement`` and
            ``clip_before_loss`` are those of ``Condition``; all others go to ``sample``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU. With ``extend_blocks`` the result need not be in
        memory as a whole.

    Raises:
        ValueError: ``num_frames`` is below F, or ``window`` or ``overlap`` is out of range.
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
    """Raise the frame rate of a video: draw the frames between the given ones (paper §3.1).

    Frame i of ``video`` becomes frame ``factor * i`` of the result; these are the x^a of Eq. 7.

    Args:
        model: a network trained at the higher frame rate.
        video: (B, C, F, H, W) in [-1, 1].
        factor: ratio of the frame rates, at least 2.
        window: frames per network call.
        overlap: known frames before the first missing one of a window; 0 acts like 1. A window
            draws up to the last given frame in it, so ``factor <= window - overlap`` unless one
            window holds all given frames.
        num_frames: frames of the result; (F - 1) * factor + 1 by default, so that it ends on a
            given frame.
        seed: as for ``extend``.
        options: as for ``extend``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU.

    Raises:
        ValueError: an argument is out of range, or ``factor`` is above ``window - overlap``.
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
    """Draw a video whose downsampled version is ``low_res``, by Eq. 8 and autoregression.

    The network is an ordinary unconditional one of the larger size, trained without low-resolution
    input (paper Fig. 2).

    Args:
        model: a network that draws (B, C, window, *size).
        low_res: (B, C, L, h, w) in [-1, 1].
        size: (H, W) of the result.
        window: frames per network call; 9 in the paper.
        overlap: as for ``extend``; the paper does not give it.
        frameskip: low-resolution frame i is frame ``frameskip * i`` of the result. Above 1 a window
            draws up to the last such frame in it, so ``frameskip <= window - overlap``.
        num_frames: frames of the result; L * frameskip by default. The last ``frameskip - 1`` then
            have no low-resolution frame after them.
        seed: as for ``extend``.
        options: as for ``extend``; ``downsample`` and ``low_res_weight`` are those of
            ``Condition``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU.

    Raises:
        ValueError: a size, ``window``, ``overlap`` or ``frameskip`` is out of range.
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
    """The windows of ``upscale``, lazily; all checks are done at the call."""
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
    """The two-stage cascade of Fig. 2: draw a coarse video, then upscale it in space and time.

    In the paper ``base`` draws 16x64x64 at frameskip 4, and a 9-frame network makes 64x128x128 at
    frameskip 1: ``cascade(base, sr, (1, 3, 16, 64, 64), (128, 128), window=9)``.

    Args:
        base: network of the first stage, for ``sample``.
        upsampler: network of the second stage, for ``upscale``.
        shape: (B, C, F, h, w) of the coarse video.
        size: (H, W) of the result.
        window: as for ``upscale``.
        overlap: as for ``upscale``.
        frameskip: as for ``upscale``.
        seed: as for ``extend``.
        base_options: options of ``sample`` for the first stage.
        options: options of ``upscale`` for the second stage.

    Returns:
        (coarse (B, C, F, h, w), fine (B, C, F * frameskip, H, W)).

    Raises:
        ValueError: as ``upscale``, before anything is drawn.
        TypeError: as ``upscale``, before anything is drawn.
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
    if len(shape) == 5:  # check the second stage before the first one is drawn
        _upscale(upsampler, torch.zeros(tuple(shape)), *plan)
    coarse = sample(base, shape, seed=seed, **first)
    return coarse, collect(_upscale(upsampler, coarse, *plan), None)
