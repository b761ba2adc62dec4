"""Schedules, parametrisations, loss, denoiser calls, extension, and what bad input is told."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import DOUBLE, Gaussian
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvdm
from fastvdm.diffusion import (
    DDIM,
    Ancestral,
    Condition,
    CosineSchedule,
    Denoiser,
    DiscreteSchedule,
    Langevin,
    alpha_of,
    cascade,
    convert,
    diffusion_loss,
    extend,
    extend_blocks,
    interpolate_frames,
    q_sample,
    sample,
    sigma_of,
    upscale,
)

# -- schedules --------------------------------------------------------------------------------


def test_cosine_schedule():
    """The check values, monotone, and fp32 as good as fp64 at both ends."""
    schedule = CosineSchedule()
    t = torch.tensor([0, 0.25, 0.5, 1.0], dtype=DOUBLE)
    expected = torch.tensor([20, 1.7626, 0, -20], dtype=DOUBLE)
    torch.testing.assert_close(schedule.log_snr(t), expected, rtol=0, atol=5e-5)
    grid = torch.linspace(0, 1, 10001, dtype=DOUBLE)
    exact = schedule.log_snr(grid)
    assert (exact.diff() < 0).all()
    torch.testing.assert_close(schedule.log_snr(grid.float()).double(), exact, rtol=0, atol=5e-3)
    ends = grid[[0, -1]]
    torch.testing.assert_close(
        schedule.log_snr(ends.float()).double(), exact[[0, -1]], atol=1e-5, rtol=0
    )
    a, b, _ = schedule._ends
    inverse = (torch.atan(torch.exp(-0.5 * exact)) - b) / a
    torch.testing.assert_close(inverse, grid, rtol=0, atol=1e-9)
    levels = schedule.levels(256).log_snr
    assert math.isclose(levels[1], -10.17, abs_tol=5e-3)
    assert math.isclose(levels[-2], 10.17, abs_tol=5e-3)
    torch.testing.assert_close(alpha_of(exact) ** 2 + sigma_of(exact) ** 2, torch.ones_like(grid))


def test_discrete_schedule():
    schedule = DiscreteSchedule(1000)
    assert math.isclose(schedule.betas[0], 4.13e-5, rel_tol=1e-2)
    assert schedule.betas[-1] == 0.9999
    index = torch.arange(1000)
    assert torch.equal(schedule.t_to_index(schedule.index_to_t(index)), index)
    levels = schedule.levels(50)
    assert levels.indices[0] == 999 and levels.indices[-1] == 0
    assert len(set(levels.indices.tolist())) == 50
    assert levels.log_snr[-1] == torch.inf
    assert torch.equal(schedule.levels(None).indices, index.flip(0))
    other = DiscreteSchedule(betas=torch.linspace(1e-4, 0.02, 10))
    assert other.timesteps == 10
    drawn = schedule.draw(4000, generator=torch.Generator().manual_seed(0))
    found = schedule.network_time(drawn, "index")
    assert found.min() >= 0 and found.max() <= 999 and abs(found.float().mean() - 499.5) < 20


# -- parametrisations -------------------------------------------------------------------------


def test_conversions():
    """All nine, from definitions: z = alpha x + sigma eps, v = alpha eps - sigma x."""
    log_snr = torch.tensor([-8.0, 0.5, 9.0], dtype=DOUBLE)
    x, eps = torch.randn(2, 3, 1, 2, 4, 5, dtype=DOUBLE)
    alpha, sigma = (f(log_snr).reshape(-1, 1, 1, 1, 1) for f in (alpha_of, sigma_of))
    z = q_sample(x, log_snr, eps)
    values = {"x": x, "eps": eps, "v": alpha * eps - sigma * x}
    for source, value in values.items():
        for target, expected in values.items():
            found = convert(value, z, log_snr, source=source, target=target)
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


# -- loss -------------------------------------------------------------------------------------


def test_loss_spaces():
    """One error, read in every space, from every parametrisation."""
    x, noise = torch.randn(2, 3, 2, 3, 4, 5, dtype=DOUBLE)
    t = torch.tensor([0.1, 0.5, 0.95], dtype=DOUBLE)
    log_snr = CosineSchedule().log_snr(t)
    z = q_sample(x, log_snr, noise)
    x_hat = x + 0.1 * torch.randn_like(x)
    per_space = {
        s: (
            convert(x_hat, z, log_snr, source="x", target=s)
            - convert(x, z, log_snr, source="x", target=s)
        )
        .square()
        .mean(dim=(1, 2, 3, 4))
        for s in ("eps", "v", "x")
    }
    for prediction in ("eps", "v", "x"):
        out = convert(x_hat, z, log_snr, source="x", target=prediction)
        for space in ("eps", "v", "x", "prediction"):
            loss = diffusion_loss(
                lambda *_, out=out: out,
                x,
                t=t,
                noise=noise,
                prediction=prediction,
                loss_space=space,
                reduction="none",
            )
            expected = per_space[prediction if space == "prediction" else space]
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-8)


def test_loss_is_smallest_at_the_truth():
    """The perfect denoiser of Gaussian data beats one that is 5 % off, in epsilon space."""
    data = Gaussian()
    g = torch.Generator().manual_seed(0)
    factor = torch.linalg.cholesky(data.cov)
    white = torch.randn(1, 1, data.frames, 64, 64, generator=g, dtype=DOUBLE)
    x = torch.einsum("ij,bcjhw->bcihw", factor, white)
    x = x + data.mean.reshape(1, 1, -1, 1, 1)
    noise = torch.randn(x.shape, generator=g, dtype=DOUBLE)  # not the global seed: x has it
    options = dict(t=torch.tensor([0.5], dtype=DOUBLE), noise=noise)
    perfect = data.denoiser()
    best = diffusion_loss(perfect, x, **options)
    for scale in (0.95, 1.05):
        assert diffusion_loss(lambda z, l, s=scale: s * perfect(z, l), x, **options) > best


def test_loss_options():
    """Frame weights, dropped conditions, and the network's own null_cond_prob."""
    x = torch.randn(4, 1, 3, 4, 4)
    weight = torch.tensor([1.0, 0.0, 0.0])
    loss = diffusion_loss(lambda z, t: z, x, frame_weight=weight, noise=0 * x, reduction="none")
    assert loss.shape == (4,)
    other = x.clone()
    other[:, :, 1:] = 9
    args = dict(noise=torch.ones_like(x), t=torch.rand(4), frame_weight=weight)
    torch.testing.assert_close(
        diffusion_loss(lambda z, t: z, x, **args), diffusion_loss(lambda z, t: z, other, **args)
    )
    seen = []

    def model(z, time, cond):
        seen.append(cond)
        return z

    cond = torch.ones(4, 5)
    diffusion_loss(model, x, cond=cond, cond_drop_prob=1.0)
    diffusion_loss(model, x, cond=cond)
    assert not seen[0].any() and torch.equal(seen[1], cond)

    class Own(nn.Module):
        def forward(self, z, time, cond=None, null_cond_prob=0.0):
            seen.append(null_cond_prob)
            return z

        def forward_with_cond_scale(self, *args, **kwargs):
            raise AssertionError("not in training")

    diffusion_loss(Own(), x, cond=cond, cond_drop_prob=0.25)
    assert seen[-1] == 0.25


# -- calls of the network ---------------------------------------------------------------------


def test_guidance_is_one_batched_pass():
    """Eq. 6 in a plain callable: one call of twice the batch, zeros as the null condition."""
    calls = []

    def model(z, time, cond):
        calls.append((z.shape[0], cond.clone()))
        return z * cond.sum(1).reshape(-1, 1, 1, 1, 1)

    z, cond = torch.randn(2, 1, 2, 4, 4), torch.randn(2, 3)
    out = Denoiser(model, cond=cond, guidance_scale=3.0)(z, torch.zeros(2))
    assert calls[0][0] == 4 and not calls[0][1][:2].any() and torch.equal(calls[0][1][2:], cond)
    torch.testing.assert_close(out, 3.0 * z * cond.sum(1).reshape(-1, 1, 1, 1, 1))
    null = torch.ones(1, 3)
    out = Denoiser(model, cond=cond, guidance_scale=3.0, null_cond=null)(z, torch.zeros(2))
    value = cond.sum(1).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(out, z * (3.0 + 3.0 * (value - 3.0)))


def test_unet_guidance_and_modes():
    """UNet3D through its own forward_with_cond_scale; eval mode inside, flags back after; an
    averaged copy samples like the module it holds; 16-bit weights under an fp32 state."""
    net = fastvdm.UNet3D(8, dim_mults=(1, 2), channels=1, cond_dim=3, time_input="logsnr")
    modes = []
    net.stem.register_forward_hook(
        lambda m, *_: modes.append((m.training, torch.is_grad_enabled()))
    )
    net.train()
    options = dict(cond=torch.randn(2, 3), guidance_scale=2.0, num_steps=2, seed=4)
    x = sample(net, (2, 1, 3, 4, 8), **options)
    assert modes == [(False, False)] * 2 and net.training
    averaged = torch.optim.swa_utils.AveragedModel(net)
    torch.testing.assert_close(sample(averaged, (2, 1, 3, 4, 8), **options), x)
    assert not torch.equal(sample(net, (2, 1, 3, 4, 8), **{**options, "guidance_scale": 1.0}), x)
    net.bfloat16()
    given = Condition(torch.zeros(2, 1, 1, 4, 8), guidance_weight=2.0)
    options["cond"] = options["cond"].bfloat16()
    x = sample(net, (2, 1, 3, 4, 8), condition=given, **options)
    assert x.dtype == torch.float32 and torch.isfinite(x).all()


def test_inside_inference_mode():
    """A guided run works where the caller has switched autograd off."""
    data = Gaussian(frames=3)
    with torch.inference_mode():
        frames = torch.zeros(1, 1, 1, 4, 4)
        x = sample(data.denoiser(), (1, 1, 3, 4, 4), num_steps=3, condition=Condition(frames))
    assert torch.isfinite(x).all() and not x.requires_grad


# -- reproducibility --------------------------------------------------------------------------


def test_reproducible():
    data = Gaussian(frames=3)
    model, shape = data.denoiser(), (2, 1, 3, 4, 4)

    def run(**options):
        return sample(model, shape, num_steps=4, **options)

    def generator():
        return torch.Generator().manual_seed(5)

    assert torch.equal(run(generator=generator()), run(generator=generator()))
    assert torch.equal(run(seed=5), run(seed=5))
    assert not torch.equal(run(seed=5), run(seed=6))
    torch.manual_seed(3)
    a, b = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), a) and torch.equal(run(), b) and not torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_batch():
    """Seeds per sample, and no gradient from one sample's condition into another."""
    data = Gaussian(frames=3)
    frames = torch.rand(3, 1, 1, 4, 4) * 2 - 1

    def run(rows):
        return sample(
            data.denoiser(),
            (len(rows), 1, 3, 4, 4),
            num_steps=5,
            corrector=Langevin(),
            seed=[100 + r for r in rows],
            condition=Condition(frames[rows], guidance_weight=2.0),
        )

    together = run([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(run([row])[0], together[row])


def test_callback_and_clipping(capsys):
    data = Gaussian(frames=3)
    model = lambda z, l: 3 * data.denoiser("x")(z, l)  # noqa: E731
    options = dict(prediction="x", num_steps=4, seed=0)
    steps = []
    x = sample(model, (2, 1, 3, 4, 4), callback=steps.append, **options)
    assert [s.number for s in steps] == [0, 1, 2, 3] and steps[-1].num_steps == 4
    assert torch.equal(steps[-1].z, x) and x.abs().max() <= 1
    steps.clear()
    sample(model, (2, 1, 3, 4, 4), callback=steps.append, clip="dynamic", **options)
    assert all(s.x_tilde.abs().max() <= 1 for s in steps)
    steps.clear()
    free = sample(
        model, (2, 1, 3, 4, 4), callback=steps.append, clip=None, progress=True, **options
    )
    assert free.abs().max() > 1 and torch.equal(steps[-1].x_tilde, free)
    assert "sampling" in capsys.readouterr().err


# -- longer, denser, larger -------------------------------------------------------------------


def ramp_model(z, log_snr):
    """x_hat of a video that does not change in time: the mean over the frames, per pixel."""
    level = log_snr.reshape(-1, 1, 1, 1, 1)
    alpha2 = torch.sigmoid(level)
    mean = z.mean(dim=2, keepdim=True) * alpha2.sqrt() * z.shape[2]
    return (mean / (alpha2 * z.shape[2] + torch.sigmoid(-level))).expand_as(z)


STILL = dict(prediction="x", num_steps=48, guidance_weight=2.0, clip=None, seed=0)


def test_extend():
    """What is given stays, bit for bit; a still video stays still, to any length."""
    video = torch.rand(2, 1, 1, 4, 4).expand(-1, -1, 3, -1, -1) - 0.5
    for length, window, overlap in ((8, 4, 1), (9, 4, 3), (10, 4, 2)):
        out = extend(ramp_model, video, length, window=window, overlap=overlap, **STILL)
        assert out.shape == (2, 1, length, 4, 4)
        assert torch.equal(out[:, :, :3], video)
        assert (out - video[:, :, :1]).abs().max() < 0.25
    blocks = list(extend_blocks(ramp_model, video, 10, window=4, overlap=2, **STILL))
    assert [b.shape[2] for b in blocks] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(blocks, dim=2), out[:, :, 3:])
    long = torch.rand(1, 1, 20, 4, 4)
    out = extend(ramp_model, long, 22, window=4, overlap=2, method="replacement", num_steps=2,
                 prediction="x")  # fmt: skip
    assert torch.equal(out[:, :, :20], long)


def test_extend_at_constant_memory():
    """The largest tensor of a run does not grow with the length, nor does what is alive."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.untyped_storage().nbytes())
            return out

    video, largest = torch.zeros(1, 1, 2, 4, 4), []
    options = {**STILL, "num_steps": 2}
    for length in (12, 96):
        with Largest() as mode:
            for _ in extend_blocks(ramp_model, video, length, window=4, overlap=2, **options):
                pass
        largest.append(mode.numel)
    assert largest[0] == largest[1] > 0


def test_interpolate_frames():
    video = torch.rand(1, 1, 4, 4, 4)
    out = interpolate_frames(ramp_model, video, 3, window=5, overlap=2, **{**STILL, "num_steps": 4})
    assert out.shape[2] == 10 and torch.equal(out[:, :, ::3], video)
    out = interpolate_frames(
        ramp_model, video, 2, window=4, num_frames=8, **{**STILL, "num_steps": 2}
    )
    assert out.shape[2] == 8 and torch.equal(out[:, :, ::2], video)


def test_upscale_and_cascade():
    """The windows get the low-resolution frames that lie in them, at their places."""
    low = torch.rand(1, 1, 1, 3, 3).expand(-1, -1, 4, -1, -1) - 0.5
    out = upscale(ramp_model, low, (6, 6), window=5, overlap=1, frameskip=4, **STILL)
    assert out.shape == (1, 1, 16, 6, 6)
    small = torch.nn.functional.avg_pool3d(out, (1, 2, 2))
    assert (small[:, :, ::4] - low).abs().mean() < 0.15
    coarse, fine = cascade(
        ramp_model,
        ramp_model,
        (1, 1, 4, 3, 3),
        (6, 6),
        window=5,
        base_options=dict(prediction="x", num_steps=3),
        downsample="bilinear",
        **{**STILL, "num_steps": 3},
    )
    assert coarse.shape == (1, 1, 4, 3, 3) and fine.shape == (1, 1, 16, 6, 6)


# -- bad input --------------------------------------------------------------------------------

VIDEO = torch.zeros(1, 1, 2, 4, 4)
SHAPE = (1, 1, 4, 4, 4)


def run(**options):
    return sample(Gaussian(frames=4).denoiser(), SHAPE, num_steps=2, **options)


def conditioned(*args, **options):
    return run(condition=Condition(*args, **options))


class Conditional(torch.nn.Module):
    """Computes the guidance itself, as UNet3D and the peer's network do."""

    def forward_with_cond_scale(self, *args, **kwargs):
        raise AssertionError("called")


BAD = {
    "index above": (lambda: conditioned(VIDEO, frame_index=[0, 4]), "within the 4 frames"),
    "index below": (lambda: conditioned(VIDEO, frame_index=[-5, 0]), "within the 4 frames"),
    "index twice": (lambda: conditioned(VIDEO, frame_index=[0, -4]), "twice"),
    "index count": (lambda: conditioned(VIDEO, frame_index=[0]), "name 2 frames"),
    "frames size": (lambda: conditioned(VIDEO[..., :3]), "frames must be"),
    "frames rank": (lambda: Condition(VIDEO[0]), "frames must be"),
    "frames kind": (lambda: Condition(VIDEO.long()), "floating point"),
    "frames nan": (lambda: Condition(VIDEO + math.nan), "NaN"),
    "nothing": (lambda: Condition(), "needs frames"),
    "weight": (lambda: Condition(VIDEO, guidance_weight=-1.0), "guidance_weight"),
    "weight nan": (lambda: Condition(VIDEO, guidance_weight=math.nan), "guidance_weight"),
    "method": (lambda: Condition(VIDEO, method="inpaint"), "method"),
    "flavour": (lambda: Condition(VIDEO, replacement="both"), "replacement"),
    "low replaced": (lambda: Condition(low_res=VIDEO, method="replacement"), "cannot be replaced"),
    "replaced weight": (
        lambda: Condition(VIDEO, method="replacement", guidance_weight=50),
        "guidance_weight=50.* is of method='reconstruction'",
    ),
    "replaced limit": (
        lambda: Condition(VIDEO, method="replacement", guidance_limit="none"), "guidance_limit"
    ),
    "replaced clip": (
        lambda: Condition(VIDEO, method="replacement", clip_before_loss=True), "clip_before_loss"
    ),
    "flavour of nothing": (
        lambda: Condition(low_res=VIDEO, replacement="posterior"), "is of known frames"
    ),
    "downsample of nothing": (
        lambda: Condition(VIDEO, downsample="bilinear"), "is of a low-resolution video"
    ),
    "low factor": (lambda: conditioned(low_res=torch.zeros(1, 1, 4, 3, 3)), "whole factor"),
    "low count": (lambda: conditioned(low_res=torch.zeros(1, 1, 9, 2, 2)), "within the 4"),
    "low custom": (
        lambda: conditioned(low_res=torch.zeros(1, 1, 4, 2, 2), downsample=lambda x: x),
        "downsample gives",
    ),
    "downsample": (lambda: Condition(low_res=VIDEO, downsample="cubic"), "downsample"),
    "gamma": (lambda: Ancestral(1.5), "gamma"),
    "eta": (lambda: DDIM(-0.1), "eta"),
    "delta": (lambda: Langevin(0.0), "delta"),
    "bounds": (lambda: CosineSchedule(3, -3), "logsnr_min"),
    "steps": (lambda: CosineSchedule().levels(0), "num_steps"),
    "steps kind": (lambda: CosineSchedule().levels(2.0), "num_steps"),
    "too many steps": (lambda: DiscreteSchedule(10).levels(11), "between 1 and 10"),
    "index of cosine": (lambda: run(time_input="index"), "DiscreteSchedule"),
    "clip": (lambda: run(clip="hard"), "clip"),
    "prediction": (lambda: run(prediction="noise"), "prediction"),
    "sampler name": (lambda: run(sampler="euler"), "one of ancestral, ddim, got 'euler'"),
    "sampler class": (lambda: run(sampler=DDIM), r"'ancestral', 'ddim' or an object such as DDIM"),
    "both noises": (lambda: run(seed=1, generator=torch.Generator()), "not both"),
    "seeds": (lambda: run(seed=[1, 2]), "seed"),
    "scale": (lambda: run(guidance_scale=2.0), "needs cond"),
    "negative scale": (lambda: run(cond=torch.zeros(1, 2), guidance_scale=-1.0), "guidance_scale"),
    "cond rows": (lambda: run(cond=torch.zeros(3, 2)), "cond must have"),
    "dtype": (lambda: run(dtype=torch.float16), "dtype"),
    "shape": (lambda: sample(ramp_model, (1, 1, 4, 4)), "shape"),
    "model": (lambda: sample(None, SHAPE), "callable"),
    "output": (lambda: sample(lambda z, t: z[:, :, :1], SHAPE, num_steps=1), "returned"),
    "checkpoint": (lambda: DiscreteSchedule.from_state_dict({}), "betas"),
    "betas": (lambda: DiscreteSchedule(betas=torch.tensor([0.0])), "betas"),
    "no betas": (lambda: DiscreteSchedule(betas=torch.zeros(0)), "betas must be 1-D"),
    "list of betas": (lambda: DiscreteSchedule(betas=[0.1]), "betas must be a tensor, got list"),
    "loss indices": (lambda: diffusion_loss(ramp_model, VIDEO, t=torch.tensor([9])),
                     "t must be floating-point .*got torch.int64; of step indices"),
    "loss beyond": (lambda: diffusion_loss(ramp_model, VIDEO, t=torch.tensor([9.0])),
                    r"t must be in \[0, 1\], got 9.0 to 9.0"),
    "loss nan": (lambda: diffusion_loss(ramp_model, VIDEO, t=torch.tensor([torch.nan])),
                 r"t must be in \[0, 1\]"),
    "loss list": (lambda: diffusion_loss(ramp_model, VIDEO, t=[0.5]), "t must be a tensor"),
    "null of its own": (lambda: sample(Conditional(), SHAPE, cond=torch.zeros(1, 2),
                                       guidance_scale=2.0, null_cond=torch.ones(1, 2)),
                        "null_cond is for models without a null condition of their own"),
    "loss rank": (lambda: diffusion_loss(ramp_model, VIDEO[0]), "x must be"),
    "loss t": (lambda: diffusion_loss(ramp_model, VIDEO, t=torch.zeros(2)), "t must be"),
    "loss drop": (lambda: diffusion_loss(ramp_model, VIDEO, cond_drop_prob=2.0), "cond_drop_prob"),
    "shorter": (lambda: extend(ramp_model, VIDEO, 2, window=4), "num_frames"),
    "overlap": (lambda: extend(ramp_model, VIDEO, 9, window=4, overlap=4), "overlap"),
    "no overlap": (lambda: extend(ramp_model, VIDEO, 9, window=4, overlap=0), "overlap"),
    "overlap given": (lambda: extend(ramp_model, VIDEO, 9, window=4, overlap=3), "overlap"),
    "owned": (lambda: extend(ramp_model, VIDEO, 9, window=4, condition=1), "window by window"),
    "no low res": (lambda: extend(ramp_model, VIDEO, 9, window=4, low_res_weight=1.0), "none here"),
    "factor": (lambda: interpolate_frames(ramp_model, VIDEO, 1, window=2), "factor"),
    "too long": (lambda: interpolate_frames(ramp_model, VIDEO, 2, window=2, num_frames=9), "in"),
    "smaller": (lambda: upscale(ramp_model, VIDEO, (2, 2), window=2), "below"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        call()


def test_model_that_hides_its_gradient():
    def model(z, time):
        return z.detach() * 0.5

    with pytest.raises(RuntimeError, match="autograd"):
        sample(model, SHAPE, num_steps=2, condition=Condition(VIDEO))
