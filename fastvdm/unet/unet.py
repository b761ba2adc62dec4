"""UNet3D: the factorized space-time 3D U-Net, drop-in for the peer's ``Unet3D``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastvdm.unet import checkpoint as files
from fastvdm.unet import folder as folders
from fastvdm.unet import peer
from fastvdm.unet import source as modules
from fastvdm.unet.card import CARD, PAPER
from fastvdm.unet.config import preset
from fastvdm.unet.network import FactorizedUNet


class UNet3D(
    FactorizedUNet,
    folders.Pretrained,
    library_name="fastvdm",
    license="mit",
    paper_url=PAPER,
    model_card_template=CARD,
):
    """Factorized space-time 3D U-Net (Ho et al. 2022, "Video Diffusion Models", §3).

    Its arguments are the fields of ``fastvdm.unet.UNetConfig``, which says what they mean: first
    the thirteen of ``video_diffusion_pytorch.Unet3D`` 0.5 to 0.7, then keyword-only ones.
    """

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet3D:
        """One of the six models of Appendix A: "ucf101", "bair", "kinetics600", "t2v-small",
        "t2v-large", "t2v-128". ``overrides`` replace any constructor argument.

        Raises:
            ValueError: no such preset.
        """
        return cls(**vars(preset(name, **overrides)))

    @classmethod
    def from_unet3d(
        cls,
        source: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
        *,
        ema: bool | None = False,
        prefix: str | None = None,
        exact: bool = False,
        check: bool = True,
        **overrides: Any,
    ) -> UNet3D:
        """The same network as a peer ``Unet3D``: its arguments are read off the weights.

        The same keys are not the same network. Of a module, both networks are run on a small random
        input, and ``stem_skip`` is the one with which they agree. A state_dict or a file cannot be
        run: one of the peer's GroupNorm era, which has two meanings, needs ``stem_skip``.

        Args:
            source: the module or one that holds it; its state_dict or a checkpoint of any wrapper
                that has it under some prefix (``GaussianDiffusion``, ``Trainer``, Lightning, EMA,
                DDP ...), as a mapping or a file (nothing is unpickled). Also of a ``UNet3D`` in the
                peer's place, with the config.json and settings.json beside it where they are.
            ema: take the averaged weights: of a state see
                ``fastvdm.unet.checkpoint.find_network``, of a module the network whose path says
                "ema", "averaged" or "swa".
            prefix: which network, where there are several: its dotted path or a part of it.
            exact: keep the peer's defects too (``mask_stem_attention=False``,
                ``cond_drop_prob=0``), for runs that must be reproduced.
            check: compare a module with its ``UNet3D``; False for one that cannot be run.
            overrides: constructor arguments. GroupNorm's groups are read off a module, and cannot
                be read off a state_dict: pass ``resnet_groups`` unless it is the default 8.

        Raises:
            ValueError: the source holds no peer ``Unet3D``, or several, or has other keys; a module
                computes something else than its ``UNet3D``, or cannot be run; weights alone do not
                tell what is needed: ``stem_skip`` of the peer's GroupNorm era, ``time_input`` of a
                ``UNet3D``.

        Warns:
            UserWarning: groups of a ``UNet3D``'s GroupNorm that had to be assumed.
        """
        network: nn.Module | None = None
        settings: Mapping[str, Any] = {}
        if isinstance(source, nn.Module):
            network, arguments = modules.read_module(source, prefix=prefix, ema=ema)
            state: Mapping[str, Any] = network.state_dict()
            settings = network.settings if isinstance(network, UNet3D) else settings
        else:
            found = files.find_network(files.read_source(source), ema=ema, prefix=prefix)
            state = found.state
            stored = folders.stored_arguments(source, found)
            arguments = peer.infer_arguments(state) if stored is None else stored
            if stored is not None:
                settings = folders.read_settings(Path(source).parent)  # type: ignore[arg-type]
            elif found.is_own:
                folders.check_assumed(found, arguments, overrides)
            peer.require_release(state, overrides)
        if exact:
            arguments |= {"mask_stem_attention": False, "cond_drop_prob": 0.0}
        if type(network) is cls or not check:  # ours tells its arguments
            network = None
        model = modules.load(cls, arguments | overrides, state, network)
        model.settings = settings
        return model

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
        *,
        ema: bool | None = False,
        prefix: str | None = None,
    ) -> Any:
        """Also takes a peer state_dict, and either under any prefix and in any nested mapping, as
        wrappers save it; ``ema`` and ``prefix`` as in ``from_unet3d``. Everything is checked before
        anything is copied. One of the peer's GroupNorm era warns where this network was built
        without ``stem_skip``.

        Raises:
            ValueError: keys or shapes that do not fit; the model is then unchanged.
        """
        names = self.state_dict().keys()
        network = files.find_network(state_dict, ema=ema, prefix=prefix, names=names)
        state = peer.to_own_keys(self, network.state)
        files.check_state(self, state, strict=strict)
        return super().load_state_dict(state, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What torch calls where a module around this one, e.g. a ``GaussianDiffusion``, loads."""
        peer.rename_to_own(self, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def to_peer_state_dict(self) -> dict[str, Tensor]:
        """The state_dict of the peer's ``Unet3D`` with these weights, bit for bit. With
        ``stem_skip="before"`` it is for releases up to 0.5.3, though others take it too.

        Raises:
            ValueError: the network has no peer equivalent (paper layout, other positions,
                ``causal``).
        """
        return peer.to_peer_keys(self)
