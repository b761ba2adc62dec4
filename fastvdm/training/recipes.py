"""How the paper's six models were trained (Ho et al. 2022, Video Diffusion Models, Appendix A)."""

from __future__ import annotations

from typing import Any

# batch_size is the sum over all devices.
TRAINING: dict[str, dict[str, Any]] = {
    "ucf101": {"lr": 3e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 60_000,
               "num_images": 8},
    "bair": {"lr": 2e-4, "betas": (0.9, 0.999), "weight_decay": 0.01, "batch_size": 128,
             "steps": 660_000, "ema_decay": 0.999, "num_images": 8, "flip": True},
    "kinetics600": {"lr": 2e-4, "betas": (0.9, 0.99), "batch_size": 256, "steps": 220_000,
                    "num_images": 8},
    "t2v-small": {"lr": 3e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 200_000,
                  "num_images": 8},
    "t2v-large": {"lr": 3e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 700_000,
                  "num_images": 8},
    "t2v-128": {"lr": 2e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 800_000,
                "num_images": 7},
}  # fmt: skip
