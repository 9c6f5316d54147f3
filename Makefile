# Every task of the repository. `make help` lists them; CI calls only these.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup system demo test coverage check format gen serve clean bench docs-compatibility docs-faults docs-performance faults \
        bench-cache bench-contracts bench-control bench-growth bench-kasmina bench-kernels bench-mesh bench-ops bench-tamiyo

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Esper needs Python 3.11 or newer, found {sys.version.split()[0]}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.ready ## virtual environment with everything, pinned by constraints.txt

system: ## Debian packages that some kernels and tests need (compiler, PostgreSQL, Chromium), where root or sudo allows
	@tools/system_packages.sh

demo: system setup ## grow a network on real data through the whole mesh, compared with its controls
	$(BIN)/esper train digits --compare

test: system setup ## the whole test suite
	$(BIN)/python -m pytest -n 3 --dist loadfile

coverage: system setup ## the whole test suite with line coverage
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n 3 --dist loadfile --cov --cov-config=pyproject.toml --cov-report=term-missing:skip-covered

check: setup ## formatting, lint, types, contracts, proof that gen/ is current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy runtime services loadtests tools examples tests
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code proto
	tools/breaking.sh
	tools/gen.sh --check

format: setup ## format code and contracts in place
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	$(BIN)/buf format --write proto

gen: setup ## regenerate gen/ from proto/
	tools/gen.sh

bench-cache: setup ## hit latency of the kernel cache, hit ratios against LRU and the optimum, as JSON lines
	$(BIN)/python -m loadtests.bench_cache

bench-contracts: setup ## sizes and codec times of the contracts, as JSON lines
	$(BIN)/python -m loadtests.bench_contracts

bench-control: setup ## what an absent or dying control plane costs a training loop, as JSON lines
	$(BIN)/python -m loadtests.bench_control

bench-growth: setup ## transitions, state and health samples, as JSON lines
	$(BIN)/python -m loadtests.bench_growth

bench-kasmina: setup ## every figure of the runtime: dormant, active, wrapping, parts, cache, device operations
	$(BIN)/python -m loadtests.bench_kasmina
	$(BIN)/python -m loadtests.bench_growth
	$(BIN)/python -m loadtests.bench_kernels
	$(BIN)/python -m loadtests.bench_cache
	$(BIN)/python -m loadtests.bench_ops

bench-kernels: setup ## compiled kernels against plain torch, by way of compiling and by shape, as JSON lines (minutes)
	$(BIN)/python -m loadtests.bench_kernels

bench-mesh: setup ## overhead of the chassis, logging, settings, start-up, as JSON lines
	$(BIN)/python -m loadtests.bench_mesh

bench-ops: setup ## bandwidth of the device operations against a device copy, as JSON lines
	$(BIN)/python -m loadtests.bench_ops

bench-tamiyo: setup ## latency of decisions, as JSON lines
	$(BIN)/python -m loadtests.bench_tamiyo

faults: setup ## inject every fault into a training run and print what it costs, as JSON lines
	$(BIN)/python -m loadtests.faults

docs-compatibility: setup ## judge every architecture of the zoo and write docs/compatibility.md
	$(BIN)/python -m loadtests.write_compatibility

docs-faults: setup ## inject every fault and write docs/faults.md
	$(BIN)/python -m loadtests.write_faults

docs-performance: setup ## run every benchmark and write docs/performance.md from what they print
	$(BIN)/python -m loadtests.write_performance

clean: ## remove caches (the virtual environment and the data directory stay)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov dist build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
