"""Shapes, types and options that nobody thought of: the C++ ops against the reference, or, with
FASTVDM_EMULATE=90, the Triton kernels as they compile for that architecture (tests/ptxemu).

The tests run a few fixed examples of each property. ``make fuzz MINUTES=10`` draws new ones until
the time is over, over every instruction set in turn; a failure is printed as its smallest example.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvdm import use_backend
from fastvdm.ops.attention_block import AttentionOptions, attention_block
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.guidance import guidance_seed, guidance_update
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.space_conv import space_conv
from fastvdm.testing import assert_close3, cpu_isas, grads, use_cpu_isa

ARCH = int(os.environ.get("FASTVDM_EMULATE", "0"))
BACKEND = "triton" if ARCH else "cpu"
pytestmark = pytest.mark.skipif(not (ARCH or cpu_isas()), reason="no C++ extension")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31 - 1)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def extents(draw: Draw, *most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(1, m)) for m in most)


# Relative to the largest value. Larger than the harness's own: over many degenerate shapes (one
# channel, equal logits) the baseline is often exact, which leaves its factor nothing to multiply.
FLOOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(fn: Callable[..., Tensor], inputs: list[Tensor | None], strict: bool = True) -> None:
    """Forward and every gradient, in three ways."""
    with use_backend("reference"):
        shape = fn(*inputs).shape
        dout = torch.randn(shape, dtype=torch.float64)
        wide = [None if t is None else t.double() for t in inputs]
        (exact,), exact_grads = grads(fn, wide, dout)
        (base,), base_grads = grads(fn, inputs, dout)
    with use_backend(BACKEND if strict or ARCH else "auto", strict=True):
        (out,), found_grads = grads(fn, inputs, dout)
    assert_close3(out, base, exact, floor=FLOOR[out.dtype])
    most = max((e.abs().max().item() for e in exact_grads if e is not None), default=0.0)
    for i, (g, b, e) in enumerate(zip(found_grads, base_grads, exact_grads)):
        if g is None:
            continue
        # A gradient whose terms cancel (of a Shaw table with one row it is zero) has the rounding
        # of the terms, which are as large as the other gradients.
        floor = FLOOR[out.dtype] * max(1.0, 0.1 * most / max(e.abs().max().item(), 1e-30))
        assert_close3(g, b, e, factor=3, floor=floor, name=f"gradient {i}")


@given(st.data(), DTYPES, SEEDS)
def norms(data, dtype, seed):
    draw = data.draw
    torch.manual_seed(seed)
    kind = draw(st.sampled_from(["group", "rms", "layer"]))
    groups = draw(st.integers(1, 5)) if kind == "group" else 1
    per_frame = draw(st.booleans()) if kind == "group" else False
    shape = extents(draw, 2, 4, 9, 9)
    c = groups * draw(st.integers(1, 20))
    c2 = draw(st.sampled_from([0, groups, 3 * groups]))
    # torch refuses a group of one value
    assume(kind != "group" or c // groups * shape[2] * shape[3] > 1)
    film, residual = draw(st.booleans()), draw(st.booleans())

    def maybe(wanted: bool, *size: int) -> Tensor | None:
        return torch.randn(*size) if wanted else None

    total = c + c2
    inputs = [
        (torch.randn(*shape, c) + 0.5).to(dtype),
        torch.randn(*shape, c2).to(dtype) if c2 else None,
        torch.randn(total),
        maybe(draw(st.booleans()), total),
        maybe(film, shape[0], total),
        maybe(film, shape[0], total),
        torch.randn(*shape, total).to(dtype) if residual else None,
    ]

    def fn(x, x2, weight, bias, scale, shift, residual):
        return norm_act(
            x, weight, bias, kind=kind, groups=groups, per_frame=per_frame, scale=scale,
            shift=shift, residual=residual, x2=x2, eps=1e-3,
        )  # fmt: skip

    check(fn, inputs)


def attention_options(
    draw: Draw, n: int, heads: int, d: int, dtype: torch.dtype, batch: int, masks: bool = True
):
    """Tensors (bias, rel_k, rel_v) and the rest, for a sequence of n."""
    tables = draw(st.sampled_from([1, heads]))
    reach = [draw(st.none() | st.integers(0, 6)) for _ in range(2)]
    tensors = [torch.randn(heads, n, n) if draw(st.booleans()) else None]
    for r in reach:
        tensors.append(None if r is None else torch.randn(tables, 2 * r + 1, d).to(dtype))
    half = draw(st.integers(0, d // 2))
    angle = torch.rand(n, half) * 6
    rest = dict(
        rotary=torch.stack((angle.cos(), angle.sin())) if half else None,
        focus_mask=torch.rand(batch) > 0.5 if masks and draw(st.booleans()) else None,
        num_images=draw(st.integers(0, n)) if masks else 0,
    )
    return tensors, rest


@given(st.data(), DTYPES, SEEDS)
def attention(data, dtype, seed):
    draw = data.draw
    torch.manual_seed(seed)
    axis = draw(st.sampled_from(["time", "space"]))
    shape = extents(draw, 3, 40, 4, 4) if axis == "time" else extents(draw, 2, 3, 8, 8)
    heads, d = extents(draw, 4, 40)
    n = shape[1] if axis == "time" else shape[2] * shape[3]
    tensors, rest = attention_options(draw, n, heads, d, dtype, shape[0], axis == "time")
    qkv = torch.randn(*shape, 3, heads, d).to(dtype)

    def fn(qkv, bias, rel_k, rel_v):
        return axis_attention(qkv, axis=axis, bias=bias, rel_k=rel_k, rel_v=rel_v, **rest)

    check(fn, [qkv, *tensors])


@given(st.data(), DTYPES, SEEDS)
def blocks(data, dtype, seed):
    draw = data.draw
    torch.manual_seed(seed)
    shape = extents(draw, 3, 26, 4, 4)
    c, heads, d = extents(draw, 70, 4, 40)
    tensors, rest = attention_options(draw, shape[1], heads, d, dtype, shape[0])
    inner = heads * d
    inputs = [
        torch.randn(*shape, c).to(dtype),
        torch.randn(c),
        (torch.randn(3 * inner, c) / c**0.5).to(dtype),
        (torch.randn(c, inner) / inner**0.5).to(dtype),
        *tensors,
    ]

    def fn(x, norm, qkv, out, bias, rel_k, rel_v):
        options = AttentionOptions(bias, rel_k, rel_v, **rest)
        return attention_block(
            x, norm, qkv, out, core="time", heads=heads, eps=1e-3, options=options
        )

    check(fn, inputs)


@given(st.data(), DTYPES, SEEDS)
def linear_attentions(data, dtype, seed):
    torch.manual_seed(seed)
    shape, (c, heads, d) = extents(data.draw, 2, 4, 14, 14), extents(data.draw, 40, 4, 62)
    d += 8  # an average of one feature over many pixels is all cancellation
    inner = heads * d
    inputs = [
        torch.randn(*shape, c),
        1 + 0.1 * torch.randn(c),
        torch.randn(3 * inner, c) / c**0.5,
        torch.randn(c, inner) / inner**0.5,
        torch.randn(c),
        torch.randn(c),
    ]

    def fn(x, norm_weight, qkv, out, norm_bias, bias):
        return attention_block(
            x, norm_weight, qkv, out, core="linear", heads=heads, norm_bias=norm_bias, out_bias=bias
        )

    check(fn, [t.to(dtype) for t in inputs])


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]), SEEDS)
def convolutions(data, dtype, seed):
    draw = data.draw
    torch.manual_seed(seed)
    shape, (c, out) = extents(draw, 2, 3, 18, 18), extents(draw, 40, 40)
    c2 = draw(st.integers(0, 20))
    x2 = torch.randn(*shape, c2).to(dtype) if c2 else None
    bias = torch.randn(out).to(dtype) if draw(st.booleans()) else None
    residual = torch.randn(*shape, out).to(dtype) if draw(st.booleans()) else None
    weight = (torch.randn(out, c + c2, 3, 3) / (9 * (c + c2)) ** 0.5).to(dtype)

    def fn(x, weight, bias, x2, residual):
        return space_conv(x, weight, bias, x2=x2, residual=residual)

    inputs = [torch.randn(*shape, c).to(dtype), weight, bias, x2, residual]
    check(fn, inputs, strict=False)  # dispatch chooses ours or the library's by shape


@given(st.data(), DTYPES, SEEDS)
def guidance(data, network, seed):
    draw = data.draw
    torch.manual_seed(seed)
    b, c, f, factor = extents(draw, 3, 4, 5, 4)
    h, w = (factor * e for e in extents(draw, 5, 12))
    z = torch.randn(b, c, f, h, w)

    def like(dtype: torch.dtype) -> Tensor:
        order = draw(st.permutations(range(5)))
        t = torch.randn([z.shape[i] for i in order]).to(dtype)
        return t.permute([order.index(i) for i in range(5)])

    def frames(*size: int) -> dict[str, Tensor]:
        count = draw(st.integers(1, f))
        slot = torch.full((f,), -1, dtype=torch.int32)
        slot[torch.randperm(f)[:count]] = torch.arange(count, dtype=torch.int32)
        return dict(values=torch.randn(b, c, count, *size), slot=slot)

    known = frames(h, w) if draw(st.booleans()) else None
    low = frames(h // factor, w // factor) if draw(st.booleans()) else None
    given_frames = dict(known=known["values"], slot=known["slot"]) if known else {}
    seed_options = dict(given_frames, clip=draw(st.booleans()))
    if low:
        seed_options |= dict(low_res=low["values"], low_slot=low["slot"])
    if draw(st.booleans()):
        seed_options["extra"] = torch.randn_like(z)
    compare(guidance_seed, (z, like(network), torch.randn(b, 4)), seed_options)

    options: dict[str, Any] = dict(given_frames, clip=draw(st.booleans()))
    if draw(st.booleans()):
        options["grad"] = like(draw(DTYPES))
        if draw(st.booleans()):
            options["seed"] = like(network)
    noise = draw(st.sampled_from(["none", "noise", "rng"]))
    if noise == "noise":
        options["noise"] = torch.randn_like(z)
    elif noise == "rng":
        rng = torch.tensor([draw(st.integers(0, 2**63 - 1)) for _ in range(b)])
        options |= dict(rng=rng, step=draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        options["threshold"] = torch.rand(b) + 0.5
    compare(guidance_update, (z, like(network), torch.randn(b, 9)), options)


def compare(op: Callable[..., tuple[Tensor, Tensor]], args: tuple, options: dict[str, Any]) -> None:
    def wide(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    with use_backend(BACKEND, strict=True):
        found = op(*args, **options)
    with use_backend("reference"):
        base = op(*args, **options)
        exact = op(*map(wide, args), **{k: wide(v) for k, v in options.items()})
    for f, b, e in zip(found, base, exact):
        assert_close3(f, b, e, floor=FLOOR[f.dtype])


PROPERTIES = (norms, attention, blocks, linear_attentions, convolutions, guidance)
QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


# An example of new extents is a compilation.
EXAMPLES = 3 if ARCH else 15
LATE = [pytest.mark.slow] * (ARCH > 0)


@pytest.mark.parametrize(
    "law", [pytest.param(p, id=f"{p.__name__}-{BACKEND}", marks=LATE) for p in PROPERTIES]
)
def test_property(law):
    settings(max_examples=EXAMPLES, derandomize=True, **QUIET)(law)()


@contextmanager
def emulated() -> Iterator[None]:
    """What the emulator finds is a failure of the example."""
    from ptxemu import emulate

    with emulate(ARCH) as emulator:
        yield
    assert not emulator.bad(), "\n".join(map(str, emulator.bad()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    laws = [settings(max_examples=EXAMPLES + 10, **QUIET)(law) for law in PROPERTIES]
    until = time.monotonic() + 60 * parser.parse_args().minutes
    count = 0
    while time.monotonic() < until:
        for lane in [None] if ARCH else cpu_isas():
            for law in laws:
                with emulated() if ARCH else use_cpu_isa(lane):
                    law()
                count += EXAMPLES + 10
        print(f"{count} examples, {max(0.0, until - time.monotonic()) / 60:.1f} minutes left")


if __name__ == "__main__":
    main()
