"""The candidates of ``bench/tune.py``: the neighbours of a configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvdm.kernels.common import next_power_of_2
from fastvdm.kernels.space_conv.shared import pick_box
from fastvdm.kernels.tuned import Choice

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

# In a move num_stages is an addend, maxnreg is a value, and all else is a factor.
_WARPS = ({"num_warps": 2}, {"num_warps": 0.5})
MOVES: dict[str, tuple[dict[str, Any], ...]] = {
    "norm_act_group": (
        {"block_l": 2},
        {"block_l": 0.5},
        {"block_c": 0.5, "block_l": 2},
        {"block_l": 2, "num_warps": 2},
        {"num_warps": 2},
    ),
    "norm_act_stats": (
        {"block_l": 2},
        {"block_l": 0.5},
        {"block_l": 2, "num_warps": 2},
        {"block_l": 0.5, "num_warps": 0.5},
        *_WARPS,
    ),
    "norm_act_row": ({"block_l": 2}, {"block_l": 0.5}, *_WARPS),
    "temporal_block": (
        {"P": 2},
        {"P": 0.5},
        {"P": 0.5, "num_warps": 0.5},
        {"P": 0.25, "num_warps": 0.5},
        {"num_warps": 0.5},
    ),
    "linear_residual": _LINEAR,
    "linear_attention": (
        {"block_n": 2},
        {"block_n": 0.5},
        {"block_n": 2, "num_warps": 2},
        {"block_n": 0.5, "num_warps": 0.5},
        *_WARPS,
    ),
    "linear_attention_block": (
        {"block_n": 2, "num_warps": 2},
        {"block_n": 0.5, "num_warps": 0.5},
        {"block_n": 2},
        {"block_n": 0.5},
        {"block_f": 2},
        {"block_f": 0.5},
        *_WARPS,
        {"num_stages": 1},
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

    A tile is no larger than the work. The largest ones also bound shared memory if calls with the
    same key differ in their options: a measured configuration must fit for all of them.
    """
    given, kernel = choice.given, choice.kernel
    found = {"num_warps": (1, 8), "num_stages": (1, 5)}
    if kernel == "norm_act_group":
        width = next_power_of_2(max(given["c1"], given["c2"]))
        return found | {"block_c": (8, width), "block_l": (1, 256)}
    if kernel == "norm_act_stats":
        return found | {"block_l": (8, 512), "num_warps": (4, 16)}
    if kernel == "norm_act_row":
        return found | {"block_l": (1, 256)}
    if kernel == "temporal_block":
        return found | {"P": (1, min(given["pixels"], 256 // choice.analytic.BN))}
    if kernel == "linear_residual":
        widest = max(64, min(256, next_power_of_2(given["features"])))
        sides = {"BM": (64, 128), "BN": (64, widest), "BK": (32, 64)}
        return found | sides | {"num_warps": _WARP_GROUPS}
    if kernel == "linear_attention":
        return found | {"block_n": (16, max(16, min(given["pixels"], 128)))}
    if kernel == "linear_attention_block":
        head = max(16, next_power_of_2(given["dim"]))
        sides = {"block_n": (64, 128), "block_f": (max(32, head), 256)}
        return found | sides | {"num_warps": _WARP_GROUPS}
    if kernel == "axis_attention_short":
        most = 16384 // (given["bn"] * given["bd"])  # 32 KiB per operand in bf16
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
    """``fields`` with dependent ones: the box of a tile of pixels, and square tiles if the kernel
    needs them."""
    if choice.kernel == "space_conv" and choice.given["tma"] and "block_p" in fields:
        box = pick_box(*choice.given["grid"], fields["block_p"])
        return fields | dict(zip(("box_h", "box_w"), box))
    square = choice.kernel == "axis_attention_long" and (
        choice.given["shaw"] or choice.given["kind"] == "drel"
    )
    if square and fields.keys() & {"BM", "BN"}:
        side = fields.get("BM", fields.get("BN"))
        return fields | {"BM": side, "BN": side}
    return fields
