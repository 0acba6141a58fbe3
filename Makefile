# `make test` and `make demo` each do all their own set-up: virtual environment, pinned CPU packages, model, text.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
ASSETS ?= .cache/assets
TORCHVISION = $(dir $(ASSETS))torchvision
# A plain `torch` from PyPI brings CUDA libraries along; this index has the CPU build. It need not be reachable
# where pip finds a CPU build elsewhere.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check
PY = $(VENV)/bin/python
EXTENSION = vllm_spense/_C.abi3.so
KERNELS = $(shell find kernels -type f)

# GPU machines bring their own Python with a CUDA build of torch; elsewhere (gpu-plan) the virtual environment does.
HAS_CUDA = python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null
GPU_PY ?= $(shell $(HAS_CUDA) && echo python3 || echo $(PY))
GPU_BUDGET ?= 210
GPU_STAGE_BUDGET ?= 520
GPU_OUT ?= benchmarks/results/gpu
GPU_STAGES = $(addprefix gpu-,build first speed test counters tune stack serving tests kernels four_bit sparse_mlp pruning cutlass)

.PHONY: help setup kernels kernels-check sdist wheel wheels test test-fast fuzz soak start-up lint format demo accuracy frontier second-model cpu report clean gpu gpu-plan gpu-bundle \
	gpu-rehearsal gpu-report $(GPU_STAGES)

help:
	@echo "make setup      virtual environment, packages, trained model and text"
	@echo "make kernels    the CUDA extension with all CUTLASS instances (needs nvcc; 10 minutes)"
	@echo "make sdist | wheel  source package with kernels/, and the wheel built from it (CUDA kernels where nvcc is), into dist/"
	@echo "make wheels     one wheel per CUDA toolkit (CUDA_HOMES='/usr/local/cuda-12.8 /usr/local/cuda-13.0'), into dist/"
	@echo "make test       all tests, with real vLLM on CPU"
	@echo "make test-fast  the tests that start no vLLM engine"
	@echo "make fuzz       6000 damaged checkpoints, 3000 damaged source models (minutes; FUZZ='--seed 7 --cases 20000')"
	@echo "make soak       the server under 32 clients for ten minutes: errors, memory, answers"
	@echo "make start-up   seconds until vLLM is ready, Spense against dense FP8, and what the checks take"
	@echo "make lint       ruff, clang-format, mypy and which package may import which"
	@echo "make demo       fetch, prune, measure, serve and ask a small trained model"
	@echo "make accuracy   what FP8 and INT8 rounding cost: table and plot of docs/accuracy_smollm2.md"
	@echo "make frontier   quality against size and predicted speed, every pruning method, three seeds (hours)"
	@echo "make second-model  fetch Gemma 3 270M (Gemma terms; never part of setup or test) and measure pruning on it (hours)"
	@echo "make cpu        on this CPU: the kernels against GEMMs, and real vLLM's tokens per second (8 GB, one to two hours)"
	@echo "make report     every table and plot again, from the committed results"
	@echo "make gpu        on an H100 or H200: is the kernel right, and how fast? 210 s; run it again to go on (docs/gpu.md)"
	@echo "make gpu-plan   what make gpu would do and what it lacks; needs no GPU"
	@echo "make gpu-bundle what a GPU machine without network needs, into .gpu/ (needs nvcc; two minutes)"
	@echo "make gpu-rehearsal  make gpu without a GPU: time limits and faults, with the emulated kernel (ten minutes)"
	@echo "make gpu-first | -speed | -test | -counters | -tune | -stack | -serving   one stage, under 9 minutes; also"
	@echo "    gpu-build, gpu-tests (all), gpu-kernels (all rows), gpu-four_bit, gpu-sparse_mlp, gpu-pruning, gpu-cutlass; gpu-report makes the tables"

setup: $(VENV)/.ready $(ASSETS)/.ready $(TORCHVISION)/.ready

$(VENV)/.ready: requirements/cpu.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch==2.13.0
	$(PIP) --no-deps -r requirements/cpu.txt
	SPENSE_CUDA_ARCHS= $(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(ASSETS)/.ready: $(VENV)/.ready vllm_spense/demo_assets.py
	$(PY) -c "from vllm_spense import demo_assets as a; a.fetch_model('$(ASSETS)', print); a.fetch_text('$(ASSETS)', print)"
	touch $@

# Beside the virtual environment: where only the build for GPUs is found, transformers cannot import it by itself.
$(TORCHVISION)/.ready: $(VENV)/.ready
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) --target $(TORCHVISION) --upgrade torchvision==0.28.0
	touch $@

# Half a minute: CPU kernels and our own CUDA kernel, no CUTLASS instances. Without nvcc this prints why that is not built.
$(EXTENSION): $(VENV)/.ready $(KERNELS) setup.py
	SPENSE_CPU=1 SPENSE_CUTLASS=0 $(PY) setup.py -q build_ext --inplace

kernels: $(VENV)/.ready
	$(PY) setup.py -q build_ext --inplace

kernels-check: $(VENV)/.ready
	SPENSE_CPU=1 SPENSE_CUTLASS=check $(PY) setup.py -q build_ext --inplace

SDIST = dist/vllm_spense-$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml).tar.gz
sdist: $(VENV)/.ready
	$(PY) setup.py -q sdist --dist-dir dist

# From the sdist, so that nothing of the checkout gets into it. pip would take an earlier wheel of this path from its cache.
wheel: sdist
	$(PY) -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir dist $(SDIST)

# One wheel per CUDA toolkit. Its runtime is linked in, so a wheel runs under drivers of its toolkit's major version.
CUDA_HOMES ?= /usr/local/cuda-12.8 /usr/local/cuda-13.0
wheels: $(VENV)/.ready
	@for home in $(CUDA_HOMES); do \
		release=$$($$home/bin/nvcc --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/cu\1\2/p'); \
		test -n "$$release" || { echo "no nvcc in $$home: CUDA_HOMES=\"TOOLKIT …\" names the toolkits" >&2; exit 2; }; \
		NVCC= CUDA_HOME=$$home $(PY) setup.py -q egg_info --tag-build=+$$release bdist_wheel --dist-dir dist || exit 1; \
	done; ls -l dist

# Two processes, a file at a time: most tests use one core, and two engines fit the memory of any machine.
TEST_PROCESSES ?= 2
test: setup $(EXTENSION)
	SPENSE_ASSETS=$(ASSETS) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-fast: setup $(EXTENSION)
	SPENSE_ASSETS=$(ASSETS) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not vllm and not model"

fuzz: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz $(FUZZ)

soak: setup build/soak/spense
	$(PY) -m tools.soak --model build/soak/spense

start-up: setup build/soak/spense
	$(PY) -m benchmarks.serving.start_up build/soak/spense --name SmolLM2-135M

build/soak/spense:
	$(VENV)/bin/spense prune $(ASSETS)/SmolLM2-135M-Instruct -o $@ --calibration $(ASSETS)/wikipedia/train.txt \
		--preset spensegpt+ --num-samples 16 --seq-len 256 --no-check

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(KERNELS)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(KERNELS)

demo: setup
	SPENSE_ASSETS=$(ASSETS) $(VENV)/bin/spense demo --work build/demo

accuracy: setup
	SPENSE_ASSETS=$(ASSETS) $(PY) -m benchmarks.accuracy.smollm2

frontier: setup
	$(PY) -m benchmarks.accuracy.frontier --assets $(ASSETS)
	$(PY) -m benchmarks.accuracy.frontier --assets $(ASSETS) --ablations --seeds 0

# Fetches the model itself, for whoever asks for it accepts its licence.
second-model: setup
	$(PY) -m benchmarks.accuracy.frontier --model gemma-3-270m --assets $(ASSETS)

cpu: setup $(EXTENSION)
	$(PY) -m benchmarks.kernels.cpu_linear
	$(PY) -m benchmarks.serving.cpu

# Every table and plot of README and docs/ that stands on committed results or on calculation.
report: $(VENV)/.ready
	$(PY) -m benchmarks.accuracy.frontier --plot-only
	$(PY) -m benchmarks.pruning.pruning_time --report
	$(PY) -m benchmarks.accuracy.sparsify --report-only
	$(PY) -m benchmarks.accuracy.relufication --report-only
	$(PY) -m benchmarks.accuracy.relu_training --report-only
	$(PY) -m benchmarks.serving.sparse_relu --report
	$(PY) -m benchmarks.serving.sparse_trained --report
	$(PY) -m benchmarks.kernels.cpu_sparse_mlp --report
	$(PY) -m benchmarks.serving.prediction
	$(PY) -m benchmarks.serving.report
	$(PY) -m benchmarks.kernels.cpu_linear --report
	$(PY) -m benchmarks.serving.cpu --report
	$(PY) -m tools.model_table
	test ! -f benchmarks/results/gpu/kernels.json || $(GPU_PY) -m benchmarks.kernels.spense_linear --report

gpu:
	$(GPU_PY) -m tools.gpu --budget $(GPU_BUDGET) --out $(GPU_OUT)

$(GPU_STAGES):
	$(GPU_PY) -m tools.gpu $(@:gpu-%=%) --budget $(GPU_STAGE_BUDGET) --out $(GPU_OUT)

gpu-plan:
	$(GPU_PY) -m tools.gpu --plan

gpu-bundle: $(VENV)/.ready
	$(PY) -m tools.gpu.bundle

gpu-rehearsal: $(VENV)/.ready
	$(PY) -m tools.gpu.rehearsal

gpu-report:
	$(GPU_PY) -m benchmarks.kernels.spense_linear --report
	test ! -f benchmarks/results/gpu/serving_decode.json || $(GPU_PY) -m benchmarks.serving.report

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
