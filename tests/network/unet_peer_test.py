"""UNet3D against the peer itself, its weights loaded: forward, gradients, guidance, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from peer import peer_or_skip

from fastvdm import UNet3D
from fastvdm.testing import max_error

# (constructor arguments, input shape): odd frame counts, non-square frames, every peer option.
CONFIGS = {
    "small": (dict(dim=16, dim_mults=(1, 2)), (2, 3, 5, 8, 12)),
    "deep": (dict(dim=8, dim_mults=(1, 2, 4, 8), attn_heads=2), (1, 3, 3, 16, 24)),
    "cond": (dict(dim=16, dim_mults=(1, 2), cond_dim=11, attn_heads=4), (2, 3, 4, 6, 10)),
    "wide": (dict(dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=64), (1, 3, 7, 8, 4)),
    "narrow": (
        dict(dim=8, dim_mults=(1, 3), attn_heads=3, attn_dim_head=16),
        (1, 3, 2, 4, 6),
    ),
    "no_linear": (
        dict(dim=16, dim_mults=(1, 2), use_sparse_linear_attn=False, init_kernel_size=5),
        (1, 3, 6, 8, 8),
    ),
    "one_frame": (dict(dim=16, dim_mults=(1, 2), channels=1, out_dim=2), (3, 1, 1, 4, 8)),
}
ERAS = {"0.7.0": "rms", "0.6.3": "group"}


def pair(version: str, arguments: dict, **ours):
    peer = peer_or_skip(version).Unet3D(**arguments)
    for name, p in peer.named_parameters():  # gammas and biases away from ones and zeros
        if not name.endswith("freqs"):
            p.data += 0.05 * torch.randn_like(p)
    options = dict(
        exact=True, check=False, stem_skip="after"
    )  # compared here, on more than a check
    return peer, UNet3D.from_unet3d(peer, **options, **ours)


def batch(arguments: dict, shape: tuple[int, ...]):
    x = torch.randn(shape)
    time = torch.randint(0, 1000, shape[:1])
    cond = torch.randn(shape[0], arguments["cond_dim"]) if "cond_dim" in arguments else None
    return x, time, cond


@pytest.mark.parametrize("version", ERAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_parity(version, name):
    arguments, shape = CONFIGS[name]
    if version == "0.6.3":
        arguments = arguments | {"resnet_groups": 4}
    peer, ours = pair(version, arguments)
    assert ours.stem.weight.shape[0] == arguments["dim"]
    x, time, cond = batch(arguments, shape)
    out_peer = peer(x, time, cond=cond)
    out = ours(x, time, cond=cond)
    assert max_error(out, out_peer) < 1e-5
    dout = torch.randn_like(out)
    out_peer.backward(dout)
    out.backward(dout)
    want = {k: p.grad for k, p in peer.named_parameters() if p.grad is not None}
    grads = copy.deepcopy(ours)
    for p, q in zip(grads.parameters(), ours.parameters()):
        p.data = q.grad if q.grad is not None else torch.zeros_like(q)
    got = grads.to_peer_state_dict()
    assert len(want) > 50
    for key, g in want.items():
        assert max_error(got[key], g) < 1e-4, key


@pytest.mark.parametrize("version", ERAS)
def test_guidance_in_one_pass(version):
    arguments, shape = CONFIGS["cond"]
    peer, ours = pair(version, arguments)
    x, time, cond = batch(arguments, shape)
    calls = []
    ours.stem.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        out = ours.forward_with_cond_scale(x, time, cond=cond, cond_scale=3.5)
        want = peer.forward_with_cond_scale(x, time, cond=cond, cond_scale=3.5)
    assert max_error(out, want) < 2e-5
    assert len(calls) == 1


@pytest.mark.parametrize("mask", [[True, False], [True, True], [False, False]])
def test_focus_mask_exact(mask):
    arguments, shape = CONFIGS["small"]
    peer, ours = pair("0.7.0", arguments)
    x, time, _ = batch(arguments, shape)
    focus = torch.tensor(mask)
    with torch.no_grad():
        out = ours(x, time, focus_present_mask=focus)
        assert max_error(out, peer(x, time, focus_present_mask=focus)) < 1e-5


def test_sample_from_the_peers_diffusion():
    arguments, (_, _, f, h, _) = CONFIGS["small"]
    peer, ours = pair("0.7.0", arguments)
    diffusion = peer_or_skip("0.7.0").GaussianDiffusion
    videos = []
    for net in (peer, ours):
        torch.manual_seed(3)
        videos.append(diffusion(net, image_size=h, num_frames=f, timesteps=6).sample(batch_size=2))
    assert max_error(videos[1], videos[0]) < 1e-4


def test_loss_in_the_peers_diffusion():
    """The peer's GaussianDiffusion trains ours as it trains its own, focus probability included."""
    arguments, (b, c, f, h, _) = CONFIGS["small"]
    peer, ours = pair("0.7.0", arguments)
    video, losses = torch.rand(b, c, f, h, h), []
    for net in (peer, ours):
        torch.manual_seed(5)
        diffusion = peer_or_skip("0.7.0").GaussianDiffusion(net, image_size=h, num_frames=f)
        loss = diffusion(video, prob_focus_present=0.5)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ERAS)
@pytest.mark.parametrize("name", ["cond", "no_linear", "deep"])
def test_round_trip_is_bitwise(version, name):
    arguments, _ = CONFIGS[name]
    if version == "0.6.3":
        arguments = arguments | {"resnet_groups": 2}
    module = peer_or_skip(version).Unet3D(**arguments)
    state = module.state_dict()
    back = UNet3D.from_unet3d(module).to_peer_state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    peer_or_skip(version).Unet3D(**arguments).load_state_dict(back)


@pytest.mark.parametrize("wrap", ["bare", "diffusion", "trainer", "ddp"])
def test_load_nested(wrap, tmp_path):
    arguments, (_, _, f, h, _) = CONFIGS["small"]
    peer = peer_or_skip("0.7.0")
    module = peer.Unet3D(**arguments)
    diffusion = peer.GaussianDiffusion(module, image_size=h, num_frames=f, timesteps=10)
    state = {
        "bare": module.state_dict(),
        "diffusion": diffusion.state_dict(),
        "trainer": {"step": 7, "model": diffusion.state_dict(), "ema": {}, "scaler": {}},
        "ddp": {f"module.{k}": v for k, v in module.state_dict().items()},
    }[wrap]
    torch.save(state, tmp_path / "model-1.pt")
    by_path = UNet3D.from_unet3d(tmp_path / "model-1.pt")
    ours = UNet3D(**arguments, norm="rms")
    ours.load_state_dict(state)
    for model in (by_path, ours):
        back = model.to_peer_state_dict()
        assert all(torch.equal(back[k], v) for k, v in module.state_dict().items())


def test_averaged_weights():
    arguments, _ = CONFIGS["small"]
    peer = peer_or_skip("0.7.0")
    model, ema = peer.Unet3D(**arguments), peer.Unet3D(**arguments)
    state = {
        name: {f"denoise_fn.{k}": v for k, v in net.state_dict().items()}
        for name, net in (("model", model), ("ema", ema))
    }
    ours = UNet3D.from_unet3d(state, ema=True)
    assert torch.equal(ours.stem.weight.flatten(), ema.init_conv.weight.flatten())
    with pytest.raises(ValueError, match="averaged"):
        UNet3D.from_unet3d(model, ema=True)


def test_load_inside_a_wrapper():
    """A peer GaussianDiffusion state loads into a GaussianDiffusion around ours."""
    arguments, (_, _, f, h, _) = CONFIGS["cond"]
    peer = peer_or_skip("0.7.0")
    source = peer.GaussianDiffusion(peer.Unet3D(**arguments), image_size=h, num_frames=f)
    ours = UNet3D(**arguments, norm="rms")
    target = peer.GaussianDiffusion(ours, image_size=h, num_frames=f)
    target.load_state_dict(source.state_dict())
    back = ours.to_peer_state_dict()
    assert all(torch.equal(back[k], v) for k, v in source.denoise_fn.state_dict().items())
    target.load_state_dict(target.state_dict())  # and its own again
    with pytest.raises(RuntimeError, match="norm='rms'"):
        peer.GaussianDiffusion(UNet3D(**arguments), image_size=h, num_frames=f).load_state_dict(
            source.state_dict()
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("init_conv.bias"), "1 missing keys: stem.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected keys: extra"),
        (lambda s: s.update({"init_conv.weight": torch.zeros(8, 3, 1, 7, 7)}), "needs"),
        (lambda s: s.update({"init_conv.bias": "text"}), "unexpected keys: init_conv.bias"),
    ],
)
def test_bad_checkpoint_leaves_the_model_alone(damage, message):
    arguments, _ = CONFIGS["small"]
    state = dict(peer_or_skip("0.7.0").Unet3D(**arguments).state_dict())
    damage(state)
    ours = UNet3D(**arguments, norm="rms")
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        ours.load_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_truncated_file(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(peer_or_skip("0.7.0").Unet3D(dim=8, dim_mults=(1, 2)).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        UNet3D.from_unet3d(path)
    with pytest.raises(FileNotFoundError):
        UNet3D.from_unet3d(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="no peer Unet3D"):
        UNet3D.from_unet3d({"weight": torch.zeros(1)})


def test_wrong_era_says_so():
    arguments, _ = CONFIGS["small"]
    state = peer_or_skip("0.7.0").Unet3D(**arguments).state_dict()
    with pytest.raises(ValueError, match="norm='rms'"):
        UNet3D(**arguments).load_state_dict(state)
