"""Schedules, losses, samplers and guidance of video diffusion (Ho et al. 2022)."""

from __future__ import annotations

from fastvdm.diffusion.condition import Condition
from fastvdm.diffusion.denoiser import Denoiser, input_gradient
from fastvdm.diffusion.downsample import average_downsample, bilinear_downsample
from fastvdm.diffusion.extend import (
    cascade,
    extend,
    extend_blocks,
    interpolate_frames,
    upscale,
)
from fastvdm.diffusion.loss import diffusion_loss, q_sample
from fastvdm.diffusion.prediction import Prediction, convert
from fastvdm.diffusion.sample import Step, sample
from fastvdm.diffusion.samplers import DDIM, Ancestral, Langevin
from fastvdm.diffusion.schedule import CosineSchedule, DiscreteSchedule, alpha_of, sigma_of
from fastvdm.unet.settings import Settings

__all__ = [
    "DDIM",
    "Ancestral",
    "Condition",
    "CosineSchedule",
    "Denoiser",
    "DiscreteSchedule",
    "Langevin",
    "Prediction",
    "Settings",
    "Step",
    "alpha_of",
    "average_downsample",
    "bilinear_downsample",
    "cascade",
    "convert",
    "diffusion_loss",
    "extend",
    "extend_blocks",
    "input_gradient",
    "interpolate_frames",
    "q_sample",
    "sample",
    "sigma_of",
    "upscale",
]
