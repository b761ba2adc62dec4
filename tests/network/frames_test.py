"""Networks of any size (pad), that see no later frame (causal), and with a time for each frame."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastvdm import UNet3D, use_backend
from fastvdm.diffusion import CosineSchedule, DiscreteSchedule, diffusion_loss, q_sample
from fastvdm.export import example_inputs, export_program
from fastvdm.unet.padding import crop, pad_edges

PEER = dict(attn_heads=2, norm="rms")
PAPER = dict(
    layout="paper", image_size=8, attn_resolutions=(4, 8), attn_dim_head=8, resnet_groups=4,
    emb_dim=16, num_blocks=1, position="shaw", null_cond="zeros", zero_init=False,
    norm_per_frame=True, time_input="logsnr",
)  # fmt: skip
NETWORKS = {
    "rms": PEER,
    "group": PEER | dict(norm="group", norm_per_frame=True),
    "t5": PEER | dict(position="t5"),
    "shaw": PEER | dict(position="shaw"),
    "no position": PEER | dict(position="none", stem_skip="before"),
    "paper": PAPER,
    "paper, resblock": PAPER | dict(resample="resblock", position="rotary+t5"),
    "paper, add": PAPER | dict(conditioning="add", position="none"),
}
SHAPE = (2, 3, 5, 8, 4)


def network(name: str = "rms", **options) -> UNet3D:
    torch.manual_seed(0)
    return UNet3D(8, 3, dim_mults=(1, 2), **(NETWORKS[name] | options)).eval()


def inputs(shape=SHAPE):
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g), torch.tensor([3.0, 7.0]), torch.randn(2, 3, generator=g)


# -- sizes ----------------------------------------------------------------------------------------


def test_padding():
    x = torch.arange(2.0 * 3 * 5).view(1, 1, 2, 3, 5)
    wide = pad_edges(x, 4)
    assert wide.shape == (1, 1, 2, 4, 8)
    assert torch.equal(wide, torch.nn.functional.pad(x, (1, 2, 0, 1, 0, 0), mode="replicate"))
    assert torch.equal(crop(wide.permute(0, 2, 3, 4, 1), (3, 5)).permute(0, 4, 1, 2, 3), x)
    assert pad_edges(x[..., :2, :4], 2).data_ptr() == x.data_ptr()
    assert pad_edges(x[..., :1, :1], 8).shape[3:] == (8, 8)


@pytest.mark.parametrize("name", ["rms", "group", "paper, resblock"])
def test_sizes_that_fit_are_as_before(name):
    x, time, cond = inputs()
    plain, padded = network(name), network(name, pad=True)
    assert torch.equal(plain(x, time, cond), padded(x, time, cond))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (3, 8)])
def test_other_sizes(size, layout):
    model = network("paper", pad=True).to(memory_format=layout)
    x, time, cond = inputs((2, 3, 5, *size))
    out = model(x, time, cond)
    by_hand = torch.nn.functional.pad(
        x, [n for m in reversed(size) for n in (m % 2 and 0, m % 2)] + [0, 0], mode="replicate"
    )
    want = network("paper")(by_hand, time, cond)[..., : size[0], : size[1]]
    assert out.shape == x.shape and torch.equal(out, want)
    scaled = model.forward_with_cond_scale(x, time, cond, cond_scale=1.5)
    assert scaled.shape == x.shape
    with pytest.raises(ValueError, match=r"multiples of 2 .*: a network built with pad=True"):
        network("paper")(x[..., :1, :1], time, cond)


def test_gradients_and_compilation():
    model = network(pad=True).double()
    x = torch.randn(1, 3, 2, 3, 5, dtype=torch.double, requires_grad=True)
    time, cond = torch.tensor([3.0]), torch.randn(1, 3).double()
    out = model(x, time, cond)
    out.square().sum().backward()
    step = torch.randn_like(x)
    with torch.no_grad():
        two = [model(x + s * 1e-5 * step, time, cond).square().sum() for s in (1, -1)]
    slope = (two[0] - two[1]) / 2e-5
    torch.testing.assert_close((x.grad * step).sum(), slope, rtol=1e-5, atol=1e-7)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x, time, cond), out)


def test_export_and_files(tmp_path):
    model = network(pad=True)
    program = export_program(model, example_inputs(model, 1, 2, 7, 5), backend="reference")
    x, time, cond = example_inputs(model, 1, 2, 7, 5)
    torch.testing.assert_close(program.module()(x, time, cond), model(x, time, cond))
    model.save_pretrained(tmp_path)
    again = UNet3D.from_pretrained(tmp_path)
    assert torch.equal(again(x, time, cond), model(x, time, cond))
    peers = UNet3D.from_unet3d(
        UNet3D(8, dim_mults=(1, 2), attn_heads=2).to_peer_state_dict(), stem_skip="after", pad=True
    )
    assert peers.pad and peers(torch.randn(1, 3, 2, 5, 5), torch.tensor([1])).shape[3:] == (5, 5)


# -- what a frame sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_later_frames_change_nothing(name, backend):
    """Bit for bit, of outputs and of gradients."""
    model = network(name, causal=True)
    x, time, cond = inputs()
    with use_backend(backend):
        for kept in (1, 3):
            other = x.clone()
            other[:, :, kept:] = torch.randn_like(x[:, :, kept:])
            grads = []
            for video in (x, other):
                leaf = video.clone().requires_grad_()
                out = model(leaf, time, cond)
                out[:, :, :kept].square().sum().backward()
                grads.append((out[:, :, :kept], leaf.grad))
            assert torch.equal(grads[0][0], grads[1][0])
            assert all(not g[:, :, kept:].any() for _, g in grads)
            with torch.no_grad():
                assert not torch.equal(model(x, time, cond)[:, :, kept:], out[:, :, kept:])
        apart = network(name)  # negative control
        assert not torch.equal(apart(x, time, cond)[:, :, :3], apart(other, time, cond)[:, :, :3])


@pytest.mark.parametrize("name", ["t5", "shaw"])
def test_later_frames_in_triton(name):
    model = UNet3D(8, dim_mults=(1,), causal=True, **NETWORKS[name]).eval()
    x = torch.randn(1, 3, 3, 2, 2)
    other = torch.cat((x[:, :, :2], torch.randn_like(x[:, :, 2:])), 2)
    with use_backend("triton"), torch.no_grad():
        out = [model(video, torch.tensor([1])) for video in (x, other)]
    assert torch.equal(out[0][:, :, :2], out[1][:, :, :2]) and not torch.equal(*out)
    torch.testing.assert_close(model(x, torch.tensor([1])), out[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_prefixes(name):
    """The first frames alone give what they give in the whole video."""
    model = network(name, causal=True)
    x, time, cond = inputs()
    out = model(x, time, cond)
    torch.testing.assert_close(model(x[:, :, :2], time, cond), out[:, :, :2], rtol=1e-4, atol=1e-5)


def test_causal_trains_and_is_kept(tmp_path):
    model = network("t5", causal=True).train()
    x, time, cond = inputs()
    model(x, time, cond, num_images=1).square().mean().backward()
    table = model.relative_bias["2"].relative_attention_bias.weight.grad
    assert table[:16].any() and not table[17:].any()  # of earlier frames, and of later ones
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert UNet3D.from_pretrained(tmp_path).causal
    half = network("rms", causal=True).bfloat16()
    assert half(x.bfloat16(), time, cond.bfloat16()).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, time, cond).isfinite().all()


def test_causal_needs_norms_of_frames():
    with pytest.raises(ValueError, match="causal=True needs norm_per_frame=True or norm='rms'"):
        UNet3D(8, causal=True)
    with pytest.raises(ValueError, match="the peer's network is not causal"):
        UNet3D(8, dim_mults=(1, 2), norm="rms", causal=True).to_peer_state_dict()
    with pytest.raises(TypeError, match="causal must be a bool, got 'yes'"):
        UNet3D(8, norm="rms", causal="yes")


# -- a time for each frame ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_times_are_one_time(name):
    model = network(name)
    x, time, cond = inputs()
    out = model(x, time, cond)
    each = time[:, None].repeat(1, 5)
    torch.testing.assert_close(model(x, each, cond), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.forward_with_cond_scale(x, each, cond, cond_scale=2.0),
        model.forward_with_cond_scale(x, time, cond, cond_scale=2.0), rtol=1e-4, atol=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["none", "block", "level"])
@pytest.mark.parametrize("name", ["rms", "group", "paper, resblock"])
def test_the_time_of_a_frame_is_its_own(name, checkpointing):
    """Without temporal attention between them frames are videos of one frame."""
    model = network(name, checkpointing=checkpointing)
    x, _, cond = inputs()
    times = torch.arange(1.0, 11).view(2, 5)
    focus = torch.ones(2, dtype=torch.bool)
    whole = model(x, times, cond, focus_present_mask=focus)
    for f in range(5):
        one = model(x[:, :, f : f + 1], times[:, f], cond, focus_present_mask=focus)
        torch.testing.assert_close(whole[:, :, f : f + 1], one, rtol=1e-4, atol=1e-5)
    causal = network(name, causal=True)
    later = times.clone()
    later[:, 3:] += 2
    out = causal(x, times, cond), causal(x, later, cond)
    assert torch.equal(out[0][:, :, :3], out[1][:, :, :3])
    assert not torch.equal(out[0][:, :, 3:], out[1][:, :, 3:])


def test_times_that_do_not_fit():
    x, _, cond = inputs()
    with pytest.raises(ValueError, match=r"time must be \(2,\), or \(2, 5\) for each frame"):
        network()(x, torch.ones(2, 4), cond)
    with pytest.raises(ValueError, match="needs norm_per_frame=True or norm='rms'"):
        network("group", norm_per_frame=False)(x, torch.ones(2, 5), cond)


@pytest.mark.parametrize("schedule", [CosineSchedule(), DiscreteSchedule(50)])
@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
def test_loss_of_times_of_frames(prediction, schedule):
    """With frames apart it is the mean of their own losses."""
    kind = schedule.time_input
    model = network("rms", time_input=kind)
    x, _, cond = inputs()
    noise, t = torch.randn_like(x), torch.rand(2, 5)
    options = dict(
        schedule=schedule, prediction=prediction, cond=cond, reduction="none",
        focus_present_mask=torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    whole = diffusion_loss(model, x, t=t, noise=noise, **options)
    parts = [
        diffusion_loss(
            model, x[:, :, f : f + 1], t=t[:, f], noise=noise[:, :, f : f + 1], **options
        )
        for f in range(5)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-6)
    z = q_sample(x, schedule.log_snr(t), noise)
    assert torch.equal(z[:, :, 2], q_sample(x[:, :, 2], schedule.log_snr(t[:, 2]), noise[:, :, 2]))
    with pytest.raises(ValueError, match=r"t must be \(2,\) or \(2, 5\), got \(2, 4\)"):
        diffusion_loss(model, x, t=torch.rand(2, 4), schedule=schedule, cond=cond)


# -- times of the other kind ----------------------------------------------------------------------


def test_a_time_of_the_other_kind_is_said():
    x, _, cond = inputs()
    index, log_snr = network(), network("paper")
    with pytest.warns(UserWarning, match="takes step indices.*a log-SNR") as caught:
        index(x, torch.tensor([0.5, 3.0]), cond)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="a log-SNR"):
        index(x, torch.tensor([-3, 3]), cond)
    with pytest.warns(UserWarning, match="takes log-SNRs.*a step index"):
        log_snr(x, torch.tensor([500, 3]), cond)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index(x, torch.tensor([0, 999]), cond)
        index(x, torch.tensor([0.0, 1.5]), cond)
        log_snr(x, torch.tensor([-20.0, 20.0]), cond)
        torch.compile(index, backend="eager")(x, torch.tensor([0.5, 3.0]), cond)


def test_what_a_network_says_of_itself():
    lines = repr(network("rms", causal=True, pad=True)).splitlines()
    count = sum(p.numel() for p in network().parameters())
    assert lines[0] == "UNet3D(" and lines[1] == (
        "  8, cond_dim=3, dim_mults=(1, 2), attn_heads=2, norm='rms', pad=True, causal=True; "
        f"{count:,} parameters"
    )
    assert "checkpointing='level'" in repr(network(checkpointing="level")).splitlines()[1]
    assert "arguments" in UNet3D.__init__.__doc__


def test_options_that_are_set_later_are_checked_saved_and_shown(tmp_path):
    model = network("rms").eval()
    model.causal = True
    assert "causal=True" in repr(model).splitlines()[1]
    model.save_pretrained(tmp_path)
    assert UNet3D.from_pretrained(tmp_path).causal
    with pytest.warns(UserWarning, match="causal=False is assumed"):
        assert not UNet3D.from_unet3d(model.state_dict(), time_input="index").causal
    assert UNet3D.from_unet3d(model.state_dict(), time_input="index", causal=True).causal
    with pytest.raises(ValueError, match="causal=True needs norm_per_frame"):
        UNet3D(8, dim_mults=(1, 2), attn_heads=2).causal = True
    with pytest.raises(TypeError, match="pad must be a bool"):
        model.pad = "no"
