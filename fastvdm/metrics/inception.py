"""The metric behind ``fastvdm.metrics.InceptionScore``, in a file that imports torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr
from torchmetrics.image.inception import InceptionScore
from torchmetrics.utilities.data import dim_zero_cat


class SplitScore(InceptionScore):
    """torchmetrics' Inception Score, but never NaN for finite logits.

    torchmetrics' deviation of a single split is NaN. So is its score if every sample of a split
    gives a class a probability that is 0 in fp32.
    """

    def compute(self) -> tuple[Tensor, Tensor]:
        """E KL(p(y|x) || p(y)) = H(p(y)) - E H(p(y|x)), with 0 log 0 = 0."""
        logits = dim_zero_cat(self.features)
        prob = logits[torch.randperm(logits.shape[0])].softmax(dim=1)
        scores = torch.stack(
            [
                (entr(p.mean(dim=0)).sum() - entr(p).sum(dim=1).mean()).exp()
                for p in prob.chunk(self.splits)
            ]
        )
        return scores.mean(), scores.std() if len(scores) > 1 else torch.zeros_like(scores[0])
