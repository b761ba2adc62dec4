"""Replace the peer's ``Unet3D`` modules inside an existing model by ``UNet3D``.

The peer is ``video-diffusion-pytorch`` (lucidrains).
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from fastvdm.unet import UNet3D
from fastvdm.unet.peer import parameter_order
from fastvdm.unet.source import chain, is_a, peer_networks, require_convertible

# A module can hold these beside its forward; replacing the module would lose them.
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def accelerate(
    model: nn.Module, *, exact: bool = True, check: bool = True, **overrides: Any
) -> nn.Module:
    """Replace every peer ``Unet3D`` in ``model`` by a ``UNet3D`` with the same weights.

    The peer is ``video-diffusion-pytorch`` (lucidrains). ``model`` is the network itself, a
    ``GaussianDiffusion``, or any module that contains one. Each network and its ``UNet3D`` are run
    once on a small random input and must agree to rounding. This detects forks whose layers have
    the same names and another meaning, and it finds where the outermost skip connection starts
    (``stem_skip``). Device, dtypes, training mode, frozen parameters and ``torch.compile`` around
    the network are kept. Call this function before the optimizer is made, and before
    DistributedDataParallel or FSDP wraps the model; ``convert_optimizer_state`` converts the state
    of an existing optimizer.

    Args:
        model: the module to change. It is changed in place, after all checks have passed.
        exact: keep the peer's defects, so that a training run continues unchanged; see
            ``UNet3D.from_unet3d``.
        check: compare the two networks. Pass False for a network that cannot be run, or if
            ``overrides`` change the function.
        overrides: constructor arguments of ``UNet3D``, e.g. ``checkpointing="level"``.

    Returns:
        ``model``; or the new network if ``model`` itself is a peer ``Unet3D``. The new network is
        compiled if the old one was.

    Raises:
        ValueError: ``model`` contains no peer ``Unet3D``; a network computes another function; or
            the replacement would lose something: hooks, a ``forward`` set on the instance, shared
            parameters, a wrapper that keeps references to the old parameters.
        TypeError: ``model`` is not a module.

    Example:
        >>> import fastvdm
        >>> from video_diffusion_pytorch import GaussianDiffusion, Unet3D
        >>> peer = Unet3D(dim=8, dim_mults=(1, 2))
        >>> diffusion = GaussianDiffusion(peer, image_size=16, num_frames=4)
        >>> diffusion = fastvdm.accelerate(diffusion)  # diffusion.denoise_fn is a UNet3D
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"accelerate takes a module, got {given}; UNet3D.from_unet3d reads a state_dict or file"
        )
    places = list(peer_networks(model))
    if not places:
        raise ValueError(f"no peer Unet3D found inside {type(model).__name__}")
    swapped: dict[int, nn.Module] = {}  # a network under two names is converted once
    for path, network in places:
        _require_replaceable(model, path)
        if id(network) not in swapped:
            _require_unshared(model, network)
            swapped[id(network)] = _convert(network, exact, check, overrides)
    for path, network in places:
        above = chain(model, path)[:-1]
        new = swapped[id(network)]
        while above and _is_compiled(above[-1]):  # the wrapper calls the old network's forward
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
    return is_a(module, {"OptimizedModule"})  # by name: importing torch._dynamo is slow


def _require_replaceable(model: nn.Module, path: str) -> None:
    """Check that replacing the network at ``path`` loses nothing.

    Raises:
        ValueError: a module above the network or in it would be lost, or keep using the old one.
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
    """Check that no parameter of the network is shared.

    Raises:
        ValueError: a parameter of the network has a second name, inside or outside the network.
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
    """Convert the state of an optimizer over the peer's parameters to the parameters of ``model``.

    The moments are reordered and reshaped like the weights, so Adam continues where it stopped.

    Args:
        state: ``optimizer.state_dict()`` of an optimizer over ``network.parameters()``, with one
            parameter group.
        network: the peer ``Unet3D`` to which the state belongs.
        model: the ``UNet3D`` with the same weights.

    Returns:
        The state_dict for an optimizer over ``model.parameters()``.

    Raises:
        ValueError: there are several groups, or the state does not cover all parameters.
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
    """A copy of an optimizer entry: moments get the shape of ``p``, counters stay as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else value.reshape(p.shape).clone()
