"""Guidance, beside the suite: noise, the guided step against Eqs. 7 and 8, launches a step."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from gaussian import DOUBLE, Gaussian
from op_cases import ROWS, make
from torch.utils._python_dispatch import TorchDispatchMode

import fastvdm
from fastvdm import use_backend
from fastvdm.diffusion import (
    DDIM,
    Ancestral,
    Condition,
    CosineSchedule,
    Langevin,
    alpha_of,
    bilinear_downsample,
    convert,
    input_gradient,
    sample,
)
from fastvdm.ops.guidance import (
    guidance_seed,
)
from fastvdm.reference.guidance import philox_normal, philox_words
from fastvdm.testing import cpu_isas


@pytest.mark.skipif(not cpu_isas(), reason="no C++ extension")
def test_slots_are_checked():
    """On a CPU a place that is not among the frames given is an error, not a read beyond them."""
    case = make(ROWS["guidance/seed"], torch.float32)
    case.rest["slot"] += 1
    with use_backend("cpu"), pytest.raises(RuntimeError, match="frame 2 of 2"):
        case(*case.tensors.values())


def test_exact_low_resolution(lane):
    """Integer operands and a factor of 4: an index error cannot hide in a tolerance."""
    backend, device = lane
    z = torch.arange(2 * 1 * 3 * 8 * 12, dtype=torch.float32, device=device).reshape(2, 1, 3, 8, 12)
    coef = torch.tensor([[1.0, 2.0, 0.0, 16.0]], device=device).repeat(2, 1)
    low = torch.arange(2 * 2 * 2 * 3, dtype=torch.float32, device=device).reshape(2, 1, 2, 2, 3)
    slot = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    with use_backend(backend):
        x_hat, seed = guidance_seed(z, z.flip(4), coef, low_res=low, low_slot=slot)
    assert torch.equal(x_hat, z + 2 * z.flip(4))
    mean = torch.nn.functional.avg_pool3d(x_hat, (1, 4, 4))
    expected = 2 * (mean[:, :, [0, 2]] - low[:, :, [1, 0]])
    assert torch.equal(seed[:, :, 1], torch.zeros_like(seed[:, :, 1]))
    spread = expected.repeat_interleave(4, 3).repeat_interleave(4, 4)
    assert torch.equal(seed[:, :, [0, 2]], spread)


# -- noise ------------------------------------------------------------------------------------


def test_philox_known_answer():
    """Random123's vectors for philox4x32-10: counter and key all zero, and all ones."""
    a, b = philox_words(torch.tensor([0]), 0, (1,))
    assert (a.item(), b.item()) == (0x6627E8D5, 0xE169C58D)


def test_a_place_on_the_device_is_added_to_the_step(lane):
    """(B, 2) seeds and places give the bits of (B,) seeds at step + place."""
    backend, device = lane
    case = make(ROWS["guidance/update"], torch.float32, device, dict(clip=True))
    tensors, seeds = list(case.tensors.values()), case.rest["rng"][:, 0].contiguous()

    def update(rng, step):
        case.rest |= dict(rng=rng, step=step)
        return case(*tensors)

    counted = torch.stack((seeds, torch.full_like(seeds, 7)), dim=1)
    with use_backend(backend):
        assert all(map(torch.equal, update(seeds, 9), update(counted, 2)))
        for bad in (counted[:1], counted.int(), seeds[:1]):
            error = TypeError if bad.dtype == torch.int32 else ValueError
            with pytest.raises(error, match="rng must be"):
                update(bad, 2)


def test_noise_is_normal_and_independent():
    rng = torch.tensor([7, 8])
    n = torch.cat([philox_normal(rng, step, (4, 50, 250)).flatten(1) for step in (0, 1)])
    assert (n.mean(1).abs() < 0.02).all() and (n.std(1) - 1).abs().max() < 0.02
    assert ((n**4).mean(1) - 3).abs().max() < 0.15
    correlation = torch.corrcoef(torch.cat((n, n.roll(1, dims=1)))) - torch.eye(8)
    assert correlation.abs().max() < 0.02


# -- the step ---------------------------------------------------------------------------------


def trace(model, shape, **options):
    """[(log_snr, z before, x_tilde after)] of a run; the first step's z is not handed out."""
    steps = []
    sample(model, shape, callback=steps.append, clip=None, seed=1, dtype=DOUBLE, **options)
    return [(a.log_snr, a.z, b.x_tilde) for a, b in zip(steps, steps[1:])]


def targets(shape, known, downsample, low_index):
    b, c, f, h, w = shape
    g = torch.Generator().manual_seed(5)
    out = {}
    if known:
        out["frames"] = torch.randn(b, c, len(known), h, w, generator=g, dtype=DOUBLE)
        out["frame_index"] = known
    if downsample:
        index = range(f) if low_index is None else low_index
        size = (b, c, len(index), h // 2, w // 2)
        out["low_res"] = torch.randn(size, generator=g, dtype=DOUBLE)
        out["low_res_index"], out["downsample"] = low_index, downsample
    return out


def pool(x):
    return torch.nn.functional.avg_pool3d(x, (1, 2, 2))


def diagonal_pick(x):
    """A downsampling that no kernel knows: each 2 x 2 block's diagonal, unevenly."""
    return 0.3 * x[..., ::2, ::2] + 0.7 * x[..., 1::2, 1::2]


CONDITIONS = {
    "prediction": ([0, 1], None, None),
    "interpolation": ([0, -1], None, None),
    "low_res": ([], "average", None),
    "low_res_some_frames": ([], "average", [3, 1]),
    "bilinear": ([], "bilinear", None),
    "custom": ([], diagonal_pick, None),
    "both": ([0], "average", [0, 2]),
    "both_custom": ([2], diagonal_pick, None),
}


# 1/|D|^2 of each: an average spreads evenly, the diagonal's only gain is sqrt(.3^2 + .7^2)
INVERSE_NORMS = {"average": 4.0, "bilinear": 4.0, diagonal_pick: 1 / (0.3**2 + 0.7**2)}


def weights_of(t, known, low):
    """Options of a Condition on ``t``, and the factor of ||y - D(x_hat)||^2 that they mean."""
    options = dict(guidance_limit="none") | (dict(guidance_weight=known) if "frames" in t else {})
    if "low_res" not in t:
        return options, 0.0
    return options | dict(low_res_weight=low), low * INVERSE_NORMS[t["downsample"]]


def loss_of(x_hat, t, known, low):
    """w_r ||x^a - x_hat^a||^2 + w_y ||y - D(x_hat)||^2, written from Eqs. 7 and 8."""
    total = x_hat.new_zeros(())
    if "frames" in t:
        total = total + known * (t["frames"] - x_hat[:, :, t["frame_index"]]).square().sum()
    if "low_res" in t:
        down = {
            "average": pool,
            "bilinear": lambda x: bilinear_downsample(x, t["low_res"].shape[3:]),
        }.get(t["downsample"], t["downsample"])
        index = t["low_res_index"]
        seen = x_hat if index is None else x_hat[:, :, index]
        total = total + low * (t["low_res"] - down(seen)).square().sum()
    return total


@pytest.mark.parametrize("case", CONDITIONS)
@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
def test_x_tilde_is_eq_7_and_8(case, prediction):
    """Every x_tilde of a run equals x_hat - (alpha/2) grad, the gradient in closed form."""
    data = Gaussian(frames=5)
    shape = (2, 1, 5, 4, 6)
    t = targets(shape, *CONDITIONS[case])
    options, low = weights_of(t, 3.0, 0.7)
    run = trace(
        data.denoiser(prediction),
        shape,
        prediction=prediction,
        num_steps=5,
        corrector=None,
        condition=Condition(**t, **options),
    )
    known = [i % 5 for i in t.get("frame_index", [])]
    rest = [i for i in range(5) if i not in known]
    for log_snr, z, x_tilde in run:
        gain, offset = data.gain(log_snr)
        leaf = z.clone().requires_grad_()
        x_hat = torch.einsum("ij,bcjhw->bcihw", gain, leaf) + offset.reshape(1, 1, -1, 1, 1)
        (g,) = torch.autograd.grad(loss_of(x_hat, t, 3.0, low), leaf)
        alpha = alpha_of(torch.tensor(log_snr, dtype=DOUBLE))
        expected = (x_hat - alpha / 2 * g).detach()
        torch.testing.assert_close(x_tilde[:, :, rest], expected[:, :, rest], rtol=1e-9, atol=1e-9)
        if known:
            assert torch.equal(x_tilde[:, :, known], t["frames"])


@pytest.mark.parametrize("case", ["prediction", "low_res", "custom"])
def test_clip_before_loss(case):
    """The option differentiates through the clamp: saturated elements have no gradient."""
    data = Gaussian(frames=5, mean=0.6)
    shape = (1, 1, 5, 4, 6)
    t = targets(shape, *CONDITIONS[case])
    options, low = weights_of(t, 0.5, 0.2)
    run = trace(
        data.denoiser("v"),
        shape,
        prediction="v",
        num_steps=4,
        condition=Condition(**t, **options, clip_before_loss=True),
    )
    rest = [i for i in range(5) if i not in t.get("frame_index", [])]
    saturated = False
    for log_snr, z, x_tilde in run:
        gain, offset = data.gain(log_snr)
        leaf = z.clone().requires_grad_()
        raw = torch.einsum("ij,bcjhw->bcihw", gain, leaf) + offset.reshape(1, 1, -1, 1, 1)
        x_hat = raw.clamp(-1, 1)
        (g,) = torch.autograd.grad(loss_of(x_hat, t, 0.5, low), leaf)
        expected = (x_hat - 0.5 * alpha_of(torch.tensor(log_snr, dtype=DOUBLE)) * g).detach()
        torch.testing.assert_close(x_tilde[:, :, rest], expected[:, :, rest], rtol=1e-9, atol=1e-9)
        saturated |= bool((raw.abs() > 1).any())
    assert saturated


@pytest.mark.parametrize("guided, backwards", [(True, 5), (False, 3)])
def test_unguided_corrector(guided, backwards):
    """``Langevin(guided=False)`` spares the backward pass of the correction."""
    data, real, calls = Gaussian(frames=3), torch.autograd.grad, []

    def grad(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    with mock.patch.object(torch.autograd, "grad", grad):
        sample(
            data.denoiser(),
            (1, 1, 3, 2, 2),
            num_steps=3,
            corrector=Langevin(guided=guided),
            condition=Condition(torch.zeros(1, 1, 1, 2, 2)),
        )
    assert len(calls) == backwards


@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
@pytest.mark.parametrize("case", ["prediction", "low_res", "both_custom"])
def test_gradient_through_unet(case, prediction):
    """alpha/2 <grad, d> by central differences through the whole UNet3D, in fp64."""
    torch.manual_seed(0)
    net = fastvdm.UNet3D(
        8, dim_mults=(1, 2), channels=1, attn_heads=2, attn_dim_head=8, time_input="logsnr"
    ).double()
    shape = (1, 1, 3, 4, 8)
    known = CONDITIONS[case][0]
    t = targets(shape, *CONDITIONS[case])
    options, low = weights_of(t, 2.0, 0.6)
    run = trace(
        net,
        shape,
        prediction=prediction,
        num_steps=4,
        condition=Condition(**t, **options),
    )
    rest = [i for i in range(3) if i not in known]
    for log_snr, z, x_tilde in run[1:]:  # two levels
        level = torch.full((1,), log_snr, dtype=DOUBLE)

        def x_hat_of(z, level=level):
            out = net(z, level)
            return convert(out, z, level, source=prediction, target="x")

        with torch.no_grad():
            shift = (x_hat_of(z) - x_tilde)[:, :, rest]
            direction = torch.zeros_like(z)
            direction[:, :, rest] = torch.randn_like(shift)
            h = 1e-5
            up, down = (loss_of(x_hat_of(z + s * h * direction), t, 2.0, low) for s in (1, -1))
        slope = (up - down) / (2 * h)
        expected = alpha_of(level)[0] / 2 * slope
        found = (shift * direction[:, :, rest]).sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"checkpointing": "level"}], ids=["plain", "checkpoint"])
def test_backward_is_dgrad_only(options):
    """In a guided step nothing leads to a parameter, no weight gradient is asked of any
    convolution, and the module comes back as it was."""
    net = fastvdm.UNet3D(8, dim_mults=(1, 2), channels=1, time_input="logsnr", **options)
    net.train()
    frozen = next(net.parameters())
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]

    class Watch(TorchDispatchMode):
        masks: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                self.masks.append(args[-1])
            return func(*args, **(kwargs or {}))

    leaves = set()

    def walk(node):
        stack, seen = [node], set()
        while stack:
            n = stack.pop()
            if n is None or n in seen:
                continue
            seen.add(n)
            if type(n).__name__ == "AccumulateGrad":
                leaves.add(id(n.variable))
            stack += [m for m, _ in n.next_functions]

    real = torch.autograd.grad

    def grad(outputs, inputs, *args, **kwargs):
        leaves.clear()
        walk(outputs.grad_fn)
        assert leaves == {id(inputs)}
        return real(outputs, inputs, *args, **kwargs)

    frames = torch.zeros(1, 1, 1, 8, 4)
    with Watch() as watch, mock.patch.object(torch.autograd, "grad", grad):
        sample(net, (1, 1, 3, 8, 4), num_steps=2, condition=Condition(frames))
    assert leaves and all(not any(mask[1:]) for mask in watch.masks)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert net.training and all(p.grad is None for p in net.parameters())
    with pytest.raises(KeyError), input_gradient(net):
        raise KeyError
    assert [p.requires_grad for p in net.parameters()] == flags


# -- launches ---------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Names of the ops that compute something, outside ``paused`` blocks."""

    VIEWS = ("detach", "view", "select", "slice", "expand", "alias", "_unsafe_view", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.names, self.on = [], True

    @contextmanager
    def paused(self):
        self.on = False
        yield
        self.on = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if self.on and name not in self.VIEWS:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def network(count):
    """A network whose own work is not counted, forward or backward."""

    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            with count.paused():
                return 0.1 * z**3

        @staticmethod
        def backward(ctx, dy):
            (z,) = ctx.saved_tensors
            with count.paused():
                return 0.3 * z**2 * dy

    return lambda z, time: Cubed.apply(z)


@pytest.mark.parametrize("corrector", [None, Langevin()], ids=["ancestral", "langevin"])
@pytest.mark.parametrize("guided", [False, True])
def test_launches_per_step(guided, corrector, device):
    """Two elementwise launches a network call where it is guided, one where it is not; nothing
    else, whatever is known about the video."""
    from fastvdm.kernels import guidance as kernels

    shape = (2, 1, 4, 8, 6)
    t = targets(shape, [0, 2], "average", [0, 1])
    condition = Condition(
        **{k: t[k].float() if "_" not in k[-6:] and k in ("frames", "low_res") else t[k] for k in t}
    )
    launches = []

    def counted(kernel):
        real = kernel.run

        def run(*args, **kwargs):
            launches.append(kernel)
            return real(*args, **kwargs)

        return mock.patch.object(kernel, "run", run)

    def count_ops(steps):
        launches.clear()
        count = Count()
        with (
            use_backend("triton"),
            counted(kernels._guidance_seed_kernel),
            counted(kernels._guidance_update_kernel),
            count,
        ):
            sample(
                network(count),
                shape,
                num_steps=steps,
                clip=None,
                corrector=corrector,
                condition=condition if guided else None,
                seed=0,
                device=device,
            )
        return len(launches), sorted(count.names)

    calls = 1 if corrector is None else 2
    per_step = (2 if guided else 1) * calls
    short, long = count_ops(3), count_ops(5)
    assert long[0] - short[0] == 2 * per_step
    ours = [n for n in long[1] if n.startswith("fastvdm::")]
    assert len(ours) == long[0]
    # what is left is the set-up of a run, the same for any number of steps
    other = [[n for n in names if not n.startswith("fastvdm::")] for _, names in (short, long)]
    assert other[0] == other[1]


@pytest.mark.parametrize("sampler", [Ancestral(0.3), DDIM(0.5)], ids=["ancestral", "ddim"])
def test_fused_equals_unfused(sampler, lane):
    """A whole guided run through the kernels against the reference, the same counter noise."""
    backend, device = lane
    shape = (2, 1, 4, 8, 6)
    t = targets(shape, [0, 2], "average", None)
    options = dict(
        sampler=sampler,
        corrector=Langevin(),
        num_steps=6,
        seed=11,
        device=device,
        condition=Condition(**t, guidance_weight=2.0),
        clip=None,
    )
    data = Gaussian(frames=4)

    def model(z, log_snr):
        return data.denoiser()(z.cpu(), log_snr.cpu()).to(z.device)

    results = []
    for name in ("reference", backend):
        with use_backend(name):
            results.append(sample(model, shape, **options))
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4)


def test_schedule_is_what_the_tests_assume():
    """The levels that ``trace`` reports are those of the cosine schedule."""
    run = trace(Gaussian(frames=2).denoiser(), (1, 1, 2, 2, 2), num_steps=4)
    t = torch.tensor([0.75, 0.5, 0.25], dtype=DOUBLE)
    found = torch.tensor([r[0] for r in run], dtype=DOUBLE)
    torch.testing.assert_close(found, CosineSchedule().log_snr(t))
