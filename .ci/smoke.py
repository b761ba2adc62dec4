"""What an installed wheel owes: ``python .ci/smoke.py``, by an environment that holds it.

The C++ kernels load, and with them a network computes what it computes in plain torch.
"""

from __future__ import annotations

import copy
import os
from importlib.metadata import version
from pathlib import Path

os.environ["FASTVDM_STRICT"] = "1"

import torch

import fastvdm
from fastvdm.runtime import extension
from fastvdm.testing import assert_close3


def main() -> None:
    where = Path(fastvdm.__file__).resolve()
    assert "site-packages" in where.parts, f"not installed: {where}"
    assert version("fastvdm") == fastvdm.__version__
    assert extension.reason_off() is None, extension.reason_off()
    torch.manual_seed(0)
    network = fastvdm.UNet3D(16, dim_mults=(1, 2), attn_heads=2).eval()
    video, time = torch.randn(2, 3, 5, 16, 24), torch.tensor([3, 70])
    with torch.no_grad():
        with fastvdm.use_backend("cpu"):
            fast = network(video, time)
        with fastvdm.use_backend("reference"):
            plain = network(video, time)
            exact = copy.deepcopy(network).double()(video.double(), time)
    assert_close3(fast, plain, exact)
    print(f"fastvdm {version('fastvdm')} in {where.parent}, torch {torch.__version__}: ok")


if __name__ == "__main__":
    main()
