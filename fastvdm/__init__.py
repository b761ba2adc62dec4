"""fastvdm: video diffusion with factorized space-time 3D U-Nets, fast and exact."""

from __future__ import annotations

from fastvdm.config import use_backend
from fastvdm.swap import accelerate, convert_optimizer_state
from fastvdm.unet import UNet3D

__version__ = "0.1.0"
__all__ = ["UNet3D", "accelerate", "convert_optimizer_state", "use_backend", "__version__"]
