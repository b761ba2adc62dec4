"""The options of softmax attention, passed as one value from layer to launcher. Needs no Triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionOptions(NamedTuple):
    """Options of softmax attention over a sequence of N positions.

    bias: (heads, N, N) [query, key], any floating dtype, added to the scaled logits. -inf masks; a
        row of only -inf gives zeros. A finite value does not: a row of finfo.min is uniform,
        but for fp32's on fp16 in torch's or xformers' kernel, where -65504 takes its place.
    rel_k: Shaw vectors (1 or heads, 2R+1, D). For query i, row clip(j-i, -R, R) + R is added to key
        j. With ``rotary``, rel_k is multiplied with the unrotated query.
    rel_v: the same for value j.
    rotary: (2, N, R/2) cosines and sines in fp32 that rotate the pairs (2i, 2i+1) of the first R
        features of q and k. It is not differentiated.
    focus_mask: (B,) bool, over time only. True: the frames of this video attend to themselves only,
        so out = v (+ rel_v of distance 0).
    num_images: K, over time only. The last K frames are images that attend to themselves only; the
        first F-K attend to each other.
    """

    bias: Tensor | None = None
    rel_k: Tensor | None = None
    rel_v: Tensor | None = None
    rotary: Tensor | None = None
    focus_mask: Tensor | None = None
    num_images: int = 0

    @property
    def pairs(self) -> int:
        """R/2, the number of rotated pairs."""
        return 0 if self.rotary is None else self.rotary.shape[-1]

    @property
    def masked(self) -> bool:
        """Whether some frames attend to themselves only."""
        return self.focus_mask is not None or self.num_images > 0

    @property
    def shaw(self) -> bool:
        return self.rel_k is not None or self.rel_v is not None
