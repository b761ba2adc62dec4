"""What a launch compiles: arguments that are absent, 1 or of another dtype change a kernel, and the
interpreter, which runs Python, accepts more than the compiler does.

``aot_test.py`` compiles chosen configurations; here the launchers choose for an H100, with Triton's
own specialisation, on tensors of a CPU: everything but the launch itself. A driver that names sm_90
and has no device stands in for the GPU's. Run as a script, without the interpreter, this file
prints one JSON line per kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

SHARED = 227 * 1024  # of a block on sm_90


def axis_attention(shape, num_images=0, need=(True,) * 4, **given) -> None:
    from fastvdm.kernels import axis_attention as kernels

    b, f, _, _, heads, d = shape
    qkv = torch.empty(*shape[:4], 3, heads, d, dtype=torch.bfloat16)
    tensors = dict(
        bias=torch.empty(heads, f, f),
        rel_k=torch.empty(1, 5, d, dtype=qkv.dtype),
        rel_v=torch.empty(heads, 5, d, dtype=qkv.dtype),
        rotary=torch.empty(2, f, d // 4),
        focus_mask=torch.zeros(b, dtype=torch.bool),
    )
    options = [t if given.get(name, True) else None for name, t in tensors.items()]
    out, lse = kernels.axis_attention_fwd(qkv, 1, *options, num_images, 0.3)
    wanted = [n and (i == 0 or options[i - 1] is not None) for i, n in enumerate(need)]
    kernels.axis_attention_bwd(out, qkv, out, lse, 1, *options, num_images, 0.3, *wanted)


def temporal_block(shape, heads, dim, dtype, need) -> None:
    """``dtype``: of the residual stream; the projections are bf16, as under autocast."""
    from fastvdm.kernels import temporal_block as kernels

    b, f, _, _, c = shape

    def make(*size, kind=torch.bfloat16):
        return torch.empty(size, dtype=kind)

    x = make(*shape, kind=dtype)
    args = (
        *(x, make(c, kind=dtype), None, make(3 * heads * dim, c), None, make(c, heads * dim), None),
        *(heads, 1e-5, make(heads, f, f, kind=torch.float32), None, None),
        *(make(2, f, dim // 4, kind=torch.float32), None, 0, 0.3),
    )
    kernels.temporal_block_fwd(*args)
    kernels.temporal_block_bwd(x, *args, *(need,) * 5)


def linear_attention(shape) -> None:
    from fastvdm.kernels import linear_attention as kernels

    qkv = torch.empty(shape, dtype=torch.bfloat16)
    out, lse, ctx = kernels.linear_attention_fwd(qkv, 0.5)
    kernels.linear_attention_bwd(out, qkv, lse, ctx, 0.5)


def norm_act(shape, c2, kind, needs, film, before=False) -> None:
    """``before``: with the bias of the convolution before, and its gradient."""
    from fastvdm.kernels import norm_act as kernels

    x, c = torch.empty(shape, dtype=torch.bfloat16), shape[-1] + c2
    x2 = torch.empty(*shape[:-1], c2, dtype=x.dtype) if c2 else None
    scale = torch.empty(shape[0], c, dtype=x.dtype) if film else None
    x_bias = torch.empty(c) if before else None
    params = (x, x2, x_bias, torch.empty(c), torch.empty(c) if film else None, scale, scale)
    options = (kind, 1, False, 1e-5, True)
    y, mean, rstd = kernels.norm_act_fwd(*params, None, None, None, None, *options)
    stats = (mean, rstd) if kind == 0 else (None, None)
    for need_dx, *need in needs:
        kernels.norm_act_bwd(y, *params, None, *stats, *options, need_dx, before, *need)


def norm_conv(shape, cout, kernel, film, rows=1) -> None:
    from fastvdm.kernels import norm_conv as kernels

    x, c = torch.empty(shape, dtype=torch.bfloat16), shape[-1]
    stats = torch.empty(2, rows, 1).unbind()
    weight = torch.empty(cout, c, kernel, kernel, dtype=x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    scale = torch.empty(shape[0], 2 * c, dtype=x.dtype)[:, :c] if film else None
    bias = torch.empty(c) if film else None
    kernels.norm_conv_fwd(x, *stats, torch.empty(c), bias, scale, scale, weight, None, None, film)


def space_conv_down(shape, cout) -> None:
    """4x4 with stride 2 and the backward of its transpose, both gather with a stride."""
    from fastvdm.kernels import space_conv as kernels

    x = torch.empty(shape, dtype=torch.bfloat16)
    weight = torch.empty(cout, shape[-1], 4, 4, dtype=x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = kernels.space_conv_fwd(x, None, weight, None, None, 2)
    kernels.space_conv_transpose_bwd(x, y, weight, True, False, False)


def space_conv(shape, cout, kernel, c2=0) -> None:
    from fastvdm.kernels import space_conv as kernels

    x = torch.empty(shape, dtype=torch.bfloat16)
    x2 = torch.empty(*shape[:-1], c2, dtype=x.dtype) if c2 else None
    weight = torch.empty(cout, shape[-1] + c2, kernel, kernel, dtype=x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    kernels.space_conv_stats_fwd(x, x2, weight, None, None, 1, 1, False, 1e-5)
    kernels.space_conv_bwd(torch.empty(*shape[:4], cout, dtype=x.dtype), x, x2, weight, 1,
                           True, x2 is not None, False, False)  # fmt: skip


def norm_linear(shape, features, dtype=torch.bfloat16, bias=True) -> None:
    from fastvdm.kernels import norm_linear as kernels

    def make(*size, kind=torch.bfloat16):
        return torch.empty(size, dtype=kind) if bias or len(size) > 1 else None

    x = make(*shape, kind=dtype)
    args = (x, torch.empty(shape[-1]), make(shape[-1]), make(features, shape[-1]), make(features))
    y = kernels.norm_linear_fwd(*args, 1e-5)
    kernels.norm_linear_bwd(y, *args, 1e-5, True, True, True, True)


def linear_residual(rows, depth, features, dtype=torch.bfloat16, bias=True) -> None:
    from fastvdm.kernels import linear_residual as kernels

    x = torch.empty(rows, features, dtype=dtype)
    o, weight = (torch.empty(n, depth, dtype=torch.bfloat16) for n in (rows, features))
    b = torch.empty(features, dtype=torch.bfloat16) if bias else None
    kernels.linear_residual_fwd(x, o, weight, b)


ONE_NEED = [(True, False, False), (False, True, False), (False, False, True)]
CALLS = {
    "axis_attention/short/every extent 1": lambda: axis_attention((1, 1, 1, 1, 1, 16)),
    "axis_attention/long/one frame is no image": lambda: axis_attention((1, 34, 1, 1, 1, 16), 33),
    "axis_attention/short/bias alone is trained": lambda: axis_attention(
        (2, 16, 2, 2, 2, 32), need=(False, True, False, False), rel_k=False, rel_v=False
    ),
    "axis_attention/long/bias alone is trained": lambda: axis_attention(
        (2, 40, 2, 2, 2, 32), need=(False, True, False, False), rel_k=False, rel_v=False
    ),
    "axis_attention/long/a table alone is trained": lambda: axis_attention(
        (2, 40, 2, 2, 2, 32), need=(False, False, True, False), rotary=False
    ),
    "temporal_block/every extent 1": lambda: temporal_block(
        (1, 1, 1, 1, 32), 1, 32, torch.bfloat16, True
    ),
    "temporal_block/fp32 stream, frozen": lambda: temporal_block(
        (1, 16, 2, 2, 64), 8, 32, torch.float32, False
    ),
    "norm_linear/every extent 1": lambda: norm_linear((1, 1, 1, 1, 1), 1),
    "norm_linear/odd extents, no biases": lambda: norm_linear((1, 2, 3, 5, 17), 33, bias=False),
    "norm_linear/fp32 stream, many rows": lambda: norm_linear(
        (2, 16, 16, 16, 512), 1536, torch.float32
    ),
    "linear_residual/every extent 1": lambda: linear_residual(1, 1, 1),
    "linear_residual/odd extents, no bias": lambda: linear_residual(30, 17, 33, bias=False),
    "linear_residual/fp32 stream, many rows": lambda: linear_residual(
        8192, 512, 512, torch.float32
    ),
    "linear_attention/every extent 1": lambda: linear_attention((1, 1, 1, 1, 3, 1, 16)),
    "norm_act/group/every extent 1": lambda: norm_act((1, 1, 1, 1, 1), 0, 0, ONE_NEED, True),
    "norm_act/group/two of 1 channel": lambda: norm_act((1, 1, 1, 1, 1), 1, 0, ONE_NEED[:1], True),
    "norm_act/rms/every extent 1": lambda: norm_act((1, 1, 1, 1, 1), 0, 1, ONE_NEED[:2], False),
    "norm_act/layer/two of 1 channel": lambda: norm_act((1, 1, 1, 1, 1), 1, 2, ONE_NEED[2:], True),
    "norm_act/group/a bias before": lambda: norm_act(
        (1, 2, 4, 4, 32), 0, 0, ONE_NEED, True, before=True
    ),
    "norm_act/group/a bias before, every extent 1": lambda: norm_act(
        (1, 1, 1, 1, 1), 0, 0, [(False,) * 3], False, before=True
    ),
    "norm_act/rms/a bias before, alone trained": lambda: norm_act(
        (1, 2, 4, 4, 32), 0, 1, [(False,) * 3], False, before=True
    ),
    "norm_act/layer/a bias before": lambda: norm_act(
        (1, 1, 1, 1, 1), 0, 2, [(True, True, False)], True, before=True
    ),
    "norm_conv/every extent 1": lambda: norm_conv((1, 1, 1, 1, 1), 1, 1, False),
    "norm_conv/pointers": lambda: norm_conv((2, 3, 5, 4, 12), 6, 3, True, rows=6),
    "norm_conv/descriptors": lambda: norm_conv((2, 2, 8, 8, 16), 8, 3, True, rows=2),
    "norm_conv/descriptors, one channel tile of 128": lambda: norm_conv(
        (1, 2, 32, 32, 128), 128, 3, False
    ),
    "space_conv/every extent 1": lambda: space_conv((1, 1, 1, 1, 1), 1, 1),
    "space_conv/pointers, two sources of 1 and 3 channels": lambda: space_conv(
        (1, 1, 2, 2, 1), 1, 3, 3
    ),
    "space_conv/descriptors, stride 2": lambda: space_conv_down((1, 2, 16, 16, 32), 64),
    "space_conv/descriptors, two sources": lambda: space_conv((1, 2, 8, 8, 8), 8, 3, 16),
}


class NoDevice:
    """A Triton driver for compiling alone."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_launches() -> None:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastvdm.runtime.device import H100, pretend

    driver.set_active(NoDevice())
    current = ""

    def launcher(kernel, grid):
        def launch(*args, **options):
            found = {"call": current, "kernel": kernel.__name__, "error": "", "shared": 0}
            try:
                found["shared"] = kernel.run(
                    *args, grid=grid, warmup=True, **options
                ).metadata.shared
            except Exception as error:  # whatever the compiler throws is the finding
                found["error"] = f"{error} {error.__cause__ or ''}"[-600:]
            print(json.dumps(found))

        return launch

    JITFunction.__getitem__ = launcher
    with pretend(H100):
        for current, call in CALLS.items():  # noqa: B007  (read by launch)
            call()


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("call", CALLS)
def test_every_launch_compiles(call, compiled) -> None:
    mine = [r for r in compiled if r["call"] == call]
    assert mine
    for r in mine:
        assert not r["error"], f"{r['kernel']}: {r['error']}"
        assert r["shared"] <= SHARED, f"{r['kernel']}: {r['shared']} bytes of shared memory"


if __name__ == "__main__":
    compile_launches()
