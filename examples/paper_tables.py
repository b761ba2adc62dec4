"""The paper's claims in the small, in under half an hour on two cores: ``make paper-tables``.

Handwritten digits (scikit-learn ships 1,797 real ones, 8 x 8) bounce about a 16 x 16 canvas. Four
small networks are trained on 8-frame clips, and three tables drawn:

    1. extension to 4 times the length, reconstruction guidance against replacement (Table 6)
    2. joint training with 0, 4 or 8 independent image frames a clip (Table 4)
    3. classifier-free guidance by digit class (Table 5)

Fréchet distances are between features of a small network trained here to name the digit and its
velocity; they compare the rows of a table, not papers. Seeds are fixed; whatever comes out is what
is written, to bench/results/paper_tables.md with pictures. ``--quick`` runs it all in seconds, with
networks that have learned nothing.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import fastvdm
from fastvdm import UNet3D
from fastvdm.diffusion import Ancestral, Langevin, extend, sample
from fastvdm.diffusion.joint import joint_loss
from fastvdm.metrics import frechet_feature_distance

FRAMES, SIZE, DIGIT = 8, 16, 8
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "bench" / "results"


@dataclass(frozen=True)
class Budget:
    """How much of everything; the full one takes about 25 minutes on two cores."""

    steps: int = 1400  # training steps of each network
    batch: int = 16
    judge_steps: int = 1500
    clips: int = 120  # drawn for each row of tables 2 and 3
    long_clips: int = 32  # of table 1
    sampling: int = 24  # steps; half of them with a corrector, which calls twice


QUICK = Budget(steps=2, batch=2, judge_steps=2, clips=4, long_clips=2, sampling=2)


class MovingDigits:
    """Clips (B, 1, F, 16, 16) in [-1, 1] with class and velocity, from one generator."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        self.images = torch.tensor(data.images / 8.0 - 1.0, dtype=torch.float32)
        self.labels = torch.tensor(data.target)
        self.generator = torch.Generator().manual_seed(seed)

    def _rand(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def draw(self, batch: int, frames: int = FRAMES) -> tuple[Tensor, Tensor, Tensor]:
        """clips, class (B,), velocity (B, 2) in pixels a frame, each of -1..1 and not both 0."""
        pick = self._rand(0, len(self.images), (batch,))
        room = SIZE - DIGIT
        at, velocity = self._rand(0, room + 1, (batch, 2)), self._rand(-1, 2, (batch, 2))
        velocity[(velocity == 0).all(1)] = 1
        clips = torch.full((batch, 1, frames, SIZE, SIZE), -1.0)
        for b in range(batch):
            for f in range(frames):
                y, x = (self._bounce(int(at[b, i] + f * velocity[b, i]), room) for i in (0, 1))
                clips[b, 0, f, y : y + DIGIT, x : x + DIGIT] = self.images[pick[b]]
        return clips, self.labels[pick], velocity

    @staticmethod
    def _bounce(p: int, room: int) -> int:
        p %= 2 * room
        return 2 * room - p if p > room else p


class Judge(nn.Module):
    """Names the digit and its velocity; its 16 features are what Fréchet distances are taken in.

    So few because a covariance of n features needs several times n clips.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 24, 3, padding=1), nn.ReLU(), nn.AvgPool3d((1, 2, 2)),
            nn.Conv3d(24, 48, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2),
            nn.Conv3d(48, 64, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.narrow = nn.Linear(64, 16)
        self.head = nn.Linear(16, 10 + 3 + 3)

    def features(self, clips: Tensor) -> Tensor:
        """(B, 16) of the largest activations over space, averaged over time."""
        return self.narrow(self.body(clips).amax(dim=(3, 4)).mean(dim=2))

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(clips).relu())

    def correct(self, clips: Tensor, labels: Tensor) -> float:
        """Share of clips whose digit it names as told."""
        with torch.no_grad():
            return (self(clips)[:, :10].argmax(1) == labels).float().mean().item()


def train_judge(budget: Budget) -> tuple[Judge, float]:
    torch.manual_seed(0)
    data, judge = MovingDigits(1), Judge()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for step in trange(budget.judge_steps, desc="judge"):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / budget.judge_steps)
        clips, labels, velocity = data.draw(32 if budget.judge_steps > 10 else 2)
        out = judge(clips + 0.05 * torch.randn_like(clips))
        loss = F.cross_entropy(out[:, :10], labels)
        for i, part in enumerate((out[:, 10:13], out[:, 13:])):
            loss = loss + F.cross_entropy(part, velocity[:, i] + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, labels, _ = MovingDigits(2).draw(200)
    return judge.eval(), judge.correct(clips, labels)


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, 10).float()


def train(num_images: int, budget: Budget, conditional: bool = False) -> tuple[nn.Module, float]:
    """(EMA network, mean loss of the last tenth). The same clips for every ``num_images``."""
    torch.manual_seed(0)
    net = UNet3D(
        16, dim_mults=(1, 2), channels=1, attn_heads=4, attn_dim_head=16, init_kernel_size=3,
        cond_dim=10 if conditional else None, norm="rms", time_input="logsnr", null_cond="zeros",
        use_sparse_linear_attn=False,
    )  # fmt: skip
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, betas=(0.9, 0.99))
    data, stills = MovingDigits(10), MovingDigits(11)
    losses = []
    name = "by class" if conditional else f"{num_images} images"
    for step in trange(budget.steps, desc=name):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, 0.02 + 2 * (1 - step / budget.steps))
        clips, labels, _ = data.draw(budget.batch)
        if num_images:  # frames of clips that are not in the batch
            images = stills.draw(budget.batch * num_images, 1)[0]
            images = images.reshape(budget.batch, num_images, 1, SIZE, SIZE).transpose(1, 2)
            clips = torch.cat((clips, images), dim=2)
        loss = joint_loss(
            net,
            clips,
            num_images,
            prediction="v",
            loss_space="v",
            cond=one_hot(labels) if conditional else None,
            cond_drop_prob=0.15 if conditional else 0.0,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        keep = min(0.99, step / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters()):
                a.lerp_(p, 1 - keep)
        losses.append(loss.item())
    return average, float(np.mean(losses[-max(1, budget.steps // 10) :]))


def frechet(judge: Judge, real: Tensor, fake: Tensor) -> float:
    with torch.no_grad():
        return frechet_feature_distance(judge.features(real), judge.features(fake)).item()


def windows(clips: Tensor) -> Tensor:
    """The four 8-frame parts of a 32-frame clip, as clips of their own."""
    return torch.cat(clips.split(FRAMES, dim=2)[: clips.shape[2] // FRAMES])


def seam_error(clips: Tensor, overlap: int) -> float:
    """Mean squared change of a frame at the seams of the windows, over that between other frames.

    1 is a seam that does not show; real clips have 1 but for chance.
    """
    change = (clips[:, :, 1:] - clips[:, :, :-1]).square().mean(dim=(0, 1, 3, 4))
    seams = torch.arange(FRAMES - 1, len(change), FRAMES - overlap)
    inside = torch.ones(len(change), dtype=torch.bool)
    inside[seams] = False
    return (change[seams].mean() / change[inside].mean()).item()


def table_extension(net: nn.Module, judge: Judge, budget: Budget):
    """Rows of table 1, and a picture row of each method."""
    length, overlap = 4 * FRAMES, 3
    given, labels, _ = MovingDigits(20).draw(budget.long_clips, FRAMES)
    real = MovingDigits(21).draw(4 * budget.long_clips, length)[0]
    parts = length // FRAMES - 1  # the windows of a clip that are new
    rows, pictures = [], []

    def add(name: str, clips: Tensor) -> None:
        new = windows(clips[:, :, FRAMES:])
        same = judge.correct(new, labels.repeat(parts))
        rows.append((name, frechet(judge, windows(real), new), seam_error(clips, overlap), same))
        pictures.append(clips[0])
        print("{:48s} Fréchet {:8.3f}   seam {:.3f}   same digit {:.3f}".format(*rows[-1]))

    add("real clips", MovingDigits(20).draw(budget.long_clips, length)[0])
    methods = [
        ("replacement, marginal", dict(method="replacement")),
        ("replacement, posterior", dict(method="replacement", replacement="posterior")),
        *((f"reconstruction, w_r = {w:g}", dict(guidance_weight=w)) for w in (1.0, 2.0, 5.0, 10.0)),
    ]
    for corrector in (None, Langevin(0.1)):
        steps = budget.sampling if corrector is None else budget.sampling // 2
        for name, options in methods if corrector is None else (methods[0], methods[3]):
            out = extend(
                net,
                given,
                length,
                window=FRAMES,
                overlap=overlap,
                prediction="v",
                sampler=Ancestral(0.0),
                corrector=corrector,
                num_steps=steps,
                seed=5,
                progress=False,
                **options,
            )
            add(f"{name}, {'ancestral' if corrector is None else 'Langevin'} ({steps})", out)
    return rows, pictures


def table_joint(nets: dict[int, tuple[nn.Module, float]], judge: Judge, budget: Budget):
    real = MovingDigits(30).draw(4 * budget.clips)[0]
    rows, pictures = [], []
    for count, (net, loss) in nets.items():
        out = sample(
            net,
            (budget.clips, 1, FRAMES, SIZE, SIZE),
            prediction="v",
            num_steps=budget.sampling,
            seed=6,
        )
        still = frechet(judge, *(c[:, :, :1].expand_as(c) for c in (real, out)))
        rows.append((count, loss, frechet(judge, real, out), still))
        print("{} images: loss {:.4f}   Fréchet {:.3f}   first frame {:.3f}".format(*rows[-1]))
        pictures.append(out[0])
    return rows, pictures


def table_guidance(net: nn.Module, judge: Judge, budget: Budget):
    real = MovingDigits(40).draw(4 * budget.clips)[0]
    labels = torch.arange(budget.clips) % 10
    rows, pictures = [], []
    for scale in (0.0, 1.0, 2.0, 3.0, 6.0):
        out = sample(
            net,
            (budget.clips, 1, FRAMES, SIZE, SIZE),
            prediction="v",
            num_steps=budget.sampling,
            cond=one_hot(labels),
            guidance_scale=scale,
            seed=7,
        )
        rows.append((scale, frechet(judge, real, out), judge.correct(out, labels)))
        print("scale {:g}: Fréchet {:.3f}   right digit {:.3f}".format(*rows[-1]))
        pictures.append(out[3 % budget.clips])
    return rows, pictures


def picture(path: Path, clips: list[Tensor], zoom: int = 3) -> None:
    """One clip a row, one frame a column."""
    frames = min(c.shape[1] for c in clips)
    gap = 1
    sheet = torch.full((len(clips) * (SIZE + gap), frames * (SIZE + gap)), 0.3)
    for i, clip in enumerate(clips):
        for f in range(frames):
            y, x = i * (SIZE + gap), f * (SIZE + gap)
            sheet[y : y + SIZE, x : x + SIZE] = (clip[0, f].clamp(-1, 1) + 1) / 2
    image = Image.fromarray((255 * sheet).byte().numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    def cell(value):
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


REPORT = """# The paper's claims in the small

`make paper-tables` on {machine}, {threads} threads, torch {torch}, fastvdm {version}:
{minutes:.1f} minutes. {quick}Moving handwritten digits, {frames} frames of {size} x {size};
networks of {parameters:,} parameters, {steps} training steps of batch {batch}, one seed. The judge
names {accuracy:.1%} of the digits of other clips (other digits are not held out). One run with
small samples: differences of a few per cent mean nothing.

## 1. Extension to 4 times the length

The first {frames} frames are real, the rest is drawn window by window with 3 frames of overlap;
{long_clips} clips. Seam: change between frames where windows meet, over that between other frames.
Same digit: share of the new windows in which the judge names the digit of the clip given.
The corrector calls the network twice a step, so it has half the steps.

{extension}

![extension](paper_tables_extension.png)

First row a real clip, then the rows of the table in order.

## 2. Joint training

Independent image frames after each clip; the same clips in the same order. "First frames": distance
of the first frame alone, held still.

{joint}

![joint](paper_tables_joint.png)

## 3. Classifier-free guidance by class

Scale is 1 + w of Eq. 6: 0 ignores the class, 1 is no guidance. {clips} clips.

{guidance}

![guidance](paper_tables_guidance.png)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the report (default: bench/results)")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick needs --out: it would overwrite the real report")
    out = args.out or DEFAULT_OUT
    out.mkdir(parents=True, exist_ok=True)
    budget = QUICK if args.quick else Budget()
    start = time.perf_counter()
    judge, accuracy = train_judge(budget)
    nets = {count: train(count, budget) for count in (0, 4, 8)}
    by_class, _ = train(0, budget, conditional=True)
    # Table 1 uses the network that joint training left best equipped, as the paper's does.
    extension, rows1 = table_extension(nets[8][0], judge, budget)
    joint, rows2 = table_joint(nets, judge, budget)
    guidance, rows3 = table_guidance(by_class, judge, budget)
    for name, rows in (("extension", rows1), ("joint", rows2), ("guidance", rows3)):
        picture(out / f"paper_tables_{name}.png", rows)
    report = REPORT.format(
        machine=f"{platform.machine()} {platform.system()}",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        version=fastvdm.__version__,
        minutes=(time.perf_counter() - start) / 60,
        quick="**--quick: these numbers mean nothing.** " if args.quick else "",
        frames=FRAMES,
        size=SIZE,
        parameters=sum(p.numel() for p in nets[0][0].parameters()),
        steps=budget.steps,
        batch=budget.batch,
        accuracy=accuracy,
        long_clips=budget.long_clips,
        clips=budget.clips,
        extension=table(("method", "Fréchet distance", "seam", "same digit"), extension),
        joint=table(("images", "loss", "Fréchet distance", "of first frames"), joint),
        guidance=table(("scale", "Fréchet distance", "right digit"), guidance),
    )
    partial = out / "paper_tables.md.part"
    partial.write_text(report)
    partial.replace(out / "paper_tables.md")
    print(f"wrote {out / 'paper_tables.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
