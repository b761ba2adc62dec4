"""The numbers of kernels/limits.py: ops and C++ go by the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvdm.kernels.limits import MAX_ROW_CHANNELS, SHORT, TIME
from fastvdm.runtime.dispatch import explain

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("frames", [SHORT, SHORT + 1])
def test_the_op_announces_lse_where_a_kernel_saves_it(frames, backend) -> None:
    qkv = torch.empty(1, frames, 1, 1, 3, 1, 16, device="meta")
    options = (TIME, None, None, None, None, None, 0, 1.0, backend)
    _, lse = torch.ops.fastvdm.axis_attention_fwd(qkv, *options)
    assert (lse.numel() > 0) == (frames > SHORT and backend == "triton")


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_ops_leave_wider_rows_to_the_reference(kind) -> None:
    for channels in (MAX_ROW_CHANNELS, MAX_ROW_CHANNELS + 1):
        x, wide = torch.empty(1, channels, device="meta"), channels > MAX_ROW_CHANNELS
        assert (str(channels) in (explain("norm_act", x, kind, channels)["triton"] or "")) is wide
