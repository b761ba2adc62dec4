"""Runs a learner on the processes of a run: replicated, or sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fastvdm.bundle import Bundle
from fastvdm.training.config import TrainConfig
from fastvdm.training.learner import Averaged, Learner

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True)


class Engine:
    """The learner, its optimizer and its moving average on this process.

    Args:
        make: makes a new bundle of the run on the CPU. With sharded weights a second one is made,
            from which checkpoints are written.
        config: the configuration.
        accelerator: the ``Accelerator`` of Hugging Face accelerate.

    Raises:
        ValueError: the device does not support the precision.
    """

    def __init__(self, make: Callable[[], Bundle], config: TrainConfig, accelerator: Any) -> None:
        self.config, self.accelerator, self._make = config, accelerator, make
        self.device = accelerator.device
        self.sharded = config.parallel == "fsdp"
        half = config.mixed_precision == "fp16"
        if self.sharded and half:
            raise ValueError("parallel=fsdp takes mixed_precision bf16 or no, not fp16")
        if self.sharded and accelerator.num_processes < 2:
            raise ValueError("parallel=fsdp needs several processes: accelerate launch, torchrun")
        self.bundle = make().to(self.device)
        self.learner = Learner(self.bundle, config)
        images_without = config.num_images and config.image_cond == "none"
        null = self.bundle.unet.null_cond_emb
        if null is not None and not config.cond_drop_prob and not images_without:
            null.requires_grad_(False)  # it is unused, and gradient reduction would wait for it
        self._plain: Bundle | None = None
        if self.sharded:
            self._shard()
        self.parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        trained = [m for m in (self.bundle.unet, self.bundle.text) if m is not None]
        self.averaged = Averaged(trained, config.ema_decay, config.ema_warmup)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self._call: Any = None

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        from fastvdm.parallel import fully_shard_unet

        mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        fully_shard_unet(self.bundle.unet, mesh)
        # The root module keeps gathered weights by default: those of the average, after sampling.
        fully_shard(self.learner, mesh=mesh, reshard_after_forward=True)

    def start(self) -> None:
        """Call this once the initial weights are loaded."""
        if self.config.compile:
            self.bundle.unet.compile()
        self._call = self.learner if self.sharded else self.accelerator.prepare(self.learner)

    # -- a step ---------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        kind = kinds.get(self.config.mixed_precision)
        if kind is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=kind)

    def backward(self, video: Tensor, conditions: list[Any] | None, last: bool) -> Tensor:
        """The loss of one pass. In the ``last`` pass of a step, processes sum their gradients."""
        alone = not last and not self.sharded
        with self.accelerator.no_sync(self._call) if alone else contextlib.nullcontext():
            with self.autocast():
                loss = self._call(video, conditions) / self.config.accumulate
            self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self, lr: float, step: int) -> Tensor:
        """One step of the optimizer and of the average. Returns the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip if self.config.grad_clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged.update(step)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # -- what a checkpoint holds ------------------------------------------------------------------

    def writer(self) -> Callable[[Path], None]:
        """A function that writes the weights and their average into a folder, for the main process.
        All processes must call this, because sharded weights are gathered now."""
        if not self.sharded:
            return self._write
        states = {"model": get_model_state_dict(self.learner, options=_GATHERED)}
        with self.averaged.swapped():
            states["ema"] = get_model_state_dict(self.learner, options=_GATHERED)

        def write(folder: Path) -> None:
            self._plain = self._plain or self._make()
            for name, state in states.items():
                Learner(self._plain, self.config).load_state_dict(state)
                self._plain.save(folder / name)

        return write

    def _write(self, folder: Path) -> None:
        self.bundle.save(folder / "model")
        with self.averaged.swapped():
            self.bundle.save(folder / "ema")

    def state(self) -> dict[str, Any]:
        """Optimizer and loss scale, gathered from all processes."""
        if self.sharded:
            optimizer = get_optimizer_state_dict(self.learner, self.optimizer, options=_GATHERED)
        else:
            optimizer = self.optimizer.state_dict()
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Load weights that ``writer`` wrote, and a ``state``."""
        if self.sharded:
            plain = Learner(self._make(), self.config)
            for name in ("ema", "model"):
                Bundle(plain.unet, self.bundle.settings, plain.text).load_weights(folder / name)
                set_model_state_dict(self.learner, plain.state_dict(), options=_SPREAD)
                if name == "ema":
                    self.averaged.load_current()
            set_optimizer_state_dict(
                self.learner, self.optimizer, state["optimizer"], options=_SPREAD
            )
        else:
            self.bundle.load_weights(folder / "ema")
            self.averaged.load_current()
            self.bundle.load_weights(folder / "model")
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def size(self) -> int:
        """Bytes of a checkpoint: weights, their average, and two moments per parameter."""
        return sum(4 * p.numel() * (4 if p.requires_grad else 2) for p in self.learner.parameters())
