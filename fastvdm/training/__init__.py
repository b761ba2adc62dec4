"""Training as ``fastvdm train`` runs it."""

from __future__ import annotations

from fastvdm.training.config import TrainConfig
from fastvdm.training.learner import Averaged, build
from fastvdm.training.order import OrderedSamples, Place
from fastvdm.training.trainer import Trainer, train

__all__ = ["Averaged", "OrderedSamples", "Place", "TrainConfig", "Trainer", "build", "train"]
