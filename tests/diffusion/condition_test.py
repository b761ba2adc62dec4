"""What a ``Condition`` refuses, and what is said where a weight is lowered."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fastvdm.diffusion import (
    DDIM,
    Condition,
    CosineSchedule,
    Langevin,
    cascade,
    extend,
    extend_blocks,
    interpolate_frames,
    sample,
    upscale,
)

ZEROS = torch.zeros(1, 1, 2, 4, 4)


@pytest.mark.parametrize("name", ["guidance_weight", "low_res_weight"])
@pytest.mark.parametrize(
    "value, error",
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        (None, TypeError),
        ("Auto", TypeError),
        ("5", TypeError),
        ((5.0,), TypeError),
        (np.array([3.0, 1.0]), TypeError),
    ],
)
def test_weights_are_checked(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        Condition(ZEROS, low_res=ZEROS, **{name: value})


def test_conditions_are_checked():
    for weight in (0, 2.0):
        with pytest.raises(ValueError, match="is of known frames: here are low_res_weight"):
            Condition(low_res=ZEROS, guidance_weight=weight)
    for weight in (3, np.float32(3), np.int64(3)):  # any real number
        assert Condition(ZEROS, guidance_weight=weight).guidance_weight == 3.0
    with pytest.raises(ValueError, match="low_res_weight=2.0 is of a low-resolution video"):
        Condition(ZEROS, low_res_weight=2)
    with pytest.raises(TypeError, match="frames must be a tensor, got ndarray"):
        Condition(np.zeros((1, 1, 2, 4, 4)))
    for limit in ("Stable", None, 3.7, True):
        with pytest.raises(ValueError, match=r"guidance_limit must be one of stable, none"):
            Condition(ZEROS, guidance_limit=limit)


@pytest.mark.parametrize("clip", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["frames", "low_res"])
def test_values_beyond_the_range(name, clip):
    calls = []

    def model(z, log_snr):
        calls.append(1)
        return 0.5 * z

    run = dict(prediction="x", num_steps=2, seed=0)
    for value in (-200.0, 1.01):
        given = Condition(**{name: ZEROS[:, :, :1] + value}, **_first(name))
        with pytest.raises(ValueError, match=rf"{name} must be in \[-1, 1\].*clip=None"):
            sample(model, ZEROS.shape, condition=given, clip=clip, **run)
        assert not calls
        assert sample(model, ZEROS.shape, condition=given, clip=None, **run).isfinite().all()
        calls.clear()
    given = Condition(**{name: ZEROS[:, :, :1] + 1.0005}, **_first(name))  # rounding is none
    sample(model, ZEROS.shape, condition=given, clip=clip, **run)


def _first(name):
    return {"low_res_index": [0]} if name == "low_res" else {}


@pytest.mark.parametrize(
    "down, message",
    [
        (lambda x: torch.zeros(1, 1, 2, 4, 4), "differentiable"),
        (lambda x: x.detach(), "differentiable"),
        (lambda x: x.sign() * 1.0, "must depend"),
        (lambda x: 0 * x, "must depend"),
        (lambda x: x * math.nan, "finite"),
        (lambda x: x[..., ::2], "downsample gives"),
        (lambda x: (x, x), "downsample gives tuple"),
    ],
)
def test_bad_downsampling(down, message):
    given = Condition(low_res=ZEROS, downsample=down)
    with pytest.raises(ValueError, match=message):
        sample(lambda z, t: z, ZEROS.shape, condition=given, prediction="x", num_steps=2)


def test_downsampling_may_leave_the_range():
    """Averages of a video in [-1, 1] are there too, and D need not be defined at a constant."""
    for down in (lambda x: 3 * x, lambda x: x / x.std((3, 4), keepdim=True)):
        given = Condition(low_res=ZEROS + 2, downsample=down)
        out = sample(
            lambda z, t: 0.5 * z, ZEROS.shape, condition=given, prediction="x", num_steps=2
        )
        assert out.isfinite().all()


BEFORE = {
    "weight": dict(guidance_weight=-1.0),
    "low weight": dict(low_res_weight=-1.0),
    "limit": dict(guidance_limit="on"),
    "method": dict(method="replacement"),
    "typo": dict(low_weight=1.0),
    "size": dict(size=(9, 9)),
    "unclipped base": dict(base_options=dict(clip=None)),
    "steps": dict(num_steps=0),
    "clip": dict(clip="bogus"),
    "prediction": dict(prediction="noise"),
    "schedule": dict(schedule="linear"),
    "corrector": dict(corrector=Langevin),
    "cond": dict(cond=torch.zeros(2, 3)),
    "dtype": dict(dtype=torch.float16),
    "graph": dict(cuda_graph=True),
    "downsample": dict(downsample=lambda x: x),
    "seed": dict(seed=[1]),
}


@pytest.mark.parametrize("options", BEFORE.values(), ids=BEFORE)
def test_a_cascade_is_checked_before_anything_is_drawn(options):
    def model(z, log_snr):
        raise AssertionError("drawn")

    options = dict(size=(8, 8), window=5, num_steps=2, prediction="x") | options
    with pytest.raises((ValueError, TypeError)):
        cascade(model, model, (1, 1, 2, 4, 4), **options)


@pytest.mark.parametrize("options", [dict(num_steps=0), dict(clip="x"), dict(cuda_graph=True)])
def test_blocks_are_checked_at_the_call(options):
    with pytest.raises((ValueError, TypeError)):
        extend_blocks(lambda z, t: z, ZEROS, 8, window=4, **options)


SAMPLE = {
    "seed": (dict(seed=3.0), "seed must be one int or 1 of them, got 3.0"),
    "seeds": (dict(seed=[3.5]), "seed must be one int"),
    "two seeds": (dict(seed=[1, 2]), "seed must be one int or 1 of them, got 2"),
    "corrector": (
        dict(corrector=True),
        r"corrector must be Langevin\(\), 'langevin' or None, got True",
    ),
    "corrector class": (dict(corrector=Langevin), "corrector must be Langevin"),
    "sampler class": (dict(sampler=DDIM), "sampler must be .* or an object such as DDIM"),
    "sampler": (dict(sampler=Langevin()), "got a corrector"),
    "schedule": (dict(schedule="linear"), "schedule must be one of cosine, discrete, got 'linear'"),
    "schedule class": (dict(schedule=CosineSchedule), "schedule must be .* or an object"),
    "condition": (dict(condition=ZEROS), "condition must be a Condition, got Tensor"),
    "cond": (dict(cond=np.zeros((1, 3))), "cond must be a tensor, got ndarray"),
    "scale": (dict(cond=torch.zeros(1, 3), guidance_scale=math.inf), "must be finite"),
    "null": (
        dict(cond=torch.zeros(1, 3), guidance_scale=2.0, null_cond=torch.zeros(1, 4)),
        r"null_cond must be one row like cond .* got \(1, 4\)",
    ),
    "places": (dict(condition=Condition(ZEROS, [0.0, 1.7])), "frame_index must be .* ints"),
    "a mask": (dict(condition=Condition(ZEROS, [True, False])), "frame_index must be .* ints"),
    "one place": (dict(condition=Condition(ZEROS, 0)), "frame_index must be .* ints, got 0"),
    "shape": (dict(shape=(1, 1, 2.0, 4, 4)), "five positive extents"),
}


@pytest.mark.parametrize("options, message", SAMPLE.values(), ids=SAMPLE)
def test_what_sample_refuses(options, message):
    """With what was expected and what came, before the network is called."""

    def model(z, log_snr, cond=None):
        raise AssertionError("drawn")

    options = dict(shape=ZEROS.shape, num_steps=2) | options
    with pytest.raises((ValueError, TypeError), match=message):
        sample(model, **options)


def test_what_sample_takes():
    def draw(**options):
        return sample(lambda z, t: 0.5 * z, ZEROS.shape, prediction="x", **options)

    usual = draw(seed=3, num_steps=4)
    assert torch.equal(draw(seed=np.int64(3), num_steps=np.int64(4)), usual)
    assert torch.equal(draw(seed=torch.tensor(3), num_steps=4), usual)
    with pytest.raises(TypeError, match="the model must return a tensor, got tuple"):
        sample(lambda z, t: (z,), ZEROS.shape)


def test_a_whole_video_is_checked_before_its_first_window():
    def model(z, log_snr):
        raise AssertionError("drawn")

    late = torch.zeros(1, 1, 9, 4, 4)
    late[:, :, -1] = 200.0
    with pytest.raises(ValueError, match=r"the video must be in \[-1, 1\]"):
        interpolate_frames(model, late, 2, window=4)
    with pytest.raises(ValueError, match=r"low_res must be in \[-1, 1\]"):
        upscale(model, late, (8, 8), window=4)
    with pytest.raises(ValueError, match="overlap=0 leaves none"):
        upscale(model, late[:, :, :4], (8, 8), window=2, overlap=0, guidance_weight=4.0)


def test_nothing_to_guide_is_not_guided():
    """All frames known: no backward pass, and a model without a gradient will do."""
    whole = Condition(ZEROS)
    out = sample(lambda z, t: z.detach(), ZEROS.shape, condition=whole, num_steps=2)
    assert torch.equal(out, ZEROS)


def _warned(condition, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(
            lambda z, t: 0.5 * z,
            ZEROS.shape,
            condition=condition,
            prediction="x",
            num_steps=6,
            **options,
        )
    assert all(w.filename == __file__ for w in caught)  # the line that asked for it
    return [str(w.message) for w in caught]


def test_what_is_lowered_is_said():
    """For a number that was asked for, once a run, corrector or not; not for what was not asked."""
    frame = ZEROS[:, :, :1]
    for options in ({}, dict(corrector=Langevin(1.0))):
        (text,) = _warned(Condition(frame, guidance_weight=50), **options)
        assert text.startswith("guidance_weight=50 is beyond") and "of 6 steps" in text
        assert "3.73" in text and "guidance_limit='none'" in text
        (text,) = _warned(Condition(low_res=ZEROS, low_res_weight=7), **options)
        assert text.startswith("low_res_weight=7 is beyond") and "1.5" in text
        for silent in (
            Condition(frame),
            Condition(frame, low_res=ZEROS),
            Condition(frame, guidance_weight=3.5),
            Condition(frame, guidance_weight=50, guidance_limit="none"),
            Condition(frame, method="replacement"),
            Condition(low_res=ZEROS, low_res_weight=1.5),
        ):
            assert _warned(silent, **options) == []
    # "auto" is lowered without a word, also where the other weight was asked for
    texts = _warned(Condition(frame, low_res=ZEROS, low_res_weight=7))
    assert len(texts) == 1 and texts[0].startswith("low_res_weight=7")


def test_a_warning_of_every_window_is_shown_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        options = dict(window=4, prediction="x", num_steps=4, guidance_weight=50)
        extend(lambda z, t: 0.5 * z, ZEROS[:, :, :1], 16, **options)
    assert [w.filename for w in caught] == [__file__]
