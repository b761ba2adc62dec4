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

from fastvdm.diffusion.condition import Condition
from fastvdm.diffusion.denoiser import Model
from fastvdm.diffusion.sample import sample

# Options of the Condition that a window is given; the rest of ``options`` goes to ``sample``.
_FRAMES = ("guidance_weight",)
_LOW_RES = ("low_res_weight", "downsample")
_CONDITION = ("method", "guidance_limit", "replacement", "clip_before_loss", *_FRAMES, *_LOW_RES)


class _Timeline:
    """What is given along the whole output: frames and low-resolution frames at their places."""

    def __init__(
        self,
        length: int,
        frames: Tensor | None = None,
        places: Sequence[int] = (),
        low_res: Tensor | None = None,
        low_places: Sequence[int] = (),
    ) -> None:
        self.length = length
        self.frames, self.place = frames, {p: i for i, p in enumerate(places)}
        self.low_res, self.low_place = low_res, {p: i for i, p in enumerate(low_places)}
        self.given = self.place.keys() | self.low_place.keys()

    def frame(self, f: int) -> Tensor | None:
        """Frame ``f`` (B, C, H, W) if it is given in full."""
        if self.frames is None or f not in self.place:
            return None
        return self.frames[:, :, self.place[f]].detach()


def _split_options(options: dict[str, Any], low_res: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    for name in ("condition", "shape"):
        if name in options:
            raise ValueError(f"{name} is set window by window here; do not pass it")
    for name in () if low_res else _LOW_RES:
        if name in options:
            raise ValueError(f"{name} is of a low-resolution video, and there is none here")
    ours = {k: options[k] for k in _CONDITION if k in options}
    return ours, {k: v for k, v in options.items() if k not in _CONDITION}


def _check_window(window: int, overlap: int, length: int) -> None:
    if window < 1 or length < 1:
        raise ValueError(f"window and length must be positive, got {window} and {length}")
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be in [0, {window - 1}] for window {window}, got {overlap}")


def _check_steps(name: str, step: int, count: int, length: int, window: int, overlap: int) -> int:
    """Windows over ``count`` frames given every ``step``: the overlap to use.

    A window begins after a given frame and must reach the next one, or it would have to guess. The
    given frame before it is seen in any case: without it nothing ties the windows together.
    """
    if step < 1:
        raise ValueError(f"{name} must be at least 1, got {step}")
    last = (count - 1) * step
    if not last < length <= count * step:
        raise ValueError(f"num_frames must be in [{last + 1}, {count * step}], got {length}")
    _check_window(window, overlap, length)
    if length < window:
        raise ValueError(f"the result of {length} frames is shorter than the window {window}")
    if step == 1:
        return overlap
    overlap = min(max(overlap, 1), window - 1)
    if last >= window and step > window - overlap:
        raise ValueError(
            f"{name} {step} exceeds window - overlap = {window} - {overlap}: no window would reach "
            f"from one given frame to the next. Take a smaller overlap, a larger window, or a "
            f"smaller {name} in two passes"
        )
    return overlap


def _blocks(
    model: Model,
    timeline: _Timeline,
    size: tuple[int, ...],
    *,
    start: int,
    window: int,
    overlap: int,
    seed: int | None,
    options: dict[str, Any],
) -> Iterator[Tensor]:
    """Yields the frames from ``start`` on, window by window; given ones as they are.

    A window begins ``overlap`` frames before the first frame that is missing and is put out up to
    the last frame given in it (in full or in low resolution), if there is one after that: what
    lies behind would be drawn without a view of the next given frame, and jump there. The last
    window is put out whole and moved back to end with the video, as networks are trained on one
    length.
    """
    condition_options, sample_options = _split_options(options, timeline.low_res is not None)
    batch, channels, height, width = size
    shape = (batch, channels, window, height, width)
    drawn: dict[int, Tensor] = {}  # the last frames drawn, at most one window
    done = start
    number = 0
    while done < timeline.length:
        given = timeline.frame(done)
        if given is not None:
            yield given[:, :, None]
            done += 1
            continue
        first = max(0, min(done - overlap, timeline.length - window))
        inside = range(first, first + window)
        known: dict[int, Tensor] = {}
        for f in inside:
            frame = drawn.get(f) if f not in timeline.place else timeline.frame(f)
            if frame is not None:
                known[f - first] = frame
        low = [f for f in inside if f in timeline.low_place]
        condition = _condition(timeline, known, low, first, condition_options)
        # every window has its own stream of noise
        extra: dict[str, Any] = {} if seed is None else {"seed": seed + 0x632BE5AB * number}
        block = sample(model, shape, condition=condition, **sample_options, **extra)
        number += 1
        stop = inside.stop
        if stop < timeline.length:
            stop = max((f + 1 for f in inside if f >= done and f in timeline.given), default=stop)
        drawn |= {f: block[:, :, f - first].clone() for f in range(done, stop)}
        drawn = {f: frame for f, frame in drawn.items() if f >= stop - window}
        yield block[:, :, done - first : stop - first]
        done = stop


def _condition(
    timeline: _Timeline,
    known: dict[int, Tensor],
    low: list[int],
    first: int,
    options: dict[str, Any],
) -> Condition | None:
    parts: dict[str, Any] = {}
    if known:
        device = next(iter(known.values())).device
        parts["frames"] = torch.stack([t.to(device) for t in known.values()], dim=2)
        parts["frame_index"] = list(known)
    if low and timeline.low_res is not None:
        parts["low_res"] = timeline.low_res[:, :, [timeline.low_place[f] for f in low]]
        parts["low_res_index"] = [f - first for f in low]
    if not parts:
        return None
    absent = (*(() if "frames" in parts else _FRAMES), *(() if "low_res" in parts else _LOW_RES))
    return Condition(**parts, **{k: v for k, v in options.items() if k not in absent})


def _check_video(video: Tensor, name: str) -> None:
    if video.ndim != 5 or video.shape[2] < 1:
        raise ValueError(f"{name} must be (B, C, F, H, W), got {tuple(video.shape)}")


def _collect(blocks: Iterator[Tensor], head: Tensor | None) -> Tensor:
    """All blocks on the CPU, after the frames that were there already."""
    parts = [] if head is None else [head.detach().cpu().float()]
    parts += [block.cpu().float() for block in blocks]
    return torch.cat(parts, dim=2)


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
    _check_video(video, "video")
    given = video.shape[2]
    if num_frames <= given:
        raise ValueError(f"num_frames must exceed the {given} frames given, got {num_frames}")
    _check_window(window, overlap, num_frames)
    if overlap < 1:
        raise ValueError("overlap must be at least 1: without it nothing ties the blocks together")
    if overlap > given:
        raise ValueError(f"overlap {overlap} exceeds the {given} frames given")
    if num_frames < window:
        raise ValueError(f"num_frames must be at least the window {window}, got {num_frames}")
    places = range(given)
    if given > window:  # older frames can be in no window
        places, video = range(given - window, given), video[:, :, -window:]
    timeline = _Timeline(num_frames, video, places)
    b, c, _, h, w = video.shape
    return _blocks(
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
        seed: as in ``sample``; each window gets a stream of its own.
        options: ``method``, ``guidance_weight``, ``guidance_limit``, ``replacement`` and
            ``clip_before_loss`` as in ``Condition``; all others go to ``sample``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU. The device holds one window at a time; with
        ``extend_blocks`` the result need not be in memory either.

    Raises:
        ValueError: fewer frames asked than given, a window or overlap out of range.
    """
    blocks = extend_blocks(
        model, video, num_frames, window=window, overlap=overlap, seed=seed, **options
    )
    return _collect(blocks, video)


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
        overlap: frames before the first missing one that the next window sees, at least 1; a
            window draws up to the last given frame in it, so ``factor <= window - overlap``.
        num_frames: of the result; (F - 1) * factor + 1 by default, which ends on a given frame.
        options: as for ``extend``.

    Returns:
        (B, C, num_frames, H, W) fp32 on the CPU.

    Raises:
        ValueError: a factor, window, overlap or number of frames out of range, or a factor above
            ``window - overlap``.
    """
    _check_video(video, "video")
    if factor < 2:
        raise ValueError(f"factor must be at least 2, got {factor}")
    b, c, f, h, w = video.shape
    length = (f - 1) * factor + 1 if num_frames is None else num_frames
    overlap = _check_steps("factor", factor, f, length, window, overlap)
    blocks = _blocks(
        model,
        _Timeline(length, video, range(0, f * factor, factor)),
        (b, c, h, w),
        start=0,
        window=window,
        overlap=overlap,
        seed=seed,
        options=options,
    )
    return _collect(blocks, None)


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
    _check_video(low_res, "low_res")
    b, c, count = low_res.shape[:3]
    if size[0] < low_res.shape[3] or size[1] < low_res.shape[4]:
        raise ValueError(f"size {tuple(size)} is below that of low_res {tuple(low_res.shape)}")
    length = count * frameskip if num_frames is None else num_frames
    overlap = _check_steps("frameskip", frameskip, count, length, window, overlap)
    places = range(0, count * frameskip, frameskip)
    blocks = _blocks(
        model,
        _Timeline(length, low_res=low_res, low_places=places),
        (b, c, *size),
        start=0,
        window=window,
        overlap=overlap,
        seed=seed,
        options=options,
    )
    return _collect(blocks, None)


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
        ValueError: as ``upscale``; windows are checked before anything is drawn.
    """
    if len(shape) == 5:  # before the first stage is drawn for nothing
        _check_steps("frameskip", frameskip, shape[2], shape[2] * frameskip, window, overlap)
    coarse = sample(base, shape, seed=seed, **(base_options or {}))
    later = None if seed is None else seed + 1
    fine = upscale(
        upsampler,
        coarse,
        size,
        window=window,
        overlap=overlap,
        frameskip=frameskip,
        seed=later,
        **options,
    )
    return coarse, fine
