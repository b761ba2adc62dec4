"""The modules that are trained, and the moving average of their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastvdm.bundle import Bundle, make_text
from fastvdm.diffusion.joint import append_images, images_from_batch, joint_loss
from fastvdm.training.config import TrainConfig
from fastvdm.training.order import INIT, seeded, stream_seed


def build(
    config: TrainConfig,
    classes: tuple[str, ...] | None = None,
    cond_dim: int | None = None,
    fps: float = 8.0,
    *,
    fetch: bool = True,
) -> Bundle:
    """A new network and text conditioner of the configuration, initialised from its seed.

    Args:
        config: the configuration.
        classes: class names of the videos; they decide ``cond_dim``.
        cond_dim: width of the videos' condition vectors; it decides that of the network.
        fps: frame rate of the videos if the configuration does not resample them.
        fetch: whether a text encoder that is not on this machine may be downloaded.

    Raises:
        ValueError: the data lack the condition, or it has another width.
    """
    from fastvdm.unet import UNet3D

    width = len(classes) if classes else cond_dim
    with seeded(stream_seed(config.seed, INIT)):
        network, settings = config.network(), config.settings(classes, fps)
        text = None
        if settings.text_encoder is not None:
            text = make_text(settings, network.cond_dim, fetch=fetch)
            network = replace(network, cond_dim=text.out_dim)
        elif width is not None:
            if network.cond_dim not in (None, width):
                raise ValueError(f"cond_dim={network.cond_dim}, but the data have {width}")
            network = replace(network, cond_dim=width)
        unet = UNet3D(**vars(network))
    return Bundle(unet, settings, text)


class Learner(nn.Module):
    """The network and the text pooling. ``forward`` returns the loss of a batch, so wrappers for
    distributed training see one call. In eval mode no condition is dropped."""

    def __init__(self, bundle: Bundle, config: TrainConfig) -> None:
        super().__init__()
        self.unet, self.text = bundle.unet, bundle.text
        self.config, self.schedule = config, bundle.schedule
        self.num_classes = len(bundle.settings.classes or ())

    def forward(self, video: Tensor | None, conditions: list[Any] | None) -> Tensor:
        """The loss of a video (B, C, F[+ K], H, W) in [0, 1], or of latents, with B conditions, or
        B lists of 1 + K. Without a video it returns the encoded conditions, because sharded weights
        are gathered only for this call. In eval mode no images are taken from the batch, which may
        be a single clip.
        """
        if video is None:
            return self._encode(conditions or [])
        c, images = self.config, self.config.num_images
        if images and c.image_source == "batch":
            images = images if self.training else 0
            video = append_images(video, images_from_batch(video, images)) if images else video
        if c.value_range is not None:
            video = 2 * video - 1
        cond, image_cond = self._cond(conditions)
        return joint_loss(
            self.unet,
            video,
            images,
            cond=cond,
            image_weight=c.image_weight,
            image_time=c.image_time,
            image_cond=image_cond,
            schedule=self.schedule,
            prediction=c.prediction,
            loss_space=c.loss_space,
            loss_type=c.loss_type,
            cond_drop_prob=c.cond_drop_prob if self.training else 0.0,
        )

    def _cond(self, conditions: list[Any] | None) -> tuple[Tensor | None, Any]:
        """cond (B, D), and the condition of the image frames (B, K, D) or the option's name."""
        option = self.config.image_cond
        if conditions is None:
            return None, "shared"
        joint = isinstance(conditions[0], list)
        videos = [c[0] for c in conditions] if joint else conditions
        if option != "own" or not self.config.num_images:
            return self._encode(videos), "shared" if option == "own" else option
        images = [c for row in conditions for c in row[1:]]
        both = self._encode([*videos, *images])
        return both[: len(videos)], both[len(videos) :].unflatten(0, (len(videos), -1))

    def _encode(self, conditions: list[Any]) -> Tensor:
        """Encode captions, class numbers or vectors → (N, D)."""
        first, weight = conditions[0], self.unet.stem.weight
        if isinstance(first, str):
            assert self.text is not None
            return self.text(conditions)
        if isinstance(first, int):
            classes = torch.tensor(conditions, device=weight.device)
            return F.one_hot(classes, self.num_classes).to(weight.dtype)
        return torch.stack(conditions).to(weight.device, weight.dtype)


def _local(t: Tensor) -> Tensor:
    """This process's shard of a tensor; averaging is elementwise."""
    return t.to_local() if isinstance(t, DTensor) else t


class Averaged:
    """Exponential moving average of parameters, in fp32; if sharded, of this process's shards.

    Args:
        modules: modules whose parameters are averaged.
        decay: weight of the old average in an update.
        warmup: use decay_n = min(decay, (1 + n)/(10 + n)) in update n, so that a short run does not
            average the initial weights.
    """

    def __init__(self, modules: list[nn.Module], decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.source = [p for m in modules for p in m.parameters()]
        self.load_current()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the current parameters in, as update number ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.copies, [_local(p).float() for p in self.source], 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The modules have the averaged values inside the block."""
        kept = [_local(p).detach().clone() for p in self.source]
        self._copy(self.copies)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self.source, values):
            _local(p).copy_(value)

    def load_current(self) -> None:
        """Set the average to the current values of the modules."""
        self.copies = [_local(p).detach().clone().float() for p in self.source]
