"""The configuration of a UNet3D and the six models of the paper's Appendix A."""

from __future__ import annotations

from typing import Any

BERT_DIM = 768  # bert-base-cased, the encoder behind the peer's use_bert_text_cond

CHOICES = {
    "layout": ("peer", "paper"),
    "norm": ("group", "rms"),
    "position": ("rotary+t5", "t5", "shaw", "none"),
    "time_input": ("index", "logsnr"),
    "null_cond": ("learned", "zeros"),
    "conditioning": ("scale_shift", "add"),
    "resample": ("conv", "resblock"),
    "checkpointing": ("none", "block", "level"),
    "stem_skip": (None, "after", "before"),
    "block_type": ("resnet",),
}


def check_choice(name: str, value: Any) -> None:
    if value not in CHOICES[name]:
        choices = ", ".join(map(str, CHOICES[name]))
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


# What all six share (Appendix A; the layout is facts of the distillation code, see UNet3D).
PAPER = {
    "layout": "paper",
    "norm": "group",
    "resnet_groups": 32,
    "norm_eps": 1e-6,
    "norm_per_frame": True,
    "init_kernel_size": 3,
    "time_input": "logsnr",
    "null_cond": "zeros",
    "position": "shaw",
    "emb_dim": 1024,
    "attn_resolutions": (8, 16, 32),
}


def _paper(dim: int, mults: tuple[int, ...], size: int, head_dim: int, **options: Any) -> dict:
    return PAPER | {
        "dim": dim,
        "dim_mults": mults,
        "image_size": size,
        "attn_dim_head": head_dim,
        **options,
    }


# The text models take the attention-pooled BERT-large embedding, 1024 wide.
PRESETS: dict[str, dict[str, Any]] = {
    "ucf101": _paper(256, (1, 2, 4, 8), 64, 64, num_blocks=2, mlp_layers=4, dropout=0.1),
    "bair": _paper(128, (1, 2, 3, 4), 64, 64, num_blocks=3, mlp_layers=2, dropout=0.1),
    "kinetics600": _paper(256, (1, 2, 4, 8), 64, 64, num_blocks=2, mlp_layers=2, dropout=0.1),
    "t2v-small": _paper(128, (1, 2, 4, 8), 64, 64, num_blocks=2, mlp_layers=4, cond_dim=1024),
    "t2v-large": _paper(256, (1, 2, 4, 8), 64, 64, num_blocks=2, mlp_layers=4, cond_dim=1024),
    "t2v-128": _paper(128, (1, 2, 4, 8, 16), 128, 128, num_blocks=2, mlp_layers=4, cond_dim=1024),
}

# Not part of the network, but of the model: how it is trained and sampled (Appendix A).
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


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Constructor arguments of a preset, with overrides.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name] | overrides
