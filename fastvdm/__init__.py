"""fastvdm: video diffusion with factorized space-time 3D U-Nets, fast and exact."""

from __future__ import annotations

from fastvdm.config import use_backend

__version__ = "0.1.0"
__all__ = ["use_backend", "__version__"]
