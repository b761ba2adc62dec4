"""Random clips of 16 x 64 x 64 out of 720p H.264: clips a second, by who reads and by workers.

    python bench/video_bench.py [--clips 32] [--workers 0 2 4] [--write]

The files are made here: 10 seconds, key frames 250 frames apart, B-frames. Every reader opens the
file for each clip, like a data set of many files, and scales with the same function. Missing
readers (torchcodec, decord, OpenCV) are reported. Parity comes first: each frame must be close to
the same frame of a plain decode, and closer than to its neighbours. The floor is the time to decode
the frames of a clip and those to which they refer, and nothing else. ``--write`` makes
bench/results/video.md.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvdm.video import read_video, resize_crop
from fastvdm.video.decode import _by_seeking
from fastvdm.video.index import frame_index, opened

FRAMES, SIZE, RATE, SECONDS = 16, 64, 30, 10
Read = Callable[[str, int], Tensor]


def make_clip(path: Path, seed: int) -> None:
    """A textured picture that moves, an inverted square that moves differently, and grain."""
    rng = np.random.default_rng(seed)
    height, width, count = 720, 1280, RATE * SECONDS
    texture = rng.integers(0, 256, (150, 320, 3), dtype=np.uint8)
    texture = np.kron(texture, np.ones((8, 8, 1), np.uint8)).astype(np.float32)
    for _ in range(2):
        texture = sum(np.roll(texture, s, a) for s in (-3, 0, 3) for a in (0, 1)) / 6
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "23", "preset": "medium", "g": "250", "sc_threshold": "0"}
        for i in range(count):
            frame = texture[i:, 2 * i :][:height, :width].copy()
            frame[100 + i : 260 + i, 300 + 2 * i : 500 + 2 * i] *= -1
            frame = frame % 256 + rng.normal(0, 3, (height, width, 1))
            pixels = frame.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def scaled(frames: list[np.ndarray] | Tensor) -> Tensor:
    """(F, H, W, C) or a list of (H, W, C), uint8, to (C, F, 64, 64) in [0, 1]."""
    small = [resize_crop(torch.as_tensor(f).permute(2, 0, 1), SIZE) for f in frames]
    return torch.stack(small, 1).float() / 255


def fastvdm_reader() -> Read:
    return lambda path, start: read_video(path, FRAMES, size=SIZE, start=start)


def pyav_reader() -> Read:
    def read(path: str, start: int) -> Tensor:
        frames = []
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            for i, frame in enumerate(container.decode(video=0)):
                if i >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == FRAMES:
                    return scaled(frames)
        raise AssertionError(path)

    return read


def opencv_reader() -> Read:
    cv2 = importlib.import_module("cv2")

    def read(path: str, start: int) -> Tensor:
        capture = cv2.VideoCapture(path)
        for _ in range(start):
            capture.grab()
        frames = [capture.read()[1][..., ::-1].copy() for _ in range(FRAMES)]
        capture.release()
        return scaled(frames)

    return read


def decord_reader() -> Read:
    decord = importlib.import_module("decord")

    def read(path: str, start: int) -> Tensor:
        reader = decord.VideoReader(path, num_threads=torch.get_num_threads())
        return scaled(reader.get_batch(range(start, start + FRAMES)).asnumpy())

    return read


def torchcodec_reader(mode: str) -> Read:
    decoders = importlib.import_module("torchcodec.decoders")

    def read(path: str, start: int) -> Tensor:
        decoder = decoders.VideoDecoder(
            path,
            seek_mode=mode,
            dimension_order="NHWC",
            num_ffmpeg_threads=torch.get_num_threads(),
        )
        return scaled(decoder.get_frames_in_range(start, start + FRAMES).data)

    return read


READERS: dict[str, Callable[[], Read]] = {
    "fastvdm": fastvdm_reader,
    "torchcodec, exact": lambda: torchcodec_reader("exact"),
    "torchcodec, approximate": lambda: torchcodec_reader("approximate"),
    "decord": decord_reader,
    "PyAV from the start": pyav_reader,
    "OpenCV from the start": opencv_reader,
}


class Clips(Dataset):
    """Clips at positions drawn beforehand; each process makes its own reader."""

    def __init__(self, name: str, places: list[tuple[str, int]]) -> None:
        self.name, self.places = name, places
        self.read: Read | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        if self.read is None:
            self.read = READERS[self.name]()
        return self.read(*self.places[index])


def check_parity(name: str, path: str) -> float:
    """The mean difference to a plain decode, in levels of 255."""
    whole = []
    with av.open(path) as container:
        for frame in container.decode(video=0):
            whole.append(frame.to_ndarray(format="rgb24"))
    truth = scaled(whole)
    read, errors = READERS[name](), []
    for start in (0, 1, 77, 249, 251, len(whole) - FRAMES):
        clip = read(path, start)
        for i in range(FRAMES):
            near = range(max(0, start + i - 2), min(len(whole), start + i + 3))
            distance = {j: (clip[:, i] - truth[:, j]).abs().mean().item() for j in near}
            best = min(distance, key=distance.__getitem__)
            assert best == start + i, f"{name}: frame {start + i} is frame {best}"
            errors.append(255 * distance[best])
    assert max(errors) < 3, f"{name} differs by {max(errors):.1f} levels"
    return statistics.mean(errors)


def rate(name: str, places: list[tuple[str, int]], workers: int) -> float:
    """Clips per second in the best of three passes, after an uncounted one."""
    loader = DataLoader(
        Clips(name, places),
        batch_size=4,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in loader:
            pass
        times.append(time.perf_counter() - start)
    return len(places) / min(times[1:])


def cpu(name: str, places: list[tuple[str, int]]) -> float:
    """Milliseconds of CPU time per clip with one thread, the figure that other work on the machine
    affects least; in the second pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clips = Clips(name, places)
    for _ in range(2):
        before = time.process_time()
        for i in range(len(clips)):
            clips[i]
        spent = time.process_time() - before
    torch.set_num_threads(threads)
    return 1e3 * spent / len(places)


def floor(places: list[tuple[str, int]]) -> float:
    """CPU milliseconds per clip to decode what it needs, with open files and no conversion."""
    spent = 0.0
    for path, start in places:
        index = frame_index(path)
        with opened(path, threads=1) as file:
            _by_seeking(file, index, [start], lambda frame: torch.empty(0))
            before = time.process_time()
            _by_seeking(file, index, range(start, start + FRAMES), lambda frame: torch.empty(0))
            spent += time.process_time() - before
    return 1e3 * spent / len(places)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{lines[0].split(':')[1].strip()}, {len(lines)} cores" if lines else cpu
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for module in ("av", "torchcodec", "decord", "cv2"):
        try:
            versions.append(f"{module} {importlib.import_module(module).__version__}")
        except (ImportError, OSError, RuntimeError, AttributeError):
            continue
    return f"{cpu}; {', '.join(versions)}; {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    lines = [f"{SECONDS} s of 1280 x 720 at {RATE} fps, H.264, GOP 250, B-frames; random clips of "
             f"{FRAMES} x {SIZE} x {SIZE}, clips a second.", "", machine(), ""]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.mp4" for i in range(args.files)]
        for seed, path in enumerate(paths):
            make_clip(path, seed)
        rng = np.random.default_rng(0)
        last = RATE * SECONDS - FRAMES
        places = [(str(paths[i % len(paths)]), int(rng.integers(last))) for i in range(args.clips)]
        threads = torch.get_num_threads()
        lines.append(
            f"Floor: {floor(places):.0f} ms of CPU a clip. Without workers readers have {threads} "
            "threads, in a worker one."
        )
        heads = ["levels of 255 from a plain decode", "CPU ms a clip"]
        heads += [f"{n} workers" for n in args.workers]
        lines += ["", f"| reader | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        absent = []
        for name in READERS:
            try:
                READERS[name]()
            except (ImportError, OSError, RuntimeError) as error:
                absent.append(f"{name}: absent ({str(error).splitlines()[0][:100]})")
                continue
            cells = [f"{check_parity(name, str(paths[0])):.2f}", f"{cpu(name, places):.0f}"]
            cells += [f"{rate(name, places, workers):.2f}" for workers in args.workers]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines + ([""] if absent else []) + absent) + "\n"
    print(text)
    if args.write:
        target = Path(__file__).parent / "results" / "video.md"
        target.write_text(f"# Reading clips (bench/video_bench.py)\n\n{text}")


if __name__ == "__main__":
    main()
