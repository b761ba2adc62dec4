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
from fastvdm.unet.config import preset
from fastvdm.unet.network import FactorizedUNet


class UNet3D(FactorizedUNet, folders.Pretrained, library_name="fastvdm", license="mit"):
    """Factorized space-time 3D U-Net (Ho et al. 2022, "Video Diffusion Models", §3).

    The first thirteen arguments are those of ``video_diffusion_pytorch.Unet3D`` 0.5 to 0.7, with
    the same meaning and defaults. The keyword-only rest chooses the normalisation, the fixes of the
    peer's defects, and the layout of the paper's own models (``from_preset``).

    Args:
        dim: base width. cond_dim: width of the conditioning vector, None for none.
        out_dim: output channels, ``channels`` by default. dim_mults: width multiplier per level.
        attn_heads, attn_dim_head: heads and their size; in the paper layout heads = C / head size.
        use_bert_text_cond: cond_dim = 768. init_dim: width of the stem. init_kernel_size: odd.
        use_sparse_linear_attn: linear spatial attention at every level (peer layout).
        block_type: "resnet". resnet_groups: groups of the GroupNorm.
        norm: "group" (peer to 0.6, the paper) or "rms" (peer 0.7). norm_eps: None is its default.
        norm_per_frame: GroupNorm statistics over each frame instead of the whole video. Only then,
            or with "rms", are image frames of joint training exactly isolated (paper §3).
        cond_drop_prob: probability of dropping the condition in training when the caller does not
            pass ``null_cond_prob``. The peer has 0, so that its null embedding is never trained.
        mask_stem_attention: apply the focus and image masks to the temporal attention of the stem
            too. The peer does not, so that its frames mix there.
        stem_skip: "after" (peer 0.6 and 0.7) or "before" (peer up to 0.5.3 and forks copied from
            it): where the outermost skip leaves, after the temporal attention of the stem or before
            it. No weight tells. None is "after", and warns when weights are loaded that could be
            either's.
        dropout: probability, between the two convolutions of a block.
        checkpointing: "none", "block" or "level": what is recomputed in the backward pass.
        layout: "peer" or "paper"; the arguments below default to what the layout has.
        num_blocks: residual blocks per level (paper layout; the peer has two).
        image_size, attn_resolutions: the paper layout attends where the feature map of an
            ``image_size`` input has one of these sizes.
        time_input: "index" (peer) or "logsnr" (paper): what ``forward`` takes as ``time``.
        position: "rotary+t5" (peer), "t5", "shaw" (paper) or "none", in temporal attention.
        shaw_max_distance, shaw_values, shaw_per_head: clip distance of the Shaw tables, tables for
            values as well as keys, a table per head. The paper is silent; LVDM has both tables,
            shared by the heads, and so are the defaults.
        emb_dim: width of the embedding, 4 * dim (peer) or 1024 (paper).
        mlp_layers: layers of the embedding MLPs.
        null_cond: "learned" (peer) or "zeros" (paper): the vector of the unconditional branch.
        conditioning: "scale_shift" or "add" (paper layout). The text says "added", the distillation
            code scales and shifts; the latter is the default.
        resample: "conv" or "resblock" (paper layout): strided convolution and nearest-up +
            convolution, or pooling and nearest-up inside a residual block.
        zero_init: zero the last convolution of a block, the output of an attention and the head
            (paper layout), as the distillation code does.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet3D:
        """One of the six models of Appendix A: "ucf101", "bair", "kinetics600", "t2v-small",
        "t2v-large", "t2v-128". ``overrides`` replace any constructor argument.

        Raises:
            ValueError: no such preset.
        """
        return cls(**preset(name, **overrides))

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
        model.settings = dict(settings)
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
            ValueError: the network has no peer equivalent (paper layout, other positions).
        """
        return peer.to_peer_keys(self)
