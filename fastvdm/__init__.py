"""fastvdm: video diffusion with factorized space-time 3D U-Nets, fast and exact."""

from __future__ import annotations

from fastvdm.runtime.config import use_backend
from fastvdm.unet import UNet3D
from fastvdm.unet.accelerate import accelerate, convert_optimizer_state

__version__ = "0.1.0"
__all__ = ["UNet3D", "accelerate", "convert_optimizer_state", "use_backend", "__version__"]
