"""The floor of a whole network: the least cost of each op call, from shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fastvdm import use_backend
from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.layers import attention, conv, norm, resnet
from fastvdm.ops._cost import Cost
from fastvdm.ops.axis_attention import axis_attention_cost
from fastvdm.ops.linear import linear_cost
from fastvdm.ops.linear_attention import linear_attention_cost
from fastvdm.ops.linear_attention_block import linear_attention_block_cost
from fastvdm.ops.norm_act import norm_act_cost
from fastvdm.ops.space_conv import space_conv_cost, space_conv_transpose_cost
from fastvdm.ops.temporal_block import temporal_block_cost


def _wide(x: Tensor, x2: Tensor | None) -> tuple[int, ...]:
    """The shape of the concatenation of both sources along channels."""
    return *x.shape[:-1], x.shape[-1] + (0 if x2 is None else x2.shape[-1])


def _conv(x: Tensor, weight: Tensor, bias: Any = None, **k: Any) -> Cost:
    return space_conv_cost(
        _wide(x, k.get("x2")),
        weight.shape,
        stride=k.get("stride", 1),
        upsample=k.get("upsample"),
        residual=k.get("residual") is not None,
        itemsize=x.element_size(),
    )


def _norm(x: Tensor, *_: Any, stats: bool = False, **k: Any) -> Cost:
    x2 = k.get("x2")
    return norm_act_cost(
        x,
        kind=k["kind"],
        c2=0 if x2 is None else x2.shape[-1],
        stats=stats,
        residual=k.get("residual") is not None,
        dropout=k.get("dropout_mask") is not None,
    )


def _conv_norm(x: Tensor, weight: Tensor, bias: Any, *rest: Any, **k: Any) -> Cost:
    up = k.pop("upsample", None)
    first = _conv(x, weight, bias, x2=k.get("x2"), upsample=up)
    b, f, h, w, _ = x.shape
    factor = 1 if up is None else 2
    hidden = x.new_empty(b, f, factor * h, factor * w, weight.shape[0])
    second = _norm(hidden, stats=True, **(k | {"x2": None}))
    return Cost(first.flops + second.flops, first.bytes + second.bytes)


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Cost:
    n, k = weight.shape
    return linear_cost(x.numel() // k, k, n, x.element_size())


def _attention(qkv: Tensor, core: str, heads: int, options: AttentionOptions) -> Cost:
    shape = (*qkv.shape[:-1], 3, heads, qkv.shape[-1] // (3 * heads))
    if core == "linear":
        return linear_attention_cost(shape, qkv.element_size())
    bias = options.bias is not None
    return axis_attention_cost(shape, qkv.element_size(), core, bias=bias)


def _block(
    x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, out_weight: Tensor, **k: Any
) -> Cost:
    heads, core = k["heads"], k["core"]
    if core == "space":
        qkv = x.new_empty(*x.shape[:-1], qkv_weight.shape[0])
        out = qkv[..., : out_weight.shape[1]]
        calls = _linear(x, qkv_weight), _attention(qkv, core, heads, k["options"])
        flops, moved = zip(*calls, _linear(out, out_weight))
        return Cost(sum(flops), sum(moved))
    cost = temporal_block_cost if core == "time" else linear_attention_block_cost
    return cost(x.shape, heads, qkv_weight.shape[0] // (3 * heads), x.element_size())


_OPS: dict[tuple[Any, str], Callable[..., Cost]] = {
    (conv, "space_conv"): _conv,
    (conv, "space_conv_transpose"): lambda x, weight, bias=None: space_conv_transpose_cost(
        x.shape, weight.shape, itemsize=x.element_size()
    ),
    (norm, "norm_act"): _norm,
    (resnet, "conv_group_norm"): _conv_norm,
    (attention, "attention_block"): _block,
    (attention, "attention"): _attention,
    (F, "linear"): _linear,
}


def network_costs(net: nn.Module, x: Tensor, time: Tensor, dtype: torch.dtype) -> list[Cost]:
    """One Cost per op call of ``net(x, time)`` in ``dtype``; runs on fake tensors."""
    costs: list[Cost] = []
    depth = 0

    def recorded(op: Callable[..., Any], cost: Callable[..., Cost]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:  # do not count the ops inside an op
                costs.append(cost(*args, **kwargs))
            depth += 1
            try:
                return op(*args, **kwargs)
            finally:
                depth -= 1

        return call

    patches = [
        mock.patch.object(module, name, recorded(getattr(module, name), cost))
        for (module, name), cost in _OPS.items()
    ]
    net = copy.deepcopy(net).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, use_backend("reference"):
        inputs = fake.from_tensor(x.to(dtype)), fake.from_tensor(time)
        for patch in patches:
            patch.start()
        try:
            net(*inputs)
        finally:
            for patch in patches:
                patch.stop()
    return costs
