"""One-line acceleration of an existing model: peer ``Unet3D`` modules swapped for ``UNet3D``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from fastvdm.unet import UNet3D
from fastvdm.unet.peer import parameter_order
from fastvdm.unet.source import chain, is_a, peer_networks, require_convertible

# What a module does beside its forward, and a swap would lose.
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def accelerate(
    model: nn.Module, *, exact: bool = True, check: bool = True, **overrides: Any
) -> nn.Module:
    """Replace every peer ``Unet3D`` in ``model`` by a ``UNet3D`` of the same weights.

    Works on the network itself, a ``GaussianDiffusion``, or any module that holds one. Each network
    and its ``UNet3D`` are run once on a small random input and must agree to rounding, which finds
    forks whose layers have the same names and another meaning; where the outermost skip leaves
    (``stem_skip``) is found so. Device, dtypes, training mode, frozen parameters and
    ``torch.compile`` around the network are kept. Call it before the optimizer is made, and before
    DistributedDataParallel or FSDP; the state of an older optimizer goes through
    ``convert_optimizer_state``.

    Args:
        model: changed in place, after everything has been checked.
        exact: keep the peer's defects, so that a run continues as it was; see
            ``UNet3D.from_unet3d``.
        check: compare; False for a network that cannot be run, or that ``overrides`` change.
        overrides: constructor arguments of ``UNet3D``, e.g. ``checkpointing="level"``.

    Returns:
        ``model``, or the new network (compiled, if it was) where ``model`` itself is a peer
        ``Unet3D``.

    Raises:
        ValueError: there is no peer ``Unet3D`` inside, one computes something else, or the swap
            would lose something: hooks, a forward set on the instance, shared parameters, a wrapper
            that holds on to the old parameters. TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"accelerate takes a module, got {given}; UNet3D.from_unet3d reads a state_dict or file"
        )
    places = list(peer_networks(model))
    if not places:
        raise ValueError(f"no peer Unet3D found inside {type(model).__name__}")
    swapped: dict[int, nn.Module] = {}  # one network under two names stays one
    for path, network in places:
        _require_replaceable(model, path)
        if id(network) not in swapped:
            _require_unshared(model, network)
            swapped[id(network)] = _convert(network, exact, check, overrides)
    for path, network in places:
        above = chain(model, path)[:-1]
        new = swapped[id(network)]
        while above and _is_compiled(above[-1]):  # it would go on with the old one's forward
            outer = above.pop()
            if id(outer) not in swapped:
                swapped[id(outer)] = type(outer)(new, outer.dynamo_ctx)
            new = swapped[id(outer)]
            path = path.rpartition(".")[0]
        if not above:
            return new
        setattr(above[-1], path.rpartition(".")[2], new)
    return model


def _convert(network: nn.Module, exact: bool, check: bool, overrides: dict[str, Any]) -> UNet3D:
    new = UNet3D.from_unet3d(network, exact=exact, check=check, **overrides)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    for peer_name, own_name in parameter_order(new):
        new.get_parameter(own_name).requires_grad_(peer_name not in frozen)
    if any(m._compiled_call_impl is not None for m in network.modules()):
        warnings.warn(
            "the network was compiled in place, with options that cannot be read; its UNet3D is "
            "not: call .compile() on it",
            UserWarning,
            stacklevel=3,
        )
    return new.train(network.training)


def _is_compiled(module: nn.Module) -> bool:
    return is_a(module, {"OptimizedModule"})  # without torch._dynamo, which is slow to import


def _require_replaceable(model: nn.Module, path: str) -> None:
    """
    Raises:
        ValueError: something above the network, or in it, would be lost or go on with the old one.
    """
    require_convertible(model, path)
    *above, network = chain(model, path)
    for m in above:
        if is_a(m, {"DistributedDataParallel"}):
            raise ValueError(
                f"{type(m).__name__} would go on reducing the gradients of the old parameters: "
                "call accelerate before wrapping"
            )
    compiled = [m for m in above if _is_compiled(m)]
    for name, m in [("", m) for m in compiled] + list(network.named_modules()):
        lost = [kind for kind in _HOOKS if getattr(m, kind, None)]
        lost += [k for k in ("forward", "forward_with_cond_scale") if k in vars(m)]
        if lost and not (m in compiled and lost == ["forward"]):
            raise ValueError(
                f"{f'{path}.{name}'.strip('.') or 'the network'} has {', '.join(lost)} set on the "
                "instance, which a swap would lose: remove them, and set them on the new network"
            )


def _require_unshared(model: nn.Module, network: nn.Module) -> None:
    """
    Raises:
        ValueError: a parameter of the network has another name, in it or outside.
    """
    names: dict[int, str] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(p), name)
        if first != name and not name.endswith("rotary_emb.freqs"):
            raise ValueError(f"{first} and {name} are one parameter, which UNet3D would part")
    inside = set(network.modules())
    for path, m in model.named_modules():
        for name, p in m._parameters.items() if m not in inside else ():
            if id(p) in names:
                raise ValueError(
                    f"{path}.{name} is the network's {names[id(p)]}, which a swap would part"
                )


def convert_optimizer_state(
    state: dict[str, Any], network: nn.Module, model: UNet3D
) -> dict[str, Any]:
    """The state_dict of an optimizer over ``network.parameters()``, for ``model.parameters()``.

    ``network`` is the peer ``Unet3D`` the state belongs to. Its moments are reordered and reshaped
    as the weights are, so that Adam continues where it stopped. One parameter group only.

    Raises:
        ValueError: several groups, or a state that is not of all the network's parameters.
    """
    groups = state["param_groups"]
    names = [name for name, _ in network.named_parameters()]
    if len(groups) != 1 or len(groups[0]["params"]) != len(names):
        raise ValueError(
            f"expected one group of {len(names)} parameters, got groups of "
            f"{[len(g['params']) for g in groups]}"
        )
    by_name = {n: state["state"].get(i) for n, i in zip(names, groups[0]["params"])}
    peer_of = {own: there for there, own in parameter_order(model)}
    converted, order = {}, []
    for i, (own, p) in enumerate(model.named_parameters()):
        order.append(i)
        entry = by_name.get(peer_of[own])
        if entry is not None:
            converted[i] = {k: _reshaped(v, p) for k, v in entry.items()}
    return {"state": converted, "param_groups": [groups[0] | {"params": order}]}


def _reshaped(value: Any, p: Tensor) -> Any:
    """A copy of an optimizer's entry: moments in the shape of ``p``, counters as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else value.reshape(p.shape).clone()
