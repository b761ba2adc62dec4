"""Whole networks in ``make gpu-check``: forward, training step, compiled, sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from gpu_worker import Skip, note
from torch import Tensor, nn

FP32, BF16 = torch.float32, torch.bfloat16
DEVICE = "cuda"


def network(name: str) -> nn.Module:
    """A network in fp32 without zero weights, which would hide what precedes them."""
    from unet_bench import CASES

    from fastvdm import UNet3D

    torch.manual_seed(0)
    net = CASES["readme"]
    with torch.device(DEVICE):
        if name == "ucf101":
            model = UNet3D.from_preset(name)
        else:
            norm = {"norm": "rms"} if name.endswith("rms") else {}
            model = UNet3D(net.dim, dim_mults=net.dim_mults, cond_drop_prob=0.0, **norm)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model.to(DEVICE)


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, time, target."""
    from unet_bench import CASES

    net = CASES["readme"]
    batch = 1 if name == "ucf101" else min(2, net.gpu_batch)
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (batch, 3, net.frames, net.size, net.size)
    x, target = torch.randn(2, *shape, generator=generator, device=DEVICE).unbind()
    time = torch.linspace(0.2, 1.5, batch, device=DEVICE) * (1 if name == "ucf101" else 300)
    return x, time, target


def results(model: nn.Module, x: Tensor, time: Tensor, target: Tensor, train: bool) -> list[Tensor]:
    """The output; or with ``train`` the loss and the gradients of x and weights, no dropout."""
    model.eval()
    if not train:
        with torch.no_grad():
            return [model(x, time)]
    leaf = x.detach().requires_grad_()
    loss = nn.functional.mse_loss(model(leaf, time).to(target.dtype), target)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [leaf, *weights], allow_unused=True)
    return [loss.detach(), *(t for t in found if t is not None)]


def hold(
    parts: Iterable[tuple[str, list[Tensor], float]],
    plain: list[Tensor],
    exact: list[Tensor],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """``assert_close3`` over the tensors of each part together, because a weight whose gradient
    cancels has no size of its own. Tensors are processed one by one: those of a large network fill
    the memory. ``dtype`` is that of the activations.

    Raises:
        AssertionError: the error of a part exceeds its factor times that of plain torch.
    """
    from fastvdm.testing import _FLOOR

    found, at, wrong = {}, 0, []
    for name, tensors, factor in parts:
        errors, plains, sizes = [], [], []
        for t in tensors:
            p, e = plain[at], exact[at].double()
            at += 1
            errors.append((t.double() - e).abs().max().item())
            plains.append((p.double() - e).abs().max().item())
            sizes.append(e.abs().max().item())
        size = max(sizes)
        limit = max(factor * max(plains), _FLOOR[dtype] * factor / 2 * size)
        worst = max(errors, key=lambda v: v if v == v else float("inf"))
        found[name] = {"error": worst / size, "plain": max(plains) / size, "limit": limit / size}
        if not worst <= limit:
            wrong.append(
                f"{name}: error {worst / size:.2e}, plain torch's {max(plains) / size:.2e}"
            )
    if wrong:
        raise AssertionError("; ".join(wrong))
    return found


def whole(
    name: str, dtype: torch.dtype, train: bool, without: tuple[str, ...], *, autocast: bool = False
) -> dict[str, Any]:
    """A network against the reference in its dtype and in fp64; two runs must be bit-equal. With
    ``autocast`` the weights are fp32, and ``dtype`` is autocast's."""
    from fastvdm import use_backend

    weights = FP32 if autocast else dtype
    model = network(name).to(weights)
    given = inputs(name)
    x, time, target = given[0].to(weights), given[1], given[2].to(weights)

    def run(backend: str, low: bool = autocast) -> list[Tensor]:
        note(backend)
        with use_backend(backend), torch.autocast(DEVICE, dtype, enabled=low):
            return results(model, x, time, target, train)

    torch.use_deterministic_algorithms(True, warn_only=True)  # for torch's ops; it fills empty()
    try:
        ours, again = run("auto"), run("auto")
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(map(torch.equal, ours, again))
    del again
    plain = run("reference")
    model.double()
    x, target = x.double(), target.double()
    exact = run("reference", False)
    if train:
        parts = [("loss", ours[:1], 2.0), ("dx", ours[1:2], 3.0), ("dw", ours[2:], 3.0)]
    else:
        parts = [("out", ours, 2.0)]
    found = hold(parts, plain, exact, dtype)
    if not same:
        raise AssertionError("two runs differ")
    said = ", ".join(f"{k} {v['error']:.1e} (plain {v['plain']:.1e})" for k, v in found.items())
    return {"errors": found, "say": said}


def like_the_peer(without: tuple[str, ...]) -> dict[str, Any]:
    """Compare with the peer's own network, with the same weights, in fp32."""
    from peer import PeerMissing, import_peer
    from unet_bench import CASES

    from fastvdm import UNet3D
    from fastvdm.testing import max_error

    try:
        peer = import_peer("0.7.0")
    except PeerMissing as error:
        raise Skip(str(error)) from error
    net = CASES["readme"]
    torch.manual_seed(0)
    theirs = peer.Unet3D(dim=net.dim, dim_mults=net.dim_mults).to(DEVICE).eval()
    ours = UNet3D.from_unet3d(theirs, exact=True).to(DEVICE).eval()
    x, time, _ = inputs("unet")
    with torch.no_grad():
        error = max_error(ours(x, time), theirs(x, time))
    if not error <= 1e-4:
        raise AssertionError(f"max error {error:.2e}")
    return {"error": error, "say": f"max error {error:.1e}"}


def compiled_network(without: tuple[str, ...]) -> dict[str, Any]:
    """A network compiled into one graph must give the result of the eager one."""
    from fastvdm.testing import max_error

    model = network("unet").to(BF16).eval()
    x, time, _ = inputs("unet")
    with torch.no_grad():
        eager = model(x.to(BF16), time)
        note("compile")
        error = max_error(
            torch.compile(model, fullgraph=True, dynamic=False)(x.to(BF16), time), eager
        )
    if not error <= 5e-2:
        raise AssertionError(f"max error {error:.2e}")
    return {"error": error, "say": f"max error {error:.1e}"}


def graphed_sample(guided: bool, without: tuple[str, ...]) -> dict[str, Any]:
    """``sample`` by CUDA graphs must give the bits of the same run without graphs."""
    from fastvdm.diffusion import Condition, sample

    model = network("unet").to(FP32 if guided else BF16).eval()
    x = inputs("unet")[0][:1]
    condition = Condition(x[:, :, :1].clamp(-1, 1), guidance_weight=2.0) if guided else None
    options = dict(num_steps=6, seed=3, time_input="logsnr", condition=condition, device=DEVICE)
    found = []
    for graph in (False, True):
        note(f"cuda_graph={graph}")
        found.append(sample(model, tuple(x.shape), cuda_graph=graph, **options))
    if not found[0].isfinite().all():
        raise AssertionError("not finite")
    if not torch.equal(*found):
        raise AssertionError(f"other bits: {(found[0] - found[1]).abs().max().item():.2e}")
    return {}
