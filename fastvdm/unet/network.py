"""The forward pass of ``UNet3D``: its layers and their order."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvdm.layers.attention import Attention, TimeContext
from fastvdm.layers.conv import SpaceConv, convolve
from fastvdm.layers.embedding import TimeEmbedding, mlp, probability_mask
from fastvdm.layers.kept import watched
from fastvdm.layers.position import T5RelativeBias, causal_bias, rotary_table
from fastvdm.layers.resnet import Films, films
from fastvdm.layers.shards import FrameShards
from fastvdm.unet.blocks import Level, Unit, attend, film_layers
from fastvdm.unet.build import paper_parts, peer_parts
from fastvdm.unet.config import SETTABLE, UNetConfig, built_from, changed, check_choice
from fastvdm.unet.padding import crop, pad_edges


class FactorizedUNet(nn.Module):
    """``UNet3D`` without the methods that read and write weights."""

    @built_from(UNetConfig)
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        paper = config.layout == "paper"
        self.channels, self.out_dim = config.channels, config.out_channels
        self.cond_dim = config.cond_width
        self.has_cond = self.cond_dim is not None
        self.levels = len(config.dim_mults)
        self.layout, self.time_input = config.layout, config.time_input
        self.position, self.rotary_dim = config.position, config.rotary_dim
        self.stem_width = config.stem_width
        self.stem_skip: str | None = config.stem_skip
        self.mask_stem_attention = config.mask_stem_attention
        self.cond_drop_prob = config.cond_drop_prob
        self.pad, self.causal = config.pad, config.causal
        self.separate_frames = config.separate_frames
        self.shards: FrameShards | None = None  # see fastvdm.parallel

        act, layers = nn.SiLU if paper else nn.GELU, config.mlp_layers
        self.time_embedding = TimeEmbedding(
            config.dim, config.time_width, time_input=self.time_input, num_layers=layers, act=act
        )
        self.cond_embedding: nn.Module | None = None
        self.null_cond_emb: nn.Parameter | None = None
        if self.cond_dim is not None:
            if paper:
                self.cond_embedding = mlp(self.cond_dim, config.time_width, layers, act)
            if config.null_cond == "learned":
                self.null_cond_emb = nn.Parameter(torch.randn(1, self.cond_dim))

        self.stem = SpaceConv(self.channels, config.stem_width, config.init_kernel_size)
        parts = (paper_parts if paper else peer_parts)(config)
        self.stem_attention = parts.stem_attention
        self.downs = nn.ModuleList(parts.downs)
        self.middle = nn.ModuleList(parts.middle)
        self.ups = nn.ModuleList(parts.ups)
        self.head = parts.head
        self.push_resampled = parts.push_resampled
        self.checkpointing = config.checkpointing

        # Temporal attentions with the same number of heads share one T5 table, as in the peer.
        self.relative_bias = nn.ModuleDict()
        attention = (m for m in self.modules() if isinstance(m, Attention))
        self.temporal_heads = sorted({m.heads for m in attention if m.core == "time"})
        if "t5" in self.position:
            for h in self.temporal_heads:
                self.relative_bias[str(h)] = T5RelativeBias(h)
        self._config = config

    def __setattr__(self, name: str, value: Any) -> None:
        """Some options may be set afterwards, to any value that the constructor takes."""
        check_choice(name, value)
        if name in SETTABLE and "_config" in self.__dict__:
            replace(self._config, **{name: value})  # raises as the constructor does
        super().__setattr__(name, value)
        if name == "checkpointing":
            for module in self.modules():
                if isinstance(module, Unit):
                    module.recompute = value == "block"

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor | None = None,
        null_cond_prob: float | None = None,
        focus_present_mask: Tensor | None = None,
        prob_focus_present: float = 0.0,
        *,
        num_images: int = 0,
    ) -> Tensor:
        """Denoise ``x``: return what the network predicts (noise, v or the clean video).

        Args:
            x: (B, channels, F, H, W), floating point. H and W are divisible by 2^(levels - 1)
                unless the network was built with ``pad=True``.
            time: (B,) step indices or log-SNRs, as ``time_input`` says. (B, F) gives each frame its
                own time (diffusion forcing); it requires norms over single frames (``norm="rms"``
                or ``norm_per_frame=True``).
            cond: (B, cond_dim), required if and only if the network is conditional.
            null_cond_prob: probability of the null condition per sample. None, the default, means
                ``cond_drop_prob`` in training mode and 0 otherwise.
            focus_present_mask: (B,) bool; True for samples in which every frame attends to itself
                only. None draws it with ``prob_focus_present``.
            prob_focus_present: probability of True in a drawn ``focus_present_mask``.
            num_images: the last ``num_images`` frames are independent images (paper §3): they
                attend to themselves, and no video frame attends to them.

        Returns:
            (B, out_dim, F, H, W).

        Raises:
            TypeError: a tensor has the wrong kind of dtype.
            ValueError: a shape, a device or a number does not fit.

        Warns:
            UserWarning: a time on the CPU looks like the other kind: an index below 0 or between 0
                and 1, or a log-SNR beyond +-100 (schedules end near 20). Times on other devices are
                not checked, because that would synchronise with the device.
        """
        self._check_input(x, time, cond, focus_present_mask, num_images)
        batch = x.shape[0]
        focus = focus_present_mask
        if focus is None:
            focus = probability_mask(batch, prob_focus_present, x.device)
        if null_cond_prob is None:
            null_cond_prob = self.cond_drop_prob if self.training else 0.0
        drop = probability_mask(batch, null_cond_prob, x.device) if self.has_cond else None
        return self._denoise(x, time, cond, drop, focus, num_images)

    def forward_with_cond_scale(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor | None = None,
        *,
        cond_scale: float = 2.0,
        focus_present_mask: Tensor | None = None,
        prob_focus_present: float = 0.0,
        num_images: int = 0,
    ) -> Tensor:
        """Classifier-free guidance, with both branches in one batched pass.

        The result is null + (cond - null) * cond_scale, with cond_scale = 1 + w of Eq. 6. The other
        arguments are those of ``forward``.
        """
        self._check_input(x, time, cond, focus_present_mask, num_images)
        batch = x.shape[0]
        focus = focus_present_mask
        if focus is None:
            focus = probability_mask(batch, prob_focus_present, x.device)
        if cond_scale == 1 or not self.has_cond:
            return self._denoise(x, time, cond, None, focus, num_images)
        assert cond is not None
        if "forward" in self.__dict__:  # replaced, e.g. by offloading, which then loads the weights
            conditional, null = (
                self.forward(x, time, cond, p, focus, num_images=num_images) for p in (0.0, 1.0)
            )
            return null + (conditional - null) * cond_scale
        drop = torch.arange(2 * batch, device=x.device) >= batch
        both = self._denoise(
            x.repeat(2, 1, 1, 1, 1),
            torch.cat((time, time)),
            cond.repeat(2, 1),
            drop,
            None if focus is None else focus.repeat(2),
            num_images,
        )
        conditional, null = both.chunk(2)
        return null + (conditional - null) * cond_scale

    def _denoise(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor | None,
        drop: Tensor | None,
        focus: Tensor | None,
        num_images: int,
    ) -> Tensor:
        size = x.shape[3:]
        if self.pad:
            x = pad_edges(x, 2 ** (self.levels - 1))
        frames = x.shape[2] * (1 if self.shards is None else self.shards.size)
        biases = {int(h): table(frames, x.device) for h, table in self.relative_bias.items()}
        if self.causal:
            for h in self.temporal_heads:
                future = causal_bias(h, frames, x.device, x.dtype)
                biases[h] = biases[h] + future if h in biases else future
        context = TimeContext(
            biases=biases,
            rotary=rotary_table(frames, self.rotary_dim, x.device) if self.rotary_dim else None,
            focus_mask=focus,
            num_images=num_images,
        )
        emb: Tensor | Films = self._embed(time, cond, drop)
        if x.is_cuda:  # small batches are bound by kernel launches: project for all blocks at once
            emb = films(emb, film_layers([*self.downs, *self.ups], self.middle))
        x = x.permute(0, 2, 3, 4, 1).contiguous()  # the only change of layout before the head
        x = convolve(self.stem, x)
        skips = [x]
        if self.stem_attention is not None:
            unmasked = context._replace(focus_mask=None, num_images=0)
            x = attend(self.stem_attention, x, context if self.mask_stem_attention else unmasked)
            if self.stem_skip != "before":
                skips = [x]

        for level in self.downs:
            x, pushed = self._run(level.down, x, emb, context, self.push_resampled)
            skips += pushed
        for unit in self.middle:
            x = self._run(unit, x, emb, context)
        for level in self.ups:
            assert isinstance(level, Level)
            count = len(level.units)
            x = self._run(level.up, x, emb, context, skips[-count:])
            del skips[-count:]
        x = self.head(x, skips.pop() if skips else None)
        if self.pad:
            x = crop(x, size)
        return x.permute(0, 4, 1, 2, 3).contiguous()  # back to the caller's layout

    def _embed(self, time: Tensor, cond: Tensor | None, drop: Tensor | None) -> Tensor:
        """Embed time and condition: (B, emb_dim), or (B * F, emb_dim) for times (B, F). Includes
        the SiLU that every block would otherwise repeat."""
        emb = self.time_embedding(time if time.ndim == 1 else time.flatten())
        if cond is not None:
            cond = cond.to(emb.dtype)
            if drop is not None:
                null = cond.new_zeros(()) if self.null_cond_emb is None else self.null_cond_emb
                cond = torch.where(drop[:, None], null.to(emb.dtype), cond)
            if self.cond_embedding is not None:
                cond = self.cond_embedding(cond)
            if time.ndim == 2:
                cond = cond[:, None].expand(-1, time.shape[1], -1).flatten(0, 1)
            emb = torch.cat((emb, cond), -1) if self.cond_embedding is None else emb + cond
        return nn.functional.silu(emb)

    def _run(self, fn: Any, *args: Any) -> Any:
        if self.checkpointing == "level" and torch.is_grad_enabled():
            return checkpoint(fn, *args, use_reentrant=False)
        return fn(*args)

    def _check_input(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor | None,
        focus: Tensor | None,
        num_images: int,
    ) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {kind}")
        if x.ndim != 5 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, F, H, W), got {tuple(x.shape)}")
        batch, _, frames, height, width = x.shape
        shards = 1 if self.shards is None else self.shards.size
        if frames == 0 or batch == 0:
            raise ValueError(f"x must have at least one sample and one frame, got {tuple(x.shape)}")
        factor = 2 ** (self.levels - 1)
        fits = self.pad or not (height % factor or width % factor)
        if height == 0 or width == 0 or not fits:
            raise ValueError(
                f"height and width must be multiples of {factor} ({self.levels} levels), "
                f"got {height} x {width}: a network built with pad=True takes any"
            )
        if not isinstance(time, Tensor):
            raise TypeError(f"time must be a tensor, got {type(time).__name__}")
        if time.is_complex():
            raise TypeError(f"time must be of real numbers, got {time.dtype}")
        if time.shape != (batch,):
            self._check_frame_times(time, batch, frames)
        if time.device.type == "cpu" and not watched():
            self._check_time(time)
        if self.has_cond and cond is None:
            raise ValueError(
                f"cond of shape ({batch}, {self.cond_dim}) must be given: the network "
                "is conditional"
            )
        if not self.has_cond and cond is not None:
            raise ValueError("cond was given to an unconditional network; build it with cond_dim")
        if cond is not None:
            if not isinstance(cond, Tensor) or not cond.is_floating_point():
                raise TypeError(
                    "cond must be a floating-point tensor, got "
                    f"{getattr(cond, 'dtype', type(cond).__name__)}"
                )
            if cond.shape != (batch, self.cond_dim):
                raise ValueError(
                    f"cond must be ({batch}, {self.cond_dim}), got {tuple(cond.shape)}"
                )
        if focus is not None:
            if focus.dtype != torch.bool:
                raise TypeError(f"focus_present_mask must be bool, got {focus.dtype}")
            if focus.shape != (batch,):
                raise ValueError(f"focus_present_mask must be ({batch},), got {tuple(focus.shape)}")
        if not 0 <= num_images < frames * shards:
            raise ValueError(
                f"num_images must lie in [0, {frames * shards - 1}] for {frames * shards} frames, "
                f"got {num_images}"
            )
        weight = getattr(self.stem, "weight", None)
        if weight is None or (weight.is_meta and "forward" in self.stem.__dict__):
            return  # replaced, or offloaded until it is called: its device is unknown
        device = weight.device
        for name, t in {"x": x, "time": time, "cond": cond, "focus_present_mask": focus}.items():
            if t is not None and t.device != device:
                raise ValueError(f"{name} is on {t.device}, the network on {device}")

    def _check_frame_times(self, time: Tensor, batch: int, frames: int) -> None:
        if time.shape != (batch, frames):
            raise ValueError(
                f"time must be ({batch},), or ({batch}, {frames}) for each frame, got "
                f"{tuple(time.shape)}"
            )
        if not self.separate_frames:
            raise ValueError(
                f"time ({batch}, {frames}) for each frame needs norm_per_frame=True or norm='rms': "
                "GroupNorm over the whole video mixes its frames"
            )
        if self.shards is not None:
            raise ValueError("a network over several devices takes one time for each video")

    def _check_time(self, time: Tensor) -> None:
        if self.time_input == "index":
            strange = bool(((time < 1) & (time != 0)).any())
            message = "step indices and was given a number below 0 or between 0 and 1: a log-SNR?"
        else:
            strange = bool((time.abs() > 100).any())
            message = "log-SNRs and was given a number beyond 100: a step index?"
        if strange:
            warnings.warn(f"this network takes {message}", stacklevel=6)

    def extra_repr(self) -> str:
        names = (*SETTABLE, "checkpointing")
        config = replace(self._config, **{name: getattr(self, name) for name in names})
        count = sum(p.numel() for p in self.parameters())
        return f"{changed(config)}; {count:,} parameters"
