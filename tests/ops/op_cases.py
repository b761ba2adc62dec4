"""One table of the public ops, a row per case. ``suite_test.py`` applies every check to each row.

A shape is written in letters, which ``sizes`` and an edge may set: B, F, H, W of the video, C and E
the channels of one and of a second source, N those of the output, K a kernel's extent or a depth,
A heads, D their features, G groups, R rows of a Shaw table, P and Q the output's height and width.
"2H" is twice the height, "BF" a product, "C+E" a sum. Extents differ: a cube hides a swapped axis.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastvdm.layers.position import rotary_table
from fastvdm.ops import guidance
from fastvdm.ops.attention_block import AttentionOptions, attention_block
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.conv_group_norm import conv_group_norm
from fastvdm.ops.linear import linear
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.space_conv import space_conv, space_conv_stats, space_conv_transpose
from fastvdm.ops.space_conv_ends import bias_residual, fold_upsample_weight
from fastvdm.reference.space_conv import group_stats_ref
from fastvdm.runtime.config import use_backend
from fastvdm.testing import assert_close3, assert_parity, make_exact_operand, poison_empty

VIDEO = dict(B=2, F=3, H=5, W=4)
Sizes = dict[str, int]


def shape_of(letters: str, sizes: Sizes) -> tuple[int, ...]:
    def extent(product: str) -> int:
        factors = re.findall(r"\d+|[A-Z]", product)
        return math.prod(int(f) if f.isdigit() else sizes[f] for f in factors)

    return tuple(sum(map(extent, word.split("+"))) for word in letters.split())


@dataclass(frozen=True)
class Row:
    """A public function and one way to call it."""

    op: str  # the file in fastvdm/ops
    fn: Callable[..., Any]
    tensors: dict[str, str]  # what has a gradient: argument -> shape; the first is x
    sizes: Sizes
    options: dict[str, Any] = field(default_factory=dict)  # a function is called with the sizes
    # Further arguments: of the sizes, made once; of the tensors' values, made in every call.
    beside: Callable[[Sizes], dict[str, Any]] = lambda s: {}
    derived: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Any]] = lambda t, o: {}
    # Parity alone: other sizes (capitals), options (small), ``given``: the optional arguments.
    edges: dict[str, dict[str, Any]] = field(default_factory=dict)
    cpu_edges: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the C++ lane alone
    # Of compiled Triton kernels alone: full tiles of the networks' kinds, and one that is not.
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    kernels: tuple[str, ...] = ("cpu", "triton")  # who has one; elsewhere it is parts or torch
    dtype: torch.dtype = torch.float32  # of Triton's lane, in all but parity
    wide: tuple[str, ...] = ()  # stay fp32 where the others have 16 bits
    mixed: tuple[str, ...] = ()  # have 16 bits in the mix of dtypes that the op takes
    gradient: bool = True
    without: dict[str, str] = field(default_factory=dict)  # check, or check-backend -> why not

    @property
    def function(self) -> str:
        return getattr(self.fn, "func", self.fn).__name__

    def optional(self) -> set[str]:
        """The tensors that may be None."""
        found = inspect.signature(self.fn).parameters
        return {n for n in self.tensors if "None" in str(found[n].annotation)}


@dataclass
class Case:
    """The tensors of one call of a row, and what calls it with others in their place."""

    row: Row
    tensors: dict[str, Tensor]
    rest: dict[str, Any]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.tensors, tensors, strict=True))
        more = {} if "stats" in self.rest else self.row.derived(named, self.rest)
        out = self.row.fn(**named, **self.rest, **more)
        return out if isinstance(out, tuple) else (out,)

    def first(self, *tensors: Tensor) -> Tensor:
        """What is differentiated."""
        return self(*tensors)[0]


def make(
    row: Row,
    dtype: torch.dtype,
    device: str = "cpu",
    edge: dict[str, Any] | None = None,
    *,
    narrow: tuple[str, ...] | None = None,
    exact: bool = False,
) -> Case:
    """``narrow``: those that have ``dtype``, the others being fp32."""
    edge = edge or {}
    sizes = row.sizes | {n: v for n, v in edge.items() if n.isupper()}
    given = edge.get("given")
    generator = None if device == "meta" else torch.Generator(device).manual_seed(3)
    tensors = {}
    for i, (name, letters) in enumerate(row.tensors.items()):
        shape = shape_of(letters, sizes)
        if given is not None and name in row.optional() and name not in given:
            continue
        if exact:
            t = make_exact_operand(shape, high=2, seed=i)
        else:
            t = _value(name, shape, device, generator) * row.scales.get(name, 1.0)
        keep = name in row.wide if narrow is None else name not in narrow
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t = t.to(device, wide if keep else dtype)
        tensors[name] = t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
    rest: dict[str, Any] = {n: None for n in row.tensors if n not in tensors}
    for name, value in row.beside(sizes).items():
        if given is None or name in given:
            rest[name] = value.to(device) if isinstance(value, Tensor) else value
    options = row.options | {n: v for n, v in edge.items() if n.islower() and n != "given"}
    rest |= {n: v(sizes) if callable(v) else v for n, v in options.items()}
    if exact and "stats" in inspect.signature(row.fn).parameters and rest.get("groups"):
        rest["stats"] = _exact_statistics(sizes, rest)
    return Case(row, tensors, rest)


def _value(
    name: str, shape: tuple[int, ...], device: str, generator: torch.Generator | None
) -> Tensor:
    t = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    if name.endswith("weight"):
        return 1 + 0.5 * t if t.ndim == 1 else t * math.prod(shape[1:]) ** -0.5
    if name in ("x", "qkv"):
        return 1.5 * t + 0.25
    if name == "threshold":
        return t.abs() + 0.5
    return 2 * t if name == "bias" and t.ndim == 3 else t


def _exact_statistics(s: Sizes, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Integers, and powers of two."""
    n = s["B"] * (s["F"] if options.get("per_frame") else 1)
    mean = make_exact_operand((n, options["groups"]), seed=98)
    return mean, 2.0 ** make_exact_operand((n, options["groups"]), high=1, seed=99)


def by_reference(fn: Callable) -> Callable:
    def call(*tensors):
        with use_backend("reference"):
            return fn(*tensors)

    return call


def check_parity(case: Case) -> None:
    """Outputs and every gradient on the backend in force, by the three-way tolerance."""
    tensors = list(case.tensors.values())
    with poison_empty():
        if case.row.gradient:
            assert_parity(case.first, by_reference(case.first), tensors, names=list(case.tensors))
            rest = slice(1, None)
        else:
            rest = slice(None)
        with torch.no_grad():
            found = case(*tensors)[rest]
            if not found:
                return
            plain = by_reference(case)(*tensors)[rest]
            # What is beside the tensors is exact in their dtype.
            exact = by_reference(case)(*(t.double() for t in tensors))[rest]
    for i, (a, b, c) in enumerate(zip(found, plain, exact)):
        assert_close3(a, b, c, name=f"output {i}")


# -- the attention block, one function a core -----------------------------------------------------

linear_block = partial(attention_block, core="linear")


def time_block(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    *,
    heads: int,
    norm_bias: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    rel_k: Tensor | None = None,
    rel_v: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    return attention_block(
        x, norm_weight, qkv_weight, out_weight, core="time", heads=heads, norm_bias=norm_bias,
        qkv_bias=qkv_bias, out_bias=out_bias, eps=eps,
        options=AttentionOptions(bias, rel_k, rel_v, **rest),
    )  # fmt: skip


# -- what stands beside the tensors ---------------------------------------------------------------

heads, groups = itemgetter("A"), itemgetter("G")


def kept(letters: str, dtype: torch.dtype = torch.bool) -> Callable[[Sizes], dict[str, Any]]:
    def mask(s: Sizes) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        drawn = torch.rand(shape_of(letters, s), generator=generator) > 0.25
        return dict(dropout_mask=drawn if dtype == torch.bool else drawn.to(dtype) / 0.75)

    return mask


def turned(s: Sizes) -> dict[str, Any]:
    return dict(rotary=rotary_table(s["F"], max(2, s["D"] // 4 * 2), torch.device("cpu")))


def masked(s: Sizes) -> dict[str, Any]:
    focused = torch.arange(s["B"]) % 2 == (0 if s["B"] > 2 else 1)
    return dict(focus_mask=focused, num_images=max(1, s["F"] // 3))


def statistics(t: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Of x, in its own precision."""
    x, per_frame = t["x"].detach(), options.get("per_frame", False)
    groups = t["x"].shape[-1] // 3
    return dict(stats=group_stats_ref(x, groups, per_frame))


def frames_given(s: Sizes) -> dict[str, Any]:
    """The last frame is the second of those given, the first the first; half of its size, one in
    the middle."""
    slot, low = torch.full((2, s["F"]), -1, dtype=torch.int32)
    slot[-1], slot[0], low[s["F"] // 2] = 1, 0, 0
    return dict(slot=slot, low_slot=low)


def place(s: Sizes) -> dict[str, Any]:
    seeds = torch.tensor([3, 2**61 + 5, 2**33])[: s["B"]]
    return dict(slot=frames_given(s)["slot"], rng=torch.stack((seeds, seeds.flip(0) % 2**32), 1))


# -- the rows -------------------------------------------------------------------------------------

X, Y = "B F H W C", "B F H W N"
FILM = dict(scale="B C", shift="B C")
EVERYTHING = dict(x=X, weight="C", bias="C", **FILM, residual=X)
PAIR = dict(x=X, x2="B F H W E", weight="C+E", bias="C+E", shift="B C+E", residual="B F H W C+E")
CONV = dict(x=X, weight="N C K K", bias="N", residual=Y)
ATTENTION = dict(qkv="B F H W 3 A D", bias="A F F", rel_k="1 R D", rel_v="A R D")
BLOCK = dict(x=X, norm_weight="C", qkv_weight="3AD C", out_weight="C AD")
VIDEOS = "B C F H W"

_ELEMENTWISE = {"exact": "it rounds: sums of squares and SiLU"}
_SOFTMAX = {"exact": "a softmax rounds; one that picks is in the op's own file"}
# Plain torch multiplies what is masked by 0, and 0 times NaN is NaN.
_MASKED = _SOFTMAX | {"not_a_number": "masked frames are isolated, plain torch's are not"}
_TABLES = {"cost": "plain torch multiplies other rows of the tables (flops_test.py)"}
_CONV = {
    "not_a_number": "tiles of a convolution spread it over their pixels",
    "threads": "weight gradients are oneDNN's, whose sums follow the threads",
}
_FORWARD = "no gradient: sampling needs none"
_NO_GRADIENT = {
    check: _FORWARD
    for check in (
        "expanded_dy", "each_alone", "frozen", "second_backward", "gradcheck", "transforms",
        "large",
    )
} | {"exact": "its coefficients are no integers"}  # fmt: skip

_PAIRS = {
    "+".join(pair) or "plain": dict(given=pair)
    for n in (0, 1, 2)
    for pair in itertools.combinations(
        ("bias", "rel_k", "rel_v", "rotary", "focus_mask", "num_images"), n
    )
}

ROWS: dict[str, Row] = {
    # -- norm_act
    "norm_act/group": Row(
        "norm_act", norm_act, EVERYTHING, VIDEO | dict(C=12), dict(kind="group", groups=4),
        kept(X), mixed=("x", "scale", "residual"), without=_ELEMENTWISE,
        edges={
            "one_pixel": dict(F=1, H=1, W=1, C=24, groups=3),
            "off_tile": dict(B=1, F=1, H=33, W=31, C=3, groups=3),
            "many_videos": dict(B=19, F=1, H=2, W=3, C=4, groups=2, given=("bias", "scale")),
            "bare": dict(B=1, C=16, groups=2, act=False, given=()),
            "256": dict(B=1, F=2, C=256, groups=32, given=("bias",)),
        },
        cpu_edges={
            str(c): dict(B=1, F=2, C=c, groups=g, given=("bias", "residual"))
            for c, g in ((17, 1), (48, 3), (96, 8), (192, 3), (512, 8))
        },
        tiles={
            "l0": dict(B=1, F=2, H=16, W=33, C=64, groups=8, given=("bias", "scale", "shift")),
            "small": dict(B=1, F=2, H=16, W=17, C=64, groups=2),
        },
    ),
    "norm_act/group_frame": Row(
        "norm_act", norm_act, EVERYTHING, VIDEO | dict(C=15),
        dict(kind="group", groups=5, per_frame=True), without=_ELEMENTWISE,
        edges={"scale": dict(given=("scale",)), "shift": dict(given=("shift",))},
    ),
    "norm_act/group_pair": Row(
        "norm_act", norm_act, PAIR, VIDEO | dict(C=17, E=7), dict(kind="group", groups=3),
        kept("B F H W C+E", torch.float32), without=_ELEMENTWISE,
        edges={
            "frame": dict(C=6, E=9, groups=5, per_frame=True),
            "narrow_second": dict(C=40, E=1, groups=1),
        },
        tiles={"aligned": dict(B=1, F=2, H=8, W=9, C=64, E=64, groups=8)},
    ),
    "norm_act/group_stats": Row(
        "norm_act", norm_act, EVERYTHING, VIDEO | dict(C=12),
        dict(kind="group", groups=4, per_frame=True, act=False), derived=statistics,
        edges={"video": dict(per_frame=False, act=True)},
    ),
    "norm_act/group_x_bias": Row(
        "norm_act", norm_act, EVERYTHING | dict(x_bias="C"), VIDEO | dict(C=12),
        dict(kind="group", groups=4), kept(X), without=_ELEMENTWISE,
        edges={
            "one_channel_a_group": dict(F=1, H=3, C=6, groups=6),
            "frame": dict(C=15, groups=5, per_frame=True),
            "narrow_frames": dict(B=3, F=2, C=8, groups=4, per_frame=True),
            "bare": dict(C=16, groups=2, act=False, given=("x_bias",)),
        },
    ),
    **{
        f"norm_act/{kind}": Row(
            "norm_act", norm_act, EVERYTHING, VIDEO | dict(C=17), dict(kind=kind), kept(X),
            mixed=("x", "scale", "residual"), without=_ELEMENTWISE,
            edges={
                "bare": dict(B=1, W=7, C=48, act=False, given=()),
                "narrow": dict(C=3, given=("shift",)),
                "512": dict(F=1, H=3, W=2, C=512, given=("bias",)),
            },
            cpu_edges={"64": dict(C=64), "5": dict(C=5), "40": dict(C=40)},
            tiles={"l1": dict(F=2, H=8, W=9, C=128)},
        )
        for kind in ("rms", "layer")
    },
    **{
        f"norm_act/{kind}_pair": Row(
            "norm_act", norm_act, PAIR, VIDEO | dict(F=2, H=3, C=6, E=17), dict(kind=kind),
            kept("B F H W C+E"), without=_ELEMENTWISE,
            edges={"wide": dict(C=64, E=17, given=("x2", "bias"))},
        )
        for kind in ("rms", "layer")
    },
    **{
        f"norm_act/{kind}_x_bias": Row(
            "norm_act", norm_act, EVERYTHING | dict(x_bias="C"), VIDEO | dict(F=2, H=3, C=17),
            dict(kind=kind), kept(X), without=_ELEMENTWISE,
            edges={"bare": dict(H=7, C=48, act=False, given=("x_bias",))},
        )
        for kind in ("rms", "layer")
    },
    # -- convolutions
    "space_conv/plain": Row(
        "space_conv", space_conv, CONV, VIDEO | dict(C=6, N=9, K=3),
        edges={
            "odd": dict(B=1, H=9, W=5, C=17, N=48),
            "one_pixel": dict(H=1, W=1, N=5),
            "one_row": dict(B=1, F=2, H=1, W=9, C=4, N=6, given=("residual",)),
            "off_tile": dict(B=1, F=1, H=11, W=17, C=8, N=3, given=()),
            "wide": dict(B=1, F=1, H=2, W=3, C=72, N=136, given=("bias",)),
            "1x1": dict(B=1, F=2, H=3, C=70, N=130, K=1),
            "7x7": dict(B=1, F=2, C=3, N=8, K=7),
        },
        cpu_edges={
            "odd_tiles": dict(H=7, W=9, C=20, N=24),
            "channels": dict(B=1, F=1, H=2, W=17, C=128, N=48),
        },
        tiles={
            "64": dict(B=1, F=2, H=17, W=16, C=64, N=64, given=("bias", "residual")),
            "96_192": dict(B=1, F=1, H=16, W=9, C=96, N=192, given=()),
        },
        without=_CONV,
    ),
    "space_conv/pair": Row(
        "space_conv", space_conv, CONV | dict(x2="B F H W E", weight="N C+E K K"),
        VIDEO | dict(F=2, H=3, W=5, C=17, E=6, N=9, K=3),
        edges={"1x1": dict(B=1, C=6, E=17, K=1), "one_pixel": dict(H=1, W=1, given=("x2",))},
        cpu_edges={"8x8": dict(H=8, W=7, C=16, E=5, N=33)},
        tiles={"64": dict(B=1, F=1, H=8, W=17, C=64, E=64, N=128, given=("x2",))},
        without=_CONV,
    ),
    "space_conv/up": Row(
        "space_conv", space_conv, CONV | dict(residual="B F 2H 2W N"),
        VIDEO | dict(F=2, H=3, W=5, C=6, N=9, K=3), dict(upsample="nearest"),
        edges={"one_pixel": dict(H=1, W=1)},
        without=_CONV | {"cost": "folded: 4/9 of the reference's products (flops_test.py)"},
        tiles={"64": dict(B=1, F=1, H=8, W=9, C=64, N=64, given=("bias",))},
    ),
    "space_conv/down": Row(
        "space_conv", space_conv, CONV | dict(residual="B F P Q N"),
        VIDEO | dict(H=6, W=10, C=5, N=7, K=4, P=3, Q=5), dict(stride=2),
        edges={"odd": dict(H=5, W=7, P=2, Q=3), "3x3": dict(H=5, W=8, K=3, P=3, Q=4)},
        tiles={"64": dict(B=1, H=16, W=18, C=64, N=64, P=8, Q=9, given=("bias",))},
        without=_CONV,
    ),
    "space_conv/stats": Row(
        "space_conv", space_conv_stats, CONV, VIDEO | dict(C=6, N=12, K=3), dict(groups=4),
        edges={"frame": dict(per_frame=True), "off_tile": dict(B=1, F=1, H=9, W=17, N=3, groups=1)},
        tiles={"64": dict(B=1, H=9, W=16, C=64, N=96, groups=8, given=("bias",))},
        without=_CONV | {"exact": "its statistics round; the convolution is the plain row's"},
    ),
    "space_conv/transpose": Row(
        "space_conv", space_conv_transpose, dict(x=X, weight="C N 4 4", bias="N"),
        VIDEO | dict(H=3, W=5, C=6, N=9), kernels=("triton",),
        edges={"one_pixel": dict(F=1, H=1, W=1, C=17)},
        tiles={"64": dict(B=1, H=8, W=9, C=64, N=64)},
        without=_CONV,
    ),
    "conv_group_norm/group": Row(
        "conv_group_norm", conv_group_norm,
        dict(x=X, weight="N C+E K K", bias="N", norm_weight="N", norm_bias="N", scale="B N",
             shift="B N", residual=Y, x2="B F H W E"),
        VIDEO | dict(F=2, C=6, N=8, K=3, E=3), dict(groups=4),
        without=_CONV | _ELEMENTWISE,
    ),
    "conv_group_norm/rms": Row(
        "conv_group_norm", conv_group_norm,
        dict(x=X, weight="N C K K", bias="N", norm_weight="N", residual="B F 2H 2W N"),
        VIDEO | dict(F=2, H=3, C=6, N=7, K=3), dict(kind="rms", upsample="nearest"),
        without=_CONV | _ELEMENTWISE | {"cost": "folded, as of space_conv/up"},
    ),
    # -- projections
    "linear/linear": Row(
        "linear", linear, dict(x=X, weight="N C", bias="N"), VIDEO | dict(C=16, N=10),
        kernels=("cpu",), without={"threads": "the weight's gradient is a product of torch's"},
        cpu_edges={
            "odd": dict(H=1, W=11, C=130, N=300),
            "wide": dict(H=7, W=2, C=24, N=401),
            "no_bias": dict(B=1, F=1, H=1, W=1, C=33, N=3, given=()),
        },
    ),
    "linear_residual/linear_residual": Row(
        "linear_residual", linear_residual, dict(x=Y, o="B F H W K", weight="N K", bias="N"),
        VIDEO | dict(K=17, N=10), kernels=("triton",), mixed=("o", "weight", "bias"),
        edges={
            "one_row": dict(B=1, F=1, H=1, W=1, K=5, N=17),
            "odd": dict(H=1, W=11, K=130, N=300),
            "tile": dict(B=1, F=2, H=4, W=16, K=64, N=64, given=()),
        },
        tiles={"l1": dict(B=1, F=2, H=8, W=17, K=256, N=128)},
    ),
    "space_conv_ends/bias_residual": Row(
        "space_conv_ends", bias_residual, dict(y="B F H W C", bias="C", residual="B F H W C"),
        VIDEO | dict(C=10), kernels=("triton",), mixed=("bias", "residual"),
        edges={
            "one": dict(B=1, F=1, H=1, W=1, C=1),
            "wide": dict(F=2, C=130, given=("bias",)),
            "residual": dict(C=3, given=("residual",)),
        },
        tiles={"l1": dict(B=1, F=2, H=8, W=17, C=128), "l3": dict(B=1, F=1, H=3, C=512)},
    ),
    "space_conv_ends/fold_upsample_weight": Row(
        "space_conv_ends", fold_upsample_weight, dict(weight="N C 3 3"), dict(N=10, C=7),
        kernels=("triton",), without={
            "empty": "a weight is no batch",
            "fullgraph": "a weight has no frames",
            "transforms": "vmap knows no channels_last",
        },
        edges={"one": dict(N=1, C=1), "tiles": dict(N=40, C=70)},
        tiles={"l1": dict(N=128, C=64)},
    ),
    # -- attention
    "axis_attention/time": Row(
        "axis_attention", axis_attention, dict(qkv="B F H W 3 A D", bias="A F F"),
        VIDEO | dict(F=7, W=1, A=4, D=16), dict(axis="time"), turned, without=_SOFTMAX,
        edges={
            f"{f}x{d}": dict(F=f, H=1, A=1, D=d, given=("bias",))
            for f, d in ((1, 16), (2, 32), (3, 48), (16, 128), (17, 40), (24, 96))
        } | {"scale": dict(H=3, W=2, A=2, sm_scale=0.3)},
        cpu_edges={
            "peer": dict(F=16, H=3, W=5, A=4, D=32),
            "one": dict(F=1, A=1, D=5),
            "64": dict(B=1, F=64, H=1, W=3, D=32),
        },
        tiles={
            "peer": dict(B=1, F=16, H=3, W=3, A=4, D=32),
            "16x64": dict(B=1, F=16, H=1, W=3, A=2, D=64, given=("bias",)),
            "32x64": dict(B=1, F=32, H=1, A=2, D=64),
            "64x32": dict(B=1, F=64, H=1, A=2, D=32),
        },
    ),
    "axis_attention/all": Row(
        "axis_attention", axis_attention, ATTENTION,
        VIDEO | dict(B=3, F=7, H=1, A=2, D=16, R=5), dict(axis="time"),
        lambda s: turned(s) | masked(s), without=_MASKED,
        edges={n: e | dict(B=2, F=3, D=20) for n, e in _PAIRS.items()} | {
            "unclipped": dict(R=17, given=("rel_k", "rel_v")),
            "only_images": dict(num_images=7, given=("bias", "rel_v")),
        },
        cpu_edges={
            "shaw_images": dict(B=2, F=9, W=4, D=40, R=41, num_images=3),
            "focus_images": dict(B=3, F=24, W=2, D=64, R=9, num_images=8),
            "only_17_images": dict(F=17, D=33, num_images=17),
        },
        tiles={
            "paper": dict(B=1, F=16, W=3, D=64, R=31, given=("rel_k", "rel_v")),
            "even": dict(B=1, F=16, W=8, D=64, R=9, given=("rel_k", "rel_v")),
        },
    ),
    "axis_attention/space": Row(
        "axis_attention", axis_attention, ATTENTION | dict(bias="A HW HW"),
        dict(B=1, F=2, H=4, W=5, A=2, D=16, R=7), dict(axis="space"),
        without=_SOFTMAX | _TABLES,
        edges={"bias": dict(B=2, given=("bias",)), "shaw": dict(B=2, H=1, W=7, given=("rel_v",))},
        cpu_edges={"72": dict(B=1, H=9, W=8, R=11), "42": dict(H=6, W=7, D=32, given=("bias",))},
    ),
    "axis_attention/long": Row(
        "axis_attention", axis_attention, ATTENTION,
        VIDEO | dict(F=37, H=1, W=1, A=4, D=16, R=5), dict(axis="time"),
        lambda s: turned(s) | masked(s), without=_MASKED | _TABLES,
        edges={n: e | dict(F=34, A=1, D=20) for n, e in _PAIRS.items() if "+" not in n} | {
            "100": dict(B=1, F=100, A=1, given=("bias",)),
        },
        # More sequences than there are sums of bias gradients.
        cpu_edges={"many": dict(H=6, W=7, A=1, given=("bias",))},
    ),
    "axis_attention/long_space": Row(
        "axis_attention", axis_attention, dict(qkv="B F H W 3 A D", bias="A HW HW"),
        dict(B=1, F=2, H=5, W=7, A=3, D=16), dict(axis="space"), without=_SOFTMAX,
        edges={
            "tiles": dict(F=1, H=9, W=15, A=1),
            # Without a bias a positive scale is folded into the maximum's subtraction.
            "plain": dict(F=1, A=1, given=()),
            "even": dict(F=1, H=8, W=8, A=1, given=()),
            "negative": dict(F=1, A=1, given=(), sm_scale=-0.3),
        },
        tiles={
            f"{h}x{w}x{d}": dict(F=1, H=h, W=w, A=2, D=d)
            for h, w, d in ((8, 8, 32), (8, 9, 64), (16, 16, 32), (16, 8, 128))
        } | {
            f"{h}x{w}x{d} plain": dict(F=1, H=h, W=w, A=1, D=d, given=())
            for h, w, d in ((16, 16, 64), (8, 17, 64))
        },
    ),
    "attention_block/space": Row(
        "attention_block", attention_block,
        BLOCK | dict(norm_bias="C", qkv_bias="3AD", out_bias="C"),
        VIDEO | dict(F=3, C=20, A=1, D=16), dict(core="space", heads=heads), kernels=(),
        scales=dict(qkv_weight=2.0), mixed=("qkv_weight", "out_weight", "qkv_bias", "out_bias"),
        edges={"bare": dict(H=4, W=9, given=(), eps=1e-3)},
        without=_SOFTMAX | {"cost": "composed of ops that have one"},
    ),
    "temporal_block/bias": Row(
        "temporal_block", time_block,
        BLOCK | dict(norm_bias="C", qkv_bias="3AD", out_bias="C", bias="A F F"),
        VIDEO | dict(F=5, H=2, W=3, C=20, A=2, D=16), dict(heads=heads), turned,
        scales=dict(qkv_weight=2.0), mixed=("qkv_weight", "out_weight", "qkv_bias", "out_bias"),
        dtype=torch.float64, without=_SOFTMAX,
        edges={
            "plain": dict(B=1, given=()),
            "one_frame": dict(F=1, H=1, A=1, D=20),
            "sixteen": dict(B=1, F=16, H=1, C=64, A=1, D=32, given=("bias", "rotary")),
            "wide": dict(B=1, F=3, H=1, W=11, C=136, A=1, D=20),
            "between": dict(B=1, F=24, H=1, W=1, C=64, A=1, num_images=5),
            "width": dict(B=1, F=3, H=1, C=264),
            "length": dict(B=1, F=34, H=1, W=1),
        },
        cpu_edges={
            "peer": dict(F=16, H=3, W=5, C=64, A=4, D=32, given=("bias", "rotary")),
            "64": dict(B=1, F=64, H=1, C=17, D=32),
        },
        tiles={
            f"l{i}": dict(
                B=1, F=16, H=1, W=w, C=64 << i, A=8, D=32, given=("bias", "rotary")
            )
            for i, w in enumerate((9, 5, 3))
        } | {"32": dict(B=1, F=32, H=1, W=3, C=64, A=4, D=32, given=("bias",))},
    ),
    "temporal_block/masks": Row(
        "temporal_block", time_block,
        BLOCK | dict(norm_bias="C", qkv_bias="3AD", out_bias="C", bias="A F F"),
        VIDEO | dict(B=3, F=7, H=1, C=20, A=2, D=16), dict(heads=heads),
        lambda s: turned(s) | masked(s),
        scales=dict(qkv_weight=2.0), dtype=torch.float64, without=_MASKED,
        edges={
            "images": dict(given=("num_images", "norm_bias")),
            "focus": dict(given=("focus_mask",)),
            "all_images": dict(num_images=7),
        },
    ),
    "temporal_block/shaw": Row(
        "temporal_block", time_block,
        BLOCK | dict(norm_bias="C", qkv_bias="3AD", out_bias="C", rel_k="A R D", rel_v="1 R D"),
        VIDEO | dict(B=3, F=7, H=1, C=20, A=2, D=16, R=5), dict(heads=heads), masked,
        scales=dict(qkv_weight=2.0), dtype=torch.float64, without=_MASKED,
        edges={
            "unclipped": dict(R=19, C=40, given=("rel_k", "rel_v")),
            "two_halves": dict(B=2, F=17, W=1, C=33, D=24),
            "wide": dict(B=1, W=7, C=136, A=1, D=20, given=("rel_k", "rel_v", "out_bias")),
        },
        cpu_edges={"24": dict(F=24, W=2, C=33, D=64, R=9)},
    ),
    "linear_attention/linear_attention": Row(
        "linear_attention", linear_attention, dict(qkv="B F H W 3 A D"),
        VIDEO | dict(F=1, H=3, W=5, A=4, D=16), without=_SOFTMAX, scales=dict(qkv=2.0),
        edges={
            "one_pixel": dict(F=3, H=1, W=1, A=1, D=20),
            "two_tiles": dict(B=1, F=2, H=7, W=11, A=1, D=32),
            "split": dict(B=1, F=1, H=13, W=23, A=2, D=24),
            "64": dict(B=1, F=2, H=9, W=5, A=1, D=64),
            "scale": dict(B=1, sm_scale=0.7),
        },
        cpu_edges={
            "many": dict(B=1, F=2, H=12, W=11, D=32), "odd": dict(F=3, W=7, A=3, D=24),
            "40": dict(H=1, W=1, D=40), "full": dict(B=1, F=1, H=9, W=16, A=1, D=64),
        },
        tiles={
            "l2": dict(B=1, F=2, H=16, W=17, A=8, D=32),
            "shared": dict(B=1, F=1, H=16, W=17, A=1, D=32),  # several programs a frame
        },
    ),
    "linear_attention_block/block": Row(
        "linear_attention_block", linear_block, BLOCK | dict(norm_bias="C", out_bias="C"),
        VIDEO | dict(F=3, W=7, C=17, A=4, D=8), dict(heads=heads), dtype=torch.float64,
        scales=dict(qkv_weight=2.0, out_weight=3.0),
        mixed=("qkv_weight", "out_weight", "out_bias"),
        edges={
            "bare": dict(F=2, H=3, A=1, given=(), eps=1e-3),
            "two_tiles": dict(B=1, F=2, H=7, W=11, C=40, A=3, D=24),
            "pixels": dict(B=1, F=2, H=3, W=2),
        },
        cpu_edges={
            "one_pixel": dict(B=1, F=1, H=1, W=1, C=3, A=1, D=5),
            "odd": dict(D=24),
            "splits": dict(B=1, F=2, H=24, W=37, C=24, A=2, D=32),
            "frames": dict(F=17, H=10, W=11, C=40, A=2, D=64),
        },
        tiles={
            "l0": dict(B=1, F=1, H=16, W=40, C=64, A=8, D=32),
            "l1": dict(B=1, F=1, H=16, W=17, C=128, A=8, D=32),
            "64": dict(B=1, F=1, H=23, W=24, C=64, A=3, D=64),
        },
        without=_SOFTMAX | {"cost": "the products are in another order (flops_test.py)"},
    ),
    # -- guidance
    "guidance/seed": Row(
        "guidance", guidance.guidance_seed,
        dict(z=VIDEOS, model_out=VIDEOS, coef="B 4", known="B C 2 H W", low_res="B C 1 P Q",
             extra=VIDEOS),
        dict(B=2, C=3, F=7, H=12, W=8, P=6, Q=4), beside=frames_given, gradient=False,
        wide=("z", "coef", "known", "low_res", "extra"), without=_NO_GRADIENT,
        edges={
            "clip": dict(clip=True),
            "frames": dict(given=("known", "slot")),
            "low": dict(given=("low_res", "low_slot")),
            "grey": dict(C=1, F=5, H=8, W=4, P=2, Q=1),
            "one_frame": dict(B=3, C=2, F=1, H=4, W=6, P=2, Q=3, given=("low_res", "low_slot")),
            "wide": dict(B=1, F=2, H=4, W=38, P=2, Q=19, clip=True),
        },
    ),
    **{
        f"guidance/update{'_noise' * given}": Row(
            "guidance", guidance.guidance_update,
            dict(z=VIDEOS, estimate=VIDEOS, coef="B 9", grad=VIDEOS, seed=VIDEOS,
                 known="B C 2 H W", threshold="B") | (dict(noise=VIDEOS) if given else {}),
            dict(B=2, C=3, F=7, H=12, W=8), dict(step=3),
            beside=(lambda s: dict(slot=frames_given(s)["slot"])) if given else place,
            gradient=False, wide=("z", "coef", "known", "noise", "threshold"),
            without=_NO_GRADIENT,
            edges={
                "clip": dict(clip=True),
                "plain": dict(given=("rng", "noise")),
                "unit": dict(clip=True, given=("rng", "noise", "grad", "seed")),
                "one_frame": dict(B=3, C=2, F=1, H=4, W=6, given=("grad", "threshold"), clip=True),
                "wide": dict(B=1, F=2, H=4, W=38, clip=True),
            },
        )
        for given in (False, True)
    },
}  # fmt: skip
