"""Several processes over gloo: frame-parallel networks, DDP and FSDP2 equal one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import LEFT
from torch.distributed.device_mesh import init_device_mesh

from fastvdm import UNet3D
from fastvdm.parallel import (
    count_communication,
    frame_parallel,
    fully_shard_unet,
    gather_frames,
    shard_frames,
    sum_gradients,
)
from fastvdm.testing import max_error

SMALL = dict(dim=8, dim_mults=(1, 2), attn_heads=2)
NETWORKS = {
    "group": dict(**SMALL, norm="group", resnet_groups=4),
    "one_level": dict(dim=8, dim_mults=(1,), attn_heads=2, norm="group", resnet_groups=4),
    "rms": dict(**SMALL, norm="rms"),
    "paper": dict(dim=8, dim_mults=(1, 2), layout="paper", image_size=8, attn_resolutions=(4,),
                  attn_dim_head=8, resnet_groups=4, emb_dim=16, num_blocks=1, position="shaw",
                  zero_init=False),
}  # fmt: skip


def make(name: str) -> tuple[UNet3D, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = UNet3D(**NETWORKS[name])
    return model, torch.randn(2, 3, 8, 8, 4), torch.tensor([0.7, 12.0])


def assert_same(out: torch.Tensor, one: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal to 1e-6, or as near as one process itself is to the result in fp64: the libraries sum
    in another order for another number of frames, and which depends on the machine."""
    assert max_error(out, one) < max(1e-6, 2 * max_error(one, exact))


def frame_worker(rank: int, world: int, name: str, num_images: int) -> None:
    model, x, time = make(name)
    single, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    mesh = init_device_mesh("cpu", (world,))
    parallel = frame_parallel(model, mesh)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    with torch.no_grad(), count_communication(parallel) as sent:
        shard = parallel(shard_frames(x, mesh), time, num_images=num_images)
        whole = single(x, time, num_images=num_images)
        exact = wide(x.double(), time.double(), num_images=num_images)
        assert_same(gather_frames(shard, mesh), whole, exact)
        split = frame_parallel(copy.deepcopy(wide), mesh)
        shard = split(shard_frames(x.double(), mesh), time.double(), num_images=num_images)
        assert max_error(gather_frames(shard, mesh), exact) < 1e-12
    assert sent[0].bytes > 0 and sent[0].collectives >= 6

    leaf, local = x.clone().requires_grad_(), shard_frames(x, mesh).requires_grad_()
    single(leaf, time, num_images=num_images).backward(dout)
    parallel(local, time, num_images=num_images).backward(shard_frames(dout, mesh))
    sum_gradients(parallel, mesh)
    assert max_error(local.grad, shard_frames(leaf.grad, mesh)) < 5e-6
    for (key, p), q in zip(parallel.named_parameters(), single.parameters()):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert max_error(p.grad, q.grad) < 2e-5, key


@pytest.mark.parametrize(
    ("name", "world", "images"), [("group", 2, 0), ("rms", 4, 3), ("paper", 2, 2)]
)
def test_frame_parallel_equals_one_process(ranks, name, world, images, tmp_path):
    ranks.run(frame_worker, world, tmp_path, name, images)


def bad_worker(rank: int, world: int) -> None:
    model, x, time = make("rms")
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(ValueError, match=r"multiple of 2 ranks, got \(2, 3, 7, 8, 4\)"):
        shard_frames(x[:, :, :7], mesh)
    with pytest.raises(TypeError, match="takes a UNet3D, got Linear"):
        frame_parallel(torch.nn.Linear(2, 2), mesh)
    parallel = frame_parallel(model, mesh)
    with pytest.raises(ValueError, match="2 ranks do not divide the 1 x 1 pixels"):
        parallel.stem_attention.shards.to_pixels(torch.zeros(1, 2, 1, 1, 8))


def test_bad_sizes_fail_on_every_rank(ranks, tmp_path):
    ranks.run(bad_worker, 2, tmp_path)


def disagreeing_worker(rank: int, world: int) -> None:
    """What is wrong on rank 1 alone is an error on both, before any rank waits for the other."""
    mesh = init_device_mesh("cpu", (world,))
    mixed = make("rms" if rank == 0 else "group")[0]  # checkpoints of two versions of the peer
    with pytest.raises(ValueError, match=r"layout of the network on rank\(s\) 1 differ"):
        frame_parallel(mixed, mesh)
    other = make("rms")[0]
    if rank == 1:
        with torch.no_grad():
            other.stem.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"weights of the network on rank\(s\) 1 differ"):
        frame_parallel(other, mesh)
    lost = make("rms")[0].to("cpu" if rank == 0 else "meta")
    with pytest.raises(ValueError, match="rank 1: the mesh is of cpu, the network on meta"):
        frame_parallel(lost, mesh)
    state = make("group")[0].state_dict()
    with pytest.raises(ValueError):  # one file, but of the other version: every rank says so
        make("rms")[0].load_state_dict(state)


def test_what_is_wrong_on_one_rank_fails_on_every_rank(ranks, tmp_path):
    ranks.run(disagreeing_worker, 2, tmp_path)


def uneven_worker(rank: int, world: int) -> None:
    """Shares cut by hand from a video that the ranks do not divide, or times of another type:
    every rank says so, and the next network of the same ranks works."""
    mesh = init_device_mesh("cpu", (world,))
    model, x, time_ = make("rms")
    half = slice(4 * rank, 4 * rank + 4)
    bad = {
        "0": (x[:, :, :7][:, :, half], time_),  # 4 frames and 3
        "1": (x[:, :, half], time_ if rank == 0 else time_.long()),
    }
    for name, arguments in bad.items():
        parallel = frame_parallel(make("rms")[0], mesh)
        with pytest.raises(ValueError, match=f"argument {name} is .* on rank 1 and .* on rank 0"):
            parallel(*arguments)
    with torch.no_grad():
        assert frame_parallel(model, mesh)(x[:, :, half], time_).isfinite().all()


def test_shares_of_different_sizes_fail_on_every_rank(ranks, tmp_path):
    ranks.run(uneven_worker, 2, tmp_path)


def leaving_worker(rank: int, world: int) -> str:
    model, x, time_ = make("rms")
    mesh = init_device_mesh("cpu", (world,))
    parallel = frame_parallel(model, mesh)
    if rank == 1:  # its input alone is bad
        with pytest.raises(ValueError, match="multiple of 2 ranks"):
            shard_frames(x[:, :, :7], mesh)
    else:
        with pytest.raises(RuntimeError, match="(?i)connection|pipe"):
            parallel(shard_frames(x, mesh), time_)
    return LEFT


def test_a_rank_that_leaves_does_not_hang_the_others(ranks, tmp_path):
    """The closed connection ends the collective."""
    ranks.run(leaving_worker, 2, tmp_path)


def compiled_worker(rank: int, world: int) -> None:
    model, x, time_ = make("one_level")
    single = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world,))
    parallel = frame_parallel(model, mesh)
    compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(shard_frames(x, mesh), time_)
        exact = copy.deepcopy(single).double()(x.double(), time_.double())
        assert_same(gather_frames(out, mesh), single(x, time_), exact)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    leaf, local = x.clone().requires_grad_(), shard_frames(x, mesh).requires_grad_()
    single(leaf, time_).backward(dout)
    compiled(local, time_).backward(shard_frames(dout, mesh))
    sum_gradients(parallel, mesh)
    assert max_error(local.grad, shard_frames(leaf.grad, mesh)) < 5e-6
    for (key, p), q in zip(parallel.named_parameters(), single.parameters()):
        assert max_error(p.grad, q.grad) < 2e-5, key


@pytest.mark.slow
def test_compiled_frame_parallel_equals_one_process(ranks, tmp_path):
    """One graph, collectives in it, those of the statistics too, forward and backward. Of one
    level: what lies between two levels sends nothing, and compile_test.py compiles it."""
    ranks.run(compiled_worker, 2, tmp_path)


STEPS = 8


def train(model, x, noise, time, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x, time) - noise).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def engine_worker(rank: int, world: int, engine: str) -> None:
    """Each rank trains on its part of the batch; the mean curve is that of one process."""
    torch.manual_seed(0)
    model = UNet3D(**SMALL, norm="rms").eval()
    x, noise = torch.randn(4, 3, 2, 4, 4), torch.randn(4, 3, 2, 4, 4)
    time = torch.arange(4.0) * 100
    want = train(copy.deepcopy(model), x, noise, time, STEPS)
    if engine == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        model = fully_shard_unet(model, init_device_mesh("cpu", (world,)))
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    losses = torch.stack(train(model, x[part], noise[part], time[part], STEPS))
    dist.all_reduce(losses)
    assert torch.allclose(losses / world, torch.stack(want), rtol=2e-5), (losses / world, want)


@pytest.mark.parametrize(("engine", "world"), [("ddp", 2), ("fsdp2", 2), ("ddp", 4)])
def test_data_parallel_training_curve(ranks, engine, world, tmp_path):
    ranks.run(engine_worker, world, tmp_path, engine)
