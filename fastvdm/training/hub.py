"""Upload a run to the Hugging Face hub: weights, settings and a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastvdm.bundle import Bundle, checkpoints
from fastvdm.training.config import TrainConfig
from fastvdm.training.log import read_log


def push_run(
    run: str, name: str, *, ema: bool = True, private: bool = False, text_encoder: str | None = None
) -> str:
    """Upload the latest checkpoint of a run, or a folder with a model. Returns the page's address.

    Args:
        run: the output folder of a training run, or any folder that ``Bundle.load`` reads.
        name: "user/name" on the hub; it is created if it does not exist.
        ema: take the averaged weights if there are both.
        private: create a private repository.
        text_encoder: the name of the text encoder on the hub, if the run has it from a folder.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the name of the model or of its text encoder is not valid.
        OSError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    if name.count("/") != 1:
        raise ValueError(f"the name on the hub must be user/name, got {name!r}")
    bundle = Bundle.load(run, ema=ema)
    encoder = bundle.settings.text_encoder
    if text_encoder is None and encoder is not None and Path(encoder).is_absolute():
        raise ValueError(
            f"the text encoder is a folder of this machine, {encoder}: --text-encoder user/name "
            "says where others find it"
        )
    if text_encoder is not None:
        bundle.settings = replace(bundle.settings, text_encoder=text_encoder)
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder)
        bundle.save(to)
        sheet = _newest_sheet(Path(run))
        if sheet is not None:
            shutil.copy(sheet, to / f"samples{sheet.suffix}")
        picture = None if sheet is None else f"samples{sheet.suffix}"
        text = card(bundle, name, facts(Path(run)), picture)
        (to / "README.md").write_text(text, encoding="utf-8")
        api = HfApi()
        page = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=to, commit_message="fastvdm push")
    return str(page)


def _newest_sheet(run: Path) -> Path | None:
    found = sorted(p for p in run.glob("samples/step-*") if p.suffix in (".gif", ".webp"))
    return found[-1] if found else None


def facts(run: Path) -> dict[str, str]:
    """How a run was trained, in words; empty for a folder that is not a run."""
    file, saved = run / "config.json", checkpoints(run)
    if not saved or not file.is_file():
        return {}
    config = TrainConfig.create(json.loads(file.read_text(encoding="utf-8")))
    step = int(saved[-1].name.removeprefix("step-"))
    log = run / config.log
    rows = [r for r in read_log(log) if r["step"] <= step] if log.is_file() else []
    found = {
        "steps": f"{step}, {config.batch_size * config.accumulate} clips a process and step",
        "loss": f"{config.loss_type} in {config.loss_space} space, predicts {config.prediction}",
        "optimizer": f"AdamW, learning rate {config.lr:g} {config.lr_schedule}, betas "
        f"{config.betas[0]:g} and {config.betas[1]:g}, averaged with {config.ema_decay:g}",
        "precision": "fp32" if config.mixed_precision == "no" else config.mixed_precision,
    }
    if config.preset:
        found["recipe"] = f"{config.preset} of Video Diffusion Models, Appendix A"
    if rows:
        last = rows[-100:]
        mean = sum(r["loss"] for r in last) / len(last)
        found["training loss"] = f"{mean:.4f}, mean of the last {len(last)} steps"
    return found


def card(bundle: Bundle, name: str, trained: Mapping[str, str], sheet: str | None) -> str:
    """The README.md for the hub: the network's card with samples, a command and the run's facts."""
    s, dim = bundle.settings, bundle.unet.cond_dim
    kind, option, argument = "nothing", "", "None, 1"
    if s.text_encoder:
        kind, option, argument = "captions", ' --caption "..."', '["..."], 1'
    elif s.classes:
        kind, option = f"{len(s.classes)} classes", f' --label "{s.classes[0]}"'
        argument = f"None, 1, labels=[{s.classes[0]!r}]"
    elif dim:
        kind, option = f"vectors of {dim} numbers", " --cond vector.npy"
        argument = "None, 1, vectors=vector"
    count = sum(p.numel() for p in bundle.unet.parameters())
    rows = {"network": f"UNet3D, {count / 1e6:.1f} M parameters", "conditioned on": kind, **trained}
    parts = [str(bundle.unet.generate_model_card(repo_id=name)).rstrip()]
    if sheet:
        parts.append(f"![samples]({sheet})")
    ends = ".npy" if s.value_range is None else ".mp4"
    parts.append(f"```\nfastvdm sample {name} out{ends}{option}\n```")
    if dim:
        parts.append(
            "With its condition, in Python:\n\n```python\nfrom fastvdm.bundle import Bundle\n\n"
            f"model = Bundle.load({name!r})\ncond = model.cond({argument})\n"
            "video = sample(model.unet, cond=cond, value_range=(0, 1))\n```"
        )
    parts.append("| run | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items()))
    if s.classes:
        parts.append(f"Classes: {', '.join(s.classes)}")
    return "\n\n".join(parts) + "\n"
