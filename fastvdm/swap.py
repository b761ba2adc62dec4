"""One-line acceleration of an existing model: peer ``Unet3D`` modules swapped for ``UNet3D``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastvdm.unet import UNet3D
from fastvdm.unet.peer import is_peer_state, parameter_order


def _peer_networks(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, nn.Module]]:
    """(parent, attribute, network) of every peer ``Unet3D`` inside ``model``, itself included."""
    if is_peer_state(model.state_dict()):
        yield None, "", model
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if is_peer_state(child.state_dict()):
                yield parent, name, child


def accelerate(model: nn.Module, *, exact: bool = True, **overrides: Any) -> nn.Module:
    """Replace every peer ``Unet3D`` in ``model`` by a ``UNet3D`` of the same weights.

    Works on the network itself, a ``GaussianDiffusion``, or any module that holds one, such as the
    latent-diffusion forks. Device, dtype, training mode and frozen parameters are kept. Call it
    before the optimizer is made; the state of an older optimizer goes through
    ``convert_optimizer_state``.

    Args:
        model: changed in place.
        exact: keep the peer's defects, so that a run continues as it was; see
            ``UNet3D.from_unet3d``.
        overrides: constructor arguments of ``UNet3D``, e.g. ``checkpointing="level"``.

    Returns:
        ``model``, or the new network where ``model`` itself is a peer ``Unet3D``.

    Raises:
        ValueError: there is no peer ``Unet3D`` inside.
    """
    swapped: dict[int, UNet3D] = {}  # one network under two names stays one
    for parent, name, network in list(_peer_networks(model)):
        if id(network) not in swapped:
            swapped[id(network)] = _convert(network, exact, overrides)
        if parent is None:
            return swapped[id(network)]
        setattr(parent, name, swapped[id(network)])
    if not swapped:
        raise ValueError(f"no peer Unet3D found inside {type(model).__name__}")
    return model


def _convert(network: nn.Module, exact: bool, overrides: dict[str, Any]) -> UNet3D:
    new = UNet3D.from_unet3d(network, exact=exact, **overrides)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    for peer_name, own_name in parameter_order(new):
        new.get_parameter(own_name).requires_grad_(peer_name not in frozen)
    return new.train(network.training)


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
