"""What sampling takes from the settings of a network, and the names that stand for objects."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from fastvdm import UNet3D
from fastvdm.bundle import Bundle
from fastvdm.diffusion import (
    DDIM,
    Ancestral,
    Condition,
    CosineSchedule,
    DiscreteSchedule,
    Langevin,
    Settings,
    diffusion_loss,
    extend,
    sample,
)
from fastvdm.diffusion.defaults import sampler_for, schedule_for

SHAPE = (1, 3, 2, 4, 6)


def network(**options) -> UNet3D:
    torch.manual_seed(0)
    return UNet3D(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, norm="rms", **options).eval()


# Settings, the kind of time, and what they come to.
TOLD = {
    "cosine": (
        Settings(2, (4, 6), prediction="v", num_steps=3, gamma=0.3, langevin=True), "logsnr",
        dict(schedule=CosineSchedule(), prediction="v", num_steps=3, sampler=Ancestral(0.3),
             corrector=Langevin()),
    ),
    "index": (
        dict(num_frames=2, image_size=[4, 6], timesteps=20, num_steps=3), "index",
        dict(schedule=DiscreteSchedule(20), prediction="eps", num_steps=3, sampler=Ancestral(),
             corrector=None),
    ),
    "betas": (
        dict(num_frames=2, image_size=(4, 6), timesteps=3, betas=[0.1, 0.2, 0.3],
             schedule="discrete", prediction="x"), "logsnr",
        dict(schedule=DiscreteSchedule(betas=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
                                       time_input="logsnr"),
             prediction="x", num_steps=None, sampler=Ancestral(), corrector=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_a_network_is_sampled_as_its_settings_say(name, tmp_path):
    settings, kind, explicit = TOLD[name]
    model = network(time_input=kind)
    model.settings = settings
    want = sample(network(time_input=kind), SHAPE, seed=0, **explicit)
    model.save_pretrained(tmp_path)
    bundle = Bundle.load(tmp_path)
    for net in (model, UNet3D.from_pretrained(tmp_path), copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)), torch.nn.DataParallel(model),
                bundle.unet):  # fmt: skip
        assert torch.equal(sample(net, seed=0), want)
        assert torch.equal(sample(net, 1, seed=0), want)
        assert torch.equal(sample(net, SHAPE, seed=0), want)
    assert bundle.schedule.levels(3).log_snr.equal(explicit["schedule"].levels(3).log_snr)
    assert len(sample(model, 2)) == 2
    x, t, noise = torch.rand(SHAPE), torch.tensor([0.5]), torch.randn(SHAPE)
    loss = diffusion_loss(model, x, t=t, noise=noise)
    known = {k: explicit[k] for k in ("schedule", "prediction")}
    assert loss == diffusion_loss(network(time_input=kind), x, t=t, noise=noise, **known)


def test_what_the_caller_says_wins():
    model = network(time_input="logsnr")
    model.settings = TOLD["cosine"][0]
    plain = network(time_input="logsnr")
    explicit = TOLD["cosine"][2]
    for change in (
        dict(prediction="eps"),
        dict(num_steps=5),
        dict(schedule=CosineSchedule(-10, 10)),
        dict(sampler=Ancestral(0.0), corrector=None),
        dict(sampler=DDIM(), corrector=None),
        dict(corrector=Langevin(0.2)),
        dict(corrector=None),
    ):
        want = explicit | change
        given = dict(change)
        if "schedule" in change:  # then its own number of steps, too
            given["num_steps"] = 3
        got = sample(model, SHAPE, seed=0, **given)
        assert torch.equal(got, sample(plain, SHAPE, seed=0, **want))
        assert not torch.equal(got, sample(model, SHAPE, seed=0))
    assert sampler_for(model, "ancestral", "auto") == (Ancestral(0.3), None)
    assert sampler_for(model, "ddim", "langevin") == (DDIM(), Langevin())
    assert sampler_for(model, None, None) == (Ancestral(0.3), None)
    assert sampler_for(plain, None, "auto") == (Ancestral(), None)


def test_names():
    model = network(time_input="logsnr")
    options = dict(num_steps=3, seed=0)
    for name, value in (
        (dict(sampler="ddim"), dict(sampler=DDIM())),
        (dict(sampler="ancestral"), dict(sampler=Ancestral())),
        (dict(corrector="langevin"), dict(corrector=Langevin())),
        (dict(schedule="cosine"), dict(schedule=CosineSchedule())),
        (dict(schedule="discrete"), dict(schedule=DiscreteSchedule(time_input="logsnr"))),
    ):
        want = sample(model, SHAPE, **options, **value)
        assert torch.equal(sample(model, SHAPE, **options, **name), want)
    schedule = schedule_for(network(), None, None)  # of step indices
    assert isinstance(schedule, DiscreteSchedule) and schedule.timesteps == 1000
    assert isinstance(schedule_for(lambda z, t: z, "discrete", None), DiscreteSchedule)
    assert schedule_for(lambda z, t: z, None, None) == CosineSchedule()


BAD = {
    "sampler": (dict(sampler="langevin"), ValueError, "sampler must be one of ancestral, ddim"),
    "corrector": (dict(corrector="ddim"), ValueError, "corrector must be one of None, auto, lang"),
    "schedule": (dict(schedule="linear"), ValueError, "schedule must be one of cosine, discrete"),
    "no schedule": (dict(schedule=3), TypeError, "schedule must be 'cosine', 'discrete' or an"),
    "index": (dict(schedule="cosine", time_input="index"), ValueError, "is 'discrete'"),
    "clip": (dict(clip="hard"), ValueError, "clip must be one of None, auto, static, dynamic"),
    "time": (
        dict(time_input="sigma"),
        ValueError,
        "time_input must be one of None, logsnr, t, index",
    ),
    "range": (dict(value_range=(1, 0)), ValueError, r"value_range must be \(low, high\)"),
    "one": (dict(value_range=1), TypeError, "value_range must be two numbers"),
    "words": (dict(value_range=("0", "1")), TypeError, "value_range must be two numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        sample(network(time_input="logsnr"), SHAPE, num_steps=1, **options)


def test_a_shape_that_nobody_says():
    model = network()
    for shape in (None, 2):
        with pytest.raises(ValueError, match=r"model.settings = Settings\(num_frames="):
            sample(model, shape)
    with pytest.raises(ValueError, match="shape must be"):
        sample(lambda z, t: z)
    with pytest.raises(TypeError, match="shape must be .* a number of videos or None"):
        sample(model, 2.5)
    model.settings = Settings()
    with pytest.raises(ValueError, match="five positive extents"):
        sample(model, 0)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"predictions": "v"}, ValueError, "unknown settings predictions"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of eps, v, x"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of None, cosine, discrete"),
        ({"image_size": 64}, ValueError, r"image_size must be \(height, width\)"),
        ({"image_size": (64, 0)}, ValueError, "image_size must be an integer"),
        ({"gamma": 2}, ValueError, r"gamma must be in \[0, 1\]"),
        ({"gamma": "0"}, ValueError, "gamma must be"),
        ({"langevin": "yes"}, TypeError, "langevin must be a bool"),
        ({"fps": "8"}, ValueError, "fps must be positive"),
        ({"betas": [0.1], "timesteps": 2}, ValueError, "timesteps is 2"),
        ({"text_pooling": "max"}, ValueError, "text_pooling must be one of attention, mean, cls"),
        ("v", TypeError, "settings must be Settings or a mapping, got str"),
    ],
)
def test_bad_settings(settings, error, message):
    model = network()
    with pytest.raises(error, match=message):
        model.settings = settings
    assert model.settings == {}


def test_settings_are_read_through_the_network_only():
    model = network()
    given = {"prediction": "v"}
    model.settings = given
    given["prediction"] = "x"
    assert model.settings == {"prediction": "v"} and network().settings == {}
    with pytest.raises(TypeError):
        model.settings["prediction"] = "x"


def test_value_range():
    model = network(time_input="logsnr")
    steps = []
    options = dict(num_steps=2, seed=0, condition=Condition(torch.zeros(1, 3, 1, 4, 6)))
    plain = sample(model, SHAPE, **options)
    unit = sample(model, SHAPE, value_range=(0, 1), callback=steps.append, **options)
    torch.testing.assert_close(unit, (plain + 1) / 2)
    assert unit.min() >= 0 and unit.max() <= 1 and torch.equal(steps[-1].z, plain)
    torch.testing.assert_close(sample(model, SHAPE, value_range=(0, 255), **options), unit * 255)
    with pytest.raises(ValueError, match=r"value_range is of sample"):
        extend(model, torch.zeros(SHAPE), 4, window=2, value_range=(0, 1))


# -- folders and the hub --------------------------------------------------------------------------


def test_the_card_says_how_to_sample(tmp_path):
    model = network(cond_dim=5)
    model.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "More Information Needed" not in card and "https://arxiv.org/abs/2204.03458" in card
    assert "cond=torch.zeros(1, 5)" in card and "(1, 3, num_frames, height, width)" in card
    model = network()
    model.settings = TOLD["cosine"][0]
    model.save_pretrained(tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| num_steps | 3 |\n" in card and "betas" not in card
    (code,) = card.split("```python\n")[1:]
    assert "this folder" in code and "sample(model, value_range=(0, 1))" in code


class Hub:
    """Stands for ``HfApi``: keeps the files of one repository, as ``upload_folder`` leaves them."""

    files: dict[str, bytes] = {}

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **options):
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path, delete_patterns, **options):
        new = {p.name: p.read_bytes() for p in folder_path.iterdir()}
        kept = {k: v for k, v in self.files.items() if k not in (delete_patterns or [])}
        Hub.files = kept | new
        return "url"


def test_push_to_hub_brings_the_settings_and_leaves_none(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr(Hub, "files", {"text.safetensors": b"", "notes.txt": b""})
    model = network()
    model.settings = Settings(prediction="v")
    model.push_to_hub("me/videos")
    assert json.loads(Hub.files["settings.json"])["prediction"] == "v"
    assert b'from_pretrained("me/videos")' in Hub.files["README.md"]
    assert "notes.txt" in Hub.files and "text.safetensors" not in Hub.files
    network().push_to_hub("me/videos")
    assert set(Hub.files) == {"README.md", "config.json", "model.safetensors", "notes.txt"}
    model.push_to_hub("me/videos")
    network().push_to_hub("me/videos", delete_patterns=[])
    assert "settings.json" in Hub.files


def test_a_model_does_not_choose_what_is_fetched(tmp_path, monkeypatch):
    """Its text encoder is looked for on this machine alone, unless the caller says so."""
    transformers = pytest.importorskip("transformers")
    model = network(cond_dim=5)
    model.save_pretrained(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"text_encoder": "nobody/nothing"}))
    asked = []

    def refuse(name, **options):
        asked.append((name, options["local_files_only"], options["trust_remote_code"]))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    message = "wants the text encoder 'nobody/nothing'.*allow_download=True .--allow-download"
    with pytest.raises(ValueError, match=message):
        Bundle.load(tmp_path)
    with pytest.raises(ValueError, match="cannot load the text encoder 'nobody/nothing'"):
        Bundle.load(tmp_path, allow_download=True)
    with pytest.raises(ValueError, match="cannot load the text encoder 'my/own'"):
        Bundle.load(tmp_path, text_encoder="my/own")
    with pytest.raises(ValueError, match=message):
        Bundle.load(tmp_path / "model.safetensors")
    places = ("nobody/nothing", True), ("nobody/nothing", False), ("my/own", False)
    assert asked == [(*p, False) for p in (*places, places[0])]


@pytest.mark.parametrize(
    "told",
    [
        {"classes": "cat"}, {"classes": {"a": 1}}, {"classes": ["a", "a"]}, {"text_encoder": 5},
        {"betas": "x" * 1000}, {"betas": [2.0] * 1000}, {"betas": [float("nan")] * 1000},
        {"value_range": [float("-inf"), 1]}, {"data_fps": 10**400}, {"fps": 10**400},
        {"value_range": [1, 0]}, {"data_fps": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_folder_that_are_none(tmp_path, told):
    network().save_pretrained(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(told))
    with pytest.raises((ValueError, TypeError), match=next(iter(told))):
        UNet3D.from_pretrained(tmp_path)


def test_json_that_is_too_deep(tmp_path):
    network().save_pretrained(tmp_path)
    (tmp_path / "settings.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="settings.json is not JSON"):
        UNet3D.from_pretrained(tmp_path)


def test_the_card_is_of_what_was_saved_last(tmp_path):
    model = network()
    for frames in (2, 7):
        model.settings = Settings(num_frames=frames)
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| num_frames | 7 |" in card and "| num_frames | 2 |" not in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.settings = Settings(value_range=None)
    model.save_pretrained(tmp_path / "latents")
    card = (tmp_path / "latents" / "README.md").read_text()
    assert "video = sample(model)\n" in card and '"sample.npy"' in card


def test_a_bool_is_no_number_of_videos():
    model = network()
    model.settings = Settings(num_frames=2, image_size=(8, 8))
    for shape in (True, (1, 3, 3, 8, True)):
        with pytest.raises((ValueError, TypeError), match="shape must be"):
            sample(model, shape, num_steps=1)
