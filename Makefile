# Every target that needs it does the set-up first; a second call finds it done.
#   make demo PROVIDER=tcp ARGS="--layers 8"        make test ARGS="-k death -x"
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
ARGS ?=
PROVIDER ?=
HISTORIES ?= 5000
SIM = FABRIC_LOG_LEVEL=error
SIM_ARGS = -q -s -p no:cacheprovider tests/test_sim_histories.py

export PYTHON
# Tools of the virtual environment, for those recipes that run some.
TOOLS = PATH="$(CURDIR)/.venv/bin:$$PATH"

C_FILES = $(wildcard native/*.c native/*/*.c native/*/*.h tests/efa/emulator/*.[ch])
PY_FILES = fabric kvtransfer tests examples

.PHONY: help setup demo test test-softroce test-efa test-sim soak soak-kills chaos mutants instructions sanitize fuzz
.PHONY: ctest lint format wheel clean distclean bench bench-verbs bench-peers

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## Debian packages, .venv, native build (once)
	@scripts/setup

demo: setup ## prefill in one process, decode in another (PROVIDER=local|tcp|verbs|efa, ARGS="...")
	@.venv/bin/python examples/pd_demo.py $(if $(PROVIDER),--provider $(PROVIDER)) $(ARGS)

test: setup ## pytest against the editable install (ARGS="...")
	@.venv/bin/python -m pytest $(ARGS)

test-softroce: setup ## pytest and the demo on `verbs`, in an emulated guest (ARGS="..." to pytest)
	@tests/softroce/suite $(ARGS)

test-efa: setup ## pytest and the demo on `efa`, on emulated devices (ARGS="..." to pytest)
	@tests/efa/suite $(ARGS)

test-sim: setup ## thousands of simulated histories, one seed (HISTORIES=5000)
	@$(SIM) FABRIC_SIM_HISTORIES=$(HISTORIES) .venv/bin/python -m pytest $(SIM_ARGS) --timeout 900 $(ARGS)

soak: setup ## 100 000 layouts, then simulated histories, seed after seed, until one fails or it is stopped
	@FABRIC_EXAMPLES=100000 .venv/bin/python -m pytest -q --timeout 0 tests/test_kvtransfer_runs.py
	@while $(SIM) FABRIC_SIM_HISTORIES=$(HISTORIES) .venv/bin/python -m pytest $(SIM_ARGS) --timeout 0; do :; done

soak-kills: setup ## processes that are killed every 200 ms, 5 minutes on local and on tcp (ARGS="--help")
	@.venv/bin/python -m tests.soak $(ARGS)

chaos: setup ## the same for 2 minutes on two NICs of the emulated guest, whose links go down and lose packets
	@tests/softroce/chaos $(ARGS)

mutants: setup ## defects put into the core: the tests must see each (ARGS="NAME ...")
	@$(TOOLS) .venv/bin/python -m tests.mutation $(ARGS)

instructions: setup ## instructions of the hot paths under callgrind, each against its bound (ARGS="--update")
	@$(TOOLS) .venv/bin/python -m tests.instructions $(ARGS)

ctest: setup ## C tests; PRESET=dev, asan or tsan
	@$(TOOLS) scripts/ctest $(or $(PRESET),dev)

sanitize: setup ## Python tests under ASan and UBSan, closing under valgrind (ARGS="tests/...")
	@$(TOOLS) scripts/valgrind
	@$(TOOLS) .venv/bin/python -m tests.sanitize $(ARGS)

fuzz: setup ## libFuzzer on what peers and strangers may send (SECONDS=60 of each target)
	@$(TOOLS) scripts/fuzz $(or $(SECONDS),60)

bench: setup ## the project's targets, each beside what it is measured against (a quiet machine, 3 minutes)
	@.venv/bin/fabric bench --targets

bench-verbs: setup ## `verbs` beside ib_write_bw of perftest, in the emulated guest (about 8 minutes)
	@tests/softroce/bench

bench-peers: setup ## beside NIXL and Mooncake, on this machine, by turns (about 13 minutes; ARGS="--help")
	@scripts/peers
	@.venv/bin/python tests/peers/bench_peers.py $(ARGS)

lint: setup ## ruff, mypy, clang-format
	@$(TOOLS) scripts/lint

format: setup ## format Python and C
	@.venv/bin/ruff check --fix-only --quiet $(PY_FILES)
	@.venv/bin/ruff format --quiet $(PY_FILES)
	@.venv/bin/clang-format -i $(C_FILES)

wheel: setup ## a wheel in dist/
	@.venv/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what was built
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find fabric kvtransfer tests examples -name __pycache__ -prune -exec rm -rf {} +
	@rm -f .venv/.complete

distclean: clean ## and the virtual environment
	@rm -rf .venv
