"""Numbers on which launchers, ops and the C++ kernels agree. Imports nothing: ops run without
Triton."""

from __future__ import annotations

TIME, SPACE = 1, 2  # the axis of (B, F, H, W, ...) at which a sequence starts

# axis_attention: up to here one tile holds all keys, and the backward needs neither out nor lse.
SHORT = 32

# norm_act: what the launchers take as ``kind``.
GROUP, RMS, LAYER = 0, 1, 2
NORM_KINDS = {"group": GROUP, "rms": RMS, "layer": LAYER}
# Channels of one pixel that a program of the row-wise norms holds in registers.
MAX_ROW_CHANNELS = 4096
