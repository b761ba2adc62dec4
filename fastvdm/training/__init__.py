"""Training, as ``fastvdm train`` runs it."""

from __future__ import annotations

from fastvdm.training.config import TrainConfig
from fastvdm.training.trainer import Averaged, OrderedSamples, Trainer, build, train

__all__ = ["Averaged", "OrderedSamples", "TrainConfig", "Trainer", "build", "train"]
