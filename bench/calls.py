"""The table of calls: every op at the shapes of the networks, once.

Benchmarks take their shapes from here, the tuner its jobs (``networks``, ``by_name``), and the
ahead-of-time report the calls that no network makes (network_launches.py). What a call launches is
what is compiled. ``classes`` are calls at the limits of a ``pick_config`` or of an op, each with
all the options that it may have. ``edges`` change a kernel by an argument that is absent, 1, or of
another dtype.

A call has the options that its kernel's key does not contain, as the networks use them (bias and
rotary embedding in fp32, the focus mask), so that what fits for it fits for all calls with that
key. This file is imported without Triton; a call's ``build`` needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from harness import Outputs
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.limits import GROUP, LAYER, MAX_ROW_CHANNELS, RMS, SPACE, TIME
from fastvdm.layers.position import rotary_table

EPS = 1e-5
BF16, FP32 = torch.bfloat16, torch.float32

Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Shape:
    """One level of a U-Net. ``x`` is (B, F, H, W, C)."""

    frames: int
    height: int
    width: int
    channels: int
    heads: int = 8
    head_dim: int = 32
    groups: int = 8
    batch: int = 1

    def __str__(self) -> str:
        size = f"{self.frames}x{self.height}x{self.width}"
        return f"{size} c{self.channels} {self.heads}x{self.head_dim}"

    @property
    def x_shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.frames, self.height, self.width, self.channels

    @property
    def qkv_shape(self) -> tuple[int, ...]:
        return *self.x_shape[:-1], 3, self.heads, self.head_dim

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim


# l0 .. l3 are the four levels of the network in the peer's README (dim 64, multipliers 1, 2, 4, 8)
# on 16 x 64 x 64. ucf-* are the attention levels of the paper's base-256 models, t2v128-* those of
# the 9 x 128 x 128 model. tiny is for a busy or slow machine.
SHAPES = {
    "tiny": Shape(8, 16, 16, 32, heads=4),
    "l0": Shape(16, 64, 64, 64),
    "l1": Shape(16, 32, 32, 128),
    "l2": Shape(16, 16, 16, 256),
    "l3": Shape(16, 8, 8, 512),
    "ucf-32": Shape(16, 32, 32, 512, heads=8, head_dim=64, groups=32),
    "ucf-16": Shape(16, 16, 16, 1024, heads=16, head_dim=64, groups=32),
    "ucf-8": Shape(16, 8, 8, 2048, heads=32, head_dim=64, groups=32),
    "t2v128-32": Shape(9, 32, 32, 512, heads=4, head_dim=128, groups=32),
    "joint-24": Shape(24, 32, 32, 256, heads=4, head_dim=64, groups=32),  # 16 frames + 8 images
}
PEER, PAPER = ("l0", "l1", "l2", "l3"), ("ucf-32", "ucf-16", "ucf-8", "t2v128-32")


GPU_BATCH = 8


def shape(case: str, device: str = "cpu") -> Shape:
    """The shape with that name: one video on a CPU, GPU_BATCH videos on a GPU and on "meta"."""
    return replace(SHAPES[case], batch=1 if device == "cpu" else GPU_BATCH)


def bench_cases(*names: str, full: tuple[str, ...] = ()) -> list:
    """Parameters of a benchmark: always ``names``, and ``full`` only with ``--full``."""
    for name in (*names, *full):
        if name not in SHAPES:
            raise KeyError(f"{name!r} is not in bench/calls.py: {', '.join(SHAPES)}")
    return [*names, *(pytest.param(n, marks=pytest.mark.full) for n in full)]


@dataclass(frozen=True)
class Call:
    """One launcher at one shape. ``build(device)`` makes the inputs and returns the call.
    ``capture`` is the device for calls of which only the launches are wanted."""

    name: str
    build: Callable[[str], Run]
    dtype: torch.dtype
    capture: str = "meta"


# The calls of each op. ``device`` may be "meta".


def kernels(op: str) -> Any:
    """The launchers of an op."""
    return importlib.import_module(f"fastvdm.kernels.{op}")


def _maker(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    def make(*size: int, gain: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return gain * torch.randn(size, device=device, dtype=kind)

    return make


def norm(
    s: Shape, device: str, dtype: torch.dtype, *, kind: int, backward: bool = False, c2: int = 0,
    before: bool = False, film: bool = True, dropout: bool = False,
    need: tuple[bool, ...] = (True, True, True),
) -> Run:  # fmt: skip
    """Norm, FiLM, SiLU, dropout, residual; the backward of x, parameters and FiLM (``need``).
    ``c2``: channels of a second source; ``before``: the bias of the preceding convolution."""
    make, c, launch = _maker(device, dtype), s.channels + c2, kernels("norm_act")
    x, x2 = make(*s.x_shape), make(*s.x_shape[:-1], c2) if c2 else None
    vectors = (make(c), make(c), make(s.batch, c), make(s.batch, c))
    params = (x, x2, make(c) if before else None, *(vectors if film else (vectors[0], *[None] * 3)))
    options, residual = (kind, s.groups, False, EPS, True), None if c2 else x
    drop = torch.ones(x.shape, dtype=torch.bool, device=device) if dropout else None

    def forward() -> tuple[Tensor, ...]:
        return launch.norm_act_fwd(*params, residual, drop, None, None, *options)

    if not backward:
        return forward
    stats = forward()[1:] if kind == GROUP else (None, None)
    dy, needs = make(*s.x_shape[:-1], c), (need[0], before, *need[1:])
    return lambda: launch.norm_act_bwd(dy, *params, drop, *stats, *options, *needs)


# Options of attention over time in the networks: the peer's, and the paper's Shaw tables.
PEERS, SHAW = ("bias", "rotary", "focus_mask"), ("rel_k", "rel_v")
EVERY = ("bias", "rel_k", "rel_v", "rotary", "focus_mask")


def _options(
    s: Shape, n: int, device: str, dtype: torch.dtype, given: tuple[str, ...], images: int = 0
) -> AttentionOptions:
    """Options for n positions. The focus mask is given but all False."""
    table = torch.randn(1, 2 * n - 1, s.head_dim, device=device, dtype=dtype)
    made = {
        "bias": torch.randn(s.heads, n, n, device=device),
        "rel_k": table,
        "rel_v": table.clone(),
        "rotary": rotary_table(n, min(32, s.head_dim), torch.device(device)),
        "focus_mask": torch.zeros(s.batch, dtype=torch.bool, device=device),
    }
    return AttentionOptions(**{name: made[name] for name in given}, num_images=images)


def temporal(
    s: Shape, device: str, dtype: torch.dtype, *, backward: bool = False, biases: bool = False,
    given: tuple[str, ...] = PEERS, stream: torch.dtype | None = None, frozen: bool = False,
) -> Run:  # fmt: skip
    """The block over time; the backward of everything. ``stream``: the dtype of x, with projections
    in ``dtype``, as under autocast."""
    make, inner, c, wide = _maker(device, dtype), s.inner, s.channels, stream or dtype
    x, dy = make(*s.x_shape, kind=wide), make(*s.x_shape, kind=wide)
    norms = make(c, kind=wide), make(c, kind=wide)
    qkv = make(3 * inner, c, gain=c**-0.5), make(3 * inner)
    out = make(c, inner, gain=inner**-0.5), make(c)
    weights = [
        t if biases or i == 0 else None for pair in (norms, qkv, out) for i, t in enumerate(pair)
    ]
    options = _options(s, s.frames, device, dtype, given)
    args, launch = (*weights, s.heads, EPS, options), kernels("temporal_block")
    if not backward:
        return lambda: launch.temporal_block_fwd(x, *args)
    needs = [
        not frozen and name in ("all", *given) for name in ("all", "all", "all", "bias", "rel_k")
    ]
    return lambda: launch.temporal_block_bwd(dy, x, *args, *needs)


def linear_block(
    s: Shape, device: str, dtype: torch.dtype, *, backward: bool = False, biases: bool = True,
    stream: torch.dtype | None = None, frozen: bool = False,
) -> Run:  # fmt: skip
    """The block with linear attention; arguments as in ``temporal``."""
    make, inner, c, wide = _maker(device, dtype), s.inner, s.channels, stream or dtype
    x, dy = make(*s.x_shape, kind=wide), make(*s.x_shape, kind=wide)
    norms = make(c, kind=wide), make(c, kind=wide) if biases else None
    qkv, out = make(3 * inner, c, gain=c**-0.5), make(c, inner, gain=inner**-0.5)
    args = (*norms, qkv, out, make(c) if biases else None)
    launch, rest = kernels("linear_attention_block"), (s.heads, EPS)
    if not backward:
        return lambda: launch.linear_attention_block_fwd(x, *args, *rest)
    saved = launch.linear_attention_block_fwd(x, *args, *rest)[1:]
    needs = [not frozen] * 3
    return lambda: launch.linear_attention_block_bwd(dy, x, *args, *saved, *rest, *needs)


def second_half(
    s: Shape, device: str, dtype: torch.dtype, *, biases: bool = False,
    stream: torch.dtype | None = None,
) -> Run:  # fmt: skip
    """Projection and residual of the peer's blocks that no single kernel can hold."""
    make, c, launch = _maker(device, dtype), s.channels, kernels("linear_residual")
    x, o = make(*s.x_shape, kind=stream or dtype), make(*s.x_shape[:-1], s.inner)
    weight, bias = make(c, s.inner, gain=s.inner**-0.5), make(c) if biases else None
    return lambda: launch.linear_residual_fwd(x, o, weight, bias)


def linear(s: Shape, device: str, dtype: torch.dtype, *, backward: bool = False) -> Run:
    make, scale, launch = _maker(device, dtype), s.head_dim**-0.5, kernels("linear_attention")
    qkv = make(*s.qkv_shape)
    if not backward:
        return lambda: launch.linear_attention_fwd(qkv, scale)
    out, *saved = launch.linear_attention_fwd(qkv, scale)
    dout = torch.randn_like(out)
    return lambda: launch.linear_attention_bwd(dout, qkv, *saved, scale)


def attention(
    s: Shape, device: str, dtype: torch.dtype, *, axis: int, backward: bool = False,
    given: tuple[str, ...] = (), images: int = 0, need: tuple[bool, ...] = (True,) * 4,
) -> Run:  # fmt: skip
    """``need``: whether to compute the gradients of qkv, bias, rel_k and rel_v, if given."""
    qkv, launch = _maker(device, dtype)(*s.qkv_shape), kernels("axis_attention")
    n = s.frames if axis == TIME else s.height * s.width
    options = _options(s, n, device, dtype, given, images)
    rest = (axis, options, s.head_dim**-0.5)
    if not backward:
        return lambda: launch.axis_attention_fwd(qkv, *rest)
    saved = launch.axis_attention_fwd(qkv, *rest)
    dout = torch.randn_like(saved[0])
    wanted = [n and t is not None for n, t in zip(need, (qkv, *options[:3]))]
    return lambda: launch.axis_attention_bwd(dout, qkv, *saved, *rest, *wanted)


def guided(
    s: Shape, device: str, dtype: torch.dtype, *, what: str, net: torch.dtype | None = None,
    more: bool = False, colours: int = 3,
) -> Run:  # fmt: skip
    """One of the two ends of a guided step with 5 known frames. ``net``: dtype of the network, with
    a threshold. ``more``: for the seed also a low-resolution video; for the update no guidance and
    noise from the counter."""
    size, launch = (s.batch, colours, s.frames, s.height, s.width), kernels("guidance")
    z, out, grad, noise = torch.randn(4, *size, device=device, dtype=dtype).unbind()
    known = torch.randn(*size[:2], 5, *size[3:], device=device, dtype=dtype)
    slot = torch.tensor([*range(5), *[-1] * (s.frames - 5)], dtype=torch.int32, device=device)
    coef, model = torch.rand(s.batch, 9, device=device, dtype=dtype), out.to(net or dtype)
    if what == "seed":
        coef, low = coef[:, :4].contiguous(), (None, None)
        if more:
            low = (known[..., ::2, ::2].contiguous(), slot)
        return lambda: launch.guidance_seed_fwd(z, model, coef, known, slot, *low, None, more)
    args: tuple = (z, out, coef, grad, None, known, slot, noise, None, None)
    if more:
        rng = torch.zeros(s.batch, 2, dtype=torch.int64, device=device)
        args = (z, model, coef, None, None, None, None, None, rng, None)
    elif net is not None:
        args = (*args[:4], model, *args[5:9], coef[:, 0].contiguous())
    return lambda: launch.guidance_update_fwd(*args, 0, True, False)


def conv(
    s: Shape, device: str, dtype: torch.dtype, *, backward: bool = False, kernel: int = 3,
    stride: int = 1, cout: int = 0, c2: int = 0, bare: bool = False,
) -> Run:  # fmt: skip
    """A convolution with bias, residual and statistics of its output unless ``bare``; the backward
    of x only."""
    make, cout, launch = _maker(device, dtype), cout or s.channels, kernels("space_conv")
    x, x2 = make(*s.x_shape), make(*s.x_shape[:-1], c2) if c2 else None
    y = make(s.batch, s.frames, s.height // stride, s.width // stride, cout)
    weight, bias = _filters(make, cout, s.channels + c2, kernel), make(cout)
    if backward:
        return lambda: launch.space_conv_bwd(y, x, x2, weight, stride, True, bool(c2), False, False)
    if bare:
        return lambda: launch.space_conv_fwd(x, x2, weight, None, None, stride)
    rest = (stride, s.groups, False, EPS)
    return lambda: launch.space_conv_stats_fwd(x, x2, weight, bias, y, *rest)


def _filters(make: Callable[..., Tensor], cout: int, cin: int, kernel: int) -> Tensor:
    weight = make(cout, cin, kernel, kernel, gain=(kernel**2 * cin) ** -0.5)
    return weight.contiguous(memory_format=torch.channels_last)


def conv_transpose(s: Shape, device: str, dtype: torch.dtype, *, backward: bool = False) -> Run:
    """4x4 with stride 2 and equal numbers of channels."""
    make, c, launch = _maker(device, dtype), s.channels, kernels("space_conv")
    x, y = make(*s.x_shape), make(s.batch, s.frames, 2 * s.height, 2 * s.width, c)
    weight, bias = _filters(make, c, c, 4), make(c)
    if backward:
        return lambda: launch.space_conv_transpose_bwd(y, x, weight, True, False, False)
    return lambda: launch.space_conv_transpose_fwd(x, weight, bias, y)


# The table.


def _call(
    make: Callable[..., Run], case: str | Shape, dtype: torch.dtype = BF16, **options: Any
) -> Call:
    """``make`` at a named shape or at its own; the name contains all arguments."""

    def build(device: str) -> Run:
        return make(
            shape(case, device) if isinstance(case, str) else case, device, dtype, **options
        )

    words = [make.__name__, str(case), *([] if dtype == BF16 else [_word(dtype)])]
    words += [k if v is True else f"{k}={_word(v)}" for k, v in options.items() if v is not False]
    return Call(" ".join(words), build, dtype)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_word, value)) or "none"
    return str(int(value) if isinstance(value, bool) else value).removeprefix("torch.")


def _both(*args: Any, **options: Any) -> list[Call]:
    return [_call(*args, **options), _call(*args, **options, backward=True)]


def networks() -> list[Call]:
    """The calls of the networks, the most frequent first, in case the tuner runs out of time. The
    forward serves sampling and training."""
    found = []
    for backward in (False, True):
        way: dict[str, Any] = {"backward": backward}
        found += [_call(temporal, c, **way) for c in (PEER[:1] if backward else PEER[:3])]
        found += [_call(linear_block, c, **way) for c in PEER[:2]]
        found += [_call(linear, c, **way) for c in PEER]
        found.append(_call(linear, replace(SHAPES["l0"], batch=1), **way))  # split frames
        found += [_call(norm, c, kind=GROUP, **way) for c in PEER + PAPER]
        found += [_call(norm, c, kind=RMS, **way) for c in PEER]
        for case, given in (("l3", PEERS), ("ucf-16", SHAW), ("t2v128-32", SHAW)):
            found.append(_call(attention, case, axis=TIME, given=given, **way))
        found += [_call(attention, c, axis=SPACE, **way) for c in ("l3", *PAPER)]
    found.append(_call(second_half, "l3"))
    ends = [{"what": what} for what in ("seed", "update")]
    found += [_call(guided, "l0", FP32, **end) for end in ends]
    forms = [{"net": n, "more": m} for n in (BF16, FP32) for m in (False, True)]
    return found + [_call(guided, "l0", FP32, **form, **end) for form in forms for end in ends]


def by_name() -> list[Call]:
    """The convolution, which networks on a GPU use only if the backend is forced by name."""
    return [_call(conv, c) for c in PEER + PAPER[:3]]


def classes() -> list[Call]:
    """The classes that a ``pick_config`` or an op distinguishes, each at its largest width, head
    and length, and rare calls of the networks."""
    found = []
    for stream in (BF16, FP32):
        more: dict[str, Any] = dict(stream=stream, biases=True)
        # channels, head dim, frames; other sizes run in parts, see ops/temporal_block.py
        for c, d, f in (
            (64, 32, 16), (64, 64, 16), (64, 32, 32), (128, 32, 16), (128, 64, 16), (256, 32, 16),
        ):  # fmt: skip
            s = Shape(f, 32, 32, c, head_dim=d)
            if c <= 128 or stream == BF16:
                found.append(_call(temporal, s, **more))
            if c < 128 or (c == 128 and (stream == BF16 or d < 64)):
                found.append(_call(temporal, s, given=(*SHAW, "focus_mask"), **more))
        s = Shape(16, 64, 64, 64)
        found += [_call(temporal, s, backward=True, frozen=f, **more) for f in (False, True)]
        for height in (4, 32):  # few rows and many
            found.append(_call(second_half, Shape(16, height, 16, 512), **more))
    found.append(_call(second_half, Shape(16, 32, 32, 512), FP32, biases=True))
    for stream in (BF16, FP32):
        for c, d in ((64, 32), (64, 64), (128, 32), (128, 64)):
            s = Shape(16, 32, 32, c, head_dim=d)
            found += _both(linear_block, s, stream=stream)
            found.append(_call(linear_block, s, stream=stream, backward=True, frozen=True))
    for d, dtype in ((64, BF16), (128, BF16), (64, FP32)):
        found += _both(linear, Shape(16, 16, 16, 64, head_dim=d, batch=8), dtype)
    for n, d, given, dtype in (
        (16, 32, PEERS, BF16), (16, 64, PEERS, BF16), (16, 64, EVERY, BF16), (16, 128, PEERS, BF16),
        (32, 32, PEERS, BF16), (32, 64, SHAW, BF16), (16, 32, PEERS, FP32),
        (16, 128, PEERS, FP32), (32, 64, PEERS, FP32), (32, 128, ("focus_mask",), FP32),
    ):  # fmt: skip
        found += _both(attention, Shape(n, 32, 32, 64, head_dim=d), dtype, axis=TIME, given=given)
    for d, given, dtype in (
        (64, ("bias", "rotary"), BF16), (128, ("bias", "rotary"), BF16), (64, SHAW, BF16),
        (64, ("bias",), FP32), (64, PEERS, FP32), (128, PEERS, FP32), (128, (), FP32),
        (128, ("bias",), FP32), (64, ("rotary",), FP32),
    ):  # fmt: skip
        found += _both(attention, Shape(16, 32, 32, 64, head_dim=d), dtype, axis=SPACE, given=given)
    for kind in (GROUP, RMS, LAYER):
        found += _both(norm, Shape(4, 16, 16, 64), kind=kind, before=True, dropout=True)
        found += _both(norm, Shape(4, 16, 16, 96), kind=kind, c2=48)
        found += _both(norm, Shape(4, 16, 16, 128), FP32, kind=kind, dropout=True)
        found += _both(norm, Shape(4, 16, 16, MAX_ROW_CHANNELS), kind=kind, dropout=True)
    for c in (64, 128):
        s = Shape(16, 64, 64, c)
        for form in (dict(c2=c), dict(kernel=1, c2=c, bare=True), dict(kernel=4, stride=2)):
            found += _both(conv, s, **form)
        found += _both(conv_transpose, s)
    for c, dtype in ((64, FP32), (100, BF16)):  # the pointer variant on every GPU
        found.append(_call(conv, Shape(4, 64, 64, c, groups=4), dtype))
    return found


def edges() -> list[Call]:
    """Extents of 1, which reach a kernel as constants; absent arguments; a single gradient."""
    one, few, many = Shape(1, 1, 1, 1, 1, 16, 1), Shape(16, 2, 2, 64), Shape(40, 2, 2, 64)
    bias, table, alone = (0, 1, 0, 0), (0, 0, 1, 0), [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found, more = [], dict(axis=TIME, backward=True)
    for frames in (1, 34):  # the second has 33 images
        s = replace(one, frames=frames)
        found.append(_call(attention, s, given=EVERY, images=frames - 1, **more))
    found += [_call(attention, s, given=PEERS, need=bias, **more) for s in (few, many)]
    found.append(_call(attention, many, given=("bias", *SHAW, "focus_mask"), need=table, **more))
    found += _both(temporal, replace(one, channels=32, head_dim=32), given=PEERS[:2])
    found += _both(temporal, few, stream=FP32, frozen=True, given=PEERS[:2])
    found += _both(linear, one)
    found += _both(linear_block, replace(one, head_dim=1))
    found += _both(linear_block, Shape(2, 5, 7, 24, heads=3, head_dim=20))
    found.append(_call(second_half, replace(one, head_dim=1), biases=True))
    found.append(_call(second_half, Shape(2, 3, 5, 33, heads=17, head_dim=1)))
    for kind, needs in ((GROUP, alone), (RMS, alone[:2]), (LAYER, alone[2:])):
        way: dict[str, Any] = dict(kind=kind, backward=True, film=kind != RMS)
        found += [_call(norm, one, need=need, **way) for need in needs]
        found.append(_call(norm, one, need=needs[0], c2=1, **way))
        for s in (one, Shape(2, 4, 4, 32)):
            found.append(_call(norm, s, need=(0, 0, 0), before=True, **way))
    found += _both(conv, one, kernel=1, bare=True)
    found += _both(conv, Shape(1, 2, 2, 1, groups=1), c2=3, cout=2)
    found += _both(conv, Shape(2, 8, 8, 8), c2=16)
    found.append(_call(guided, "tiny", FP32, what="update", more=True, colours=1))  # grey
    return [replace(call, capture="cpu") for call in found]  # "meta" has no autocast
