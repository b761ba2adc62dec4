"""The compiled Triton kernels, run without a GPU: see README.md."""

from .emulator import Emulator, Launched, emulate
from .findings import HARMLESS, KINDS, Finding

__all__ = ["HARMLESS", "KINDS", "Emulator", "Finding", "Launched", "emulate"]
