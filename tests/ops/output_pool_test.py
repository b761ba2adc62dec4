"""Memory of large outputs that the C++ backend keeps (csrc/cpu/common/outputs.cpp)."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastvdm.runtime import extension

pytestmark = pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"no C++ extension: {extension.reason_off()}"
)
MIB = 1 << 20


def kept() -> int:
    return torch.ops.fastvdm_C.output_pool_bytes()


def make(pixels: int = 256) -> Tensor:
    """Of ``pixels`` KiB."""
    x = torch.randn(1, pixels, 1, 256)
    return torch.ops.fastvdm_C.linear_fwd_cpu(x, torch.eye(256), None)


@pytest.fixture(autouse=True)
def limit():
    before = torch.ops.fastvdm_C.set_output_pool_limit(0)  # what others left goes
    torch.ops.fastvdm_C.set_output_pool_limit(64 * MIB)
    yield
    torch.ops.fastvdm_C.set_output_pool_limit(0)
    torch.ops.fastvdm_C.set_output_pool_limit(before)


def test_a_freed_block_is_the_next_output():
    y = make(2048)
    address, size = y.data_ptr(), y.untyped_storage().nbytes()
    assert kept() == 0 and size == 2 * MIB
    del y
    assert kept() == 2 * MIB
    again = make(2040)  # nearly as large
    assert again.data_ptr() == address and kept() == 0


def test_views_and_copies_keep_their_block():
    y = make(2048)
    value, view = y.clone(), y[0, :3]
    del y
    assert kept() == 0
    other = make(2048)
    assert other.data_ptr() != view.data_ptr() and torch.equal(view, value[0, :3])
    del view
    assert kept() == 2 * MIB


def test_small_outputs_stay_with_the_system():
    y = make(64)
    del y
    assert kept() == 0


def test_the_limit_holds_and_the_oldest_goes():
    torch.ops.fastvdm_C.set_output_pool_limit(5 * MIB)
    first, second, third = make(2048), make(2048), make(2048)
    newest = third.data_ptr()
    del first, second, third
    assert kept() == 4 * MIB
    assert make(2048).data_ptr() == newest
    assert torch.ops.fastvdm_C.set_output_pool_limit(MIB) == 5 * MIB
    assert kept() == 0
    with pytest.raises(RuntimeError, match="-1"):
        torch.ops.fastvdm_C.set_output_pool_limit(-1)


def test_what_is_larger_than_the_limit_takes_nothing_else_along():
    torch.ops.fastvdm_C.set_output_pool_limit(5 * MIB)
    small, large = make(2048), make(8192)
    del small
    del large
    assert kept() == 2 * MIB


def test_off():
    torch.ops.fastvdm_C.set_output_pool_limit(0)
    y = make(2048)
    del y
    assert kept() == 0


def test_outputs_are_tensors_like_any(tmp_path):
    y = make(2048)
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), y)
    assert torch.equal(torch.from_numpy(y.numpy()), y)
    assert y.clone().share_memory_().is_shared() and y.share_memory_().is_shared()


def test_threads():
    def work(seed: int) -> bool:
        x = torch.full((1, 1024 + 128 * seed, 1, 256), float(seed))
        for _ in range(40):
            y = torch.ops.fastvdm_C.linear_fwd_cpu(x, torch.eye(256), None)
            if not torch.equal(y, x):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_environment():
    ask = "import torch, fastvdm; print(torch.ops.fastvdm_C.set_output_pool_limit(0))"
    for value, expected in (("", 512 * MIB), ("7", 7 * MIB), ("0", 0)):
        done = subprocess.run(
            [sys.executable, "-c", ask], capture_output=True, text=True,
            env=os.environ | {"FASTVDM_OUTPUT_POOL_MB": value},
        )  # fmt: skip
        assert done.stdout.strip() == str(expected), done.stderr
