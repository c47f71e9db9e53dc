# `make demo` and `make test` need python3 (3.10 or later), a C++20 compiler and a network the first time; later runs start in seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/gpu
MINUTES ?= 8.5
WORKERS ?= 2
SHARE = $(shell share=$$(( $$(nproc) / $(WORKERS) )); echo $$(( share > 1 ? share : 1 )))
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := -c requirements/constraints.txt
EXTENSION := setup.py pyproject.toml fastconv/schemas.inc $(wildcard csrc/* kernels/cpu/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test exact sanitize mutants fuzz install-matrix gpu peers bench-ops bench-training bench-compiled bench-pointwise lint format wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | awk -F '\t' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: $(VENV)/.built  ## six networks on real photographs: logits and times beside eager torch (ARGS="--nets mobilenet_v2")
	$(BIN)/fastconv demo $(ARGS)

# The processes share the cores: with two threads each on two cores the run takes a sixth longer. Tests of teams name their thread counts.
test: $(VENV)/.built  ## every test but the slow ones, in WORKERS=2 processes (ARGS="-k pointwise", ARGS="-m slow")
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$(SHARE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

exact:  ## 1.4 million cases of the kernels on integers, with no tolerance, between unmapped pages (ARGS="--list", "--op depthwise")
	$(PYTHON) tests/core/programs.py exact $(ARGS)

sanitize:  ## the kernels' edge cases under the address, undefined, thread and memory sanitizers (ARGS="address")
	$(PYTHON) tests/core/programs.py sanitize $(ARGS)

mutants: $(VENV)/.built  ## breaks the sources in a hundred ways and lists which test notices (ARGS="-k depthwise", "--list")
	$(BIN)/python tests/mutants.py $(ARGS)

fuzz: $(VENV)/.fuzz  ## coverage-guided fuzzing of operators, argument checks and checkpoints (ARGS="--seconds 600 operators"); operators need clang
	$(BIN)/python tests/fuzz/fuzz.py $(ARGS)

install-matrix: $(VENV)/.audit  ## a wheel for each Python found here, tried with torch 2.10, 2.11 and 2.13 where CPU builds are to be had
	$(BIN)/python tests/install_matrix.py $(ARGS)

bench-ops: $(VENV)/.built  ## every op beside plain torch on the networks' layers (ARGS="-k mobilenet_v2 --benchmark-save=NAME")
	$(BIN)/python -m pytest benchmarks $(ARGS)

peers: $(VENV)/.peers  ## six networks in all nine engines, batch 1 and 16: tables, JSON, charts, a page (ARGS="--nets mobilenet_v2")
	$(BIN)/fastconv bench --engines all --batch 1,16 --cold --layers --scaling --claims --out out/peers $(ARGS)

bench-training: $(VENV)/.built  ## a training step beside eager torch and torch.compile, in turns (ARGS="--nets mobilenet_v2")
	$(BIN)/python benchmarks/training.py $(ARGS)

bench-compiled: $(VENV)/.built  ## calls with and without torch.compile, in turns (ARGS="--nets mobilenet_v2 --training")
	$(BIN)/python benchmarks/compiled.py $(ARGS)

bench-pointwise: $(VENV)/.built  ## percent of the core's FMA peak per 1x1 shape and ISA
	$(BIN)/python benchmarks/peak_pointwise.py $(ARGS)

lint: $(VENV)/.dev  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp kernels/cpu/*.h kernels/cpu/*.cpp tests/core/exact.cpp tests/core/failing_memory.cpp tests/fuzz/*.cpp)

format: $(VENV)/.dev  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp kernels/cpu/*.h kernels/cpu/*.cpp tests/core/exact.cpp tests/core/failing_memory.cpp tests/fuzz/*.cpp)

wheel: $(VENV)/.installed  ## a wheel for this machine's Python, in dist/
	rm -rf build/lib.* build/bdist.*
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist out *.egg-info fastconv/_C*.so demo.png .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, a stamp per step.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "fastconv: no $(PYTHON): install Python 3.10 or later, or name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) requirements/check.py
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch by itself first, so that nothing else can choose another build of it.
$(VENV)/.installed: $(VENV)/.created requirements/constraints.txt requirements/test.txt requirements/no-deps.txt
	$(PIP) install $(PINS) torch
	$(PIP) install $(PINS) -r requirements/test.txt
	$(PIP) install $(PINS) --no-deps -r requirements/no-deps.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(EXTENSION)
	@$(BIN)/python requirements/check.py
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# What the peers' own requirements would replace (torch) or hold back (protobuf) is installed without asking them.
$(VENV)/.peers: $(VENV)/.built requirements/peers.txt requirements/peers-no-deps.txt
	$(PIP) install $(PINS) -r requirements/peers.txt
	$(PIP) install $(PINS) --no-deps -r requirements/peers-no-deps.txt
	@touch $@

$(VENV)/.fuzz: $(VENV)/.built requirements/fuzz.txt
	$(PIP) install $(PINS) -r requirements/fuzz.txt
	@touch $@

$(VENV)/.audit: $(VENV)/.installed requirements/audit.txt
	$(PIP) install $(PINS) -r requirements/audit.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.created requirements/constraints.txt requirements/dev.txt
	$(PIP) install $(PINS) -r requirements/dev.txt
	@touch $@

# GPU: in .venv as everything else, or in the Python named on the command line (make gpu PYTHON=python3), which then must have torch,
# triton and pytest; nothing is installed into it: the package is staged in build/gpu, and without a compiler only Triton runs.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON = PYTHONPATH="$(CURDIR):$(CURDIR)/build/gpu" $(PYTHON)
GPU_READY = build/gpu/.staged
else
GPU_PYTHON = $(BIN)/python
GPU_READY = $(VENV)/.built
endif

gpu: $(GPU_READY)  ## GPU tests and benchmarks into OUT=out/gpu within MINUTES=8.5 (PYTHON=python3: in that Python, offline)
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(GPU_PYTHON) benchmarks/gpu_all.py --out "$(OUT)" --minutes $(MINUTES); \
	else \
	    echo "fastconv: torch sees no GPU on this machine (torch.cuda.is_available() is False); no GPU test or benchmark was run"; \
	fi

build/gpu/.staged: $(EXTENSION)
	@$(PYTHON) -c 'import torch, triton, pytest' || { echo "fastconv: $(PYTHON) needs torch, triton and pytest for make gpu" >&2; exit 1; }
	@mkdir -p build/gpu/fastconv
	@ln -sfn ../../../kernels build/gpu/fastconv/kernels
	@ln -sfn ../../../benchmarks build/gpu/fastconv/benchmarks
	@$(PYTHON) setup.py -q build_ext --build-lib build/gpu --build-temp build/gpu/temp \
	    || echo "fastconv: the CPU extension was not built; GPU tests and benchmarks run without it"
	@touch $@
