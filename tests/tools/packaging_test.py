"""The sdist and the wheel: what is in them, and that they work where nothing else of ours is.

Built as a user does, isolated and in a fresh environment, but without a network: the installed
setuptools is put back into a wheel. Nothing is compiled again: the extension that the installation
of this checkout built goes into the wheel, and elsewhere a script stands in for the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
import torch

from fastvdm.info import _EXTRAS
from fastvdm.runtime import extension

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "*.o")

USE = """
import sys, torch, fastvdm
from fastvdm import UNet3D
from fastvdm.runtime import extension
from fastvdm.ops.guidance import guidance_update
assert fastvdm.__file__.startswith(sys.argv[1]), fastvdm.__file__
z = torch.randn(2, 3, 2, 4, 4)
coef = torch.eye(9)[:2] * 0
coef[:, 1] = coef[:, 4] = 2.0  # x = 2 estimate, z_next = 2 x
x, new = guidance_update(z, z, coef)
assert torch.equal(x, 2 * z) and torch.equal(new, 4 * z)
assert UNet3D(8, dim_mults=(1, 2), attn_heads=2)(z, torch.tensor([1, 2])).isfinite().all()
print(extension.reason_off())
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


NO_COMPILER = {"PATH": "/nowhere", "CXX": "/nowhere/c++"}
BROKEN_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """A folder with what pyproject.toml says a build requires."""
    folder = tmp_path_factory.mktemp("index")
    installed = distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{installed.version}-py3-none-any.whl", "w") as out:
        for file in installed.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                out.write(str(installed.locate_file(file)), str(file))
    return folder


@pytest.fixture(scope="module")
def build_wheel(index):
    """pip's isolated build of a folder or an sdist, for this environment or that of ``python``."""

    def build(source: Path, out: Path, ok: bool = True, python: Path | None = None, **env: str):
        if source.is_dir():  # what one build leaves under build/ would go into the next wheel
            source = shutil.copytree(source, out / "source")
        where = () if python is None else ("--python", python)
        return run(
            "-m", "pip", *where, "wheel", "-v", "--no-deps", "--no-index", "--no-cache-dir",
            "--find-links", index, "-w", out, source, env=env, ok=ok,
        )  # fmt: skip

    return build


@pytest.fixture
def fresh(tmp_path) -> Path:
    """The Python of an environment without any package."""
    venv.create(tmp_path / "fresh", symlinks=True)
    return tmp_path / "fresh" / "bin" / "python"


@pytest.fixture
def compiler(tmp_path) -> Path:
    """A compiler that notes its arguments and writes empty files."""
    script = tmp_path / "c++"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    script.chmod(0o755)
    return script


def planted(source: Path) -> Path:
    """``source`` with this checkout's extension where a build leaves it, newer than its sources:
    build_ext leaves it alone."""
    if extension.reason_off() is not None:
        pytest.skip(f"no compiler here: {extension.reason_off()}")
    built = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/fastvdm"
    (source / built).mkdir(parents=True)
    for library in Path(extension.__file__).parents[1].glob("_C*.so"):
        shutil.copy(library, source / built)
    return source


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


def clone(folder: Path) -> Path:
    """A clean copy, with a tuned configuration."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*SKIPPED), symlinks=True)
    (folder / "kernels" / "configs" / "gpu.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Of a clean copy, on a machine with neither torch nor a compiler."""
    folder = tmp_path_factory.mktemp("sdist")
    clone(folder / "copy")
    code = "import sys; sys.modules['torch'] = None; from setuptools import build_meta as b; "
    code += "b.build_sdist('..'); b.prepare_metadata_for_build_wheel('../meta'); "
    code += "b.prepare_metadata_for_build_editable('../meta')"
    (folder / "meta").mkdir()
    run("-c", code, cwd=folder / "copy", env={"FASTVDM_BUILD_CPP": "1", **NO_COMPILER})
    assert list((folder / "meta").glob("*.dist-info/METADATA"))
    return next(folder.glob("fastvdm-*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, build_wheel, tmp_path_factory) -> Path:
    copy = planted(shutil.copytree(source, tmp_path_factory.mktemp("planted") / "source"))
    out = tmp_path_factory.mktemp("wheel")
    build_wheel(copy, out, FASTVDM_BUILD_CPP="1", **BROKEN_COMPILER)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def without_compiler_wheel(source, build_wheel, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = build_wheel(source, out, **NO_COMPILER)
    log = done.stdout + done.stderr  # pip puts a build's words here or there
    assert "no C++ compiler, so a package without" in log and extension.WITH_KERNELS in log
    return next(out.glob("*-py3-none-any.whl"))


@pytest.fixture(scope="module")
def without_compiler(without_compiler_wheel, tmp_path_factory) -> Path:
    return install(without_compiler_wheel, tmp_path_factory.mktemp("site"))


def holds_kernels_once(files: set[str], at: str = "fastvdm/kernels") -> bool:
    """The kernels and the tuned configurations, there and nowhere else."""
    ours = {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    there = {f for f in files if f.startswith(("kernels", "fastvdm/kernels"))}
    return there == {f"{at}/{name}" for name in (*ours, "configs/gpu.json")}


def test_sdist_holds_what_a_build_reads(source):
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    for folder, pattern in (("csrc", "*.cpp"), ("csrc", "*.h"), ("csrc", "*.py"),
                            ("fastvdm", "*.py")):  # fmt: skip
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob(pattern)}
        assert ours and not ours - files
    assert holds_kernels_once(files)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastvdm/py.typed"} <= files


@pytest.mark.slow
def test_a_clone_without_links_installs(build_wheel, tmp_path):
    """And its sdist, which has the kernels where they are in the repository."""
    folder = clone(tmp_path / "clone")
    (folder / "fastvdm" / "kernels").unlink()
    (folder / "fastvdm" / "kernels").write_text("../kernels")
    run("-c", "from setuptools import build_meta as b; b.build_sdist('..')", cwd=folder)
    (sdist,) = tmp_path.glob("fastvdm-*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {m.name.partition("/")[2] for m in tar if m.isfile()}
    assert holds_kernels_once(names, at="kernels")
    for source, out in (folder, tmp_path / "one"), (sdist, tmp_path / "two"):
        build_wheel(source, out, FASTVDM_BUILD_CPP="0")
        with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
            assert holds_kernels_once(set(archive.namelist()))


def test_one_wheel_for_every_python(wheel, tmp_path):
    assert re.fullmatch(r"fastvdm-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        library = archive.extract("fastvdm/_C.abi3.so", tmp_path)
        meta = next(n for n in names if n.endswith("METADATA"))
        text = archive.read(meta).decode()
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastvdm").rglob("*.py")}
    assert holds_kernels_once(names) and not ours - names
    assert "fastvdm/py.typed" in names and any(n.endswith("LICENSE") for n in names)
    assert not [n for n in names if n.startswith(("kernels", "csrc", "tests", "bench"))]
    assert "Requires-Python: >=3.10" in text and "# fastvdm" in text  # the README is in it
    if shutil.which("nm") and sys.platform == "linux":  # nor anything of CPython
        assert not_in_the_stable_abi(Path(library)) == []


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF with nm")
def test_the_extension_uses_the_stable_abi_only():
    """Any torch since the one it was built for then loads it, under any Python."""
    found = sorted(Path(extension.__file__).parents[1].glob("_C*.so"))
    if not found:
        pytest.skip(f"no extension here: {extension.reason_off()}")
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
    done = run("-c", USE, without_compiler, env=env, cwd=tmp_path)
    assert "the C++ kernels are not built" in done.stdout and extension.WITH_KERNELS in done.stdout
    assert done.stderr.count("UserWarning") == 1 and extension.WITH_KERNELS in done.stderr
    strict = env | {"FASTVDM_STRICT": "1"}
    done = run("-c", USE, without_compiler, env=strict, cwd=tmp_path, ok=False)
    assert "FallbackError" in done.stderr and extension.WITH_KERNELS in done.stderr
    report = run("-m", "fastvdm.info", env=env, cwd=tmp_path).stdout
    assert "C++ extension  off: the C++ kernels are not built" in report
    assert extension.WITH_KERNELS in report
    blocked = "import sys; sys.modules['triton'] = None\n" + USE
    run("-c", blocked, without_compiler, env=env, cwd=tmp_path)


def test_an_isolated_build_compiles_for_the_installed_torch(sdist, build_wheel, compiler, tmp_path):
    """Through ccache where there is one; AMX has its own objects only of what uses its tiles."""
    cache = tmp_path / "bin" / "ccache"
    cache.parent.mkdir()
    cache.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/cached\nexec "$@"\n')
    cache.chmod(0o755)
    path = f"{cache.parent}:{os.environ['PATH']}"
    build_wheel(sdist, tmp_path, CC=str(compiler), CXX=str(compiler), PATH=path)
    assert re.fullmatch(r"fastvdm-[\d.]+-cp310-abi3-\w+\.whl", next(tmp_path.glob("*.whl")).name)
    *compiled, linked = (tmp_path / "log").read_text().splitlines()
    assert (tmp_path / "cached").read_text().split() == [str(compiler)] * len(compiled)
    folder = Path(torch.__file__).parent
    assert f"-L{folder}/lib" in linked and "-ltorch_cpu" in linked
    for file in (ROOT / "csrc").rglob("*.cpp"):
        lines = [line for line in compiled if f" csrc/{file.relative_to(ROOT / 'csrc')} " in line]
        kernel = file.name.endswith("_kernel.cpp")
        assert len(lines) == (len(build_module().isas(file.name)) if kernel else 1)
        assert kernel or f"-I{folder}/include" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("old", [None, "2.9.1+cu128"])
def test_a_build_that_sees_no_torch_says_what_to_type(
    old, source, build_wheel, fresh, compiler, tmp_path
):
    if old is not None:
        (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
        (site / "torch" / "version.py").write_text(f"__version__ = '{old}'\n")
    env = {"CC": str(compiler), "CXX": str(compiler), "PATH": "/nowhere"}
    done = build_wheel(source, tmp_path, ok=False, python=fresh, **env)
    out = done.stdout + done.stderr
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl")) and "Traceback" not in out
    assert (
        f"torch >= 2.11; found {'none.' if old is None else f'only {old} in {site}/torch.'}" in out
    )
    assert extension.WITH_KERNELS in out and "FASTVDM_BUILD_CPP=0 pip install ." in out
    if old is None:
        shutil.rmtree(tmp_path / "source")
        build_wheel(source, tmp_path, python=fresh, FASTVDM_BUILD_CPP="0", **env)
        assert list(tmp_path.glob("*-py3-none-any.whl"))


@pytest.mark.slow
@pytest.mark.parametrize("wanted, compiler", [("", BROKEN_COMPILER), ("1", NO_COMPILER)])
def test_kernels_that_do_not_compile_are_an_error(wanted, compiler, source, build_wheel, tmp_path):
    done = build_wheel(source, tmp_path, ok=False, FASTVDM_BUILD_CPP=wanted, **compiler)
    out = done.stdout + done.stderr
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl")) and "Traceback" not in out
    assert "the C++ kernels did not compile" in out and compiler["CXX"] in out
    assert extension.WITH_KERNELS in out and "FASTVDM_BUILD_CPP=0 pip install ." in out


def build_module():
    spec = importlib.util.spec_from_file_location("build_of_fastvdm", ROOT / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def test_a_python_that_does_not_start_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "python3").write_text("no program")
    (tmp_path / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(build_module()._torches()) == {Path(torch.__file__).parent}


@pytest.mark.slow
def test_what_all_say_to_type_works(source, tmp_path):
    """The build's error, the run-time warning and ``fastvdm info``: one command, typed here."""
    build = build_module()
    assert build.WITH_KERNELS == extension.WITH_KERNELS and build.WITH_KERNELS in build.REMEDY
    assert extension.WITH_KERNELS in (ROOT / "README.md").read_text()
    first, second = (shlex.split(part) for part in extension.WITH_KERNELS.split(" && "))
    offline = ("--no-index", "--no-deps")
    run("-m", *first, "--dry-run", *offline)
    name, value = second.pop(0).split("=")
    copy = planted(shutil.copytree(source, tmp_path / "source"))
    site = tmp_path / "site"
    env = {name: value, **BROKEN_COMPILER}
    run("-m", *second, "--target", site, *offline, env=env, cwd=copy)
    report = run("-m", "fastvdm.info", env={"PYTHONPATH": str(site)}, cwd=tmp_path).stdout
    assert "C++ extension  loaded" in report


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
    assert {"all", "cli", "train"} <= named <= extras.keys()
    required = re.findall(r'\brequire\("(\w+)[\w.]*", "(\w+)"\)', text)
    assert len(required) > 5
    packages = {"PIL": "pillow", "yaml": "pyyaml"}
    for module, extra in [*required, *((p, e) for e, names in _EXTRAS.items() for p in names)]:
        package = packages.get(module, module)
        assert package in brings[extra], f"fastvdm[{extra}] does not bring {package}"
    # A build of xformers is for one release of torch; OpenVINO only races in the benchmarks.
    every = extras.keys() - {"all", "xformers", "openvino"}
    assert set(re.findall(r"\w+", extras["all"][0].split("[")[1])) == every


@pytest.mark.slow
def test_all_extras_resolve(without_compiler_wheel):
    """Against what is installed, as there is no network in a test: no two ask for opposites."""
    for package in sum(_EXTRAS.values(), ("pytest-benchmark",)):
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
