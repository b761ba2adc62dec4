"""conv_group_norm: the fused op against its parts, what it launches, and what a block keeps.

Parity of the parts is in space_conv_test.py and norm_act_test.py.
"""

from __future__ import annotations

import collections

import pytest
import torch
import torch._dynamo.testing
from peer import PeerMissing, import_peer
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.ops.conv_group_norm import conv_group_norm
from fastvdm.reference.conv_group_norm import conv_group_norm_ref
from fastvdm.runtime.config import use_backend
from fastvdm.testing import assert_parity

# name: x (B, F, H, W, C), C2, Cout, options
CASES = {
    "video": ((2, 2, 5, 4, 6), 0, 8, {"kind": "group", "groups": 4}),
    "frames": ((1, 3, 3, 5, 4), 0, 9, {"kind": "group", "groups": 3, "per_frame": True}),
    "pair": ((1, 2, 4, 5, 6), 3, 8, {"kind": "group", "groups": 2}),
    "rms": ((2, 2, 3, 5, 6), 3, 7, {"kind": "rms"}),
}
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "scale", "shift", "residual", "x2")


def make_inputs(case, device):
    shape, c2, cout, _ = case
    b = shape[0]
    fan = 9 * (shape[-1] + c2)
    shapes = [shape, (cout, shape[-1] + c2, 3, 3), (cout,), (cout,), (cout,), (b, cout), (b, cout)]
    inputs = [torch.randn(s, device=device) for s in shapes]
    inputs[1] *= fan**-0.5
    inputs.append(torch.randn(*shape[:-1], cout, device=device))
    inputs.append(torch.randn(*shape[:-1], c2, device=device) if c2 else None)
    return inputs


def bind(fn, options, backend):
    def call(x, weight, bias, norm_weight, norm_bias, scale, shift, residual, x2):
        with use_backend(backend):
            return fn(
                x, weight, bias, norm_weight, norm_bias, scale=scale, shift=shift,
                residual=residual, x2=x2, **options,
            )  # fmt: skip

    return call


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, backend, device):
    options = case[-1]
    assert_parity(
        bind(conv_group_norm, options, backend), bind(conv_group_norm_ref, options, "reference"),
        make_inputs(case, device), names=NAMES,
    )  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts the ops that compute: views and empty tensors cost no launch."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        view = any(r.alias_info for r in func._schema.returns)
        if not view and name != "aten::promote_types":
            self.seen[name] += 1
        return out


def residual_block(x, film, w1, b1, g1, h1, w2, b2, g2, h2, *, kind="group"):
    """The peer's block: conv → norm → FiLM → SiLU → conv → norm → SiLU → + x."""
    c = x.shape[-1]
    h = conv_group_norm(
        x, w1, b1, g1, h1, kind=kind, groups=4, scale=film[:, :c], shift=film[:, c:]
    )
    return conv_group_norm(h, w2, b2, g2, h2, kind=kind, groups=4, residual=x)


def block_inputs(shape, device):
    c = shape[-1]
    half = lambda: [torch.randn(c, c, 3, 3), torch.randn(c), torch.randn(c), torch.randn(c)]  # noqa: E731
    tensors = [torch.randn(shape), torch.randn(shape[0], 2 * c), *half(), *half()]
    return [t.to(device) for t in tensors]


def test_a_residual_block_is_four_ops(device):
    """Two convolutions with the statistics in their epilogue, two norms, and nothing else: no cat,
    no layout change, no separate bias, FiLM, SiLU or residual."""
    inputs = block_inputs((1, 2, 3, 5, 8), device)
    with use_backend("triton"), torch.no_grad(), Ops() as ops:
        residual_block(*inputs)
    assert ops.seen == {"fastvdm::space_conv_stats_fwd": 2, "fastvdm::norm_act_fwd": 2}


def saved_bytes(run, leaves):
    """Bytes that autograd keeps for ``run()``, parameters and the caller's tensors left out."""
    mine = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("version, kind", [("0.7.0", "rms"), ("0.6.3", "group")])
def test_a_residual_block_keeps_half_of_what_the_peer_keeps(version, kind, device):
    """Beyond its input: the two pre-norm outputs, the activation between (the input of the second
    convolution) and the statistics. The peer keeps at least twice as much."""
    try:
        peer = import_peer(version)
    except PeerMissing as error:
        pytest.skip(str(error))
    shape = (1, 2, 6, 7, 16)
    inputs = [t.requires_grad_() for t in block_inputs(shape, device)]
    size = inputs[0].numel() * 4
    with use_backend("triton"):
        ours = saved_bytes(lambda: residual_block(*inputs, kind=kind), inputs)
    statistics = 2 * 2 * 4 * 4
    assert ours <= 3 * size + statistics

    block = peer.ResnetBlock(16, 16, time_emb_dim=8, **({"groups": 4} if kind == "group" else {}))
    block.to(device)
    video = torch.randn(1, 16, 2, 6, 7, device=device, requires_grad=True)
    emb = torch.randn(1, 8, device=device)
    theirs = saved_bytes(lambda: block(video, emb), [video, emb, *block.parameters()])
    assert theirs >= 2 * ours, (
        f"the peer keeps {theirs / size:.2f} activations, we {ours / size:.2f}"
    )


def test_compile_of_a_block(device):
    """One graph for two frame counts, with the gradients of the eager block."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(residual_block, fullgraph=True, backend=counter)
    with use_backend("auto"):  # the parts compile under Triton in their own tests
        for frames in (3, 4):
            inputs = [t.requires_grad_() for t in block_inputs((2, frames, 5, 7, 8), device)]
            torch._dynamo.mark_dynamic(inputs[0], 1)
            dy = torch.randn_like(inputs[0])
            y, expected = compiled(*inputs), residual_block(*inputs)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            pairs = (torch.autograd.grad(t, inputs, dy) for t in (y, expected))
            for a, e in zip(*pairs):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_large_mean(device):
    """A bias of 1e4 before the norm: the statistics of the epilogue keep their digits, too."""
    case = CASES["frames"]
    inputs = make_inputs(case, device)
    inputs[2] = torch.full_like(inputs[2], 1e4)
    wide = [None if t is None else t.double() for t in inputs]
    y = bind(conv_group_norm, case[-1], "triton")(*inputs)
    ref = bind(conv_group_norm_ref, case[-1], "reference")(*wide)
    assert (
        y.double() - ref
    ).abs().max() < 1e-2  # an ulp of 1e4 is 1e-3, and rstd and FiLM scale it


def test_bad_inputs():
    x, w, g = torch.randn(1, 2, 3, 4, 6), torch.randn(8, 6, 3, 3), torch.ones(8)
    with pytest.raises(ValueError, match="groups must divide the 8 channels, got 3"):
        conv_group_norm(x, w, None, g, groups=3)
    with pytest.raises(ValueError, match="kind must be"):
        conv_group_norm(x, w, None, g, kind="batch")
    with pytest.raises(ValueError, match="takes 6 channels"):
        conv_group_norm(x[..., :5], w, None, g)
