"""The sdist and the wheel: what is in them, and that they work where nothing else of ours is.

No network: what a build needs is already installed. Nothing is compiled again: the extension that
the installation of this checkout built goes into the wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from fastvdm import _ext
from fastvdm.info import _EXTRAS

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "*.o")

USE = """
import sys, torch, fastvdm
from fastvdm import UNet3D, _ext
from fastvdm.ops.guidance import guidance_update
assert fastvdm.__file__.startswith(sys.argv[1]), fastvdm.__file__
z = torch.randn(2, 3, 2, 4, 4)
coef = torch.eye(9)[:2] * 0
coef[:, 1] = coef[:, 4] = 2.0  # x = 2 estimate, z_next = 2 x
x, new = guidance_update(z, z, coef)
assert torch.equal(x, 2 * z) and torch.equal(new, 4 * z)
assert UNet3D(8, dim_mults=(1, 2), attn_heads=2)(z, torch.tensor([1, 2])).isfinite().all()
print(_ext.reason_off())
"""


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None, ok=True):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTVDM", "TRITON"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=clean | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(source: Path, out: Path, ok: bool = True, **env: str):
    """Built in a copy: what one build leaves under ``build/`` would go into the next wheel."""
    copy = shutil.copytree(source, out / "source")
    return run(
        "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, copy,
        env=env, ok=ok,
    )  # fmt: skip


def not_in_the_stable_abi(library: Path) -> list[str]:
    """What ``library`` wants from elsewhere, less libtorch's C functions and, by the version that
    ELF notes behind them, the system's. A C++ name of ``at::``, ``c10::`` or ``torch::`` is one."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names) or "Py" in done.stdout
    fine = re.compile(r"(aoti_torch|torch)_\w+$|_ITM_\w+$|__gmon_start__$|__[au][bs]an_|\w+@")
    return [name for name in names if not fine.match(name)]


def install(wheel: Path, target: Path) -> Path:
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The sdist of a clean copy, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*SKIPPED))
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    run("-c", code, cwd=folder / "copy")
    (archive,) = folder.glob("fastvdm-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    if _ext.reason_off() is not None:
        pytest.skip(f"no compiler here: {_ext.reason_off()}")
    out = tmp_path_factory.mktemp("wheel")
    built = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/fastvdm"
    (source / built).mkdir(parents=True)
    for library in Path(_ext.__file__).parent.glob("_C*.so"):
        shutil.copy(library, source / built)  # newer than its sources: build_ext leaves it alone
    build_wheel(source, out, FASTVDM_BUILD_CPP="1", CC="/bin/false", CXX="/bin/false")
    shutil.rmtree(source / "build")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def without_compiler_wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build_wheel(source, out, CC="/bin/false", CXX="/bin/false")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def without_compiler(without_compiler_wheel, tmp_path_factory) -> Path:
    return install(without_compiler_wheel, tmp_path_factory.mktemp("site"))


def test_sdist_holds_what_a_build_reads(source):
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    for folder, pattern in (("csrc", "*.cpp"), ("csrc", "*.h"), ("csrc", "*.py"),
                            ("kernels", "*.py"), ("fastvdm", "*.py")):  # fmt: skip
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob(pattern)}
        assert ours and not ours - files
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastvdm/py.typed"} <= files


@pytest.mark.slow
def test_one_wheel_for_every_python(wheel, tmp_path):
    assert re.fullmatch(r"fastvdm-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        library = archive.extract("fastvdm/_C.abi3.so", tmp_path)
        meta = next(n for n in names if n.endswith("METADATA"))
        text = archive.read(meta).decode()
    for folder, at in (("kernels", "fastvdm/kernels"), ("fastvdm", "fastvdm")):
        ours = {f"{at}/{p.relative_to(ROOT / folder).as_posix()}"
                for p in (ROOT / folder).rglob("*.py")}  # fmt: skip
        assert ours and not ours - names
    assert "fastvdm/py.typed" in names and any(n.endswith("LICENSE") for n in names)
    assert not [n for n in names if n.startswith(("kernels", "csrc", "tests", "bench"))]
    assert "Requires-Python: >=3.10" in text and "# fastvdm" in text  # the README is in it
    if shutil.which("nm") and sys.platform == "linux":  # nor anything of CPython
        assert not_in_the_stable_abi(Path(library)) == []


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF with nm")
def test_the_extension_uses_the_stable_abi_only():
    """Any torch since the one it was built for then loads it, under any Python."""
    found = sorted(Path(_ext.__file__).parent.glob("_C*.so"))
    if not found:
        pytest.skip(f"no extension here: {_ext.reason_off()}")
    assert not_in_the_stable_abi(found[0]) == []
    unstable = not_in_the_stable_abi(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert any(name.startswith("_ZN3c10") for name in unstable)
    assert any(name.startswith("Py") for name in unstable)


@pytest.mark.slow
def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    site = install(wheel, tmp_path / "site")
    env = {"PYTHONPATH": str(site), "FASTVDM_STRICT": "1"}
    assert run("-c", USE, site, env=env, cwd=tmp_path).stdout.split() == ["None"]
    report = run("-m", "fastvdm.info", env=env, cwd=tmp_path).stdout
    assert "C++ extension  loaded" in report
    blocked = "import sys; sys.modules['triton'] = None\n" + USE
    assert run("-c", blocked, site, env=env, cwd=tmp_path).stdout.split() == ["None"]


def test_without_a_compiler_the_package_works_and_says_so(without_compiler, tmp_path):
    env = {"PYTHONPATH": str(without_compiler)}
    assert not list(without_compiler.rglob("*.so"))
    out = run("-c", USE, without_compiler, env=env, cwd=tmp_path).stdout
    assert "not built (pip install with a C++ compiler" in out
    report = run("-m", "fastvdm.info", env=env, cwd=tmp_path).stdout
    assert "C++ extension  off: not built" in report
    blocked = "import sys; sys.modules['triton'] = None\n" + USE
    run("-c", blocked, without_compiler, env=env, cwd=tmp_path)


def test_asked_for_and_failing_is_an_error(source, tmp_path):
    env = {"FASTVDM_BUILD_CPP": "1", "CC": "/bin/false", "CXX": "/bin/false"}
    done = build_wheel(source, tmp_path, ok=False, **env)
    assert done.returncode != 0 and "/bin/false" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_extras_are_those_that_the_messages_name():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brings = {name: {re.split(r"[^\w-]", p)[0] for p in parts} for name, parts in extras.items()}
    text = "\n".join(p.read_text() for p in (ROOT / "fastvdm").rglob("*.py"))
    text += "\n".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    text += (ROOT / "README.md").read_text()
    named = {e for group in re.findall(r"fastvdm\[([\w,]+)\]", text) for e in group.split(",")}
    named |= {e for group in re.findall(r'"\.\[([\w,]+)\]"', text) for e in group.split(",")}
    assert {"all", "cli", "train", "text", "metrics"} <= named <= extras.keys()
    required = re.findall(r'\brequire\("(\w+)[\w.]*", "(\w+)"\)', text)
    assert len(required) > 5
    for module, extra in [*required, *((p, e) for e, names in _EXTRAS.items() for p in names)]:
        assert module in brings[extra], f"fastvdm[{extra}] does not bring {module}"
    assert set(re.findall(r"\w+", extras["all"][0].split("[")[1])) == extras.keys() - {"all"}


def test_all_extras_resolve(without_compiler_wheel):
    """Against what is installed, as there is no network in a test: no two ask for opposites."""
    for package in sum(_EXTRAS.values(), ("matplotlib", "pytest-benchmark")):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"needs {package}")
    done = run("-m", "pip", "install", "--dry-run", "--no-index", f"{without_compiler_wheel}[all]")
    installs = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert re.fullmatch(r"Would install fastvdm-[\d.]+", installs[0]), done.stdout


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu"
)
def test_portable_path_is_good_for_aarch64():
    """Every source as setup.py would hand it to that platform's compiler, without the assembler."""
    include = Path(torch.__file__).parent / "include"
    sources = sorted((ROOT / "csrc").glob("**/*.cpp"))
    command = ["aarch64-linux-gnu-g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror"]
    command += [f"-I{include}", "-DTORCH_TARGET_VERSION=0x020B000000000000", "-DFASTVDM_X86=0"]
    for source in sources:
        isa = ["-DFASTVDM_ISA=portable"] if source.name.endswith("_kernel.cpp") else []
        done = subprocess.run([*command, *isa, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
