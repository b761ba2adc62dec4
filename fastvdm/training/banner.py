"""The summary of a run that is printed before its first step."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch


def render(run: Any) -> str:
    """A few lines on a ``Trainer``: network, data, batch, steps, output."""
    c, engine = run.config, run.engine
    unet, device = engine.bundle.unet, engine.device
    count = sum(p.numel() for p in unet.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    held = "" if run.held is None else f", {len(run.held)} held out"
    total = c.batch_size * c.accumulate * run.world
    precision = "fp32" if c.mixed_precision == "no" else c.mixed_precision
    processes = "" if run.world == 1 else f" x {run.world} processes ({c.parallel})"
    passes = "" if c.accumulate == 1 else f" x {c.accumulate} passes"
    rate = f" at {c.fps:g} fps" if c.fps else ""
    condition = c.conditioning or ("captions" if c.text_encoder else "no")
    rows = {
        "network": f"{c.preset or 'UNet3D'}, {count / 1e6:.1f} M parameters, predicts "
        f"{c.prediction}, conditioned on {condition if condition != 'no' else 'nothing'}",
        "data": f"{len(run.samples)} videos{held}; {c.num_frames} frames{rate}, "
        f"{c.size[0]} x {c.size[1]}, {unet.channels} channels",
        "batch": f"{c.batch_size}{processes}{passes} = {total} clips a step, {precision} on {name}",
        "steps": f"{run.step} to {c.steps}, learning rate {c.lr:g} {c.lr_schedule}; checkpoint "
        f"every {c.save_every}, samples every {c.sample_every or 'no'}",
        "output": f"{c.output}, logs to {', '.join([c.log, *map(str, run.accelerator.log_with)])}",
    }
    lines = [f"  {title:<8} {text}" for title, text in rows.items()]
    return "\n".join([f"fastvdm {importlib.metadata.version('fastvdm')}", *lines])
