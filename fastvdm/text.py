"""From captions to the conditioning vector of a network: a frozen BERT, then attention pooling.

Ho et al. 2022, Video Diffusion Models, §4.3: "BERT-large embeddings ... processed using attention
pooling"; the unconditional branch gets a vector of zeros. What the paper leaves open (the size of
the pooling, the drop rate) is an argument here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvdm.runtime.choices import check_choice
from fastvdm.runtime.optional import require
from fastvdm.unet.settings import Pooling


class TextEncoder:
    """A frozen encoder of the BERT family with its tokenizer.

    It is not an ``nn.Module``, because it is neither trained nor saved with the network.

    Args:
        name: a local folder, or a name in the Hugging Face cache or on the hub. HF_HUB_OFFLINE=1
            prevents downloads.
        max_length: number of tokens to which longer captions are cut.
        device: device of the encoder.
        dtype: dtype of the encoder.
        local_files_only: use only a folder or the cache, without a download.

    Raises:
        ImportError: transformers is missing.
        ValueError: the encoder cannot be found or loaded, or returns no token states.
    """

    def __init__(
        self,
        name: str | os.PathLike[str] = "bert-large-uncased",
        *,
        max_length: int = 128,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> None:
        transformers = require("transformers", "text")
        self.name, self.max_length = str(name), max_length
        try:
            # Never run code that comes with an encoder, and do not ask the user whether to.
            options = {"local_files_only": local_files_only, "trust_remote_code": False}
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.name, **options)
            self.model: Any = transformers.AutoModel.from_pretrained(self.name, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the text encoder {self.name!r}: {error}") from error
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name!r} is an encoder-decoder; a BERT-family encoder is needed"
            )
        self.model.requires_grad_(False).eval()
        self.to(device, dtype)

    @property
    def dim(self) -> int:
        """Width of a token state."""
        return int(self.model.config.hidden_size)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move the encoder to ``device``, and to ``dtype`` if one is given; return it."""
        self.device = torch.device(device)
        self.model.to(self.device, dtype)
        return self

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The last hidden states (B, L, dim) and the mask (B, L): True for tokens, not padding.

        Raises:
            ValueError: there is no caption.
            TypeError: a caption is not a string.
        """
        check_captions(captions)
        tokens = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        states = self.model(**tokens).last_hidden_state
        return states, tokens["attention_mask"].bool()


def check_captions(captions: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless ``captions`` is a non-empty list of strings."""
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise TypeError("captions must be a list of strings, one for each video")
    if not captions:
        raise ValueError("expected at least one caption, got none")


class AttentionPool(nn.Module):
    """One learned query attends over the tokens; the result is projected to ``out_dim``.

    Args:
        dim: features of a token.
        out_dim: features of the result; default ``dim``.
        heads: attention heads of ``dim / heads`` features; by default 64 features each, as in BERT.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, out_dim: int | None = None, heads: int | None = None) -> None:
        super().__init__()
        heads = max(1, dim // 64) if heads is None else heads
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads, self.out_dim = heads, out_dim or dim
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(heads, dim // heads) * (dim // heads) ** -0.5)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, self.out_dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pool tokens (B, L, dim) under mask (B, L), bool and true at a token, to (B, out_dim)."""
        tokens = self.norm(tokens.to(self.query.dtype))
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, L, heads, D)
        logits = torch.einsum("blhd,hd->bhl", k, self.query) * k.shape[-1] ** -0.5
        weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        return self.out(torch.einsum("bhl,blhd->bhd", weights, v).flatten(1))


def masked_mean(tokens: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of the token states without position 0, as ``bert_embed`` in video-diffusion-pytorch.

    Args:
        tokens: states (B, L, dim).
        mask: (B, L), true at a token.
        eps: added to the number of tokens.

    Returns:
        (B, dim).
    """
    weight = mask[:, 1:, None].to(tokens.dtype)
    return (tokens[:, 1:] * weight).sum(1) / (weight.sum(1) + eps)


class TextConditioner(nn.Module):
    """Captions → ``cond`` (B, out_dim) of a network with ``cond_dim=out_dim``.

    Its parameters are those of the pooling: train and save them with the network. The encoder is
    frozen, is not in the state_dict, and follows ``.to(device)``.

    Args:
        encoder: any callable ``captions -> (tokens (B, L, D), mask (B, L))`` with ``.dim``.
        out_dim: width of the vector; by default that of the encoder. Only "attention" can change
            it.
        pooling: "attention" (the paper), "mean" (video-diffusion-pytorch's default, the masked mean
            without the first token) or "cls" (its ``text_use_bert_cls``).
        heads: heads of the attention pooling.
        dropout: share of captions replaced by zeros in training, for classifier-free guidance. The
            paper gives no rate. Use 0 if the network drops them (``null_cond_prob``).
    """

    def __init__(
        self,
        encoder: TextEncoder | Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        out_dim: int | None = None,
        *,
        pooling: str = "attention",
        heads: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, Pooling)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        dim: int = encoder.dim  # type: ignore[union-attr]
        if pooling != "attention" and out_dim not in (None, dim):
            raise ValueError(f"pooling={pooling!r} has width {dim}, got out_dim={out_dim}")
        self.encoder, self.pooling, self.dropout = encoder, pooling, dropout
        self.out_dim = out_dim or dim
        self.pool = AttentionPool(dim, self.out_dim, heads) if pooling == "attention" else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TextConditioner:
        super()._apply(fn, recurse)
        if isinstance(self.encoder, TextEncoder):
            moved = fn(torch.empty(0, dtype=self.encoder.model.dtype, device=self.encoder.device))
            self.encoder.to(moved.device)
        return self

    def null(self, batch: int) -> Tensor:
        """The unconditional vector: zeros (batch, out_dim)."""
        device = self.pool.query.device if self.pool else getattr(self.encoder, "device", "cpu")
        return torch.zeros(batch, self.out_dim, device=device)

    def forward(self, captions: Sequence[str | None]) -> Tensor:
        """cond (B, out_dim); zeros for a caption that is None or dropped."""
        if isinstance(captions, str):
            raise TypeError("captions must be a list of strings, one for each video")
        if not captions:
            raise ValueError("expected at least one caption, got none")
        keep = torch.tensor([c is not None for c in captions])
        if self.training and self.dropout:
            keep &= torch.rand(len(captions)) >= self.dropout
        # Dropped captions are encoded too: distributed training must see the same graph in any
        # case.
        tokens, mask = self.encoder(["" if c is None else c for c in captions])
        if self.pool is not None:
            cond = self.pool(tokens, mask)
        else:
            cond = masked_mean(tokens, mask) if self.pooling == "mean" else tokens[:, 0]
        return torch.where(keep.to(cond.device)[:, None], cond, torch.zeros_like(cond))
