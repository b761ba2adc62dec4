"""Joint image-video training: what is appended, that it stays apart, and what the loss is."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peer import peer_or_skip
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.diffusion import joint
from fastvdm.diffusion.loss import diffusion_loss
from fastvdm.diffusion.schedule import CosineSchedule


def _unet(**options):
    from fastvdm.unet.unet import UNet3D

    torch.manual_seed(0)
    arguments = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8}
    arguments |= {"resnet_groups": 4, "norm_per_frame": True, "time_input": "logsnr"}
    return UNet3D(**(arguments | options))


def _coded(batch: int, frames: int) -> torch.Tensor:
    """Every pixel of frame f of video b is 100 b + f."""
    code = 100 * torch.arange(batch)[:, None] + torch.arange(frames)
    return code[:, None, :, None, None].expand(-1, 3, -1, 2, 2).float()


@pytest.mark.parametrize("source", ["batch", "collate", "dataset"])
@pytest.mark.parametrize("num_images", [0, 2, 5])
def test_appended_frames_come_from_other_videos(source, num_images):
    video = _coded(4, 3)
    if source == "batch":
        out = joint.append_images(video, joint.images_from_batch(video, num_images))
    elif source == "collate":
        out = joint.JointCollate(num_images)(list(video))
    else:
        dataset = joint.JointDataset(list(video), num_images)
        out = torch.stack([dataset[i] for i in range(4)])
    assert out.shape == (4, 3, 3 + num_images, 2, 2)
    assert torch.equal(out[:, :, :3], video)
    owners = (out[:, 0, 3:, 0, 0] // 100).long()
    assert (owners != torch.arange(4)[:, None]).all()
    for row in owners[:, :3]:
        assert len(set(row.tolist())) == min(num_images, 3)  # as many videos as there are
    assert ((out[:, 0, 3:, 0, 0] % 100) < 3).all()


def test_every_other_frame_is_drawn_equally_often():
    generator = torch.Generator().manual_seed(1)
    video, draws = _coded(3, 4), 3000
    seen = torch.cat(
        [joint.images_from_batch(video, 1, generator)[0, 0, :, 0, 0] for _ in range(draws)]
    )
    values, counts = seen.unique(return_counts=True)
    assert values.tolist() == [100, 101, 102, 103, 200, 201, 202, 203]
    p = 1 / 8
    assert (counts / draws - p).abs().max() < 4.5 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("count", [2, 3])  # by rejection, by a permutation
def test_other_videos_are_drawn_uniformly_in_any_order(count):
    generator, draws = torch.Generator().manual_seed(2), 6000
    drawn = torch.stack([joint._others(2, 6, count, generator) for _ in range(draws)])
    kinds, counts = drawn.unique(dim=0, return_counts=True)
    assert len(kinds) == (20 if count == 2 else 60)  # every ordered choice of distinct others
    assert all(len({2, *kind.tolist()}) == count + 1 for kind in kinds)
    expected = draws / len(kinds)
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < (44 if count == 2 else 99)  # exceeded by chance once in 1000 seeds


def test_others_repeat_only_where_there_are_too_few():
    for total, count in itertools.product((2, 3, 9, 40), (0, 1, 2, 8, 20)):
        for own in (0, total - 1):
            drawn = [
                joint._others(own, total, count, torch.Generator().manual_seed(4)) for _ in range(2)
            ]
            assert torch.equal(*drawn)
            values, counts = drawn[0].unique(return_counts=True)
            assert len(drawn[0]) == count and own not in values.tolist()
            assert set(values.tolist()) <= set(range(total))
            assert len(values) == min(count, total - 1)
            assert (counts <= -(-count // (total - 1))).all()


def test_an_item_of_millions_of_videos_costs_what_it_holds():
    """No tensor grows with the data set."""

    class Clips:
        def __len__(self):
            return 10_000_000

        def __getitem__(self, index):
            return torch.full((1, 1, 1, 1), index, dtype=torch.long)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as mode:
        item = joint.JointDataset(Clips(), 8)[7].flatten()
    assert item[0] == 7 and item.unique().numel() == 9 and mode.numel == 9
    assert item[1:].max() > 1_000_000


def test_a_negative_index_is_not_its_own_image():
    items = joint.JointDataset(list(_coded(3, 1)), 2)
    for _ in range(20):
        owners = (items[-1][0, :, 0, 0] // 100).tolist()
        assert owners[0] == 2 and sorted(owners[1:]) == [0, 1]


def test_captions_travel_with_their_frames():
    items = [(clip, f"video {i}") for i, clip in enumerate(_coded(3, 2))]
    video, captions = joint.JointCollate(2)(items)
    first = joint.JointDataset(items, 2)[1]
    for joined, texts in [*zip(video, captions), first]:
        owners = (joined[0, 1:, 0, 0] // 100).long().tolist()  # frame 1 of the video, then images
        assert texts == [f"video {o}" for o in owners]


def test_image_frames_and_video_do_not_see_each_other():
    net = _unet().eval()
    x, time = torch.randn(1, 3, 5, 8, 8), torch.zeros(1)
    out = net(x, time, num_images=2)
    changed = x.clone()
    changed[:, :, 4] += 1
    other = net(changed, time, num_images=2)
    assert torch.equal(out[:, :, :4], other[:, :, :4])
    assert (out[:, :, 4] - other[:, :, 4]).abs().max() > 1e-3
    torch.testing.assert_close(out[:, :, :3], net(x[:, :, :3], time), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, :, 3:4], net(x[:, :, 3:4], time), atol=1e-5, rtol=1e-4)


def test_packed_loss_is_the_loss_of_the_parts():
    """One sequence under the mask = videos and one-frame videos apart, with one t for both."""
    net, x = _unet(), torch.randn(2, 3, 5, 8, 8)
    t, noise = torch.tensor([0.3, 0.6]), torch.randn(2, 3, 5, 8, 8)
    loss = joint.joint_loss(net, x, 2, image_weight=0.5, t=t, noise=noise)
    loss.backward()

    def part(frames):
        return diffusion_loss(
            net, x[:, :, frames], t=t, noise=noise[:, :, frames], reduction="none"
        )

    video, first, second = part(slice(0, 3)), part(slice(3, 4)), part(slice(4, 5))
    expected = (3 * video + 0.5 * (first + second)) / 4
    torch.testing.assert_close(loss, expected.mean(), atol=1e-5, rtol=1e-5)
    packed = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    expected.mean().backward()
    apart = [p.grad for p in net.parameters() if p.grad is not None]
    for a, b in zip(packed, apart):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


class Recorder(nn.Module):
    """Predicts zero noise and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, time, cond=None, num_images=0):
        self.calls.append((tuple(x.shape), time, cond, num_images))
        return torch.zeros_like(x)


def test_options_per_image_frame():
    x, cond, own = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 5), torch.randn(2, 1, 5)
    net, schedule = Recorder(), CosineSchedule()
    joint.joint_loss(net, x, 1, cond=cond)
    assert [(c[0], c[3]) for c in net.calls] == [((2, 3, 4, 2, 2), 1)]

    net.calls.clear()
    t = torch.tensor([0.2, 0.7])
    joint.joint_loss(net, x, 1, cond=cond, image_cond=own, t=t, schedule=schedule)
    (video, vt, vc, _), (image, it, ic, _) = net.calls
    assert video == (2, 3, 3, 2, 2) and image == (2, 3, 1, 2, 2)
    assert torch.equal(vt, it) and torch.equal(vc, cond) and torch.equal(ic, own[:, 0])

    net.calls.clear()
    joint.joint_loss(net, x, 2, cond=cond, image_cond="none", image_time="own", t=t)
    (_, vt, _, _), (image, it, ic, _) = net.calls
    assert image == (4, 3, 1, 2, 2) and not ic.any()
    assert len(set(it.tolist()) - set(vt.tolist())) == 4

    zero = joint.joint_loss(net, x, 1, noise=torch.ones(2, 3, 4, 2, 2), image_weight=0)
    assert zero == 1.0


def test_inside_the_peers_trainer_step():
    """GaussianDiffusion with our network: forward, backward, EMA copy and sampling as before."""
    package = peer_or_skip()
    net = _unet(time_input="index")
    diffusion = package.GaussianDiffusion(net, image_size=8, num_frames=3, timesteps=4)
    wrapped = joint.JointDiffusion(diffusion, num_images=2)
    assert wrapped.num_frames == 3 and wrapped.image_size == 8
    loss = wrapped(torch.rand(3, 3, 3, 8, 8), prob_focus_present=0.0, focus_present_mask=None)
    loss.backward()
    assert loss.isfinite() and diffusion.num_frames == 3
    ema = copy.deepcopy(wrapped)
    assert list(ema.state_dict()) == list(diffusion.state_dict())
    ema.load_state_dict(diffusion.state_dict())
    assert ema.sample(batch_size=1).shape == (1, 3, 3, 8, 8)


def test_bad_input():
    x = torch.randn(2, 3, 4, 2, 2)
    with pytest.raises(ValueError, match="at least 2"):
        joint.images_from_batch(x[:1], 1)
    assert joint.images_from_batch(x[:1], 0).shape == (1, 3, 0, 2, 2)
    with pytest.raises(ValueError, match="at least 2"):
        joint.JointDataset([x[0]], 1)
    with pytest.raises(ValueError, match="num_images must be at least 0"):
        joint.JointCollate(-1)
    with pytest.raises(ValueError, match="images"):
        joint.append_images(x, x[:, :, :, :1])
    with pytest.raises(ValueError, match="F >= 1"):
        joint.joint_loss(Recorder(), x, 4)
    with pytest.raises(ValueError, match="image_time"):
        joint.joint_loss(Recorder(), x, 1, image_time="none")
    with pytest.raises(ValueError, match="image_cond"):
        joint.joint_loss(Recorder(), x, 1, image_cond="own")
    with pytest.raises(TypeError, match="takes no num_images"):
        joint.joint_loss(nn.Identity(), x, 1)
