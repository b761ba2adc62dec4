"""Find networks inside modules and read what their weights do not show."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvdm.unet import peer
from fastvdm.unet.choose import choose, listed, says_averaged
from fastvdm.unet.compare import choose_stem_skip
from fastvdm.unet.folder import arguments_of
from fastvdm.unet.network import FactorizedUNet

N = TypeVar("N", bound=FactorizedUNet)

_SHARDED = {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}


def _has(module: nn.Module, path: str) -> bool:
    """``get_submodule`` without ``__getattr__``: through it a compiled module shows the children of
    the module inside."""
    for name in path.split("."):
        children = module._modules  # a TorchScript module's has no get
        child = children[name] if name in children else None  # noqa: SIM401
        if child is None:
            return False
        module = child
    return True


def is_peer_network(module: nn.Module) -> bool:
    """Whether it is a peer ``Unet3D`` or derived from one. An attention layer that has the peer's
    relative bias is not."""
    return all(_has(module, p) for p in ("time_rel_pos_bias.relative_attention_bias", "init_conv"))


def is_own_network(module: nn.Module) -> bool:
    return all(_has(module, p) for p in ("stem", "time_embedding", "downs", "head"))


def peer_networks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, network) of every peer ``Unet3D`` in ``module``, under each of its names."""
    for path, m in module.named_modules(remove_duplicate=False):
        if is_peer_network(m):
            yield path, m


def chain(module: nn.Module, path: str) -> list[nn.Module]:
    """The modules from ``module`` down to the one at ``path``, both included."""
    modules = [module]
    for name in path.split(".") if path else ():
        modules.append(modules[-1]._modules[name])  # type: ignore[arg-type]
    return modules


def is_a(module: nn.Module, names: set[str]) -> bool:
    return any(c.__name__ in names for c in type(module).__mro__)


def _require_whole(modules: list[nn.Module]) -> None:
    """
    Raises:
        ValueError: a module is TorchScript, or its parameters are sharded over processes.
    """
    for m in modules:
        if isinstance(m, torch.jit.ScriptModule):
            raise ValueError(
                "a TorchScript module does not show what it computes; give the nn.Module that it "
                "was made from"
            )
        if is_a(m, _SHARDED):
            raise ValueError(
                f"the network's parameters are sharded ({type(m).__name__}): convert it before "
                "sharding, or gather its whole state_dict and give that"
            )


def require_convertible(module: nn.Module, path: str) -> None:
    """
    Raises:
        ValueError: the network at ``path`` cannot be read: it is TorchScript, sharded, or on more
            than one device.
    """
    above = chain(module, path)
    _require_whole([*above[:-1], *above[-1].modules()])
    devices = {str(p.device) for p in above[-1].parameters()}
    if len(devices) > 1:
        raise ValueError(f"the network lies on several devices: {', '.join(sorted(devices))}")


class _Place(NamedTuple):
    path: str
    module: nn.Module
    parent: nn.Module | None

    @property
    def is_averaged(self) -> bool:
        averaged = self.parent is not None and is_a(self.parent, {"AveragedModel"})
        return averaged or says_averaged(self.path)


def find_network(
    module: nn.Module, *, prefix: str | None = None, ema: bool | None = False
) -> tuple[str, nn.Module]:
    """(path, network) of the one peer ``Unet3D`` or ``UNet3D`` in ``module``. ``prefix`` and
    ``ema`` are those of ``choose``.

    Raises:
        ValueError: there is none, or there are several; the message has their paths.
    """
    found = []
    for path, m in module.named_modules(remove_duplicate=False):
        if is_peer_network(m) or is_own_network(m):
            found.append(_Place(path, m, chain(module, path)[-2] if path else None))
    kind = type(module).__name__
    if not found:
        raise ValueError(f"no peer Unet3D found inside {kind}")
    found = choose(found, prefix=prefix, ema=ema)
    if len({id(place.module) for place in found}) > 1:
        raise ValueError(f"several networks in {kind}, under {listed(found)}: choose with prefix")
    return found[0].path, found[0].module


def norm_arguments(network: nn.Module) -> dict[str, Any]:
    """Groups and epsilon of the GroupNorms, which a state_dict does not have.

    Raises:
        ValueError: they differ inside the network.
    """
    read = {(m.num_groups, m.eps) for m in network.modules() if isinstance(m, nn.GroupNorm)}
    if not read:
        return {}
    if len(read) > 1:
        listed = ", ".join(f"{groups} (eps {eps})" for groups, eps in sorted(read))
        raise ValueError(
            f"the GroupNorms of this network differ, in groups or eps: {listed}; UNet3D has one "
            "kind for all"
        )
    ((groups, eps),) = read
    return {"resnet_groups": groups} | ({} if eps == 1e-5 else {"norm_eps": eps})


def load(
    cls: type[N],
    arguments: dict[str, Any],
    state: Mapping[str, Tensor],
    network: nn.Module | None = None,
) -> N:
    """Build a network with these arguments and weights, in their dtypes and on their device. If
    ``network`` is given, the two are compared and ``stem_skip`` is found (``choose_stem_skip``).

    Raises:
        ValueError: keys or shapes do not fit the arguments, or the networks differ.
    """
    chosen = arguments.get("stem_skip")
    if network is not None and is_own_network(network):  # a subclass of UNet3D: already known
        chosen = chosen or "after"
    if network is not None and chosen is None:  # loading must not warn: choose_stem_skip measures
        arguments = arguments | {"stem_skip": "after"}
    with torch.random.fork_rng([]):  # the initial values are discarded
        model = cls(**arguments)
    peer.require_same_keys(model, state)
    dtypes = peer.dtypes(model, state)
    # Compare before anything is rounded.
    wide = functools.reduce(torch.promote_types, dtypes.values(), torch.float32)
    stem = state["stem.weight" if "stem.weight" in state else "init_conv.weight"]
    model.to(device=stem.device, dtype=wide).load_state_dict(state)
    if network is not None:
        choose_stem_skip(network, model, chosen)
    for name, p in model.named_parameters():
        p.data = p.data.to(dtypes.get(name, p.dtype))
    return model


def read_module(
    source: nn.Module, *, prefix: str | None, ema: bool | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The one network in a module and its constructor arguments, without a peer's ``stem_skip``.

    Raises:
        ValueError: there is none, or there are several, or it cannot be read.
    """
    path, network = find_network(source, prefix=prefix, ema=ema)
    require_convertible(source, path)
    if is_own_network(network) and hasattr(network, "_hub_mixin_config"):
        return network, arguments_of(network)
    return network, peer.infer_arguments(network.state_dict()) | norm_arguments(network)
