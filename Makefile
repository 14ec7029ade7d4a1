# From a fresh clone: `make demo` trains the demo, `make test` passes the tests. Both install all they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU builds of torch and its companions. Asked for these three packages alone, so that nothing else waits for the index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

# Set where an NVIDIA GPU or its driver is. .venv stays the CPU's, which the demo and the tests are made for; the user is told.
NVIDIA ?= $(firstword $(wildcard /proc/driver/nvidia /dev/nvidia0) $(shell command -v nvidia-smi))
define GPU_NOTE

An NVIDIA GPU is here ($(NVIDIA)), but $(VENV) gets the CPU build of torch: the demo and the tests run on the CPU.
To train on the GPU, make an environment of its own:

    $(PYTHON) -m venv .venv-gpu && .venv-gpu/bin/pip install -e '.[gpu]'

endef
export GPU_NOTE

.PHONY: demo test test-interpreter test-isa test-newest test-slow test-toolchain lint bench gpu
demo: $(VENV)/.cpu
	$(BIN)/balcaprl demo --out demo-run

# Two processes of one thread each, a file of tests in one of them: most tests cannot use a second core.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# The Triton kernels on CPU tensors: a process that interprets cannot compile, and slow. Single tests go where there is room.
test-interpreter: $(VENV)/.test
	TRITON_INTERPRET=1 TRITON_DEFAULT_FP_FUSION=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m interpreter -n 2 --dist worksteal \
	    tests/kernels tests/engine/policy/layers/test_blocks.py tests/engine/training/test_optim_fused.py

# What compilers make of the sources: Triton kernels for sm_80, sm_90 and sm_100, the native library with sanitizers, archives.
test-toolchain: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m toolchain $(PARALLEL)

# What takes half a minute or more: runs that are killed in a sync of any kind, and vLLM's own server as judge.
test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(PARALLEL)

# The kernels' tests as if on older processors, and on this one with all that it has.
test-isa: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/instruction_sets.py $(PARALLEL)

# The newest packages that setup.py allows, without constraints.txt or vLLM, in an environment of their own: what plain
# `pip install .` brings. CPU builds of torch where the index can be reached, else the registry's own.
NEWEST := .venv-newest
TORCHES = $(shell sed -n 's/^ *\("torch\(vision\)\?[<>=][^"]*"\).*/\1/p' setup.py)
CORE := tests/engine/test_torchvision_compat.py tests/engine/test_extras.py tests/engine/rollout/test_hf.py \
	tests/engine/policy tests/engine/training/test_trainer.py

test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --disable-pip-version-check -q --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) $(TORCHES)
	$(NEWEST)/bin/pip install --disable-pip-version-check -q '.[test]'
	$(NEWEST)/bin/balcaprl doctor
	rm -rf build/newest-demo
	$(NEWEST)/bin/balcaprl demo --out build/newest-demo --steps 2 --sampler hf
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest $(PARALLEL) $(CORE)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	# mypy looks for packages where they are imported from: show it the two folders as the one package that they become.
	rm -rf build/typing && mkdir -p build/typing
	cp -rs $(CURDIR)/engine build/typing/balcaprl && cp -rs $(CURDIR)/kernels/ops build/typing/balcaprl/kernels
	MYPYPATH=build/typing $(BIN)/mypy -p balcaprl

bench: $(VENV)/.test
	$(BIN)/pytest bench/ --benchmark-only

# On a machine with a GPU, in an environment that has torch with CUDA and `pip install -e '.[gpu,test]'`.
gpu:
	python -m pytest tests/kernels/test_cuda.py
	BALCAPRL_TEST_GPU=1 python -m pytest -m interpreter tests/kernels
	python bench/run.py --device cuda
	python bench/update_step.py --device cuda --dtype bfloat16
	python bench/gpu_check.py --output bench/results/gpu_check/$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' _).jsonl

$(VENV)/.torch: constraints.txt
	$(if $(NVIDIA),@echo "$$GPU_NOTE")
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) torch torchvision torchaudio
	touch $@

$(VENV)/.cpu: $(VENV)/.torch setup.py CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PIP) -e '.[cpu]'
	touch $@

$(VENV)/.test: $(VENV)/.cpu
	$(PIP) -e '.[cpu,dev]'
	touch $@
