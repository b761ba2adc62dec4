"""torch's FLOP counter sees what the ops do: each formula against the count of plain torch."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from peer import peer_or_skip
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastvdm.ops
from fastvdm import UNet3D, use_backend
from fastvdm.layers.attention import Attention
from fastvdm.ops import space_conv as conv
from fastvdm.ops._call import BODIES
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import define, fake
from fastvdm.ops.axis_attention import axis_attention_bwd, axis_attention_fwd
from fastvdm.ops.linear import linear_bwd, linear_fwd
from fastvdm.ops.linear_attention import linear_attention_bwd, linear_attention_fwd
from fastvdm.ops.linear_attention_block import (
    linear_attention_block_bwd,
    linear_attention_block_fwd,
)
from fastvdm.ops.linear_residual import linear_residual_bwd, linear_residual_fwd
from fastvdm.ops.temporal_block import temporal_block_bwd, temporal_block_fwd
from fastvdm.reference.attention_block import attention_block_ref
from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.reference.linear_residual import linear_residual_ref
from fastvdm.reference.space_conv import space_conv_ref, space_conv_transpose_ref
from fastvdm.runtime import extension

for _module in pkgutil.iter_modules(fastvdm.ops.__path__):
    importlib.import_module(f"fastvdm.ops.{_module.name}")


def counted(fn, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        fn(*args)
    return counter.get_total_flops()


def of_op(op, *args) -> int:
    """Of a call with empty tensors on no device: the formula sees nothing but shapes."""
    meta = [torch.empty(a, device="meta") if isinstance(a, tuple) else a for a in args]
    return counted(op, *meta)


def of_reference(fn, *shapes, **options) -> tuple[int, int]:
    """Forward, and backward with every gradient."""
    leaves = [None if s is None else torch.randn(s, requires_grad=True) for s in shapes]
    with FlopCounterMode(display=False) as counter:
        out = fn(*leaves, **options)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_every_op_has_a_formula():
    ours = [name for name in BODIES if "_test_" not in name]  # those are other tests'
    assert len(ours) > 20
    for name in ours:
        assert getattr(torch.ops.fastvdm, name) in flop_registry, name


@pytest.mark.skipif(extension.reason_off() is not None, reason="no C++ extension")
def test_every_launcher_has_one():
    """An exported network calls them directly."""
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.split("::")[1] for s in schemas if s.name.startswith("fastvdm_C::")}
    for name in (n for n in names if n.endswith("_cpu")):
        assert getattr(torch.ops.fastvdm_C, name) in flop_registry, name
    x, x2, y = (2, 6, 7, 3), (2, 6, 7, 2), (2, 6, 7, 4)
    product = 2 * 2 * 6 * 7 * 9 * 4
    call = torch.ops.fastvdm_C.conv3x3_cpu
    x, x2, y, weight = (torch.zeros(s) for s in (x, x2, y, (4, 5, 3, 3)))
    assert counted(call, x, x2, weight, None, None, False, 2) == 5 * product
    assert counted(call, y, None, weight, None, None, True, 2) == 5 * product
    assert counted(torch.ops.fastvdm_C.space_conv_dx_cpu, y[None], weight) == 5 * product
    call, videos = torch.ops.fastvdm_C.space_conv_dw_cpu, [t[None] for t in (y, x, x2)]
    assert counted(call, *videos, weight) == 5 * product
    assert counted(torch.ops.fastvdm_C.conv3x3_dw_cpu, y, x, x2, weight, 2) == 5 * product
    call = torch.ops.fastvdm_C.linear_dx_cpu
    assert counted(call, torch.zeros(3, 5, 7), torch.zeros(7, 11)) == 2 * 15 * 7 * 11


def test_projections():
    forward, backward = of_reference(torch.nn.functional.linear, (3, 5, 7), (11, 7), (11,))
    x, dy, w, b = (3, 5, 7), (3, 5, 11), (11, 7), (11,)
    assert of_op(linear_fwd, x, w, b, "cpu") == forward
    assert of_op(linear_bwd, dy, x, w, True, True, True, "cpu") == backward == 2 * forward
    assert of_op(linear_bwd, dy, x, w, False, True, True, "cpu") == forward
    assert of_op(linear_bwd, dy, x, w, False, False, True, "cpu") == 0
    assert of_reference(linear_residual_ref, (3, 5, 11), x, w) == (forward, backward)
    assert of_op(linear_residual_fwd, dy, x, w, b, "triton") == forward
    assert of_op(linear_residual_bwd, dy, x, w, b, True, True, True, "triton") == backward
    assert of_op(linear_residual_bwd, dy, x, w, b, False, True, True, "triton") == forward


# name → x, x2, weight, stride
CONVS = {
    "3x3": ((2, 3, 6, 7, 5), None, (4, 5, 3, 3), 1),
    "pair": ((1, 2, 5, 6, 3), (1, 2, 5, 6, 2), (4, 5, 3, 3), 1),
    "1x1": ((1, 2, 5, 6, 3), (1, 2, 5, 6, 2), (4, 5, 1, 1), 1),
    "down": ((1, 2, 6, 8, 5), None, (7, 5, 4, 4), 2),
}


@pytest.mark.parametrize("x, x2, weight, stride", CONVS.values(), ids=CONVS)
def test_convolutions(x, x2, weight, stride):
    def ref(x, w, x2):
        return space_conv_ref(x, w, None, x2, stride)

    forward, backward = of_reference(ref, x, weight, x2)
    args = (x, x2, weight, None, None, stride)
    assert of_op(conv.space_conv_fwd, *args, "triton") == forward
    assert of_op(conv.space_conv_stats_fwd, *args, 1, False, 1e-5, "triton") == forward
    dy = conv.out_shape(torch.empty(x), torch.empty(weight), stride)

    def back(*needs):
        return of_op(conv.space_conv_bwd, dy, x, x2, weight, stride, *needs, "triton")

    assert back(True, x2 is not None, True, True) == backward == 2 * forward
    assert back(False, False, True, True) == forward
    assert back(True, False, False, False) == forward * x[-1] // weight[1]
    assert back(False, False, False, True) == 0


def test_transposed_convolution():
    x, weight, dy = (1, 2, 3, 5, 6), (6, 4, 4, 4), (1, 2, 6, 10, 4)
    forward, backward = of_reference(space_conv_transpose_ref, x, weight)
    assert of_op(conv.space_conv_transpose_fwd, x, weight, None, None, "triton") == forward
    for dx, dw in ((True, True), (True, False), (False, True)):
        found = of_op(conv.space_conv_transpose_bwd, dy, x, weight, dx, dw, True, "triton")
        assert found == (dx + dw) * forward
    assert backward == 2 * forward


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("tables", [(), (7,), (7, 9)], ids=str)
def test_attention(tables, images):
    """Tables with more rows than a query meets: then plain torch multiplies no more. A kernel makes
    the scores again in the backward, where plain torch kept them."""
    b, f, h, w, heads, d = 2, 5, 3, 1, 2, 7
    n, c, inner = f - images, 11, heads * d
    rel_k, rel_v = ((1, rows, d) if rows else None for rows in (*tables, 0, 0)[:2])
    scores = 2 * b * h * w * heads * n * n * d

    def ref(qkv, rel_k, rel_v):
        return axis_attention_ref(qkv, axis="time", rel_k=rel_k, rel_v=rel_v, num_images=images)

    qkv, dout = (b, f, h, w, 3, heads, d), (b, f, h, w, heads, d)
    forward, backward = of_reference(ref, qkv, rel_k, rel_v)
    rest = (rel_k, rel_v, None, None, images, 1.0)
    assert of_op(axis_attention_fwd, qkv, 1, None, *rest, "triton") == forward
    again = scores * (1 + (rel_k is not None))

    def back(*needs):
        args = (dout, qkv, (0,), (0,), 1, (heads, f, f), *rest)
        return of_op(axis_attention_bwd, *args, *needs, "triton")

    needs = (rel_k is not None, rel_v is not None)
    assert back(True, True, *needs) == backward + again
    assert back(False, True, False, False) == scores * (2 + len(tables))

    x, qw, ow = (b, f, h, w, c), (3 * inner, c), (c, inner)

    def block(x, norm, qw, ow, rel_k, rel_v):
        return attention_block_ref(
            x, norm, qw, ow, core="time", heads=heads, rel_k=rel_k, rel_v=rel_v, num_images=images
        )

    forward, backward = of_reference(block, x, (c,), qw, ow, rel_k, rel_v)
    weights = (x, (c,), None, qw, None, ow, None, heads, 1e-5, None, *rest[:-1])
    assert of_op(temporal_block_fwd, *weights, "triton") == forward

    def block_back(*needs):
        return of_op(temporal_block_bwd, x, *weights, *needs, "triton")

    assert block_back(True, True, True, True, True) == backward + again
    one = 2 * b * f * h * w * c * inner
    assert block_back(True, False, True, True, True) == backward + again - 3 * one
    assert block_back(True, True, False, True, True) == backward + again - one


def test_linear_attention():
    """The block multiplies the context by both projections instead of every pixel's value."""
    b, f, h, w, heads, d, c = 2, 3, 5, 4, 2, 7, 11
    qkv, dout, context = (b, f, h, w, 3, heads, d), (b, f, h, w, heads, d), (b, f, heads, d, d)
    forward, backward = of_reference(linear_attention_ref, qkv)
    assert of_op(linear_attention_fwd, qkv, 1.0, "triton") == forward
    args = (dout, qkv, context[:-1], context, 1.0, "triton")
    assert of_op(linear_attention_bwd, *args) == backward
    x, inner = (b, f, h, w, c), heads * d
    product, fold = 2 * b * f * h * w * c * inner, 2 * b * f * inner * d * c
    args = (x, (c,), None, (3 * inner, c), (c, inner), None)
    assert of_op(linear_attention_block_fwd, *args, heads, 1e-5, "cpu") == (4 * product + 2 * fold)
    for qkv_too, out_too in ((True, True), (False, True), (False, False)):
        found = of_op(
            linear_attention_block_bwd, x, *args, (b, f, heads, d, c), (b, f, heads, d), heads,
            1e-5, True, qkv_too, out_too, "cpu",
        )  # fmt: skip
        assert found == (6 + 2 * qkv_too) * product + (4 + qkv_too + out_too) * fold


SIZE = dict(dim=16, dim_mults=(1, 2))


def network_counts(model, x: Tensor) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        out = model(x, torch.tensor([3]))
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


def attention_inputs(model, x: Tensor) -> list[tuple[nn.Module, torch.Size]]:
    seen, hooks = [], []
    for m in model.modules():
        if isinstance(m, Attention) and m.core != "linear":
            hooks.append(m.register_forward_pre_hook(lambda m, a: seen.append((m, a[0].shape))))
    model(x, torch.tensor([3]))
    for hook in hooks:
        hook.remove()
    return seen


def test_network_counts_as_the_peers():
    """To the last product: on plain torch nothing differs. The counter hangs hooks on all modules,
    so that the layers are called one by one; the backward of softmax attention makes its scores
    again."""
    network = peer_or_skip("0.7.0").Unet3D(**SIZE)
    model = UNet3D.from_unet3d(network, exact=True)
    x = torch.randn(1, 3, 4, 16, 16)
    forward, both = network_counts(network, x)
    with use_backend("reference"):
        assert network_counts(model, x) == (forward, both)
    if extension.reason_off() is not None:
        return  # then there is nothing else on a CPU
    for m, (b, f, h, w, _) in attention_inputs(model, x):
        n, outer = (f, h * w) if m.core == "time" else (h * w, f)
        both += 2 * b * outer * n * n * m.heads * m.head_dim
    assert network_counts(model, x) == (forward, both)


@define
def flops_test_fwd(x: Tensor, factor: int = 3) -> Tensor:
    return x.clone()


@fake(flops_test_fwd)
def _(x, factor=3):
    return torch.empty_like(x)


def test_whichever_is_imported_first():
    """fastvdm was, for its ops; for this one the counter."""

    @flops(flops_test_fwd)
    def _(*, x, factor=3):
        return Cost(factor * x[0], 0)

    assert of_op(flops_test_fwd, (5, 2)) == 15 and of_op(flops_test_fwd, (5, 2), 7) == 35
