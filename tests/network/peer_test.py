"""The peer loads in both versions, side by side, and the torchvision stand-in does its part."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from peer import CenterCrop, Resize, ToPILImage, ToTensor, import_peer, peer_or_skip
from PIL import Image


@pytest.mark.parametrize(("version", "norm"), [("0.6.3", "norm.weight"), ("0.7.0", "norm.gamma")])
def test_peer_builds_and_has_the_norm_of_its_era(version: str, norm: str) -> None:
    peer = peer_or_skip(version)
    unet = peer.Unet3D(dim=16, dim_mults=(1, 2))
    assert any(k.endswith(f"block1.{norm}") for k in unet.state_dict())
    with torch.no_grad():
        assert unet(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1)).shape == (1, 3, 2, 8, 8)


def test_versions_are_distinct_and_cached() -> None:
    old, new = peer_or_skip("0.6.3"), peer_or_skip("0.7.0")
    assert old.Unet3D is not new.Unet3D
    assert import_peer("0.6.3") is old and import_peer("0.7.0") is new


def test_stand_in_leaves_no_trace() -> None:
    peer_or_skip("0.7.0")
    if importlib.util.find_spec("torchvision") is None:
        assert "torchvision" not in sys.modules


def test_gif_round_trip_through_the_peers_own_functions(tmp_path) -> None:
    peer = peer_or_skip("0.7.0")
    frames = torch.zeros(3, 4, 12, 10)
    frames[:, :, ::2] = 1.0
    frames[0, 1] = 1.0  # frames that differ, or the GIF writer merges them
    frames[1, 2] = 1.0
    frames[2, 3] = 1.0
    peer.video_tensor_to_gif(frames, tmp_path / "a.gif")
    torch.testing.assert_close(peer.gif_to_tensor(tmp_path / "a.gif"), frames)


def test_stand_in_transforms() -> None:
    a = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    t = ToTensor()(Image.fromarray(a))
    assert t.shape == (3, 6, 8) and torch.equal(t[1, 2, 3] * 255, torch.tensor(float(a[2, 3, 1])))
    assert np.array_equal(np.array(ToPILImage()(t)), a)
    assert Resize(3)(Image.fromarray(a)).size == (4, 3)
    crop = np.array(CenterCrop(4)(Image.fromarray(a)))
    assert np.array_equal(crop, a[1:5, 2:6])


def test_unknown_version() -> None:
    with pytest.raises(ValueError, match="0.7.0"):
        import_peer("0.5.0")
