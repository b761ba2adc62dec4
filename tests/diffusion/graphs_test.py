"""Sampling steps as CUDA graphs, and what they rest on: nothing in a step waits for the device.

Without a GPU a "graph" calls its step again, which leaves everything else as it is: the static
buffers, the copies into and out of them, the count of draws on the device.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm import UNet3D, use_backend
from fastvdm.diffusion import (
    DDIM,
    Ancestral,
    Condition,
    DiscreteSchedule,
    Langevin,
    extend,
    graphs,
    sample,
)
from fastvdm.diffusion.run import Run
from fastvdm.ops._call import BODIES

SHAPE = (2, 3, 4, 8, 4)
PAPER = dict(
    layout="paper",
    image_size=8,
    attn_resolutions=(4,),
    attn_dim_head=8,
    resnet_groups=4,
    emb_dim=16,
    num_blocks=1,
    position="shaw",
    null_cond="zeros",
    zero_init=False,
)


def network(cond: bool = False, **options) -> UNet3D:
    torch.manual_seed(0)
    options = {"attn_heads": 2, "time_input": "logsnr"} | options
    return UNet3D(8, dim_mults=(1, 2), cond_dim=3 if cond else None, **options)


def frames(device: str = "cpu") -> dict[str, Condition]:
    g = torch.Generator().manual_seed(1)
    known = torch.randn(2, 3, 2, 8, 4, generator=g).clamp(-1, 1).to(device)
    low = torch.randn(2, 3, 4, 4, 2, generator=g).clamp(-1, 1).to(device)
    return {
        "frames": Condition(known, frame_index=[0, -1], guidance_weight=5.0),
        "replacement": Condition(known, method="replacement", replacement="posterior"),
        "low_res": Condition(low_res=low, low_res_weight=0.5),
        "bilinear": Condition(known, low_res=low, downsample="bilinear", clip_before_loss=True),
        "mask": Condition(known.repeat(1, 1, 2, 1, 1), mask=known.repeat(1, 1, 2, 1, 1) > 0.3),
    }


# name: (network options, options of sample)
RUNS = {
    "plain": ({}, {}),
    "rms_ddim": ({"norm": "rms"}, {"sampler": DDIM(0.0)}),
    "paper_langevin": (PAPER, {"corrector": Langevin(), "sampler": Ancestral(0.3)}),
    "index": ({"time_input": "index"}, {"schedule": DiscreteSchedule(100)}),
    "dynamic": ({}, {"clip": "dynamic"}),
    "cfg": ({}, {"guidance_scale": 3.0}),
    "guided": ({}, {"condition": "frames", "corrector": Langevin()}),
    "guided_half": ({}, {"condition": "frames", "corrector": Langevin(guided=False)}),
    "guided_cfg": ({}, {"condition": "frames", "guidance_scale": 2.0, "clip": "dynamic"}),
    "replacement": ({}, {"condition": "replacement"}),
    "low_res": ({}, {"condition": "low_res"}),
    "bilinear": ({}, {"condition": "bilinear"}),
    "mask": ({}, {"condition": "mask", "corrector": Langevin()}),
}


def setup(name: str, device: str = "cpu"):
    made, options = RUNS[name]
    options = dict(options)
    cond = "guidance_scale" in options
    if cond:
        options["cond"] = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)).to(device)
    if "condition" in options:
        options["condition"] = frames(device)[options["condition"]]
    return network(cond, **made).to(device), {"num_steps": 6, "seed": [3, 11]} | options


class Recorder:
    """Stands for CUDA's capture; counts recordings and replays."""

    def __init__(self) -> None:
        self.recordings, self.replays = 0, 0

    def __call__(self, step):
        self.recordings += 1
        outputs = tuple(t.clone() for t in step())

        def replay() -> None:
            self.replays += 1
            for out, new in zip(outputs, step()):
                out.copy_(new)

        for out in outputs:
            out.fill_(float("nan"))  # a recording computes nothing
        return replay, outputs


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder, why_not = Recorder(), graphs.why_not
    monkeypatch.setattr(graphs, "capture_cuda", recorder)
    target = "fastvdm.diffusion.setup.why_not"
    with mock.patch(target, lambda device, *rest: why_not(torch.device("cuda"), *rest)):
        yield recorder


@pytest.mark.parametrize("name", RUNS)
def test_static_step_is_bit_equal(name, recorder):
    """Every z and x_tilde of the run, whatever buffers they passed through."""
    model, options = setup(name)
    runs = []
    for cuda_graph in (False, True):
        steps = []
        z = sample(model, SHAPE, callback=steps.append, cuda_graph=cuda_graph, **options)
        runs.append([t for s in steps for t in (s.z, s.x_tilde)] + [z])
    assert len(runs[0]) == len(runs[1]) and all(map(torch.equal, *runs))
    corrected = "corrector" in options
    # the last step of all samplers but the noiseless one is of another kind and runs as it is
    rows = 6 if name == "rms_ddim" else 5
    assert recorder.replays == rows * (1 + corrected)
    assert recorder.recordings == (2 if name == "guided_half" else 1)


def test_extension_passes_the_option_on(recorder):
    model, clip = network(), torch.zeros(1, 3, 2, 8, 4)
    videos = [
        extend(model, clip, 6, window=4, overlap=2, seed=1, num_steps=5, cuda_graph=on)
        for on in (False, True)
    ]
    assert torch.equal(*videos) and recorder.recordings == 2  # two windows


def test_few_rows_are_not_recorded(recorder):
    model, options = setup("plain")
    options["num_steps"] = 3
    runs = [sample(model, SHAPE, cuda_graph=on, **options) for on in (False, True)]
    assert torch.equal(*runs) and recorder.recordings == 0


def test_what_cannot_be_recorded_is_said(recorder):
    model = network()
    condition = Condition(low_res=torch.zeros(2, 3, 4, 4, 2), downsample=lambda x: x[..., ::2, ::2])
    with pytest.raises(ValueError, match="whose state is on the host: give seed"):
        sample(model, SHAPE, generator=torch.Generator(), cuda_graph=True)
    with pytest.raises(ValueError, match="downsample function of the caller"):
        sample(model, SHAPE, condition=condition, cuda_graph=True)


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="needs a CUDA device, the videos are on cpu"):
        sample(network(), SHAPE, cuda_graph=True)


def test_small_batches_are_recorded_by_themselves(recorder, monkeypatch):
    """A network of ours, alone and small; what could not be recorded runs as it is."""
    model, options = setup("plain")
    sample(model, SHAPE, **options)
    assert recorder.recordings == 0  # six steps are too few
    options["num_steps"] = 17
    found = sample(model, SHAPE, **options)
    assert recorder.recordings == 1
    assert torch.equal(found, sample(model, SHAPE, cuda_graph=False, **options))
    with graphs._CAPTURING:  # another thread records
        assert torch.equal(found, sample(model, SHAPE, **options))
    assert recorder.recordings == 1

    class Own(UNet3D):
        """Whatever its forward does."""

    own = Own(8, dim_mults=(1, 2), attn_heads=2, time_input="logsnr")
    sample(own, SHAPE, **options)
    stem, model.stem = model.stem, torch.nn.Sequential(model.stem)
    assert graphs.decide("auto", model, SHAPE, None)
    model.stem = stem
    compiled = network()
    compiled.compile(backend="eager")
    assert not graphs.decide("auto", compiled, SHAPE, None)

    more = {k: v for k, v in options.items() if k != "seed"}
    sample(model, SHAPE, generator=torch.Generator(), **more)
    sample(lambda z, time: model(z, time), SHAPE, **options)
    hook = model.head.register_forward_hook(lambda *_: None)
    sample(model, SHAPE, **options)
    hook.remove()
    monkeypatch.setattr(graphs, "SMALL", 2 * 4 * 8 * 4 * 8 - 1)
    sample(model, SHAPE, **options)
    assert recorder.recordings == 1
    with pytest.raises(ValueError, match="must be True, False or 'auto', got '1'"):
        sample(model, SHAPE, cuda_graph="1", **options)


def test_a_recording_that_fails_is_a_warning_where_nobody_asked(recorder, monkeypatch):
    def fails(step):
        raise RuntimeError("no graph today")

    model, options = setup("plain")
    options["num_steps"] = 17
    monkeypatch.setattr(graphs, "capture_cuda", fails)
    with pytest.warns(UserWarning, match="without CUDA graphs: no graph today"):
        found = sample(model, SHAPE, **options)
    assert torch.equal(found, sample(model, SHAPE, cuda_graph=False, **options))
    with pytest.raises(RuntimeError, match="no graph today"):
        sample(model, SHAPE, cuda_graph=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_graph_is_bit_equal_on_a_gpu(name):
    model, options = setup(name, "cuda")
    runs = [sample(model, SHAPE, cuda_graph=on, **options) for on in (False, True)]
    assert torch.equal(*runs)


@pytest.mark.gpu
def test_a_model_that_waits_is_named():
    def waits(z, time):
        return z * float(z.sum())

    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        sample(waits, SHAPE, num_steps=6, cuda_graph=True, device="cuda")


# -- host synchronisation ---------------------------------------------------------------------


class Sync(AssertionError):
    """Something that would wait for a GPU."""


READS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
)


class NoSync(TorchDispatchMode):
    """Fails on every operator whose result, or its size, the host has to read."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen += 1
        name = func.name().split("::")[1].split(".")[0]
        if name in READS and kwargs.get("output_size") is None:
            raise Sync(func.name())
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise Sync(f"{func.name()} by a mask")
        if func.namespace == "fastvdm":  # the body of an op of ours: its launcher is host code too
            with self:
                return BODIES[func._opname](*args, **kwargs)
        return func(*args, **kwargs)


class NoKernel:
    """In the place of a Triton launch: the launcher runs, the kernel does not."""

    launches = 0

    def __call__(self, *args, **kwargs):
        self.launches += 1


@contextmanager
def no_sync_in_steps():
    """Every step of ``sample`` fails where it would wait; the plan before it may."""
    real, mode = Run.advance, NoSync()

    def refuse(name):
        def call(self, *args, **kwargs):
            raise Sync(name)

        return mock.patch.object(torch.Tensor, name, call)

    def advance(self, *args):
        with mode, refuse("cpu"), refuse("tolist"), refuse("numpy"), refuse("__array__"):
            return real(self, *args)

    with mock.patch.object(Run, "advance", advance):
        yield mode


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device(name, backend):
    from triton.runtime.interpreter import InterpretedFunction

    model, options = setup(name)
    options["num_steps"] = 2
    skip = NoKernel()
    patch = mock.patch.object(InterpretedFunction, "__getitem__", lambda self, grid: skip)
    with use_backend(backend), no_sync_in_steps() as mode, patch:
        sample(model, SHAPE, **options)
    assert mode.seen > 100 and (skip.launches > 10) == (backend == "triton")


def host_loop(z):
    return z * sum(z.flatten()[:2].tolist())


WAITS = {
    "item": lambda z: z * z.abs().max().item(),
    "branch": lambda z: z if z.sum() > 0 else -z,
    "mask": lambda z: z[z > 0].sum() + z,
    "where": lambda z: z + torch.where(z > 0)[0].shape[0],
    "cpu": lambda z: z + z.mean().cpu(),
    "tolist": host_loop,
    "put": lambda z: torch.zeros_like(z).index_put((z > 0,), torch.tensor(1.0)),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_found(name):
    """Negative control: forward, and in the backward pass of a guided step."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, dy):
            return WAITS[name](dy)

    with no_sync_in_steps(), pytest.raises(Sync):
        sample(lambda z, time: WAITS[name](z), SHAPE, num_steps=2)
    with no_sync_in_steps(), pytest.raises(Sync):
        condition = frames()["frames"]
        sample(lambda z, time: Backward.apply(z), SHAPE, num_steps=2, condition=condition)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_on_a_gpu(name):
    model, options = setup(name, "cuda")
    sample(model, SHAPE, **options)  # kernels compile
    real = Run.advance

    def advance(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(Run, "advance", advance):
        sample(model, SHAPE, **options)
