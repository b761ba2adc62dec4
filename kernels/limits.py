"""Constants shared by launchers, ops and the C++ kernels. It imports nothing, because ops must work
without Triton."""

from __future__ import annotations

TIME, SPACE = 1, 2  # the axis of (B, F, H, W, ...) at which a sequence starts

# axis_attention: up to this length one tile holds all keys, and the backward needs no out or lse.
SHORT = 32

# norm_act: the values of ``kind`` that launchers take.
GROUP, RMS, LAYER = 0, 1, 2
NORM_KINDS = {"group": GROUP, "rms": RMS, "layer": LAYER}
# Channels of one pixel that a program of the row-wise norms can hold in registers.
MAX_ROW_CHANNELS = 4096
