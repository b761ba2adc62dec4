"""The archive that ``make gpu-pack`` writes and a stage unpacks on the other machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "out" / "gpu-pack"  # the unpacked archive
ARCHIVE = PACK.with_suffix(".tar.xz")
LIMIT = 56 * 2**20  # largest size of the archive in bytes; with the tree 64 MiB are carried
# Folders of the archive, and where they are unpacked.
PLACES = {"triton": PACK / "triton", "peer": ROOT / ".peer", "tools": PACK}
TOOLS = ("nvidia-cuda-nvcc==13.5.37", "nvidia-cuda-sanitizer-api==13.4.92")


def unpack(folder: Path) -> str:
    """Unpack the archive once and set TRITON_CACHE_DIR. Returns a text to print."""
    if not (folder / "triton").exists():
        if not ARCHIVE.exists():
            return "no pack was carried along: every kernel is compiled here"
        with tarfile.open(ARCHIVE) as archive:
            for member in archive:
                top, _, rest = member.name.partition("/")
                if member.isfile() and top in PLACES and rest:
                    member.name = str(PLACES[top].relative_to(ROOT) / rest)
                    archive.extract(member, ROOT, filter="data")
        for path in (folder / "triton").glob("*/__grp__*"):
            path.write_text(json.dumps(_group(path, str(path.parent))))
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    facts = json.loads((folder / "triton.json").read_text())
    return f"pack: {facts['kernels']} kernels of Triton {facts['triton']}; {adopt(folder)}"


def _group(path: Path, folder: str) -> dict[str, dict[str, str]]:
    """A group file of Triton's cache with its absolute paths changed to ``folder``."""
    names = json.loads(path.read_text())["child_paths"]
    return {"child_paths": {name: str(Path(folder) / name) for name in names}}


def adopt(folder: Path) -> str:
    """Use the cache with another build of the same version of Triton. Its wheels for two versions
    of Python differ in the bytes from which the key is made, not in what they compile."""
    import triton
    from triton.runtime import cache

    facts = json.loads((folder / "triton.json").read_text())
    if cache.triton_key() == facts["key"]:
        return "of this very build"
    if triton.__version__ != facts["triton"]:
        return f"not used, this is {triton.__version__}"
    cache.triton_key = lambda: facts["key"]
    return "another build of the same version"


def fetch_tools() -> None:
    """Download a newer ptxas and compute-sanitizer from the package index to ``out/gpu-pack``."""
    if (PACK / "ptxas").exists() and (PACK / "compute-sanitizer").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", scratch]
        subprocess.run([*command, *TOOLS], check=True)
        root = next(Path(scratch).glob("nvidia/*/bin/ptxas")).parents[1]
        (root / "bin" / "ptxas").replace(PACK / "ptxas")
        target = PACK / "compute-sanitizer"
        target.mkdir(exist_ok=True)
        for path in (root / "compute-sanitizer").iterdir():
            if path.is_file():
                path.replace(target / path.name)
    for path in (PACK / "ptxas", PACK / "compute-sanitizer" / "compute-sanitizer"):
        path.chmod(0o755)


def pack() -> int:
    """Write the archive; print the size of each part."""
    fetch_tools()
    parts = {
        "triton": [p for p in PLACES["triton"].rglob("*") if p.is_file()],
        "peer": [p for p in PLACES["peer"].rglob("*") if p.is_file() and p.suffix != ".pyc"],
        "tools": [PACK / "triton.json", PACK / "ptxas", *(PACK / "compute-sanitizer").iterdir()],
    }
    for name, paths in parts.items():
        print(f"{name}: {len(paths)} files, {sum(p.stat().st_size for p in paths) / 2**20:.1f} MiB")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(ARCHIVE, "w:xz") as archive:
        for name, paths in parts.items():
            for path in sorted(paths):
                source = path
                if path.name.startswith("__grp__"):  # it contains absolute paths
                    source = Path(scratch) / "group"
                    source.write_text(json.dumps(_group(path, "")))
                archive.add(source, f"{name}/{path.relative_to(PLACES[name])}", recursive=False)
    size = ARCHIVE.stat().st_size
    print(f"{ARCHIVE.relative_to(ROOT)}: {size / 2**20:.1f} MiB, limit {LIMIT >> 20}")
    print("not in it: xformers, whose wheel is larger than that alone")
    return 0 if size <= LIMIT else 1
