# make demo and make test work on a fresh machine that has Python 3.10 to 3.13, pip and make; a GPU is used where there is one.
#   PYTHON=python3.12   the interpreter that the environment is made from (a torch it already has is reused)
#   VENV=.venv          where the environment lies
#   TORCH=torch==2.13.0 what to install as torch where there is none yet
#   ARGS="-k causal"    handed on to flashtile demo or to pytest
#   WORKERS=0           test processes; 0 runs the tests in one process, for a debugger
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
WORKERS ?= auto
ARGS ?=
OTHERS ?=

export PYTHON VENV TORCH
MAKEFLAGS += --no-print-directory

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=4 --dist=worksteal
GPU_TESTS = $$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "--ignore=tests/gpu")')

.PHONY: help env demo test oldest-triton fuzz sanitize lint format types wheel check clean

help:
	@echo "make demo    show what flashtile does on this machine"
	@echo "make test    run the tests (those in tests/gpu only where there is a GPU)"
	@echo "make fuzz    random calls of the whole library against the reference: FUZZ=3600 for so many seconds"
	@echo "make check   lint, types, wheel and tests, with the oldest Triton too, and some fuzzing: what CI runs"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove the environment and the caches"

env: $(READY)

$(READY): pyproject.toml tools/setup_env.sh
	bash tools/setup_env.sh
	@touch $@

demo: $(READY)
	$(BIN)/flashtile demo $(ARGS)

# The test processes share the cores, so each one's torch gets one thread. Triton kernels are interpreted in a run of
# their own, for Triton decides that once per process.
test: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted $(ARGS)
	$(PYTEST) $(GPU_TESTS) $(OTHERS) $(ARGS)

# The oldest Triton that is supported, beside the newest, which the environment holds, takes all that depends on a
# compiler. It needs half the time for a Hopper kernel: so, of tests whose kernels' loops others have, those under it are
# enough for `check`, which leaves them out of `test` (OTHERS).
OLDEST := $(VENV)/triton-3.6

$(OLDEST): | $(READY)
	$(BIN)/python -m pip install -q --no-deps --target $@ triton==3.6.0

oldest-triton: $(OLDEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) tests/test_compile.py \
		tests/test_lower.py tests/test_builds.py tests/emulated tests/ptx_emulation $(ARGS)

# Random calls, the same ones each time: on the PyTorch backend and interpreted, side by side, for FUZZ seconds each.
FUZZ ?= 150
FUZZER = OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(FUZZ) $(ARGS)

fuzz: $(READY)
	@$(FUZZER) --device interpreter & interpreted=$$!; $(FUZZER) --device cpu; plain=$$?; wait $$interpreted && exit $$plain

# On an NVIDIA GPU: the kernels under compute-sanitizer, which CUDA's toolkit brings.
sanitize: $(READY)
	$(BIN)/python tools/sanitize.py $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(READY)
	$(BIN)/python -m mypy

wheel: $(READY)
	$(BIN)/python tools/check_wheel.py

# One after another even under make -j, and the tests last, so that their closing line ends the output.
check:
	$(MAKE) lint
	$(MAKE) types
	$(MAKE) wheel
	$(MAKE) fuzz
	$(MAKE) oldest-triton
	$(MAKE) test OTHERS="-m 'not one_triton'"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
