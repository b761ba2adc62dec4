"""The cache of transformed weights: never stale, the same bits with and without it, bounded."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fastvdm.ops import _space_conv
from fastvdm.ops import space_conv as convolutions
from fastvdm.ops.attention_block import attention_block
from fastvdm.runtime import extension
from fastvdm.testing import cpu_isas, use_cpu_isa

pytestmark = pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"no C++ extension: {extension.reason_off()}"
)
MIB = 1 << 20


def state() -> tuple[int, int, int, int]:
    """Bytes kept, entries kept, weights known, calls served."""
    return torch.ops.fastvdm_C.packed_weights_state()


def set_limit(limit: int) -> int:
    return torch.ops.fastvdm_C.set_packed_weights_limit(limit)


@pytest.fixture(autouse=True)
def empty_cache():
    before = set_limit(0)
    set_limit(64 * MIB)
    yield
    set_limit(0)
    set_limit(before)


def conv(x, weight, turned=False, m=2):
    return torch.ops.fastvdm_C.conv3x3_cpu(x, None, weight, None, None, turned, m)


def fresh(x, weight, **options):
    """The result of a process that knows no weights."""
    limit = set_limit(0)
    try:
        return conv(x, weight, **options)
    finally:
        set_limit(limit)


def pair(cin=5, out=7, dtype=torch.float32):
    x, weight = torch.randn(1, 4, 5, cin), torch.randn(out, cin, 3, 3)
    return x.to(dtype), weight.to(dtype)


def keep(x, weight, **options):
    for _ in range(3):
        y = conv(x, weight, **options)
    assert state()[1] >= 1
    return y


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", cpu_isas() or ["none"])
def test_same_bits(isa, dtype, turned, m):
    with use_cpu_isa(isa):
        x = torch.randn(2, 5, 7, 20).to(dtype)
        weight = torch.randn(*((20, 33) if turned else (33, 20)), 3, 3).to(dtype)
        expected = fresh(x, weight, turned=turned, m=m)
        for kept, served in [(0, 0), (1, 0), (1, 1), (1, 2)]:
            hits = state()[3]
            assert torch.equal(conv(x, weight, turned=turned, m=m), expected)
            assert state()[1] == kept and state()[3] - hits == min(served, 1)


LAYOUTS = {
    "slice": lambda w: torch.cat([w, w, w], 1)[:, 20:40],
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "channels_last_slice": lambda w: torch.cat([w, w], 1).contiguous(
        memory_format=torch.channels_last
    )[:, :20],
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second_tap": lambda w: F.pad(w, (1, 2, 2, 1)).repeat_interleave(2, 3)[:, :, 2:5, 2:8:2],
    "expanded": lambda w: w[:, :1].expand_as(w),
    "unaligned": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    """Each element is seen in every layout, and nothing beside the weight is."""
    x = torch.randn(1, 3, 4, 20).to(dtype)
    base = torch.randn(33, 20, 3, 3).to(dtype)
    weight = LAYOUTS[layout](base)
    assert torch.equal(keep(x, weight), fresh(x, weight))
    for _ in range(8):
        y = keep(x, weight)
        at = tuple(int(torch.randint(n, ())) for n in weight.shape)
        weight.data[at] += 1
        assert torch.equal(conv(x, weight), fresh(x, weight))
        assert not torch.equal(conv(x, weight), y)


def test_what_lies_beside_a_slice_does_not_count():
    x, whole = torch.randn(1, 3, 4, 8), torch.randn(9, 24, 3, 3)
    weight = whole[:, 8:16]
    keep(x, weight)
    whole[:, :8] += 1
    hits = state()[3]
    conv(x, weight)
    assert state()[3] == hits + 1


def update_in_place(w):
    w.data.mul_(1.5)


def update_from_copy(w):
    w.data.copy_(torch.randn_like(w))


def update_ema(w):
    with torch.no_grad():
        w.lerp_(torch.randn_like(w), 1e-4)


def update_optimizer(w):
    p = torch.nn.Parameter(w)
    assert p.data_ptr() == w.data_ptr()
    p.grad = torch.randn_like(p)
    torch.optim.SGD([p], lr=1e-3).step()


def update_numpy(w):
    w.numpy()[0, 0, 1, 2] = 7


def update_storage(w):
    w.untyped_storage()[5] = (w.untyped_storage()[5] + 1) % 256


@pytest.mark.parametrize(
    "update",
    [
        update_in_place,
        update_from_copy,
        update_ema,
        update_optimizer,
        update_numpy,
        update_storage,
        lambda w: w.fill_(float("nan")),
        lambda w: w.neg_(),
        lambda w: w.copy_(w.flip(0).clone()),
        lambda w: w.copy_(w.roll(1, 1).clone()),
    ],
)
def test_no_update_goes_unnoticed(update):
    x, weight = pair()
    keep(x, weight)
    update(weight)
    hits = state()[3]
    y = conv(x, weight)
    assert state()[1] == 0 and state()[3] == hits, "freed at once, and not used"
    torch.testing.assert_close(y, fresh(x, weight), rtol=0, atol=0, equal_nan=True)


def test_nan_and_signed_zero():
    """Bits are compared, not values: a NaN equals itself, and -0 is not 0."""
    x, weight = pair()
    weight[2, 3, 1, 1] = float("nan")
    torch.testing.assert_close(keep(x, weight), fresh(x, weight), rtol=0, atol=0, equal_nan=True)
    weight.zero_()
    y = keep(torch.ones_like(x), weight)
    weight.neg_()
    assert state()[1] == 1
    assert torch.equal(conv(torch.ones_like(x), weight), y) and state()[1] == 0


def test_address_reuse():
    x = torch.randn(1, 4, 5, 16)
    storage = torch.empty(16 * 16 * 9)
    for _ in range(5):  # the same address, sizes and strides
        weight = storage.copy_(torch.randn_like(storage)).view(16, 16, 3, 3)
        assert torch.equal(keep(x, weight), fresh(x, weight))
    seen = set()
    for _ in range(50):  # as the allocator does it
        weight = torch.randn(16, 16, 3, 3)
        seen.add(weight.data_ptr())
        assert torch.equal(conv(x, weight), fresh(x, weight))
        del weight
    if len(seen) == 50:
        pytest.skip("the allocator gave no address twice, as the address sanitizer's does")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_and_every_exchange_counts(dtype):
    """Content seen twice is kept, so a change that went unnoticed would leave something kept."""
    x, weight = pair(2, 3, dtype)
    flat = weight.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    bits = flat.element_size() * 8
    conv(x, weight)
    for i, b in itertools.product(range(flat.numel()), range(bits)):
        flat[i] ^= (1 << b) if b < bits - 1 else -(1 << b)
        conv(x, weight)
    assert state()[1] == 0
    for i, j in itertools.combinations(range(flat.numel()), 2):
        if flat[i] != flat[j]:
            flat[[i, j]] = flat[[j, i]]
            conv(x, weight)
    assert state()[1] == 0
    conv(x, weight)
    assert state()[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchanges_in_large_weights(dtype):
    x, weight = pair(64, 48, dtype)
    flat = weight.view(-1)
    conv(x, weight)
    for _ in range(300):
        i, j = (int(torch.randint(flat.numel(), ())) for _ in range(2))
        if flat[i] != flat[j]:
            flat[[i, j]] = flat[[j, i]]
            conv(x, weight)
    weight.view(48, -1)[[3, 40]] = weight.view(48, -1)[[40, 3]]
    conv(x, weight)
    weight.copy_(weight.transpose(2, 3).clone())
    conv(x, weight)
    assert state()[1] == 0


def test_training_keeps_nothing():
    x, weight = pair()
    for _ in range(6):
        conv(x, weight)
        conv(torch.randn(1, 4, 5, 7), weight, turned=True)
        weight.mul_(0.999)
    assert state()[:3] == (0, 0, 2)


def test_forms_are_kept_apart():
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(6, 6, 3, 3)
    found = {}
    for turned, m in itertools.product((False, True), (2, 4)):
        found[turned, m] = keep(x, weight, turned=turned, m=m)
    assert state()[1] == 4
    for (turned, m), y in found.items():
        assert torch.equal(y, fresh(x, weight, turned=turned, m=m))


def test_limit_zero_is_off():
    set_limit(0)
    x, weight = pair()
    for _ in range(4):
        conv(x, weight)
    assert state()[:3] == (0, 0, 0)
    with pytest.raises(RuntimeError, match="must not be negative"):
        set_limit(-1)


def test_bytes_stay_within_the_limit_and_the_unused_yield():
    x = torch.randn(1, 4, 5, 16)
    weights = [torch.randn(16, 16, 3, 3) for _ in range(6)]
    expected = [fresh(x, weight) for weight in weights]
    keep(x, weights[0])
    each = state()[0]
    set_limit(3 * each)
    for weight, y in zip(weights, expected):
        for _ in range(4):
            assert torch.equal(conv(x, weight), y)
        assert state()[0] <= 3 * each
    assert state()[1] == 3
    hits = state()[3]
    for weight in reversed(weights[3:]):  # the three last ones
        conv(x, weight)
    assert state()[3] == hits + 3


def test_a_network_larger_than_the_limit_keeps_a_part():
    """Always evicting the oldest would keep nothing until its next use."""
    x = torch.randn(1, 4, 5, 16)
    weights = [torch.randn(16, 16, 3, 3) for _ in range(6)]
    keep(x, weights[0])
    set_limit(3 * state()[0])
    for _ in range(3):
        for weight in weights:
            conv(x, weight)
    hits = state()[3]
    for weight in weights:
        conv(x, weight)
    assert state()[3] - hits == 3


def test_the_unused_are_dropped():
    x, weight = pair()
    keep(x, weight)
    other = torch.randn(7, 5, 3, 3)
    for _ in range(4096 + 256):
        conv(x[:, :1, :1], other)
    assert state()[1:3] == (1, 1)


def test_threads():
    """Entries come, go and change under one another; each result is of the weights given."""
    x = torch.randn(1, 4, 5, 16)
    shared = [torch.randn(16, 16, 3, 3) for _ in range(4)]
    expected = [fresh(x, w) for w in shared]
    keep(x, shared[0])
    set_limit(2 * state()[0])
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        random = torch.Generator().manual_seed(seed)
        own = torch.randn(16, 16, 3, 3, generator=random)
        barrier.wait()
        good = True
        for i in range(300):
            k = int(torch.randint(4, (), generator=random))
            good &= torch.equal(conv(x, shared[k]), expected[k])
            if i % 5 == 0:
                own.add_(1)
            good &= torch.equal(conv(x, own), conv(x, own.clone()))
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert state()[0] <= 2 * 16 * (16 * 16 + 16) * 4


def test_environment_variable():
    code = """if True:
        import torch, fastvdm
        x, w = torch.randn(1, 4, 5, 6), torch.randn(7, 6, 3, 3)
        for _ in range(3):
            torch.ops.fastvdm_C.conv3x3_cpu(x, None, w, None, None, False, 2)
        print(torch.ops.fastvdm_C.packed_weights_state()[1])
        print(torch.ops.fastvdm_C.set_packed_weights_limit(0))"""
    for value, printed in [("0", "0\n0\n"), ("3", "1\n3145728\n"), ("-1", None)]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**__import__("os").environ, "FASTVDM_PACKED_WEIGHTS_MB": value},
        )
        if printed is None:
            assert done.returncode != 0 and "FASTVDM_PACKED_WEIGHTS_MB" in done.stderr
        else:
            assert done.stdout == printed, done.stderr


def test_autocast_packs_a_weight_once(monkeypatch):
    """No copy of it in autocast's dtype stands between, and no gradient is rounded to it."""
    monkeypatch.setattr(_space_conv, "AMX", False)  # where oneDNN takes the convolution
    conv = torch.nn.Parameter(torch.randn(32, 32, 3, 3))
    qkv, out = torch.nn.Parameter(torch.randn(96, 32)), torch.nn.Parameter(torch.randn(32, 32))
    x = torch.randn(1, 2, 4, 4, 32)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            y = convolutions.space_conv(x, conv)
            for core in ("time", "linear"):
                y = attention_block(y, torch.ones(32), qkv, out, core=core, heads=1)
            return y

    with torch.no_grad():
        forward()
        forward()
        known, hits = state()[2:]
        forward()
    assert state()[2] == known and state()[3] - hits == known
    forward().float().square().sum().backward()
    for weight in (conv, qkv, out):
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    y = forward().float().sum()
    with torch.no_grad():
        conv.mul_(2)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation"
    ):  # as without autocast
        y.backward()
