# From a fresh clone: `make demo` trains the demo, `make test` passes the tests. Both install all they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU builds of torch and its companions. Asked for these three packages alone, so that nothing else waits for the index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-interpreter test-isa lint bench gpu
demo: $(VENV)/.cpu
	$(BIN)/balcaprl demo --out demo-run

# Two processes of one thread each, a file of tests in one of them: most tests cannot use a second core.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# The Triton kernels on CPU tensors: a process that interprets cannot compile, and slow. Single tests go where there is room.
test-interpreter: $(VENV)/.test
	TRITON_INTERPRET=1 TRITON_DEFAULT_FP_FUSION=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m interpreter -n 2 --dist worksteal tests/kernels

# The kernels' tests as if on older processors, and on this one with all that it has.
test-isa: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/instruction_sets.py $(PARALLEL)

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

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) torch torchvision torchaudio
	touch $@

$(VENV)/.cpu: $(VENV)/.torch setup.py CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PIP) -e '.[cpu]'
	touch $@

$(VENV)/.test: $(VENV)/.cpu
	$(PIP) -e '.[cpu,dev]'
	touch $@
