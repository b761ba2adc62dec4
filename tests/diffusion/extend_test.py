"""Windows along a video: which frames each one sees and puts out, and that none leaves a seam."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from gaussian import DOUBLE, Gaussian

from fastvdm.diffusion import Langevin, cascade, interpolate_frames, upscale

SEED = 5


class Windows:
    """Stands in for ``sample``: channel 0 of a frame is its place, channel 1 its window's number,
    -1 in what is given. So the video that comes out says where every frame of it is from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("fastvdm.diffusion.windows")
        monkeypatch.setattr(module, "sample", self)
        self.spans: list[range] = []
        self.seeds: list[int] = []

    def __call__(self, model, shape, *, condition, seed, clip):
        video, index = condition.frames, condition.frame_index
        if condition.low_res is not None:
            video, index = condition.low_res, condition.low_res_index
        first = int(video[0, 0, 0, 0, 0]) - index[0]
        number = len(self.spans)
        self.spans.append(range(first, first + shape[2]))
        self.seeds.append(seed)
        x = torch.full(shape, float(number))
        x[:, 0] = torch.arange(first, first + shape[2])[:, None, None]
        if condition.frames is not None:
            assert torch.equal(x[:, 0, condition.frame_index], condition.frames[:, 0])
            x[:, :, condition.frame_index] = condition.frames
        return x


def _given(count: int, step: int) -> torch.Tensor:
    video = torch.full((1, 2, count, 1, 1), -1.0)
    video[0, 0, :, 0, 0] = step * torch.arange(count)
    return video


def _run(kind, count, step, window, overlap, length):
    options = dict(window=window, overlap=overlap, num_frames=length, seed=SEED, clip=None)
    if kind == "interpolate":
        return interpolate_frames(lambda z, t: z, _given(count, step), step, **options)
    return upscale(lambda z, t: z, _given(count, step), (1, 1), frameskip=step, **options)


@pytest.mark.parametrize("kind", ["interpolate", "upscale"])
def test_every_frame_is_drawn_between_the_given_ones_beside_it(kind, monkeypatch):
    """All small cases: no window draws nothing, none guesses what comes before a given frame."""
    refused = 0
    for count, step, window, overlap in itertools.product(
        (1, 2, 3, 6), (2, 3, 4), (3, 4, 6, 9), (0, 1, 2, 5)
    ):
        for length in range((count - 1) * step + 1, count * step + 1):
            if overlap >= window or length < window:
                continue
            windows, given = Windows(monkeypatch), range(0, count * step, step)
            if step > window - max(overlap, 1) and given[-1] >= window:
                with pytest.raises(ValueError, match="smaller overlap, a larger window or a sm"):
                    _run(kind, count, step, window, overlap, length)
                refused += 1
                continue
            place, number = _run(kind, count, step, window, overlap, length)[0, :, :, 0, 0].long()
            assert place.tolist() == list(range(length))
            sources = number.tolist()
            if kind == "interpolate":
                assert [f for f in range(length) if sources[f] < 0] == list(given)
            assert set(range(len(windows.spans))) == set(sources) - {-1}
            assert windows.seeds == [SEED + 0x632BE5AB * n for n in range(len(windows.spans))]
            for f, source in enumerate(sources):
                if source >= 0:
                    span = windows.spans[source]
                    assert span.start >= 0 and span.stop <= length
                    if f <= given[-1]:  # after it comes an extension, as long as it may be
                        assert given[f // step] in span and given[-(-f // step)] in span
            stops = [sources.index(n) for n in range(1, len(windows.spans))]
            for stop, span in zip(stops, windows.spans[1:]):
                assert span.start == max(0, min(stop - max(overlap, 1), length - window))
    assert refused > 20


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_upscale_of_every_frame_puts_windows_out_whole(overlap, monkeypatch):
    windows = Windows(monkeypatch)
    _, number = _run("upscale", 20, 1, 8, overlap, 20)[0, :, :, 0, 0].long()
    step = 8 - overlap
    expected = [0 if f < 8 else 1 + (f - 8) // step for f in range(20)]
    assert number.tolist() == expected and windows.spans[-1] == range(12, 20)


@pytest.mark.parametrize(
    "length, window, count", [(5, 16, 2), (4, 13, 1), (2, 5, 1), (13, 16, 4), (1, 1, 0)]
)
def test_network_calls(length, window, count):
    """Frames that are given cost nothing; 5 frames become 17, one more than a window of 16."""
    calls = []

    def model(z, log_snr):
        calls.append(z.shape[2])
        return 0.5 * z

    video = torch.rand(1, 1, length, 2, 2)
    options = dict(prediction="x", num_steps=3, corrector=Langevin())
    out = interpolate_frames(model, video, 4, window=window, overlap=0, **options)
    assert torch.equal(out[:, :, ::4], video)
    assert calls == [window] * (count * 5)


def test_frames_that_require_a_gradient_can_be_given():
    video = torch.rand(1, 1, 2, 2, 2, requires_grad=True)
    out = interpolate_frames(
        lambda z, log_snr: 0.5 * z, video, 2, window=3, num_steps=2, prediction="x"
    )
    assert not out.requires_grad and torch.equal(out[:, :, ::2], video)


def test_a_step_that_no_window_spans():
    video = torch.zeros(1, 1, 4, 2, 2)
    with pytest.raises(ValueError, match="factor 5 exceeds window - overlap = 8 - 4"):
        interpolate_frames(None, video, 5, window=8, overlap=4)
    with pytest.raises(ValueError, match="frameskip 5 exceeds window - overlap = 8 - 4"):
        upscale(None, video, (4, 4), frameskip=5, window=8, overlap=4)
    with pytest.raises(ValueError, match="frameskip 4 exceeds window - overlap = 4 - 1"):
        cascade(None, None, video.shape, (4, 4), window=4)  # before the first stage is drawn
    with pytest.raises(ValueError, match="frameskip must be at least 1, got 0"):
        upscale(None, video, (4, 4), frameskip=0, window=2)


# -- no seam: videos of one Gaussian process, the perfect denoiser ------------------------------

RHO, SD = 0.98, 0.5


def _process(frames: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(frames, side, side, generator=generator)
    for f in range(1, frames):
        noise[f] = RHO * noise[f - 1] + (1 - RHO**2) ** 0.5 * noise[f]
    return SD * noise[None, None]


@pytest.mark.parametrize("overlap, joints", [(1, [12, 24]), (4, [12, 24]), (8, [12, 20, 28])])
@pytest.mark.parametrize("kind", ["interpolate", "upscale"])
def test_no_jump_where_a_window_ends(kind, overlap, joints):
    """The change from frame to frame over the true one; windows that were put out whole jumped by
    2.5 (interpolation) and 1.6-1.7 at every joint."""
    data, i = Gaussian(frames=16), torch.arange(16, dtype=DOUBLE)
    data.mean, data.cov = torch.zeros_like(i), SD**2 * RHO ** (i[:, None] - i).abs()
    video = _process(33, 32)
    options = dict(
        window=16, overlap=overlap, seed=1, num_frames=33, num_steps=48, corrector=Langevin(),
        prediction="x", clip=None,
    )  # fmt: skip
    if kind == "interpolate":
        out = interpolate_frames(data.denoiser("x"), video[:, :, ::4], 4, **options)
    else:
        low = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 2, 2))
        out = upscale(data.denoiser("x"), low, (32, 32), frameskip=4, **options)
        small = torch.nn.functional.avg_pool3d(out[:, :, ::4], (1, 2, 2))
        assert (small - low).norm() < 0.1 * low.norm()
    change = out.diff(dim=2).square().mean((0, 1, 3, 4)).sqrt() / (SD * (2 - 2 * RHO) ** 0.5)
    assert change[joints].max() < 1.2 and change.max() < 1.3
