"""What ``bench/tune.py`` runs and what it tries: jobs at the shapes of bench/cases.py, and the
neighbours of a configuration.

A job carries the options that its kernel's key does not name, as the networks use them (bias and
rotary embedding in fp32, the focus mask): what fits for it fits for the other calls of that key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Shape, shape
from harness import Outputs
from torch import Tensor

from fastvdm.kernels import (
    axis_attention,
    guidance,
    linear_attention,
    linear_residual,
    norm_act,
    norm_linear,
    space_conv,
    temporal_block,
)
from fastvdm.kernels.common import next_power_of_2
from fastvdm.kernels.limits import GROUP, RMS, SPACE, TIME
from fastvdm.kernels.tuned import Choice
from fastvdm.layers.position import rotary_table

EPS = 1e-5
PEER, PAPER = ("l0", "l1", "l2", "l3"), ("ucf-32", "ucf-16", "ucf-8", "t2v128-32")

Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Job:
    """One launcher at one shape. ``build(device)`` makes the inputs and returns the call."""

    name: str
    build: Callable[[str], Run]
    dtype: torch.dtype


def jobs() -> list[Job]:
    """All of them, the most used first: in that order the time runs out. Forward serves sampling
    and training; on a GPU the convolution is taken only by name."""
    found = []
    for backward in (False, True):
        way = {"backward": backward}
        found += [_job(temporal, c, **way) for c in (PEER[:1] if backward else PEER[:3])]
        found += [_job(linear, c, **way) for c in PEER]
        found += [_job(norm, c, kind=GROUP, **way) for c in PEER + PAPER]
        found += [_job(norm, c, kind=RMS, **way) for c in PEER]
        found += [_job(over_time, c, shaw=c != "l3", **way) for c in ("l3", "ucf-16", "t2v128-32")]
        found += [_job(over_space, c, **way) for c in ("l3", *PAPER)]
    found += [_job(half, "l3", first=first) for first in (True, False)]
    found += [_job(guided, "l0", torch.float32, what=what) for what in ("seed", "update")]
    return found + [_job(conv, c) for c in PEER + PAPER[:3]]


def _job(
    make: Callable[..., Run], case: str, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Job:
    named = [f"{k}={v}" for k, v in options.items()]
    name = " ".join([make.__name__, case, *named])
    return Job(name, lambda device: make(shape(case, device), device, dtype, **options), dtype)


def norm(s: Shape, device: str, dtype: torch.dtype, *, kind: int, backward: bool) -> Run:
    """Norm, FiLM, SiLU, residual; backward of x, the parameters and the FiLM vectors."""
    x, dy = (torch.randn(s.x_shape, device=device, dtype=dtype) for _ in range(2))
    vectors = torch.randn(2, s.channels, device=device, dtype=dtype).unbind()
    film = torch.randn(2, s.batch, s.channels, device=device, dtype=dtype).unbind()
    options = (kind, s.groups, False, EPS, True)

    def forward() -> tuple[Tensor, ...]:
        return norm_act.norm_act_fwd(x, None, None, *vectors, *film, x, None, None, None, *options)

    if not backward:
        return forward
    stats = forward()[1:] if kind == GROUP else (None, None)
    return lambda: norm_act.norm_act_bwd(
        dy, x, None, None, *vectors, *film, None, *stats, *options, True, False, True, True
    )


def temporal(s: Shape, device: str, dtype: torch.dtype, *, backward: bool) -> Run:
    """The peer's block over time; backward of everything."""

    def make(*size: int, gain: float = 1.0) -> Tensor:
        return gain * torch.randn(size, device=device, dtype=dtype)

    inner, c = s.heads * s.head_dim, s.channels
    x, dy = make(*s.x_shape), make(*s.x_shape)
    weights = make(c), None, make(3 * inner, c, gain=c**-0.5), None
    weights += make(c, inner, gain=inner**-0.5), None
    args = (*weights, s.heads, EPS, *_peer_options(s, device), 0, s.head_dim**-0.5)
    if not backward:
        return lambda: temporal_block.temporal_block_fwd(x, *args)
    return lambda: temporal_block.temporal_block_bwd(dy, x, *args, True, True, True, True, False)


def half(s: Shape, device: str, dtype: torch.dtype, *, first: bool) -> Run:
    """One half of the peer's blocks where they are too wide for one kernel."""
    inner, c = s.heads * s.head_dim, s.channels
    x = torch.randn(s.x_shape, device=device, dtype=dtype)
    if first:
        gain = torch.randn(c, device=device, dtype=dtype)
        weight = torch.randn(3 * inner, c, device=device, dtype=dtype) * c**-0.5
        return lambda: norm_linear.norm_linear_fwd(x, gain, None, weight, None, EPS)
    o = torch.randn(*s.x_shape[:-1], inner, device=device, dtype=dtype)
    weight = torch.randn(c, inner, device=device, dtype=dtype) * inner**-0.5
    return lambda: linear_residual.linear_residual_fwd(x, o, weight, None)


def _peer_options(s: Shape, device: str) -> tuple[Tensor | None, ...]:
    """bias, rel_k, rel_v, rotary, focus mask (read, nowhere set)."""
    bias = torch.randn(s.heads, s.frames, s.frames, device=device)
    rotary = rotary_table(s.frames, min(32, s.head_dim), torch.device(device))
    return bias, None, None, rotary, torch.zeros(s.batch, dtype=torch.bool, device=device)


def linear(s: Shape, device: str, dtype: torch.dtype, *, backward: bool) -> Run:
    qkv = torch.randn(s.qkv_shape, device=device, dtype=dtype)
    scale = s.head_dim**-0.5
    if not backward:
        return lambda: linear_attention.linear_attention_fwd(qkv, scale)
    out, *saved = linear_attention.linear_attention_fwd(qkv, scale)
    dout = torch.randn_like(out)
    return lambda: linear_attention.linear_attention_bwd(dout, qkv, *saved, scale)


def over_time(s: Shape, device: str, dtype: torch.dtype, *, shaw: bool, backward: bool) -> Run:
    """The paper's Shaw tables, or the peer's bias, rotary embedding and focus mask."""
    options = _peer_options(s, device)
    if shaw:
        table = torch.randn(2, 1, 2 * s.frames - 1, s.head_dim, device=device, dtype=dtype)
        options = (None, *table.unbind(), None, None)
    return _attention(s, device, dtype, TIME, options, backward)


def over_space(s: Shape, device: str, dtype: torch.dtype, *, backward: bool) -> Run:
    return _attention(s, device, dtype, SPACE, (None,) * 5, backward)


def _attention(
    s: Shape,
    device: str,
    dtype: torch.dtype,
    axis: int,
    options: tuple[Tensor | None, ...],
    backward: bool,
) -> Run:
    qkv = torch.randn(s.qkv_shape, device=device, dtype=dtype)
    rest = (axis, *options, 0, s.head_dim**-0.5)
    if not backward:
        return lambda: axis_attention.axis_attention_fwd(qkv, *rest)
    saved = axis_attention.axis_attention_fwd(qkv, *rest)
    dout = torch.randn_like(saved[0])
    needs = (True, *(t is not None for t in options[:3]))
    return lambda: axis_attention.axis_attention_bwd(dout, qkv, *saved, *rest, *needs)


def guided(s: Shape, device: str, dtype: torch.dtype, *, what: str) -> Run:
    """One of the two ends of a guided step, 5 frames given."""
    size = (s.batch, 3, s.frames, s.height, s.width)
    z, out, grad, noise = torch.randn(4, *size, device=device, dtype=dtype).unbind()
    known = torch.randn(s.batch, 3, 5, s.height, s.width, device=device, dtype=dtype)
    slot = torch.tensor([*range(5), *[-1] * (s.frames - 5)], dtype=torch.int32, device=device)
    coef = torch.rand(s.batch, 4 if what == "seed" else 9, device=device, dtype=dtype)
    if what == "seed":
        return lambda: guidance.guidance_seed_fwd(
            z, out, coef, known, slot, None, None, None, False
        )
    return lambda: guidance.guidance_update_fwd(
        z, out, coef, grad, None, known, slot, noise, None, None, 0, True, False
    )


def conv(s: Shape, device: str, dtype: torch.dtype) -> Run:
    """3x3 with bias, residual and the statistics of what follows."""
    c = s.channels
    x, residual = (torch.randn(s.x_shape, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(c, c, 3, 3, device=device, dtype=dtype) * (9 * c) ** -0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(c, device=device, dtype=dtype)
    return lambda: space_conv.space_conv_stats_fwd(
        x, None, weight, bias, residual, 1, s.groups, False, EPS
    )


_LINEAR: tuple[dict[str, Any], ...] = (
    {"BM": 2, "num_warps": 2},
    {"BM": 0.5, "num_warps": 0.5},
    {"BN": 2},
    {"BN": 0.5},
    {"BK": 0.5, "num_stages": 1},
    {"num_warps": 2},
    {"num_stages": 1},
    {"num_stages": -1},
)

# In a move, num_stages is added to, maxnreg is set, all else is multiplied.
_WARPS = ({"num_warps": 2}, {"num_warps": 0.5})
MOVES: dict[str, tuple[dict[str, Any], ...]] = {
    "norm_act_group": (
        {"block_l": 2},
        {"block_l": 0.5},
        {"block_c": 0.5, "block_l": 2},
        {"block_l": 2, "num_warps": 2},
        {"num_warps": 2},
    ),
    "norm_act_row": ({"block_l": 2}, {"block_l": 0.5}, *_WARPS),
    # Never more rows: the analytic tile has as many as fit the registers.
    "temporal_block": (
        {"P": 0.5},
        {"P": 0.5, "num_warps": 0.5},
        {"P": 0.25, "num_warps": 0.5},
        {"num_warps": 0.5},
    ),
    "norm_linear": _LINEAR,
    "linear_residual": _LINEAR,
    "linear_attention": (
        {"block_n": 2},
        {"block_n": 0.5},
        {"block_n": 2, "num_warps": 2},
        {"block_n": 0.5, "num_warps": 0.5},
        *_WARPS,
    ),
    "axis_attention_short": (
        {"P": 2, "num_warps": 2},
        {"P": 0.5, "num_warps": 0.5},
        {"P": 2, "maxnreg": None},
        {"P": 0.5},
        {"num_warps": 0.5, "maxnreg": None},
        {"maxnreg": None},
    ),
    "axis_attention_long": (
        {"BM": 2, "num_warps": 2},
        {"BM": 0.5},
        {"BN": 2},
        {"BN": 0.5},
        {"BM": 0.5, "BN": 0.5},
        *_WARPS,
        {"num_stages": 1},
        {"num_stages": -1},
    ),
    "guidance": ({"block": 2}, {"block": 4}, {"block": 0.5}, {"block": 2, "num_warps": 2}),
    "space_conv": (
        {"block_co": 2},
        {"block_co": 0.5},
        {"block_p": 2},
        {"block_p": 0.5},
        {"block_k": 0.5, "num_stages": 2},
        *_WARPS,
        {"num_stages": 1},
        {"num_stages": -1},
    ),
}


_WARP_GROUPS = (4, 8)  # fewer than four warps have no wgmma


def limits(choice: Choice) -> dict[str, tuple[int, int]]:
    """Smallest and largest value of each field that a move may change, for these arguments.

    A tile is no larger than what there is to do. The largest ones also bound shared memory where
    calls with the same key differ in their options: what was measured must fit for all of them.
    """
    given, kernel = choice.given, choice.kernel
    found = {"num_warps": (1, 8), "num_stages": (1, 5)}
    if kernel == "norm_act_group":
        width = next_power_of_2(max(given["c1"], given["c2"]))
        return found | {"block_c": (8, width), "block_l": (1, 256)}
    if kernel == "norm_act_row":
        return found | {"block_l": (1, 256)}
    if kernel == "temporal_block":
        return found | {"P": (1, min(given["pixels"], 256 // choice.analytic.BN))}
    if kernel in ("norm_linear", "linear_residual"):
        widest = max(64, min(256, next_power_of_2(given["features"])))
        sides = {"BM": (64, 128), "BN": (64, widest), "BK": (32, 64)}
        return found | sides | {"num_warps": _WARP_GROUPS}
    if kernel == "linear_attention":
        return found | {"block_n": (16, max(16, min(given["pixels"], 128)))}
    if kernel == "axis_attention_short":
        most = 16384 // (given["bn"] * given["bd"])  # 32 KiB an operand in bf16
        return found | {"P": (1, min(given["outer"], most, 16))}
    if kernel == "axis_attention_long":
        tile = (16, max(16, min(given["n"], 256)))
        return found | {"BM": tile, "BN": tile, "num_warps": _WARP_GROUPS}
    if kernel == "guidance":
        return found | {"block": (64, 4096)}
    # space_conv
    pixels = next_power_of_2(given["grid"][0] * given["grid"][1])
    most_k = max(16, min(next_power_of_2(max(given["widths"][:-1])), 128))
    return found | {
        "block_co": (64 if given["tma"] else 16, min(256, next_power_of_2(given["widths"][-1]))),
        "block_p": (32, min(256, pixels)),
        "block_k": (16, most_k),
        "num_warps": _WARP_GROUPS,
    }


def candidates(choice: Choice) -> list[Any]:
    """The neighbours of the analytic configuration that the arguments allow, without itself."""
    start = choice.analytic
    bounds, found = limits(choice), []
    for move in MOVES[choice.kernel]:
        fields: dict[str, Any] = {}
        for name, by in move.items():
            value = getattr(start, name)
            if name == "maxnreg":
                fields[name] = by
            else:
                fields[name] = value + by if name == "num_stages" else int(value * by)
        if all(bounds[n][0] <= v <= bounds[n][1] for n, v in fields.items() if n in bounds):
            fields = _consistent(choice, fields)
            named = isinstance(start, tuple)
            config = start._replace(**fields) if named else dataclasses.replace(start, **fields)
            if config != start and config not in found:
                found.append(config)
    return found


def _consistent(choice: Choice, fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with those that follow from them: the box of a tile of pixels, and square tiles
    where the kernel needs them."""
    if choice.kernel == "space_conv" and choice.given["tma"] and "block_p" in fields:
        box = space_conv.pick_box(*choice.given["grid"], fields["block_p"])
        return fields | dict(zip(("box_h", "box_w"), box))
    square = choice.kernel == "axis_attention_long" and (
        choice.given["shaw"] or choice.given["kind"] == "drel"
    )
    if square and fields.keys() & {"BM", "BN"}:
        side = fields.get("BM", fields.get("BN"))
        return fields | {"BM": side, "BN": side}
    return fields
