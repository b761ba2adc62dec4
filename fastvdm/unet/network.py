"""The network as a function of video and time: its layers and how they follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvdm.layers.attention import AxisAttention, TimeContext
from fastvdm.layers.conv import SpaceConv, convolve
from fastvdm.layers.embedding import TimeEmbedding, mlp, probability_mask
from fastvdm.layers.position import T5RelativeBias, rotary_table
from fastvdm.layers.shards import FrameShards
from fastvdm.unet.blocks import Level, Unit, attend
from fastvdm.unet.build import Parts, Spec, paper_parts, peer_parts
from fastvdm.unet.config import BERT_DIM, CHOICES, check_choice, check_positive


class FactorizedUNet(nn.Module):
    """``UNet3D`` without its ways to read and write weights; it says what the arguments mean."""

    def __init__(
        self,
        dim: int,
        cond_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        attn_heads: int = 8,
        attn_dim_head: int = 32,
        use_bert_text_cond: bool = False,
        init_dim: int | None = None,
        init_kernel_size: int = 7,
        use_sparse_linear_attn: bool = True,
        block_type: str = "resnet",
        resnet_groups: int = 8,
        *,
        norm: str = "group",
        norm_eps: float | None = None,
        norm_per_frame: bool = False,
        cond_drop_prob: float = 0.1,
        mask_stem_attention: bool = True,
        stem_skip: str | None = None,
        dropout: float = 0.0,
        checkpointing: str = "none",
        layout: str = "peer",
        num_blocks: int = 2,
        image_size: int | None = None,
        attn_resolutions: Sequence[int] = (8, 16, 32),
        time_input: str = "index",
        position: str = "rotary+t5",
        shaw_max_distance: int = 16,
        shaw_values: bool = True,
        shaw_per_head: bool = False,
        emb_dim: int | None = None,
        mlp_layers: int = 2,
        null_cond: str = "learned",
        conditioning: str = "scale_shift",
        resample: str = "conv",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        dim_mults = tuple(dim_mults)
        check_positive(
            dim=dim, cond_dim=cond_dim, out_dim=out_dim, channels=channels, init_dim=init_dim,
            attn_heads=attn_heads, attn_dim_head=attn_dim_head, resnet_groups=resnet_groups,
            init_kernel_size=init_kernel_size, num_blocks=num_blocks, mlp_layers=mlp_layers,
            emb_dim=emb_dim, shaw_max_distance=shaw_max_distance,
        )  # fmt: skip
        for name, value in {
            "norm": norm, "layout": layout, "position": position, "time_input": time_input,
            "null_cond": null_cond, "conditioning": conditioning, "resample": resample,
            "checkpointing": checkpointing, "block_type": block_type, "stem_skip": stem_skip,
        }.items():  # fmt: skip
            check_choice(name, value)
        if not dim_mults:
            raise ValueError("dim_mults must name at least one level, got ()")
        check_positive(**{f"dim_mults[{i}]": m for i, m in enumerate(dim_mults)})
        if init_kernel_size % 2 == 0:
            raise ValueError(f"init_kernel_size must be odd, got {init_kernel_size}")
        for name, p in {"dropout": dropout, "cond_drop_prob": cond_drop_prob}.items():
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {p}")
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be even and at least 4, got {dim}")
        if layout == "paper" and image_size is None:
            raise ValueError("layout='paper' needs image_size to place its attention")
        if layout == "paper" and stem_skip == "before":
            raise ValueError(
                "stem_skip='before' is the peer's: layout='paper' has no such attention"
            )

        self.channels = channels
        self.out_dim = out_dim or channels
        self.levels = len(dim_mults)
        self.layout, self.time_input = layout, time_input
        self.cond_dim = BERT_DIM if use_bert_text_cond else cond_dim
        self.has_cond = self.cond_dim is not None
        self.cond_drop_prob, self.mask_stem_attention = cond_drop_prob, mask_stem_attention
        self.stem_skip = stem_skip
        self.shards: FrameShards | None = None  # see fastvdm.parallel
        self.position = position
        self.rotary_dim = min(32, attn_dim_head) if position == "rotary+t5" else None

        paper = layout == "paper"
        time_dim = emb_dim or (1024 if paper else 4 * dim)
        act = nn.SiLU if paper else nn.GELU
        self.time_embedding = TimeEmbedding(
            dim, time_dim, time_input=time_input, num_layers=mlp_layers, act=act
        )
        self.cond_embedding: nn.Module | None = None
        block_emb_dim = time_dim
        if self.cond_dim is not None:
            if paper:  # both embeddings are added, as the distillation code adds its class's
                self.cond_embedding = mlp(self.cond_dim, time_dim, mlp_layers, act)
            else:  # the peer concatenates the raw vector
                block_emb_dim += self.cond_dim
        self.null_cond_emb: nn.Parameter | None = None
        if self.cond_dim is not None and null_cond == "learned":
            self.null_cond_emb = nn.Parameter(torch.randn(1, self.cond_dim))

        spec = Spec(
            dim=dim, init_dim=init_dim or dim, out_dim=self.out_dim, dim_mults=dim_mults,
            emb_dim=block_emb_dim, heads=attn_heads, head_dim=attn_dim_head,
            linear_attention=use_sparse_linear_attn, norm=norm, groups=resnet_groups,
            norm_eps=norm_eps, per_frame=norm_per_frame, num_blocks=num_blocks, dropout=dropout,
            position=position, shaw_max_distance=shaw_max_distance, shaw_values=shaw_values,
            shaw_per_head=shaw_per_head, conditioning=conditioning, resample=resample,
            zero_init=zero_init, attn_resolutions=tuple(attn_resolutions), image_size=image_size,
        )  # fmt: skip
        self.stem = SpaceConv(channels, spec.init_dim, init_kernel_size)
        parts: Parts = (paper_parts if paper else peer_parts)(spec)
        self.stem_attention = parts.stem_attention
        self.downs = nn.ModuleList(parts.downs)
        self.middle = nn.ModuleList(parts.middle)
        self.ups = nn.ModuleList(parts.ups)
        self.head = parts.head
        self.push_resampled = parts.push_resampled
        self.checkpointing = checkpointing

        # One T5 table for all temporal attentions of as many heads, as the peer has for its one.
        self.relative_bias = nn.ModuleDict()
        if "t5" in position:
            attention = (m for m in self.modules() if isinstance(m, AxisAttention))
            heads = {m.heads for m in attention if m.axis == "time"}
            for h in sorted(heads):
                self.relative_bias[str(h)] = T5RelativeBias(h)

    def __setattr__(self, name: str, value: Any) -> None:
        """Options may be set afterwards, to what the constructor takes for them."""
        if name in CHOICES:
            check_choice(name, value)
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
        """Denoise ``x``.

        Args:
            x: (B, channels, F, H, W), floating point; H and W divisible by 2^(levels - 1).
            time: (B,), step index or log-SNR as ``time_input`` says.
            cond: (B, cond_dim), required if and only if the network is conditional.
            null_cond_prob: probability of the null condition per sample. None, the default, is
                ``cond_drop_prob`` in training mode and 0 otherwise.
            focus_present_mask: (B,) bool, True where every frame attends to itself only; drawn with
                ``prob_focus_present`` when not given.
            num_images: the last ``num_images`` frames are independent images (paper §3): they
                attend to themselves, and no video frame attends to them.

        Returns:
            (B, out_dim, F, H, W).

        Raises:
            TypeError: a tensor of the wrong kind. ValueError: a wrong shape, device or number.
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
        """Classifier-free guidance, both branches in one batched pass.

        null + (cond - null) * cond_scale; cond_scale = 1 + w of Eq. 6. Arguments as in ``forward``.
        """
        self._check_input(x, time, cond, focus_present_mask, num_images)
        batch = x.shape[0]
        focus = focus_present_mask
        if focus is None:
            focus = probability_mask(batch, prob_focus_present, x.device)
        if cond_scale == 1 or not self.has_cond:
            return self._denoise(x, time, cond, None, focus, num_images)
        assert cond is not None
        if "forward" in self.__dict__:  # replaced, as offloading does: then it brings the weights
            conditional, null = (
                self.forward(x, time, cond, p, focus, num_images=num_images) for p in (0.0, 1.0)
            )
            return null + (conditional - null) * cond_scale
        drop = torch.arange(2 * batch, device=x.device) >= batch
        both = self._denoise(
            x.repeat(2, 1, 1, 1, 1),
            time.repeat(2),
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
        frames = x.shape[2] * (1 if self.shards is None else self.shards.size)
        context = TimeContext(
            biases={int(h): table(frames, x.device) for h, table in self.relative_bias.items()},
            rotary=rotary_table(frames, self.rotary_dim, x.device) if self.rotary_dim else None,
            focus_mask=focus,
            num_images=num_images,
        )
        emb = self._embed(time, cond, drop)
        x = x.permute(0, 2, 3, 4, 1).contiguous()  # the one change of layout at this end
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
        return x.permute(0, 4, 1, 2, 3).contiguous()  # and the one at the other

    def _embed(self, time: Tensor, cond: Tensor | None, drop: Tensor | None) -> Tensor:
        """(B, emb_dim) after the SiLU that every block would otherwise repeat."""
        emb = self.time_embedding(time)
        if cond is not None:
            cond = cond.to(emb.dtype)
            if drop is not None:
                null = cond.new_zeros(()) if self.null_cond_emb is None else self.null_cond_emb
                cond = torch.where(drop[:, None], null.to(emb.dtype), cond)
            if self.cond_embedding is not None:
                emb = emb + self.cond_embedding(cond)
            else:
                emb = torch.cat((emb, cond), dim=-1)
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
        if height == 0 or width == 0 or height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor} ({self.levels} levels), "
                f"got {height} x {width}"
            )
        if not isinstance(time, Tensor):
            raise TypeError(f"time must be a tensor, got {type(time).__name__}")
        if time.shape != (batch,):
            raise ValueError(f"time must be ({batch},), got {tuple(time.shape)}")
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
            return  # replaced, or offloaded until it is called: its device is its own affair
        device = weight.device
        for name, t in {"x": x, "time": time, "cond": cond, "focus_present_mask": focus}.items():
            if t is not None and t.device != device:
                raise ValueError(f"{name} is on {t.device}, the network on {device}")
