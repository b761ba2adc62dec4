"""``UNet3D``, its configuration and presets, and the settings stored with its weights."""

from fastvdm.unet.config import PRESETS, RECIPES, UNetConfig
from fastvdm.unet.settings import Settings
from fastvdm.unet.unet import UNet3D

__all__ = ["PRESETS", "RECIPES", "Settings", "UNet3D", "UNetConfig"]
