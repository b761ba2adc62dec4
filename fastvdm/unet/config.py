"""The configuration of ``UNet3D`` and the six models of the paper's Appendix A."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from numbers import Real
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_type_hints

from fastvdm.runtime import choices

BERT_DIM = 768  # bert-base-cased, the encoder behind the peer's use_bert_text_cond


@dataclass(frozen=True)
class UNetConfig:
    """The arguments of ``UNet3D``, checked. ``dataclasses.replace`` makes and checks a new one.

    The first thirteen are those of ``video_diffusion_pytorch.Unet3D`` 0.5 to 0.7 (the peer), with
    the same meaning and defaults. The others are keyword-only; they choose the normalisation, fix
    the peer's defects, and build the models of the paper (``UNet3D.from_preset``).

    Args:
        dim: base width C; even, at least 4.
        cond_dim: width of the conditioning vector; None for an unconditional network.
        out_dim: output channels; None means ``channels``.
        dim_mults: width multiplier of each level.
        channels: input channels.
        attn_heads: attention heads; the paper layout has C / attn_dim_head heads instead.
        attn_dim_head: head size.
        use_bert_text_cond: sets ``cond_dim`` to 768, the width of bert-base-cased.
        init_dim: width of the stem; None means ``dim``.
        init_kernel_size: kernel size of the stem convolution; odd.
        use_sparse_linear_attn: linear spatial attention at every level (peer layout).
        block_type: "resnet" only.
        resnet_groups: groups of the GroupNorm.
        norm: "group" (peer up to 0.6, and the paper) or "rms" (peer 0.7).
        norm_eps: epsilon of the norms; None means the default of the norm.
        norm_per_frame: compute GroupNorm statistics over each frame instead of the whole video.
            Only then, or with ``norm="rms"``, are the image frames of joint training exactly
            isolated (paper §3).
        cond_drop_prob: probability of dropping the condition in training if the caller does not
            pass ``null_cond_prob``. The peer's value is 0, so its null embedding is never trained.
        mask_stem_attention: apply the focus and image masks to the temporal attention of the stem
            too. The peer does not, so its frames mix there.
        stem_skip: where the outermost skip connection starts: "after" the temporal attention of the
            stem (peer 0.6 and 0.7) or "before" it (peer up to 0.5.3, and forks copied from it). The
            weights do not show which. None means "after", with a warning when weights are loaded
            that could belong to either.
        dropout: dropout probability between the two convolutions of a block.
        checkpointing: what the backward pass recomputes: "none", "block" or "level". Attention
            recomputes what it and its norm derive from their input, e.g. q, k and v, even with
            "none".
        layout: "peer" or "paper". ``from_preset`` sets the arguments below as the paper has them.
        num_blocks: residual blocks per level (paper layout; the peer has two).
        image_size: size of the input for which ``attn_resolutions`` are counted (paper layout).
        attn_resolutions: the paper layout has attention at the levels where the feature map of an
            ``image_size`` input has one of these sizes.
        time_input: what ``forward`` takes as ``time``: "index" (peer) or "logsnr" (paper).
        position: positions in temporal attention: "rotary+t5" (peer), "t5", "shaw" (paper), "none".
        shaw_max_distance: distance at which the Shaw tables are clipped.
        shaw_values: Shaw tables for the values as well as for the keys. The paper does not say;
            LVDM has both tables, shared by the heads, and these defaults follow it.
        shaw_per_head: a Shaw table per head.
        emb_dim: width of the time embedding; None means 4 * dim (peer) or 1024 (paper).
        mlp_layers: layers of the embedding MLPs.
        null_cond: the vector of the unconditional branch: "learned" (peer) or "zeros" (paper).
        conditioning: "scale_shift" or "add" (paper layout). The paper's text says "added"; the
            distillation code scales and shifts, which is the default.
        resample: "conv": strided convolution down, nearest neighbour and a convolution up.
            "resblock": pooling and nearest neighbour inside a residual block (paper layout).
        zero_init: initialise to zero the last convolution of a block, the output projection of an
            attention and the head (paper layout), as the distillation code does.
        pad: take any height and width. Inputs are padded to multiples of 2^(levels - 1), half on
            each side, and outputs are cropped. The border pixels are repeated: zeros would be grey
            bars that change the statistics of the norms, and a reflection needs more pixels than a
            small frame has. Sizes that fit are not changed.
        causal: frame i attends to no later frame, in any temporal attention. It requires
            ``norm="rms"`` or ``norm_per_frame=True``, because GroupNorm over the whole video mixes
            the frames. Then outputs up to frame i do not depend on later frames, exactly.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    dim: int
    cond_dim: int | None = None
    out_dim: int | None = None
    dim_mults: Sequence[int] = (1, 2, 4, 8)
    channels: int = 3
    attn_heads: int = 8
    attn_dim_head: int = 32
    use_bert_text_cond: bool = False
    init_dim: int | None = None
    init_kernel_size: int = 7
    use_sparse_linear_attn: bool = True
    block_type: Literal["resnet"] = "resnet"
    resnet_groups: int = 8
    _: KW_ONLY
    norm: Literal["group", "rms"] = "group"
    norm_eps: float | None = None
    norm_per_frame: bool = False
    cond_drop_prob: float = 0.1
    mask_stem_attention: bool = True
    stem_skip: Literal["after", "before"] | None = None
    dropout: float = 0.0
    checkpointing: Literal["none", "block", "level"] = "none"
    layout: Literal["peer", "paper"] = "peer"
    num_blocks: int = 2
    image_size: int | None = None
    attn_resolutions: Sequence[int] = (8, 16, 32)
    time_input: Literal["index", "logsnr"] = "index"
    position: Literal["rotary+t5", "t5", "shaw", "none"] = "rotary+t5"
    shaw_max_distance: int = 16
    shaw_values: bool = True
    shaw_per_head: bool = False
    emb_dim: int | None = None
    mlp_layers: int = 2
    null_cond: Literal["learned", "zeros"] = "learned"
    conditioning: Literal["scale_shift", "add"] = "scale_shift"
    resample: Literal["conv", "resblock"] = "conv"
    zero_init: bool = True
    pad: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("dim_mults", "attn_resolutions"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" or (f.type == "int | None" and value is not None):
                _check_positive(f.name, value)
            check_choice(f.name, value)
        if not self.dim_mults:
            raise ValueError("dim_mults must name at least one level, got ()")
        for i, m in enumerate(self.dim_mults):
            _check_positive(f"dim_mults[{i}]", m)
        if (self.rotary_dim or 0) % 2:
            raise ValueError(
                "attn_dim_head below 32 must be even for position='rotary+t5', got "
                f"{self.rotary_dim}"
            )
        if self.norm_eps is not None and not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be at least 0, got {self.norm_eps}")
        if self.init_kernel_size % 2 == 0:
            raise ValueError(f"init_kernel_size must be odd, got {self.init_kernel_size}")
        for name in ("dropout", "cond_drop_prob"):
            if not 0.0 <= (p := getattr(self, name)) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {p}")
        if self.dim < 4 or self.dim % 2:
            raise ValueError(f"dim must be even and at least 4, got {self.dim}")
        for name in ("pad", "causal"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.causal and not self.separate_frames:
            raise ValueError(
                "causal=True needs norm_per_frame=True or norm='rms': GroupNorm over the whole "
                "video mixes its frames"
            )
        if self.layout == "paper" and self.image_size is None:
            raise ValueError("layout='paper' needs image_size to place its attention")
        if self.layout == "paper" and self.stem_skip == "before":
            raise ValueError(
                "stem_skip='before' is the peer's: layout='paper' has no such attention"
            )

    # Values of arguments whose defaults depend on other arguments.

    @property
    def stem_width(self) -> int:
        return self.init_dim or self.dim

    @property
    def separate_frames(self) -> bool:
        """Whether the norms take their statistics over single frames."""
        return self.norm == "rms" or self.norm_per_frame

    @property
    def out_channels(self) -> int:
        return self.out_dim or self.channels

    @property
    def cond_width(self) -> int | None:
        return BERT_DIM if self.use_bert_text_cond else self.cond_dim

    @property
    def time_width(self) -> int:
        return self.emb_dim or (1024 if self.layout == "paper" else 4 * self.dim)

    @property
    def emb_width(self) -> int:
        """Width of the embedding that the blocks take. The paper layout adds the embedding of the
        condition, as the distillation code does for a class; the peer concatenates the raw vector.
        """
        return self.time_width + (0 if self.layout == "paper" else self.cond_width or 0)

    @property
    def rotary_dim(self) -> int | None:
        return min(32, self.attn_dim_head) if self.position == "rotary+t5" else None


# These can also be set on a network, because no weight depends on them.
SETTABLE = ("stem_skip", "mask_stem_attention", "cond_drop_prob", "pad", "causal")
# To typing of Python 3.10 KW_ONLY is no type.
_TYPES = get_type_hints(UNetConfig, {**globals(), "KW_ONLY": object})
_CHOICES = {k: t for k, t in _TYPES.items() if choices.choices_of(t)}


def check_choice(name: str, value: Any) -> None:
    """Raise ValueError if ``value`` is not one of the words that the argument ``name`` takes."""
    if name in _CHOICES:
        choices.check_choice(name, value, _CHOICES[name])


def changed(config: UNetConfig) -> str:
    """The arguments that differ from their defaults, as source text."""
    told = [(f.name, getattr(config, f.name), f.default) for f in fields(config)]
    return ", ".join(
        repr(value) if name == "dim" else f"{name}={value!r}"
        for name, value, default in told
        if value != default
    )


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """As ints; image_size / 8 and numpy's are taken too."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of ints, got {values!r}")
    values = tuple(values)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0:
            raise TypeError(f"{name}[{i}] must be an int, got {value!r}")
    return tuple(map(int, values))


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


P = ParamSpec("P")
C = TypeVar("C")
N = TypeVar("N")


def built_from(
    config: Callable[P, C],
) -> Callable[[Callable[[N, C], None]], Callable[Concatenate[N, P], None]]:
    """Turn an ``__init__`` that takes one configuration into one that takes its arguments.

    Signature and docstring are those of ``config``; ``help`` and the mixin of huggingface_hub read
    them.
    """

    def decorate(build: Callable[[N, C], None]) -> Callable[Concatenate[N, P], None]:
        @functools.wraps(build)
        def __init__(self: N, *args: P.args, **options: P.kwargs) -> None:
            build(self, config(*args, **options))

        __init__.__doc__ = config.__doc__
        of_config: Any = config
        __init__.__signature__ = inspect.signature(of_config.__init__)  # type: ignore[attr-defined]
        return __init__

    return decorate


# Common to all six (Appendix A; the layout follows the distillation code, see UNetConfig).
_paper = functools.partial(
    UNetConfig, layout="paper", norm="group", resnet_groups=32, norm_eps=1e-6, norm_per_frame=True,
    init_kernel_size=3, time_input="logsnr", null_cond="zeros", position="shaw", emb_dim=1024,
    attn_resolutions=(8, 16, 32),
)  # fmt: skip
# The text models take the attention-pooled embedding of BERT-large, 1024 wide.
PRESETS: dict[str, UNetConfig] = {
    "ucf101": _paper(256, dim_mults=(1, 2, 4, 8), image_size=64, attn_dim_head=64, num_blocks=2,
                     mlp_layers=4, dropout=0.1),
    "bair": _paper(128, dim_mults=(1, 2, 3, 4), image_size=64, attn_dim_head=64, num_blocks=3,
                   mlp_layers=2, dropout=0.1),
    "kinetics600": _paper(256, dim_mults=(1, 2, 4, 8), image_size=64, attn_dim_head=64,
                          num_blocks=2, mlp_layers=2, dropout=0.1),
    "t2v-small": _paper(128, 1024, dim_mults=(1, 2, 4, 8), image_size=64, attn_dim_head=64,
                        num_blocks=2, mlp_layers=4),
    "t2v-large": _paper(256, 1024, dim_mults=(1, 2, 4, 8), image_size=64, attn_dim_head=64,
                        num_blocks=2, mlp_layers=4),
    "t2v-128": _paper(128, 1024, dim_mults=(1, 2, 4, 8, 16), image_size=128, attn_dim_head=128,
                      num_blocks=2, mlp_layers=4),
}  # fmt: skip

# How each model is trained and sampled (Appendix A). This is not part of the network.
RECIPES: dict[str, dict[str, Any]] = {
    "ucf101": {"num_frames": 16, "prediction": "eps", "num_steps": 256, "gamma": 0.1},
    "bair": {"num_frames": 16, "prediction": "v", "num_steps": 256, "gamma": 0.0,
             "langevin": True},
    "kinetics600": {"num_frames": 16, "prediction": "v", "num_steps": 128, "gamma": 0.0,
                    "langevin": True},
    "t2v-small": {"num_frames": 16, "prediction": "eps", "num_steps": 256, "gamma": 0.3},
    "t2v-large": {"num_frames": 16, "prediction": "eps", "num_steps": 256, "gamma": 0.3},
    "t2v-128": {"num_frames": 9, "prediction": "eps", "num_steps": 256, "gamma": 0.3},
}  # fmt: skip


def preset(name: str, **overrides: Any) -> UNetConfig:
    """The configuration of a preset, with ``overrides`` for some arguments.

    Raises:
        ValueError: there is no such preset, or a value is out of range.
        TypeError: there is no such argument.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return replace(PRESETS[name], **overrides)
