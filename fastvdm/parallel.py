"""Axis-parallel UNet3D: one video over several devices, its frames sharded.

Rank r of P holds frames [r F/P, (r+1) F/P). Convolutions and spatial attention act on single frames
and stay local. Two operations need several frames:

- temporal attention: an all-to-all turns shards of frames into shards of pixels, in which every
  sequence is complete, and another one turns the result back;
- GroupNorm over the whole video: its partial statistics are summed over the ranks.

Volume: a temporal attention on (B, F, H, W, C) sends 2 (P-1)/P * B F H W C / P elements per rank in
the forward and as many in the backward; a GroupNorm sends 4 B * groups numbers.
``count_communication`` counts them for a network. All communication uses functional collectives, so
it compiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastvdm.layers.attention import Attention
from fastvdm.layers.norm import Norm
from fastvdm.layers.shards import FrameShards
from fastvdm.unet import UNet3D
from fastvdm.unet.blocks import Unit


def frame_parallel(model: UNet3D, mesh: DeviceMesh) -> UNet3D:
    """Let ``model`` run on its rank's frames of a one-dimensional ``mesh``.

    The model is changed in place: ``forward`` takes and returns (B, C, F/P, H, W). All other
    arguments are those of the whole video. They and the parameters must be the same on every rank.
    Each rank computes its part of the gradients of the parameters; ``sum_gradients`` adds them.
    Random masks (dropout of the condition, focus) must be drawn by the caller or from equal
    generators. The first uncompiled call compares the shapes of the arguments over the ranks.

    Args:
        model: the network.
        mesh: the ranks that share a video.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a UNet3D.
        ValueError: the mesh has more than one dimension; or a rank's network is on another kind of
            device than the mesh, or differs from rank 0's in layout or weights (checkpoints of two
            versions). Every rank raises even if only one is wrong.
    """
    if not isinstance(model, UNet3D):
        raise TypeError(f"frame_parallel takes a UNet3D, got {type(model).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"frame_parallel takes a mesh of one dimension, got {mesh.ndim}")
    _check_ranks_agree(model, mesh)
    shards = FrameShards(mesh.get_group(), mesh.size())
    for module in model.modules():
        if isinstance(module, Attention | Norm | UNet3D):
            module.shards = shards
    _check_first_call(model, mesh)
    return model


def _from_all(mine: Any, mesh: DeviceMesh) -> list[Any]:
    """Gather one object from each rank. None returns before all have them: after an error a rank
    may end its process, and the others would find the connection closed."""
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, mine, group=mesh.get_group())
    dist.barrier(mesh.get_group())
    return found


def _check_first_call(model: UNet3D, mesh: DeviceMesh) -> None:
    """Compare the ranks' arguments once, at the first uncompiled call. Shares of different sizes
    would end a process inside the collective, or hang."""

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        handle.remove()
        given = {str(i): a for i, a in enumerate(args)} | kwargs
        mine = [
            (name, tuple(a.shape), str(a.dtype), a.device.type)
            for name, a in sorted(given.items())
            if isinstance(a, Tensor)
        ]
        found = _from_all(mine, mesh)
        for rank, theirs in enumerate(found):
            for a, b in zip(found[0], theirs):
                if a != b:
                    raise ValueError(
                        f"argument {b[0]} is {b[1:]} on rank {rank} and {a[1:]} on rank 0; "
                        "shard_frames makes equal shares, all else is the same on every rank"
                    )

    handle = model.register_forward_pre_hook(check, with_kwargs=True)


def _check_ranks_agree(model: UNet3D, mesh: DeviceMesh) -> None:
    """Exchange fingerprints once, so that no rank waits in a collective for one that failed."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    kinds = sorted({t.device.type for t in tensors.values()})
    layout = repr([(k, tuple(t.shape), str(t.dtype)) for k, t in tensors.items()])
    weights = b""
    if "meta" not in kinds:
        sums = torch.stack([t.detach().double().sum().cpu() for t in tensors.values()])
        weights = sums.numpy().tobytes()
    mine = (kinds, *(hashlib.sha256(b).hexdigest() for b in (layout.encode(), weights)))
    found = _from_all(mine, mesh)
    for rank, theirs in enumerate(found):
        if theirs[0] != [mesh.device_type]:
            on = " and ".join(theirs[0])
            raise ValueError(f"rank {rank}: the mesh is of {mesh.device_type}, the network on {on}")
    for part, name in ((1, "layout"), (2, "weights")):
        others = [rank for rank, theirs in enumerate(found) if theirs[part] != found[0][part]]
        if others:
            raise ValueError(
                f"the {name} of the network on rank(s) {', '.join(map(str, others))} differ from "
                "rank 0's: load the same checkpoint everywhere"
            )


def shard_frames(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The frames of (B, C, F, H, W) that belong to this rank.

    Raises:
        ValueError: the number of ranks does not divide F; on every rank, before any communication.
    """
    if x.ndim != 5 or x.shape[2] % mesh.size():
        raise ValueError(
            f"the frames of (B, C, F, H, W) must be a multiple of {mesh.size()} ranks, "
            f"got {tuple(x.shape)}"
        )
    return x.chunk(mesh.size(), dim=2)[mesh.get_local_rank()].contiguous()


def gather_frames(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The whole video (B, C, F, H, W) on every rank, from shards (B, C, F/P, H, W)."""
    whole = collectives.all_gather_tensor(x.transpose(0, 2).contiguous(), 0, mesh.get_group())
    return whole.transpose(0, 2).contiguous()


def sum_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Add each parameter's gradient over the ranks, in one flat bucket per dtype."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        bucket = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat, group=mesh.get_group())
        for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
            g.copy_(part.view(g.shape))


def fully_shard_unet(model: UNet3D, mesh: DeviceMesh, **options: Any) -> UNet3D:
    """Apply FSDP2's ``fully_shard`` to every unit of the network, then to the rest.

    FSDP2 takes only contiguous parameters, so channels-last weights are made contiguous first.

    Args:
        model: the network.
        mesh: the ranks that share the parameters.
        options: options of ``fully_shard`` (mixed precision, offload).
    """
    from torch.distributed.fsdp import fully_shard

    for p in model.parameters():
        p.data = p.data.contiguous()
    for module in model.modules():
        if isinstance(module, Unit):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


class Communication(NamedTuple):
    """Bytes that one rank sends in one forward pass, and the number of collectives."""

    bytes: int
    collectives: int


@contextmanager
def count_communication(model: UNet3D) -> Iterator[list[Communication]]:
    """Measure the forward passes inside the block; the list receives one entry at its end."""
    shards: Any = model.shards
    if shards is None:
        raise ValueError("the model is not frame-parallel")
    before = (shards.bytes_sent, shards.calls)
    found: list[Communication] = []
    yield found
    found.append(Communication(shards.bytes_sent - before[0], shards.calls - before[1]))
