"""The replacement for CUtensorMap, with the rules by which the driver makes one."""

from __future__ import annotations

from typing import Any

import numpy as np

MAGIC = 0x7E5504DE5C000001  # as in engine/layout.h
_SPAN = (0, 32, 64, 128)  # bytes that a swizzle mode permutes


def faults(descriptor: Any, box: list[int], swizzle: int) -> list[str]:
    """Why cuTensorMapEncodeTiled would refuse; by its documentation."""
    size = descriptor.base.element_size()
    inner = box[-1] * size
    found = ["base not 16-byte aligned"] if descriptor.base.data_ptr() % 16 else []
    strides = [s * size for s in descriptor.strides[:-1]]
    found += [f"stride {s} not a multiple of 16 bytes" for s in strides if s % 16 or s >= 2**40]
    found += [f"box {b} above 256" for b in box if b > 256]
    found += [f"extent {n} not in 1 ... 2^32" for n in descriptor.shape if not 0 < n <= 2**32]
    if len(descriptor.shape) > 5:
        found.append(f"rank {len(descriptor.shape)} above 5")
    if inner % 16:
        found.append("inner box not a multiple of 16 bytes")
    if swizzle and inner > _SPAN[swizzle]:
        found.append(f"inner box of {inner} bytes above the swizzle span")
    return found


def encode(descriptor: Any, box: list[int], swizzle: int) -> bytes:
    """128 bytes for the engine: the innermost axis first, strides in bytes."""
    size, rank = descriptor.base.element_size(), len(descriptor.shape)
    shape = [*descriptor.shape][::-1] + [1] * (5 - rank)
    strides = [s * size for s in descriptor.strides][::-1][1:] + [0] * 5
    out = np.array([MAGIC, descriptor.base.data_ptr()], np.uint64).tobytes()
    out += np.array([rank, size, swizzle, 0], np.uint32).tobytes()
    out += np.array(shape, np.uint64).tobytes() + np.array(strides[:4], np.uint64).tobytes()
    out += np.array(box[::-1] + [1] * (5 - rank), np.uint32).tobytes()
    return out.ljust(128, b"\0")
