"""The window that moves along a video: which frames it sees and puts out, and the checks of a whole
run before its first window is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion.condition import Condition, check_range
from fastvdm.diffusion.defaults import clip_for
from fastvdm.diffusion.denoiser import Model
from fastvdm.diffusion.given import check_factor
from fastvdm.diffusion.sample import sample
from fastvdm.diffusion.setup import prepare

_SAMPLE = inspect.signature(sample).parameters
# Options that belong to the Condition of a window; the others go to ``sample``.
_FRAMES = ("guidance_weight", "replacement")
_LOW_RES = ("low_res_weight", "downsample")
_CONDITION = ("method", "guidance_limit", "clip_before_loss", *_FRAMES, *_LOW_RES)


class Timeline:
    """The frames and low-resolution frames that are given along the whole output."""

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
        """Frame ``f`` (B, C, H, W), or None if it is not given in full."""
        if self.frames is None or f not in self.place:
            return None
        return self.frames[:, :, self.place[f]].detach()


def _split_options(
    model: Model, options: dict[str, Any], timeline: Timeline, size: tuple[int, ...], overlap: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options between ``Condition`` and ``sample``; check them against all given frames."""
    ours = {k: options[k] for k in _CONDITION if k in options}
    rest = {k: v for k, v in options.items() if k not in _CONDITION}
    for name in rest:
        if name == "mask":
            raise ValueError("mask is of one whole video, as sample draws it: windows take none")
        if name == "value_range":
            raise ValueError("value_range is of sample: videos of windows stay in [-1, 1]")
        if name in ("condition", "shape"):
            raise ValueError(f"{name} is set window by window here; do not pass it")
        if name not in _SAMPLE:
            raise TypeError(f"{name} is an option neither of sample nor of Condition")
    for name in () if timeline.low_res is not None else _LOW_RES:
        if name in ours:
            raise ValueError(f"{name} is of a low-resolution video, and there is none here")
    for name in _FRAMES if timeline.frames is None and overlap == 0 else ():
        if name in ours:
            raise ValueError(f"{name} is of known frames, and overlap=0 leaves none")
    frames, low_res = timeline.frames, timeline.low_res
    clip = clip_for(model, rest.get("clip", _SAMPLE["clip"].default))
    drawn = torch.zeros(1, 1, 1, 1, 1)  # later windows have known frames in any case
    whole = Condition(frames=drawn if frames is None else frames, low_res=low_res, **ours)
    check_range("the video", frames, clip)
    if low_res is not None and not callable(whole.downsample):
        check_range("low_res", low_res, clip)
        check_factor(whole, size[2:])
    return ours, rest


def check_window(window: int, overlap: int, length: int) -> None:
    if window < 1 or length < 1:
        raise ValueError(f"window and length must be positive, got {window} and {length}")
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be in [0, {window - 1}] for window {window}, got {overlap}")


def check_steps(name: str, step: int, count: int, length: int, window: int, overlap: int) -> int:
    """Check windows over ``count`` frames given at every ``step``; return the overlap to use.

    A window begins after a given frame and must reach the next one, which it would otherwise have
    to guess. It always sees the given frame before it, or nothing would tie the windows together.
    """
    if step < 1:
        raise ValueError(f"{name} must be at least 1, got {step}")
    last = (count - 1) * step
    if not last < length <= count * step:
        raise ValueError(f"num_frames must be in [{last + 1}, {count * step}], got {length}")
    check_window(window, overlap, length)
    if length < window:
        raise ValueError(f"the result of {length} frames is shorter than the window {window}")
    if step == 1:
        return overlap
    overlap = min(max(overlap, 1), window - 1)
    if last >= window and step > window - overlap:
        raise ValueError(
            f"{name} {step} exceeds window - overlap = {window} - {overlap}: no window would reach "
            f"from one given frame to the next. Take a smaller overlap, a larger window or a "
            f"smaller {name}"
        )
    return overlap


def blocks(
    model: Model,
    timeline: Timeline,
    size: tuple[int, ...],
    *,
    start: int,
    window: int,
    overlap: int,
    seed: int | None,
    options: dict[str, Any],
) -> Iterator[Tensor]:
    """Draw the frames from ``start`` on, window by window; given frames stay as they are.

    A window begins ``overlap`` frames before the first missing frame. It puts out frames up to the
    last one given in it (in full or in low resolution), if there is one after the first missing
    frame: later frames would be drawn without seeing the next given frame, and the video would jump
    there. The last window puts out all its frames, and is moved back to end with the video because
    networks are trained on one length. Everything is checked at the call, not at the first window.
    """
    if seed is not None and not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, every window has a stream of its own; got {seed!r}")
    parts = _split_options(model, options, timeline, size, overlap)
    first = max(0, min(start - overlap, timeline.length - window))
    condition = _condition(timeline, {}, first, window, parts[0])
    prepare(model, (*size[:2], window, *size[2:]), condition=condition, **parts[1])
    return _draw(model, timeline, size, start, window, overlap, seed, *parts)


def _draw(
    model: Model,
    timeline: Timeline,
    size: tuple[int, ...],
    start: int,
    window: int,
    overlap: int,
    seed: int | None,
    condition_options: dict[str, Any],
    sample_options: dict[str, Any],
) -> Iterator[Tensor]:
    batch, channels, height, width = size
    shape = (batch, channels, window, height, width)
    drawn: dict[int, Tensor] = {}  # the frames drawn last, at most one window
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
        condition = _condition(timeline, drawn, first, window, condition_options)
        # Every window has its own stream of noise.
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
    timeline: Timeline,
    drawn: dict[int, Tensor],
    first: int,
    window: int,
    options: dict[str, Any],
) -> Condition | None:
    """The condition of the window from ``first`` on: what is given in it or already drawn."""
    parts: dict[str, Any] = {}
    known: dict[int, Tensor] = {}
    for f in range(first, first + window):
        frame = drawn.get(f) if f not in timeline.place else timeline.frame(f)
        if frame is not None:
            known[f - first] = frame
    low = [f for f in range(first, first + window) if f in timeline.low_place]
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


def check_video(video: Tensor, name: str) -> None:
    if video.ndim != 5 or video.shape[2] < 1:
        raise ValueError(f"{name} must be (B, C, F, H, W), got {tuple(video.shape)}")


def collect(blocks: Iterator[Tensor], head: Tensor | None) -> Tensor:
    """Collect all blocks on the CPU, after the frames that were already there."""
    parts = [] if head is None else [head.detach().cpu().float()]
    parts += [block.cpu().float() for block in blocks]
    return torch.cat(parts, dim=2)
