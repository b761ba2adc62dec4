"""torch.export and AOTInductor: the package gives the model's numbers, in Python and in C++."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from fastvdm import UNet3D
from fastvdm.export import example_inputs, export_program, export_unet, library_path
from fastvdm.runtime import extension
from fastvdm.testing import max_error

needs_extension = pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"C++ extension: {extension.reason_off()}"
)


def network() -> UNet3D:
    torch.manual_seed(0)
    return UNet3D(8, dim_mults=(1, 2), attn_heads=2, cond_dim=3).eval()


def operators(program) -> set[str]:
    targets = (n.target for n in program.graph.nodes)
    return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}


@needs_extension
def test_program_calls_cpp_operators_only():
    """Nothing implemented in Python is left, so that a C++ process can run the package."""
    model = network()
    inputs = example_inputs(model, 2, 3, 8, 4)
    program = export_program(model, inputs, backend="cpu", cond_scale=2.0)
    assert operators(program) == {"aten", "fastvdm_C"}
    with torch.no_grad():
        want = model.forward_with_cond_scale(*inputs, cond_scale=2.0)
        assert max_error(program.module()(*inputs), want) < 1e-5


def test_reference_program_is_plain_aten():
    model = network()
    inputs = example_inputs(model, 2, 3, 8, 4)
    program = export_program(model, inputs, backend="reference")
    assert operators(program) <= {"aten", "prims"}
    with torch.no_grad():
        assert max_error(program.module()(*inputs), model(*inputs)) < 1e-5


# Bytes in and out: the headers that read torch's own files take most of its compilation.
MAIN = """
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <fstream>
#include <iostream>
int main(int argc, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) { std::cerr << dlerror(); return 2; }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  std::vector<std::vector<char>> bytes;
  std::vector<at::Tensor> inputs;
  const std::vector<std::vector<int64_t>> shapes{SIZES};
  for (const auto& sizes : shapes) {
    std::ifstream file(argv[3 + bytes.size()], std::ios::binary);
    bytes.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    inputs.push_back(at::from_blob(bytes.back().data(), sizes, at::kFloat));
  }
  c10::InferenceMode guard;
  auto out = model.run(inputs)[0].contiguous();
  std::ofstream(argv[6], std::ios::binary).write((const char*)out.data_ptr(), out.nbytes());
}
"""


@needs_extension
@pytest.mark.slow
def test_package_in_python_and_cpp(tmp_path):
    model = network()
    inputs = example_inputs(model, 1, 2, 4, 4)
    # Each header is read once, which a compilation of its own does not shorten.
    with torch._inductor.config.patch({"aot_inductor.precompile_headers": False}):
        path = export_unet(model, tmp_path / "unet.pt2", inputs, backend="cpu")
    with torch.no_grad():
        want = model(*inputs)
    load = "import sys, torch, fastvdm; f = torch._inductor.aoti_load_package(sys.argv[1]); "
    code = load + "i = torch.load(sys.argv[2]); torch.save(f(*i), sys.argv[3])"
    torch.save(inputs, tmp_path / "in.pt")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "in.pt", tmp_path / "py.pt"],
                   check=True, env=env)  # fmt: skip
    assert max_error(torch.load(tmp_path / "py.pt"), want) < 1e-5

    sizes = ", ".join("{" + ", ".join(map(str, t.shape)) + "}" for t in inputs)
    (tmp_path / "main.cpp").write_text(MAIN.replace("SIZES", sizes))
    root = Path(torch.__file__).parent
    lib = root / "lib"
    subprocess.run(
        ["g++", "-std=c++20", "-O0", tmp_path / "main.cpp", "-o", tmp_path / "main",
         f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{lib}",
         f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
         "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{lib}"],
        check=True,
    )  # fmt: skip
    names = []
    for i, t in enumerate(inputs):
        names.append(tmp_path / f"{i}.bin")
        names[-1].write_bytes(t.numpy().tobytes())
    subprocess.run(
        [tmp_path / "main", library_path(), path, *names, tmp_path / "cpp.bin"],
        check=True, env=env,
    )  # fmt: skip
    out = torch.frombuffer(bytearray((tmp_path / "cpp.bin").read_bytes()), dtype=torch.float32)
    assert max_error(out.view_as(want), want) < 1e-5


def test_bad_requests(tmp_path):
    model = network()
    inputs = example_inputs(model, 1, 2, 4, 4)
    with pytest.raises(ValueError, match="must end in .pt2, got unet.so"):
        export_unet(model, tmp_path / "unet.so", inputs)
    with pytest.raises(ValueError, match="backend must be one of"):
        export_program(model, inputs, backend="metal")
    with pytest.raises(ValueError, match="conditional"):
        export_program(UNet3D(8, dim_mults=(1,)), inputs[:2], cond_scale=2.0)
