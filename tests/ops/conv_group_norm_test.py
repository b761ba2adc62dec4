"""conv_group_norm, beside the suite: what it launches, what a block keeps, who adds the bias."""

from __future__ import annotations

import collections

import pytest
import torch
import torch._dynamo.testing
from op_cases import ROWS, by_reference, make
from peer import PeerMissing, import_peer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.kernels import space_conv_library
from fastvdm.layers.norm import Norm
from fastvdm.layers.resnet import PreNormResnetBlock, ResnetBlock
from fastvdm.ops import conv_group_norm as ops
from fastvdm.ops import norm_act as norm_ops
from fastvdm.ops import space_conv as conv_ops
from fastvdm.ops.conv_group_norm import conv_group_norm, space_conv
from fastvdm.runtime.config import use_backend
from fastvdm.testing import grads


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
    options = dict(F=3, N=9, groups=3, per_frame=True, given=("bias", "norm_bias", "residual"))
    case = make(ROWS["conv_group_norm/group"], torch.float32, device, options | dict(E=0))
    case.tensors["bias"].fill_(1e4)
    inputs = list(case.tensors.values())
    with use_backend("triton"):
        y = case.first(*inputs)
    ref = by_reference(case.first)(*(t.double() for t in inputs))
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


# --- the bias of a convolution, in the norm after it ----------------------------------------------


class Activations(TorchDispatchMode):
    """Counts ops on activations by name."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(args[0] if args else None, Tensor) and args[0].ndim == 5:
            self.seen[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda_library(monkeypatch):
    """The choices of CUDA on a CPU: library convolutions without a bias, and norms in Triton."""
    for module in (space_conv_library, ops):
        monkeypatch.setattr(module, "adds_bias_apart", lambda x, kernel: kernel > 1)
    choose = conv_ops.select

    def of_library(*call):
        which = choose(*call)
        return which if which != "cpu" else "library" if call[-2] is True else "torch"  # of a pair

    monkeypatch.setattr(conv_ops, "select", of_library)
    monkeypatch.setattr(norm_ops, "select", lambda *a: "triton")


def group(channels):
    return Norm("group", channels, groups=2)


BLOCKS = {  # name: (block, channels of x and x2)
    "peer": (lambda: ResnetBlock(6, 6, group, emb_dim=5), 6, 0),
    "peer_pair": (lambda: ResnetBlock(10, 6, group, emb_dim=5), 6, 4),
    "paper": (lambda: PreNormResnetBlock(6, 6, group, emb_dim=5), 6, 0),
    "paper_up": (lambda: PreNormResnetBlock(6, 6, group, emb_dim=5, resample="up"), 6, 0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_no_bias_is_added_between_a_convolution_and_its_norm(name, cuda_library):
    """Each 3x3 or 4x4 that feeds a norm is a bias-free library call; no add is left but the one
    after the last convolution of the norm-first block, whose residual is an add as well."""
    make, channels, c2 = BLOCKS[name]
    block = make()
    x, emb = torch.randn(1, 2, 4, 6, channels), torch.randn(1, 5)
    x2 = torch.randn(1, 2, 4, 6, c2) if c2 else None
    with torch.no_grad(), Activations() as seen:
        block(x, emb, x2)
    assert seen.seen["add"] + seen.seen["add_"] == (2 if name.startswith("paper") else 0)


def test_the_count_sees_a_bias(cuda_library):
    """Negative control: the same convolution alone."""
    with torch.no_grad(), Activations() as seen:
        space_conv(torch.randn(1, 2, 4, 6, 6), torch.randn(8, 6, 3, 3), torch.randn(8))
    assert seen.seen["add"] == 1


def test_who_takes_the_bias(monkeypatch):
    """CUDA's library with a kernel larger than 1x1, and nobody else."""
    given = []

    def norm(y, *_, x_bias=None, **__):
        given.append(x_bias is not None)
        return y

    monkeypatch.setattr(ops, "norm_act", norm)

    def ask(kernel, upsample=None, pair=False, which="torch", device="cuda"):
        monkeypatch.setattr(ops, "adds_bias_apart", lambda x, k: device == "cuda" and k > 1)
        monkeypatch.setattr(ops, "choose", lambda *a: which)
        monkeypatch.setattr(ops, "convolve", lambda which, x, *a, **k: x)
        monkeypatch.setattr(ops, "space_conv_stats", lambda x, *a, **k: (x, x, x))
        x, x2 = torch.empty(1, 1, 4, 4, 6), torch.empty(1, 1, 4, 4, 2) if pair else None
        weight = torch.empty(8, 8 if pair else 6, kernel, kernel)
        conv_group_norm(x, weight, torch.empty(8), torch.empty(8), x2=x2, upsample=upsample)
        return given.pop()

    assert ask(3) and ask(3, pair=True, which="library") and ask(3, upsample="nearest")
    assert not ask(1) and not ask(3, device="cpu")
    for which in ("triton", "cpu", "reference"):
        assert not ask(3, which=which)
    assert not space_conv_library.adds_bias_apart(torch.empty(1, 1, 4, 4, 6), 3)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_same_with_the_bias_in_the_norm(name, cuda_library):
    """Output and every gradient, that of the biases included."""
    make, channels, c2 = BLOCKS[name]
    block = make()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(1, 2, 4, 6, channels), torch.randn(1, 5)
    x2 = torch.randn(1, 2, 4, 6, c2) if c2 else None
    found = []
    for backend in ("auto", "reference"):
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        with use_backend(backend), pytest.MonkeyPatch.context() as patch:
            if backend == "reference":
                patch.setattr(norm_ops, "select", lambda *a: "reference")
            y = block(leaves[0], emb, x2)
        found.append((y, *torch.autograd.grad(y.square().mean(), leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compile_of_both(cuda_library):
    """Convolution and norm in one graph, with the gradients of the eager call."""
    torch._dynamo.reset()
    w, b, g = torch.randn(6, 6, 3, 3) / 9, torch.randn(6), torch.randn(6)

    def block(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return conv_group_norm(x, w, b, g, groups=2, residual=x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    inputs = (torch.randn(2, 4, 5, 7, 6), w, b, g)
    dy = torch.randn_like(inputs[0])
    got, expected = (grads(f, inputs, dy) for f in (compiled, block))
    for a, e in zip(got[0] + got[1], expected[0] + expected[1]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_one_tensor_is_saved(cuda_library):
    """The bias-free output of the convolution: one tensor of its size, as without a bias."""
    x = torch.randn(1, 2, 4, 6, 6)
    w, b = torch.randn(8, 6, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        conv_group_norm(x, w, b, torch.ones(8), groups=2)
    large = [n for n in saved.values() if n >= 2 * 4 * 6 * 8 * 4]
    assert len(large) == 2  # the output, and the weight of 1728 bytes
