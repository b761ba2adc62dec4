"""Convert between the peer's parameter names and shapes and ours. Tensors are only reshaped.

The peer is ``video_diffusion_pytorch.Unet3D`` (lucidrains). Release 0.7 has RMSNorm
(``norm.gamma``); 0.5.2 to 0.6.3 have GroupNorm (``norm.weight``, ``norm.bias``). In 0.5.2 and 0.5.3
the outermost skip starts before the temporal attention of the stem, in 0.6 after it; neither keys
nor shapes show which. Earlier releases have other layers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvdm.layers.attention import Attention
from fastvdm.layers.norm import Norm
from fastvdm.layers.position import rotary_frequencies
from fastvdm.layers.resnet import ResnetBlock
from fastvdm.unet.blocks import Level
from fastvdm.unet.network import FactorizedUNet

# A key of every peer state_dict and of no UNet3D's.
_MARK = "time_rel_pos_bias.relative_attention_bias.weight"
_FIRST_NORM = "downs.0.0.block1.norm."


class Entry(NamedTuple):
    peer: str
    own: str
    shape: tuple[int, ...]  # of the peer's tensor


def is_peer_state(state: Mapping[str, Any], prefix: str = "") -> bool:
    return prefix + _MARK in state


def _norm_of(state: Mapping[str, Any], prefix: str = "") -> str | None:
    """The ``norm`` of a peer state_dict; None if it has the parameters of neither kind."""
    kinds = {"gamma": "rms", "weight": "group"}
    return next((kinds[k] for k in kinds if prefix + _FIRST_NORM + k in state), None)


def _same(model: nn.Module, peer: str, own: str) -> Iterator[Entry]:
    """A module whose parameters have the same names and shapes in both (Linear, Embedding)."""
    for name, p in model.get_submodule(own).named_parameters():
        yield Entry(f"{peer}.{name}", f"{own}.{name}", tuple(p.shape))


def _conv(model: nn.Module, peer: str, own: str) -> Iterator[Entry]:
    """Conv2d here; Conv3d with a kernel of depth 1 in the peer."""
    for name, p in model.get_submodule(own).named_parameters():
        shape = tuple(p.shape)
        yield Entry(f"{peer}.{name}", f"{own}.{name}", shape[:2] + (1,) * (p.ndim == 4) + shape[2:])


def _norm(model: nn.Module, peer: str, own: str) -> Iterator[Entry]:
    norm = model.get_submodule(own)
    assert isinstance(norm, Norm)
    c = norm.channels
    if norm.kind == "group":
        yield from _same(model, peer, own)
    else:
        yield Entry(f"{peer}.gamma", f"{own}.weight", (1,) * (norm.kind == "layer") + (c, 1, 1, 1))


def _resnet(model: nn.Module, peer: str, own: str) -> Iterator[Entry]:
    block = model.get_submodule(own)
    assert isinstance(block, ResnetBlock)
    if block.film is not None:
        yield from _same(model, f"{peer}.mlp.1", f"{own}.film")
    for i in (1, 2):
        yield from _conv(model, f"{peer}.block{i}.proj", f"{own}.conv{i}")
        yield from _norm(model, f"{peer}.block{i}.norm", f"{own}.norm{i}")
    if block.skip is not None:
        yield from _conv(model, f"{peer}.res_conv", f"{own}.skip")


def _attention(model: nn.Module, peer: str, own: str) -> Iterator[Entry]:
    layer = model.get_submodule(own)
    assert isinstance(layer, Attention)
    if layer.core == "linear":  # a 1x1 Conv2d in the peer
        for name, p in (("qkv", layer.qkv.weight), ("out", layer.out.weight)):
            yield Entry(f"{peer}.fn.fn.to_{name}.weight", f"{own}.{name}.weight", (*p.shape, 1, 1))
        yield Entry(f"{peer}.fn.fn.to_out.bias", f"{own}.out.bias", tuple(layer.out.bias.shape))
    else:
        for name in ("qkv", "out"):
            yield from _same(model, f"{peer}.fn.fn.fn.to_{name}", f"{own}.{name}")
    yield from _norm(model, f"{peer}.fn.norm", f"{own}.norm")


def _entries(model: FactorizedUNet) -> Iterator[Entry]:
    if model.null_cond_emb is not None:
        yield Entry("null_cond_emb", "null_cond_emb", tuple(model.null_cond_emb.shape))
    heads = next(iter(model.relative_bias))
    yield from _same(model, "time_rel_pos_bias", f"relative_bias.{heads}")
    yield from _conv(model, "init_conv", "stem")
    yield from _attention(model, "init_temporal_attn", "stem_attention")
    yield from _same(model, "time_mlp.1", "time_embedding.mlp.0")
    yield from _same(model, "time_mlp.3", "time_embedding.mlp.2")
    for there, levels in (("downs", model.downs), ("ups", model.ups)):
        for i, level in enumerate(levels):
            assert isinstance(level, Level)
            peer, own = f"{there}.{i}", f"{there}.{i}.units.0"
            yield from _resnet(model, f"{peer}.0", f"{own}.blocks.0")
            yield from _resnet(model, f"{peer}.1", f"{own}.blocks.1")
            if model.get_submodule(own).spatial is not None:
                yield from _attention(model, f"{peer}.2", f"{own}.spatial")
            yield from _attention(model, f"{peer}.3", f"{own}.temporal")
            if level.resample is not None:
                yield from _conv(model, f"{peer}.4", f"{there}.{i}.resample")
    yield from _resnet(model, "mid_block1", "middle.0.blocks.0")
    yield from _attention(model, "mid_spatial_attn", "middle.0.spatial")
    yield from _attention(model, "mid_temporal_attn", "middle.0.temporal")
    yield from _resnet(model, "mid_block2", "middle.1.blocks.0")
    yield from _resnet(model, "final_conv.0", "head.block")
    yield from _conv(model, "final_conv.1", "head.conv")


def _rotary_keys(entries: list[Entry]) -> list[str]:
    """The peer stores its frequency vector once per temporal attention."""
    return [
        e.peer.replace("to_qkv.weight", "rotary_emb.freqs")
        for e in entries
        if e.peer.endswith(".fn.fn.fn.to_qkv.weight") and "mid_spatial" not in e.peer
    ]


def parameter_order(model: FactorizedUNet) -> list[tuple[str, str]]:
    """(peer name, own name) of every parameter."""
    return [(e.peer, e.own) for e in _entries(model)]


def _require_peer_layout(model: FactorizedUNet) -> None:
    if model.layout != "peer" or model.position != "rotary+t5":
        raise ValueError(
            "only layout='peer' with position='rotary+t5' has a peer equivalent, got "
            f"layout={model.layout!r}, position={model.position!r}"
        )


def to_peer_keys(model: FactorizedUNet) -> dict[str, Tensor]:
    _require_peer_layout(model)
    if model.causal:
        raise ValueError("the peer's network is not causal: its frames would see later ones")
    assert model.rotary_dim is not None
    own, entries = model.state_dict(), list(_entries(model))
    state = {e.peer: own[e.own].reshape(e.shape) for e in entries}
    freqs = rotary_frequencies(model.rotary_dim, device=model.stem.weight.device)
    return state | dict.fromkeys(_rotary_keys(entries), freqs.to(model.stem.weight.dtype))


def _convert(model: FactorizedUNet, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Rename the keys of ``state`` under ``prefix``. What does not fit keeps its peer name."""
    _require_peer_layout(model)
    assert model.rotary_dim is not None
    entries = list(_entries(model))
    kind, own = _norm_of(state, prefix), model.get_submodule("head.block.norm1").kind
    if kind not in (None, own):
        raise ValueError(
            f"{_FIRST_NORM}{'gamma' if kind == 'rms' else 'weight'} belongs to a peer network with "
            f"norm={kind!r}, this one has norm={own!r}; build UNet3D with it or use "
            "UNet3D.from_unet3d"
        )
    out = {k: v for k, v in state.items() if k.startswith(prefix)}
    for e in entries:
        t = out.get(prefix + e.peer)
        if not isinstance(t, Tensor):
            continue
        if tuple(t.shape) != e.shape:
            raise ValueError(f"{e.peer} has shape {tuple(t.shape)}, this network needs {e.shape}")
        del out[prefix + e.peer]
        out[prefix + e.own] = t.reshape(model.get_parameter(e.own).shape)
    for key in _rotary_keys(entries):
        freqs = out.pop(prefix + key, None)
        if freqs is None or freqs.is_meta:
            continue
        ours = rotary_frequencies(model.rotary_dim, device=freqs.device)
        if freqs.shape != ours.shape or not torch.allclose(freqs.float(), ours, rtol=1e-2):
            raise ValueError(
                f"{key} is not the rotary spectrum of base 10000 over {2 * len(ours)} "
                "features; trained frequencies are not supported"
            )
    if kind == "group" and model.stem_skip is None:
        _warn_of_era(model.get_submodule("head.block.norm1").groups)  # type: ignore[arg-type]
    return out


_ERA = (
    "these weights are of the peer's GroupNorm era and do not tell which release's: 0.6.0 to 0.6.3 "
    "are stem_skip='after'; releases up to 0.5.3, and forks copied from them such as "
    "medicaldiffusion, are stem_skip='before', another function; nor do they tell resnet_groups"
)


def require_release(state: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: two releases of the peer interpret the state_dict differently, and ``given``,
            the caller's arguments, does not choose.
    """
    if is_peer_state(state) and _norm_of(state) == "group" and given.get("stem_skip") is None:
        raise ValueError(f"{_ERA}. Pass stem_skip, and resnet_groups unless it is 8")


def _warn_of_era(groups: int) -> None:
    warn_caller(
        f"{_ERA}. They are taken for 0.6's with {groups} groups; a network built with stem_skip, "
        "either value, is silent"
    )


def warn_caller(text: str) -> None:
    """Give a UserWarning at the line that called fastvdm (or torch, from a load hook)."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fastvdm.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


def to_own_keys(model: FactorizedUNet, state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a peer state_dict to ours. Any other state is returned as it is.

    Raises:
        ValueError: the shape of a tensor, or the kind of norm, does not fit this network.
    """
    return _convert(model, state, "") if is_peer_state(state) else dict(state)


def rename_to_own(
    model: FactorizedUNet, state: dict[str, Any], prefix: str, errors: list[str]
) -> None:
    """Rename peer keys under ``prefix`` in place. What does not fit is appended to ``errors``."""
    if not is_peer_state(state, prefix):
        return
    try:
        converted = _convert(model, state, prefix)
    except ValueError as error:
        errors.append(str(error))
        return
    for key in [k for k in state if k.startswith(prefix)]:
        del state[key]
    state.update(converted)


def _sizes(
    dim: int, heads: int, stem: Tensor, head: Tensor, qkv: Tensor, widths: list[int]
) -> dict[str, Any]:
    """The arguments that follow from shapes alone, under either naming: the weights of the first
    and last convolution, of the first temporal qkv, and the channels of the levels."""
    return {
        "dim": dim,
        "init_dim": stem.shape[0] if stem.shape[0] != dim else None,
        "init_kernel_size": stem.shape[-1],
        "channels": stem.shape[1],
        "out_dim": head.shape[0],
        "dim_mults": tuple(w // dim for w in widths),
        "attn_heads": heads,
        "attn_dim_head": qkv.shape[0] // (3 * heads),
    }


def _infer_own(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``infer_arguments`` for our names, as the peer's Trainer saves them for a UNet3D."""
    try:
        dim, init = state["time_embedding.mlp.0.weight"].shape[1], state["stem.weight"]
        (heads,) = {int(k.split(".")[1]) for k in state if k.startswith("relative_bias.")}
        levels = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("downs."))
        first = "downs.{}.units.0.blocks.0.conv1.weight"
        widths = [state[first.format(i)].shape[0] for i in range(levels)]
        head, qkv = state["head.conv.weight"], state["stem_attention.qkv.weight"]
        arguments = {
            **_sizes(dim, heads, init, head, qkv, widths),
            "use_sparse_linear_attn": "downs.0.units.0.spatial.qkv.weight" in state,
            "norm": "group" if "downs.0.units.0.blocks.0.norm1.bias" in state else "rms",
        }
    except (KeyError, ValueError) as error:
        raise ValueError(
            "this state_dict is of a UNet3D with a layout that the peer does not have; build it "
            f"with its arguments and use load_state_dict ({error})"
        ) from None
    if "null_cond_emb" in state:
        arguments["cond_dim"] = state["null_cond_emb"].shape[1]
    return arguments


def infer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that a state_dict implies: a peer's, or one of a ``UNet3D`` with
    the peer layout.

    Raises:
        ValueError: the state_dict is neither, or lacks keys.
    """
    if "stem.weight" in state:
        return _infer_own(state)
    if not is_peer_state(state):
        raise ValueError(f"no peer Unet3D found: the key {_MARK} is missing")
    try:
        dim = state["time_mlp.1.weight"].shape[1]
        init = state["init_conv.weight"]
        heads = state[_MARK].shape[1]
        levels = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("downs."))
        widths = [state[f"downs.{i}.0.block1.proj.weight"].shape[0] for i in range(levels)]
        qkv = state["init_temporal_attn.fn.fn.fn.to_qkv.weight"]
        arguments = {
            **_sizes(dim, heads, init, state["final_conv.1.weight"], qkv, widths),
            "use_sparse_linear_attn": "downs.0.2.fn.fn.to_qkv.weight" in state,
            "norm": _norm_of(state) or "group",
        }
        ups = {k.split(".")[1] for k in state if k.startswith("ups.")}
        joined = state["final_conv.0.block1.proj.weight"].shape[1]
    except KeyError as error:
        raise ValueError(
            f"the peer state_dict is incomplete, or of a changed network: it lacks {error}"
        ) from None
    if len(ups) != levels or joined != 2 * init.shape[0]:
        raise ValueError(
            f"{len(ups)} up levels to {levels} down, and a final_conv of {joined} channels after a "
            f"stem of {init.shape[0]}: that is another network, as the peer's was before release "
            "0.5.2, and UNet3D has no equal of it; keep the module as it is"
        )
    if "null_cond_emb" in state:
        arguments["cond_dim"] = state["null_cond_emb"].shape[1]
    return arguments


def require_same_keys(model: FactorizedUNet, state: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the keys are not those of a peer network with these arguments.
    """
    if not is_peer_state(state):
        return
    entries = list(_entries(model))
    wanted = {e.peer for e in entries}
    extra = sorted(state.keys() - wanted - set(_rotary_keys(entries)))
    missing = sorted(wanted - state.keys())
    if extra or missing:
        parts = [f"{len(extra)} keys more ({', '.join(extra[:4])})"] if extra else []
        parts += [f"{len(missing)} less ({', '.join(missing[:4])})"] if missing else []
        raise ValueError(
            f"not the peer's Unet3D, but one with layers changed: it has {' and '.join(parts)}. "
            "UNet3D has no such layers, so it cannot stand for it: keep the module as it is"
        )


def dtypes(model: FactorizedUNet, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a state_dict under either naming, by our names."""
    names = (
        [(e.peer, e.own) for e in _entries(model)] if is_peer_state(state) else zip(state, state)
    )
    return {own: t.dtype for key, own in names if isinstance(t := state[key], Tensor)}
