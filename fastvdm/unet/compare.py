"""Measure whether a network and the ``UNet3D`` with its weights are the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastvdm.layers.position import rotary_frequencies
from fastvdm.unet.network import FactorizedUNet

# The T5 buckets of two different maximum distances first differ at a distance of ten frames.
FRAMES = 11

# Bound on max |difference| / max |output|. Rounding was at most 4.4e-6 over the peer's releases,
# widths of 8 to 32, one to four levels, fresh and enlarged weights, in fp32, bf16, fp16 and fp64.
TOLERANCE = 1e-4

_LAYERS = (nn.Linear, _ConvNd, nn.Embedding)


def choose_stem_skip(network: nn.Module, model: FactorizedUNet, stem_skip: str | None) -> None:
    """Run both on a small random input and set the ``stem_skip`` with which they agree.

    ``network``, the global random state and torch's settings are unchanged afterwards.

    Args:
        network: the network to compare with.
        model: it has the weights of ``network``, in fp32 or fp64.
        stem_skip: the only value to try; None tries both.

    Raises:
        ValueError: the outputs differ (the message says by how much), or ``network`` cannot be run.
    """
    device = model.stem.weight.device
    if device.type == "meta":
        raise ValueError(
            "a network on meta has no values to compare its UNet3D by; check=False takes it "
            "without the comparison"
        )
    with ExitStack() as stack:
        # Inference tensors can be converted only in inference mode.
        tensors = [*network.parameters(), *network.buffers()]
        inference = any(t.is_inference() for t in tensors)
        stack.enter_context(torch.inference_mode() if inference else torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_full_precision())
        stack.enter_context(_undisturbed(network))
        stack.enter_context(_undisturbed(model))
        inputs = _inputs(model)
        try:
            with _widened(network, model.stem.weight.dtype):
                want = _run(network, inputs)
        except Exception as error:
            raise ValueError(
                f"{type(network).__name__} cannot be run to compare its UNet3D with it "
                f"({type(error).__name__}: {error}); check=False takes it without the comparison"
            ) from error
        if not all(out.isfinite().all() for out in want):
            raise ValueError(
                f"the output of {type(network).__name__} has NaN or infinite values (its weights, "
                "too?), so nothing can be compared; check=False takes it without the comparison"
            )
        pixels = want[0].flatten(2)
        if torch.equal(pixels.amax(-1), pixels.amin(-1)):
            raise ValueError(
                f"the output of {type(network).__name__} is constant (its last layer is zero?), so "
                "nothing can be compared; pass check=False, and stem_skip='before' for releases up "
                "to 0.5.3"
            )
        errors = {}
        for skip in (stem_skip,) if stem_skip else ("after", "before"):
            model.stem_skip = skip
            errors[skip] = _difference(_run(model, inputs), want)
    chosen = min(errors, key=lambda skip: errors[skip])
    if not errors[chosen] <= TOLERANCE:  # also true for NaN
        measured = ", ".join(f"{e:.2g} with stem_skip={skip!r}" for skip, e in errors.items())
        raise ValueError(
            f"{type(network).__name__} has the peer's keys but computes something else than the "
            f"UNet3D of its weights: they differ by {measured} (relative to the largest output; "
            f"rounding stays below {TOLERANCE:g}). Keep the module as it is if its forward was "
            "changed, and drop the overrides if they change the network; check=False takes it all "
            "the same"
        )
    if len(errors) == 2 and max(errors.values()) <= min(TOLERANCE, 8 * errors[chosen]):
        if any(isinstance(m, nn.GroupNorm) for m in network.modules()):
            raise ValueError(
                f"the output of {type(network).__name__} does not tell where its outermost skip "
                "leaves (does its first temporal attention add nothing?): pass stem_skip='after' "
                "(release 0.6) or 'before' (up to 0.5.3)"
            )
        chosen = "after"  # the only variant of the RMSNorm releases
    model.stem_skip = chosen


def _inputs(model: FactorizedUNet) -> dict[str, Tensor]:
    """The smallest input that goes through every layer; height and width differ."""
    device, dtype = model.stem.weight.device, model.stem.weight.dtype
    random = torch.Generator().manual_seed(0)
    size = 2**model.levels
    x = torch.randn(1, model.channels, FRAMES, size, size // 2, generator=random, device="cpu")
    inputs = {"x": x}
    if model.cond_dim is not None:
        inputs["cond"] = torch.randn(1, model.cond_dim, generator=random, device="cpu")
    inputs = {name: t.to(device, dtype) for name, t in inputs.items()}
    # As in training, time is an index. In an fp64 network the peer would embed it in fp32.
    index = torch.int64 if dtype == torch.float32 else dtype
    return inputs | {"time": torch.full((1,), 500, device=device, dtype=index)}


def _run(network: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The calls of training and of sampling; with a condition also the unconditional branch."""
    x, time, cond = inputs["x"], inputs["time"], inputs.get("cond")
    outputs = [network(x, time, cond=cond)]
    guided: Any = getattr(network, "forward_with_cond_scale", None)
    if guided is not None:
        outputs.append(guided(x, time, cond=cond, cond_scale=2.0))
    for out in outputs:
        if not isinstance(out, Tensor):
            raise TypeError(f"its output is a {type(out).__name__}, not a tensor")
        if out.shape[2:] != x.shape[2:]:
            raise ValueError(f"its output is {tuple(out.shape)} for {tuple(x.shape)}")
    return outputs


def _difference(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    errors = []
    for out, want in zip(outputs, wanted):
        if out.shape != want.shape:
            return float("inf")
        out, want = out.cpu().double(), want.cpu().double()  # not every device has fp64
        errors.append((out - want).abs().max() / want.abs().max().clamp_min(1e-30))
    return torch.stack(errors).max().item()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disable TF32 and bf16 inside fp32 products."""
    backends: Any = torch.backends
    settings = [
        backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv,
    ]  # fmt: skip
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, value in zip(settings, before):
            s.fp32_precision = value


@contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """``network`` in eval mode and not compiled. On exit its attributes, buffers and modes are
    restored, even if its forward has counted or cached something."""
    saved = []
    for m in network.modules():
        containers = {k: copy.copy(v) for k, v in vars(m).items() if type(v) in (dict, list, set)}
        saved.append((m, dict(vars(m)), containers))
    buffers = [(b, b.data, b.detach().clone()) for b in network.buffers()]
    try:
        for m, _, _ in saved:
            here = vars(m)
            here["training"] = False
            if here.get("_compiled_call_impl") is not None:
                here["_compiled_call_impl"] = None
            if "cache_if_possible" in here:  # would cache rotary frequencies in another precision
                here["cache_if_possible"] = False
        yield
    finally:
        for m, attributes, containers in saved:
            vars(m).clear()
            vars(m).update(attributes)
            for name, before in containers.items():
                value = attributes[name]
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        for b, data, before in buffers:
            b.data = data
            if not torch.equal(b, before):
                b.copy_(before)


@contextmanager
def _widened(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Convert parameters and buffers of a lower precision to ``dtype``. A layer's weight is
    converted while that layer runs, so there is no third copy of the network; small tensors are
    converted throughout."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def widen(tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            if t.is_floating_point() and t.dtype != dtype and id(t) not in kept:
                kept[id(t)] = t, t.data
                t.data = t.data.to(dtype)

    def restore(tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            if id(t) in kept:
                t.data = kept.pop(id(t))[1]

    layers = [m for m in network.modules() if isinstance(m, _LAYERS)]
    large = {id(p) for m in layers for p in m.parameters(recurse=False)}
    handles = []
    try:
        widen(network.buffers())
        widen(p for p in network.parameters() if id(p) not in large)
        for name, t in [*network.named_parameters(), *network.named_buffers()]:
            if name.endswith("rotary_emb.freqs") and id(t) in kept:  # UNet3D never rounds them
                t.data = rotary_frequencies(2 * len(t), device=t.device).to(dtype)
        for m in layers:
            handles += [
                m.register_forward_pre_hook(lambda m, _: widen(m.parameters(recurse=False))),
                m.register_forward_hook(
                    lambda m, _, __: restore(m.parameters(recurse=False)), always_call=True
                ),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore([t for t, _ in kept.values()])
