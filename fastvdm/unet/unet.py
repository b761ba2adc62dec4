"""``UNet3D``: the factorized space-time 3D U-Net, a drop-in for the peer's ``Unet3D``."""

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

    It takes the arguments, inputs and checkpoints of ``video_diffusion_pytorch.Unet3D`` 0.5 to 0.7
    (``video-diffusion-pytorch`` by lucidrains, here called "the peer") and computes the same
    function. The arguments are the fields of ``fastvdm.unet.UNetConfig``, which documents them:
    first the thirteen of the peer, then keyword-only ones.

    Example:
        >>> import torch
        >>> from fastvdm import UNet3D
        >>> model = UNet3D(dim=16, dim_mults=(1, 2), attn_heads=2)
        >>> video = torch.randn(1, 3, 4, 32, 32)  # (B, C, F, H, W)
        >>> model(video, torch.tensor([500])).shape  # time: a step index
        torch.Size([1, 3, 4, 32, 32])
    """

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet3D:
        """Build one of the six models of the paper's Appendix A.

        Args:
            name: "ucf101", "bair", "kinetics600", "t2v-small", "t2v-large" or "t2v-128".
            overrides: constructor arguments that replace those of the preset.

        Raises:
            ValueError: there is no such preset.
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
        """Convert a peer ``Unet3D``: the same network, with arguments read off its weights.

        Equal keys do not imply equal networks. A module is therefore run, together with the new
        ``UNet3D``, on a small random input, and the ``stem_skip`` with which they agree is kept. A
        state_dict or a file cannot be run. The peer's releases with GroupNorm have two meanings for
        the same weights, so a state of theirs requires ``stem_skip``.

        Args:
            source: a peer ``Unet3D`` or a module that contains one; or its state_dict; or a
                checkpoint of any wrapper that has it under some prefix (``GaussianDiffusion``,
                ``Trainer``, Lightning, EMA, DDP ...), as a mapping or a file. Nothing is unpickled.
                The network may also be a ``UNet3D`` used in place of the peer's; config.json and
                settings.json next to the file are then read.
            ema: take the averaged weights. For a state see
                ``fastvdm.unet.checkpoint.find_network``; in a module they are the network whose
                path says "ema", "averaged" or "swa".
            prefix: the dotted path of the network or a part of it, if there are several networks.
            exact: keep the peer's defects (``mask_stem_attention=False``, ``cond_drop_prob=0``),
                for runs that must be reproduced.
            check: compare a module with its ``UNet3D``. Pass False if it cannot be run.
            overrides: constructor arguments. The groups of GroupNorm are read off a module. A
                state_dict does not have them: pass ``resnet_groups`` unless it is the default 8.

        Returns:
            The network, with the dtypes and on the device of the weights.

        Raises:
            ValueError: the source has no peer ``Unet3D``, has several, or has other keys; a module
                computes another function or cannot be run; or an argument is needed that the
                weights do not show: ``stem_skip`` for the peer's GroupNorm releases, ``time_input``
                for a ``UNet3D``.

        Warns:
            UserWarning: the groups of a ``UNet3D``'s GroupNorm had to be assumed.
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
        if type(network) is cls or not check:  # a UNet3D knows its arguments
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
        """Copy weights from a state_dict of this network or of a peer ``Unet3D``.

        The state may be under any prefix and in any nested mapping, as wrappers save it. All keys
        and shapes are checked before anything is copied. A state of the peer's GroupNorm releases
        gives a warning if this network was built without ``stem_skip``.

        Args:
            state_dict: the state, or a mapping that contains it.
            strict: as in ``torch.nn.Module.load_state_dict``.
            assign: as in ``torch.nn.Module.load_state_dict``.
            ema: as in ``from_unet3d``.
            prefix: as in ``from_unet3d``.

        Raises:
            ValueError: keys or shapes do not fit. The model is then unchanged.
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
        """Called by torch if a module around this one, e.g. a ``GaussianDiffusion``, loads."""
        peer.rename_to_own(self, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def to_peer_state_dict(self) -> dict[str, Tensor]:
        """Return the state_dict of the peer's ``Unet3D`` with these weights, bit for bit.

        With ``stem_skip="before"`` only the peer's releases up to 0.5.3 compute the same function,
        although later ones accept the weights too.

        Raises:
            ValueError: the peer has no such network (paper layout, other positions, ``causal``).
        """
        return peer.to_peer_keys(self)
