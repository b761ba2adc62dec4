"""The C++ extension as a whole: instruction sets, what its launchers refuse, forks, symbols."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvdm.ops.linear_attention import linear_attention
from fastvdm.runtime import extension
from fastvdm.testing import cpu_isas, make_exact_operand, use_cpu_isa

pytestmark = pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"no C++ extension: {extension.reason_off()}"
)


def test_asking_what_there_is_changes_nothing():
    """FASTVDM_CPU_ISA stays in force; so does a choice inside another."""
    best, lowest = cpu_isas()[0], cpu_isas()[-1]
    with use_cpu_isa(lowest):
        cpu_isas()
        with use_cpu_isa(best):
            assert torch.ops.fastvdm_C.cpu_isa() == best
        assert torch.ops.fastvdm_C.cpu_isa() == lowest


def test_bad_input_raises_before_memory_is_touched():
    """The launchers check what the public functions promise them."""
    ops = torch.ops.fastvdm_C
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.linear_attention_fwd_cpu(torch.zeros(1, 2, 3, 4, 3, 2, 8).transpose(2, 3), 1.0)
    with pytest.raises(RuntimeError, match="fp32, bf16 and fp16"):
        ops.linear_attention_fwd_cpu(torch.zeros(1, 1, 2, 2, 3, 1, 8, dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match="channels"):
        ops.conv3x3_cpu(
            torch.zeros(1, 4, 4, 8), None, torch.zeros(8, 9, 3, 3), None, None, False, 2
        )
    with pytest.raises(RuntimeError, match="elements"):
        ops.axis_attention_fwd_cpu(
            torch.zeros(1, 4, 2, 2, 3, 2, 8),
            1,
            torch.zeros(2, 3, 3),
            None,
            None,
            None,
            None,
            0,
            1.0,
        )
    with pytest.raises(RuntimeError, match="cpu isa"):
        extension.set_cpu_isa("sse9")


def _in_worker(index: int) -> Tensor:
    qkv = make_exact_operand((1, 4, 2, 3, 3, 2, 16), seed=index)
    return linear_attention(qkv)


class _Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return _in_worker(index)


def test_forked_dataloader_workers():
    """Ops ran in the parent, then run in forked workers, whose thread pool is gone."""
    expected = torch.stack([_in_worker(i) for i in range(4)])
    loader = torch.utils.data.DataLoader(
        _Items(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=1800
    )
    found = torch.cat(list(loader))
    assert torch.equal(found, expected)


def test_environment_variable_forces_the_path():
    code = (
        "from fastvdm.runtime import extension; import torch; print(torch.ops.fastvdm_C.cpu_isa())"
    )
    for name in ("portable", "sse9"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "FASTVDM_CPU_ISA": name},
        )
        if name == "portable":
            assert done.stdout.strip() == name, done.stderr
        else:
            assert done.returncode != 0 and "FASTVDM_CPU_ISA" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
def test_only_stable_symbols():
    """What the library wants from torch is its C interface alone, so one build serves 2.11 and
    later, and only one OpenMP runtime (torch's) is in the process."""
    library = next(Path(extension.__file__).parents[1].glob("_C*.so"))
    try:
        names = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    except FileNotFoundError:
        pytest.skip("no nm on this machine")
    wanted = [n for n in names if len(n) > 1]
    bad = [n for n in wanted if "c10" in n or n.startswith("_ZN2at") or n.startswith("_ZN5torch")]
    bad += [n for n in wanted if n.startswith(("GOMP_", "omp_", "Py"))]
    assert not bad, bad
    # In a process of its own: packages that other tests import bring runtimes of their own.
    code = (
        "import torch, fastvdm; x = torch.ones(512, 64); "
        "torch.ops.fastvdm_C.linear_fwd_cpu(x, x, None); print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    runtimes = {line.split()[-1] for line in maps if "gomp" in line.rsplit("/", 1)[-1]}
    assert len(runtimes) <= 1, runtimes
