"""Trains the network that ships in ``examples/digits/model``: moving digits, 16 x 24 x 24.

    python examples/digits/train.py                  the whole run, 50 minutes on one core
    python examples/digits/train.py --steps 200 --out out/digits

It has the layers of ``video_diffusion_pytorch.Unet3D`` 0.7, which therefore loads it too, and
predicts v. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safe_bytes
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits import data
from paper.train import Muon

from fastvdm import UNet3D
from fastvdm.diffusion import DiscreteSchedule, Settings, diffusion_loss

MODEL = Path(__file__).parent / "model"
SETTINGS = Settings(
    num_frames=data.FRAMES,
    image_size=(data.SIZE, data.SIZE),
    prediction="v",
    schedule="discrete",
    num_steps=64,
    fps=8,
)


CARD = """\
# Moving digits

A toy for demonstrations: one digit in one colour bounces over black, 16 frames of 24 x 24 pixels.
436 000 parameters, stored in fp16, trained by `examples/digits/train.py` on clips that it makes
itself. Nothing was downloaded, and no data set is in it.

    fastvdm sample examples/digits/model digits.mp4 --num 4

It is too small, and was trained too briefly, to keep a digit what it is through all 16 frames. That
makes it a good subject for methods that hold a video to what is known of it.
"""


def network() -> UNet3D:
    """436 000 parameters."""
    return UNet3D(16, dim_mults=(1, 2, 2), attn_heads=4, attn_dim_head=16, norm="rms")


def optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, Adam for both ends and for vectors."""
    inside, others = [], []
    for name, p in net.named_parameters():
        ends = name.startswith(("stem.", "head.conv."))
        (others if ends or p.ndim < 2 or p.numel() <= 256 else inside).append(p)
    adam = torch.optim.Adam([{"params": others, "initial_lr": 3e-3}], 3e-3, betas=(0.9, 0.99))
    return [Muon(inside, 0.02), adam]


def factor(done: float, step: int) -> float:
    """Of the learning rates: 50 steps of warm-up; the last 60 % are half a cosine, to zero."""
    late = max(0.0, done - 0.4) / 0.6
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * late))


def train(
    steps: int, batch: int, out: Path, *, seed: int = 0, every: int = 100, bf16: bool = False,
    stop: int | None = None,
) -> UNet3D:  # fmt: skip
    """The averaged network after ``steps``, or after ``stop`` of them; the checkpoint is
    ``out/state.pt``, one every ``every`` steps."""
    torch.manual_seed(seed)
    net = network()
    average = copy.deepcopy(net).eval()
    both, start = optimizers(net), 0
    path, schedule = out / "state.pt", DiscreteSchedule(1000)
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(both, state["optimizers"]):
            optimizer.load_state_dict(kept)
    out.mkdir(parents=True, exist_ok=True)
    bar, total = tqdm(range(start, stop or steps), initial=start, total=steps, mininterval=5), 0.0
    for step in bar:
        # A stream for each step: a resumed run sees what the whole one would have.
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        video = data.clips(batch, generator=generator)
        t = (torch.rand((), generator=generator) + torch.arange(batch) / batch) % 1
        t = ((t * 1000).long() + 1) / 1000
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = diffusion_loss(
                net, video, schedule=schedule, prediction="v", loss_space="v", t=t,
                generator=generator,
            )  # fmt: skip
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(step / steps, step)
        net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        rate = min(0.998, step / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters()):
                a.lerp_(p, 1 - rate)
        total += loss.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            bar.set_postfix_str(f"loss {total / ((step % every) + 1):.4f}")
            total, partial = 0.0, path.with_suffix(".part")
            kept = [o.state_dict() for o in both]
            state = {"step": step + 1, "net": net.state_dict(), "average": average.state_dict()}
            torch.save(state | {"optimizers": kept}, partial)
            partial.replace(path)
    return average


def save(net: UNet3D, folder: Path) -> None:
    """As ``save_pretrained``, with the weights in fp16: half of 1.7 MB, read back as fp32."""
    net.settings = SETTINGS
    net.save_pretrained(folder)
    weights = folder / "model.safetensors"
    half = {name: t.half() for name, t in load_file(weights).items()}
    weights.write_bytes(safe_bytes(half, metadata={"format": "pt"}))
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--model", type=Path, default=MODEL, help="where the network goes")
    parser.add_argument("--bf16", action="store_true", help="under autocast, as shipped")
    args = parser.parse_args()
    save(train(args.steps, args.batch, args.out, bf16=args.bf16), args.model)
    print(args.model)


if __name__ == "__main__":
    main()
