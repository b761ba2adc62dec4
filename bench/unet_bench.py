"""The whole network: the peer, plain torch in its best form, fastvdm. Forward and training step.

"torch" is ``UNet3D`` on its reference backend: channels last, 2-D convolutions, and nothing of ours
but the layout. Compiled in bf16 it is the best that plain torch can do. "peer-openvino" is the peer
compiled by OpenVINO for a CPU, if that is installed (``pip install ".[openvino]"``).

"tiny" shows the cost of Python and dispatch. Networks that take seconds run with --full; -k selects
among them: ``pytest bench/unet_bench.py --full -k readme-24``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from floor import network_costs
from harness import Contest, Provider, Unavailable, compiled, need_kernel
from peer import PeerMissing, import_peer
from torch import Tensor, nn

from fastvdm import UNet3D, use_backend
from fastvdm.ops._cost import Cost
from fastvdm.runtime.extension import emulated
from fastvdm.runtime.optional import require

PROVIDERS = (
    "peer",
    "peer-bf16",
    "peer-compiled",
    "peer-openvino",
    "peer-openvino-bf16",
    "torch",
    "torch-compiled",
    "torch-bf16",
    "torch-bf16-compiled",
    "torch-bf16-autotuned",
    "fastvdm",
    "fastvdm-autocast",
    "fastvdm-bf16",
    "fastvdm-bf16-compiled",
    "fastvdm-bf16-graph",
)
SLOW_TO_COMPILE = ("peer-compiled", "torch-compiled", "torch-bf16-compiled", "torch-bf16-autotuned")


@dataclass(frozen=True)
class Net:
    """A network and its input."""

    dim: int
    dim_mults: tuple[int, ...]
    frames: int
    size: int
    batch: int = 1  # on a CPU
    gpu_batch: int = 8
    preset: str = ""  # one of the paper's models, which the peer does not have


CASES = {
    "tiny": Net(16, (1, 2), 4, 16, gpu_batch=1),
    "small": Net(32, (1, 2, 4), 8, 32),
    "readme": Net(64, (1, 2, 4, 8), 16, 64),  # the peer's README; about 4 s on two cores
    "readme-32": Net(64, (1, 2, 4, 8), 16, 32),
    "readme-9": Net(64, (1, 2, 4, 8), 9, 64),
    "readme-24": Net(64, (1, 2, 4, 8), 24, 64),
    "readme-batch-4": Net(64, (1, 2, 4, 8), 16, 64, batch=4, gpu_batch=4),
    "dim-128": Net(128, (1, 2, 4, 8), 16, 64),
}
QUICK = ("tiny", "small")  # the others need --full
# Only for make gpu.
LARGE = {
    "readme-1": Net(64, (1, 2, 4, 8), 16, 64, gpu_batch=1),
    "dim-256": Net(256, (1, 2, 4, 8), 16, 64, gpu_batch=1),
    "ucf101": Net(256, (1, 2, 4, 8), 16, 64, gpu_batch=1, preset="ucf101"),  # as the preset is
}


class Setup:
    """Both networks with the same weights, and one input."""

    def __init__(self, case: str, device: str) -> None:
        net = (CASES | LARGE)[case]
        torch.manual_seed(0)
        try:
            if net.preset:
                raise PeerMissing(f"{net.preset} is no network of the peer's")
            peer = import_peer("0.7.0")
        except PeerMissing as error:
            self.peer, self.missing = None, str(error)
            ours = UNet3D(dim=net.dim, dim_mults=net.dim_mults, norm="rms", cond_drop_prob=0.0)
            if net.preset:
                ours = UNet3D.from_preset(net.preset)
        else:
            self.peer, self.missing = peer.Unet3D(dim=net.dim, dim_mults=net.dim_mults), None
            self.peer.to(device)
            ours = UNet3D.from_unet3d(self.peer, exact=True)
        self.ours = ours.to(device)
        if device.startswith("cuda"):
            self.ours.to(memory_format=torch.channels_last)  # as docs/tools.md says
        batch = net.gpu_batch if device.startswith("cuda") else net.batch
        shape = (batch, 3, net.frames, net.size, net.size)
        self.x = torch.randn(shape, device=device)
        self.target = torch.randn(shape, device=device)
        self.time = torch.randint(0, 1000, (batch,), device=device)

    def witness(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The peer, or our reference if it is missing, in ``dtype``."""
        return copy.deepcopy(self.ours if self.peer is None else self.peer).to(dtype)

    def need_peer(self) -> nn.Module:
        if self.peer is None:
            raise Unavailable(str(self.missing))
        return copy.deepcopy(self.peer)


Step = Callable[[nn.Module, Callable[..., Tensor], Tensor, Tensor, Tensor], Any]


def forward(
    net: nn.Module, call: Callable[..., Tensor], x: Tensor, time: Tensor, target: Tensor
) -> Tensor:
    with torch.no_grad():
        return call(x, time)


def train(
    net: nn.Module, call: Callable[..., Tensor], x: Tensor, time: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Forward, MSE, backward, and the norm of all gradients, by which trainers clip."""
    net.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    loss = nn.functional.mse_loss(call(x, time).to(target.dtype), target)
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return loss.detach(), x.grad, torch.nn.utils.get_total_norm(grads)


def by_openvino(net: nn.Module, x: Tensor, time: Tensor, precision: str) -> Callable[[], Tensor]:
    """``net(x, time)`` compiled by OpenVINO for these shapes, with as many threads as torch."""
    # Its telemetry would send from a thread while others are timed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    openvino = require("openvino", "openvino")
    core = openvino.Core()
    # bf16 is only a hint to OpenVINO: without this check something else would run under its name.
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO has no bf16 on this CPU")
    with torch.no_grad():
        traced = torch.jit.trace(net.eval(), (x, time), check_trace=False)
        model = openvino.convert_model(
            traced, example_input=(x, time), input=[list(x.shape), list(time.shape)]
        )
    how = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", how).create_infer_request()
    given = {0: x.numpy(), 1: time.numpy()}

    def run() -> Tensor:  # no copies at either end; a call overwrites the previous result
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    return run


def contest(case: str, device: str, step: Step = forward) -> Contest:
    setup = Setup(case, device)
    infos: dict[str, dict[str, Any]] = {name: {} for name in PROVIDERS}

    def runner(
        make: Callable[[], nn.Module],
        name: str,
        dtype: torch.dtype,
        backend: str = "auto",
        compile: bool = False,
        **options: Any,
    ) -> Callable[[], Any]:
        net = make().to(dtype).train(step is train)
        call = compiled(net, infos[name], **options) if compile else net
        x, target = setup.x.to(dtype), setup.target

        def run() -> Any:
            with use_backend(backend):
                return step(net, call, x, setup.time, target)

        return run

    def plain(
        name: str, dtype: torch.dtype, compile: bool = False, **options: Any
    ) -> Callable[[], Any]:
        if emulated(torch.device(device), dtype):
            raise Unavailable("this CPU emulates bf16: minutes a forward pass")
        net = lambda: copy.deepcopy(setup.ours)  # noqa: E731
        return runner(net, name, dtype, "reference", compile, **options)

    def under_autocast(net: nn.Module) -> Callable[[], Any]:
        net.train(step is train)

        def call(*args: Tensor) -> Tensor:
            with torch.autocast(device.split(":")[0], bf16):
                return net(*args)

        return lambda: step(net, call, setup.x, setup.time, setup.target)

    def theirs_in_bf16() -> Callable[[], Any]:
        """Under autocast, because the peer's time embedding is fp32 whatever its weights are."""
        if emulated(torch.device(device), bf16):
            raise Unavailable("this CPU emulates bf16: minutes a forward pass")
        return under_autocast(setup.need_peer())

    def theirs_in_openvino(name: str, precision: str) -> Callable[[], Any]:
        if step is train:
            raise Unavailable("OpenVINO has no backward pass")
        if device != "cpu":
            raise Unavailable("OpenVINO takes part on a CPU")
        infos[name]["peak_mib"] = None  # it keeps its memory between calls, so no peak would show
        return by_openvino(setup.need_peer(), setup.x, setup.time, precision)

    def ours(name: str, dtype: torch.dtype, compile: bool = False) -> Callable[[], Any]:
        need_kernel("norm_act", device)
        return runner(lambda: copy.deepcopy(setup.ours), name, dtype, "auto", compile)

    def ours_under_autocast() -> Callable[[], Any]:
        need_kernel("norm_act", device)
        return under_autocast(copy.deepcopy(setup.ours))

    def graphed() -> Callable[[], Any]:
        if not device.startswith("cuda") or step is train:
            raise Unavailable("CUDA graphs of the forward pass, on a GPU")
        run = ours("fastvdm-bf16-graph", torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def reference() -> Any:
        # In fp64 a training step with eight videos, or a wider network, would fill a GPU.
        large = device != "cpu" and (step is train or (CASES | LARGE)[case].dim > 64)
        wide = torch.float32 if large else torch.float64
        net = setup.witness(wide).train(step is train)
        with use_backend("reference"):
            x, time, target = (t.to(wide) for t in (setup.x, setup.time, setup.target))
            return step(net, net, x, time, target)

    fp32, bf16 = torch.float32, torch.bfloat16
    # A training step sums errors over a longer chain.
    exact, rough = (1e-5, 5e-2) if step is forward else (1e-4, 1.5e-1)
    builds: dict[str, tuple[Callable[[], Callable[[], Any]], torch.dtype]] = {
        "peer": (lambda: runner(setup.need_peer, "peer", fp32), fp32),
        "peer-bf16": (theirs_in_bf16, bf16),
        "peer-compiled": (
            lambda: runner(setup.need_peer, "peer-compiled", fp32, compile=True),
            fp32,
        ),
        "peer-openvino": (lambda: theirs_in_openvino("peer-openvino", "f32"), fp32),
        "peer-openvino-bf16": (lambda: theirs_in_openvino("peer-openvino-bf16", "bf16"), bf16),
        "torch": (lambda: plain("torch", fp32), fp32),
        "torch-compiled": (lambda: plain("torch-compiled", fp32, True), fp32),
        "torch-bf16": (lambda: plain("torch-bf16", bf16), bf16),
        "torch-bf16-compiled": (lambda: plain("torch-bf16-compiled", bf16, True), bf16),
        "torch-bf16-autotuned": (
            lambda: plain("torch-bf16-autotuned", bf16, True, mode="max-autotune"),
            bf16,
        ),
        "fastvdm": (lambda: ours("fastvdm", fp32), fp32),
        "fastvdm-autocast": (ours_under_autocast, bf16),
        "fastvdm-bf16": (lambda: ours("fastvdm-bf16", bf16), bf16),
        "fastvdm-bf16-compiled": (lambda: ours("fastvdm-bf16-compiled", bf16, True), bf16),
        "fastvdm-bf16-graph": (graphed, bf16),
    }

    def cost(dtype: torch.dtype) -> list[Cost]:
        costs = network_costs(setup.ours, setup.x, setup.time, dtype)
        times = 1 if step is forward else 3  # the backward pass does about twice the work
        return [Cost(times * c.flops, times * c.bytes) for c in costs]

    return Contest(
        reference=reference,
        providers={
            name: Provider(build, exact if dtype == fp32 else rough, dtype, infos[name])
            for name, (build, dtype) in builds.items()
        },
        cost=cost,
        device=device,
        hide_host=False,
    )


def some(names: Iterable[str], slow: Container[str]) -> list:
    """All names; those in ``slow`` only with --full."""
    return [pytest.param(n, marks=pytest.mark.full) if n in slow else n for n in names]


# The peer compiles into 60 graphs, which takes minutes on a slow core.
@pytest.mark.parametrize("provider", some(PROVIDERS, SLOW_TO_COMPILE[::2] + SLOW_TO_COMPILE[3:]))
@pytest.mark.parametrize("case", some(CASES, CASES.keys() - QUICK))
def test_forward(race, case, provider):
    race(contest, case, provider)


# Compiling a backward pass takes minutes on two cores.
@pytest.mark.parametrize("provider", some(PROVIDERS, (*SLOW_TO_COMPILE, "fastvdm-bf16-compiled")))
@pytest.mark.parametrize("case", some(("small", "readme"), ("readme",)))
def test_train(race, case, provider):
    race(contest, case, provider, step=train)
