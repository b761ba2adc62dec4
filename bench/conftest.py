"""pytest bench/: who is faster, by how much, how close to the limit, at what numerical error.

How to write ``bench/<stem>_bench.py``::

    import pytest
    import torch
    from calls import bench_cases, shape
    from harness import Contest, Provider, compiled, grads_of, need_kernel

    PROVIDERS = ("torch", "compiled", "fastvdm")

    def contest(case: str, device: str) -> Contest:
        s = shape(case)                                     # bench/calls.py
        x = torch.randn(s.x_shape, device=device)
        info: dict = {}

        def fused():
            need_kernel("my_op", device)                    # without a kernel: skip, with why
            return lambda: my_op(x)

        return Contest(
            reference=lambda: my_op_ref(x.double()),        # held to before any timing
            providers={                                     # the first one is the baseline
                "torch": Provider(lambda: lambda: my_op_ref(x), tolerance=1e-5),
                "compiled": Provider(lambda: with_x(compiled(my_op_ref, info)), 1e-5, info=info),
                "fastvdm": Provider(fused, tolerance=1e-5),  # dtype=torch.bfloat16, tolerance=2e-2
            },
            cost=lambda dtype: my_op_cost(s, dtype),        # Cost(flops, bytes), from the op file
            device=device,
        )

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("case", bench_cases("l0", "l1", full=("l2", "l3")))
    def test_forward(race, case, provider):
        race(contest, case, provider)

``race`` builds the contest of a case once, compares every provider with the reference, times them
interleaved, and gives each test its own rounds. For a backward, write a second function whose runs
come from ``grads_of(fn, inputs, dy)``. PROVIDERS must have the provider names of the contest.

Options: ``--full`` (all cases, more rounds; ``-k`` selects among them), ``--budget`` (seconds of
timing per case), ``--device``. A benchmark refuses to run if its op's tests are known to fail.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CLOCK, Contest, Result, limits, run_contest, summary

ROOT = Path(__file__).resolve().parents[1]
# The figures of each case, without tensors.
_RESULTS: dict[tuple, tuple[dict[str, Result], dict[str, dict]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvdm bench")
    group.addoption("--full", action="store_true", help="all cases and more rounds")
    group.addoption("--budget", type=float, help="seconds of timing per case (3; with --full 40)")
    group.addoption(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the benchmarks (default: a GPU where there is one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.backends.cudnn.benchmark = True  # give the baselines the best algorithm per shape


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="only with --full")
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(skip)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


def _refuse_if_red(request: pytest.FixtureRequest, stem: str) -> None:
    cache = getattr(request.config, "cache", None)
    failed = cache.get("cache/lastfailed", {}) if cache is not None else {}
    ops = getattr(request.module, "TESTED", (stem,))
    files = [f"tests/ops/{op}_test.py" for op in ops]
    rows = [f"tests/ops/suite_test.py::test_suite[{op}/" for op in ops]
    red = [test for test in failed if test.startswith((*files, *rows))]
    if red:
        pytest.fail(f"not timed: {red[0]} is red (run pytest {red[0]!r})", pytrace=False)


def _selected(item: pytest.Item, key: tuple) -> list[str]:
    """The providers of a contest that this run will ask for and not skip."""
    return [
        i.callspec.params["provider"]
        for i in item.session.items
        if _key(i) == key and i.get_closest_marker("skip") is None
    ]


def _key(item: Any) -> tuple | None:
    if not hasattr(item, "callspec") or "provider" not in item.callspec.params:
        return None
    rest = {k: v for k, v in item.callspec.params.items() if k != "provider"}
    return (item.path, item.originalname, *sorted((k, str(v)) for k, v in rest.items()))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any, device: str) -> Callable[..., None]:
    """``race(make, case, provider, **kwargs)``: ``make(case, device, **kwargs)`` is the Contest."""

    def run(make: Callable[..., Contest], case: str, provider: str, **kwargs: Any) -> None:
        stem = request.node.path.name.removesuffix("_bench.py")
        _refuse_if_red(request, stem)
        key = _key(request.node)
        assert key is not None, "parametrize over `provider`"
        if key not in _RESULTS:
            full = request.config.getoption("--full")
            budget = request.config.getoption("--budget")
            torch.manual_seed(0)
            contest = make(case, device, **kwargs)
            results = run_contest(
                contest,
                names=_selected(request.node, key),
                budget=budget if budget is not None else 40.0 if full else 3.0,
                min_rounds=10 if full else 3,
                max_rounds=100 if full else 30,
            )
            rows = {n: summary(contest, results, n) for n, r in results.items() if r.times}
            _RESULTS[key] = results, rows
        results, rows = _RESULTS[key]
        result = results[provider]
        if result.skipped is not None:
            pytest.skip(result.skipped)
        if result.failed is not None:
            pytest.fail(f"not timed: {provider}: {result.failed}", pytrace=False)
        operation = request.node.originalname.removeprefix("test_")
        rest = [v for k, v in request.node.callspec.params.items() if k not in ("case", "provider")]
        benchmark.group = "-".join([stem, operation, case, *map(str, rest)])
        benchmark.extra_info.update(rows[provider] | {"case": case, "operation": operation})
        CLOCK.load(result.times)
        benchmark.pedantic(CLOCK.advance, rounds=len(result.times), iterations=1)

    return run


def _command(*argv: str) -> str | None:
    try:
        out = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def machine_info(device: str) -> dict[str, Any]:
    """The machine on which the figures were measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    try:
        openvino_version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        openvino_version = None
    info: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version,
        "openvino": openvino_version,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
        "dirty": bool(_command("git", "status", "--porcelain", "--untracked-files=no")),
    }
    if device.startswith("cuda"):
        info["gpu"] = torch.cuda.get_device_name()
        info["cuda"] = torch.version.cuda
        info["cudnn"] = torch.backends.cudnn.version()
        info["clocks"] = _command(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"
        )
    for dtype in (torch.float32, torch.bfloat16):
        flops, bandwidth = limits(device, dtype)
        info[f"limit_tflops_{str(dtype).removeprefix('torch.')}"] = round(flops / 1e12, 3)
        info["limit_gbs"] = round(bandwidth / 1e9, 1)
    return info


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastvdm"] = globals()["machine_info"](config.getoption("--device"))
