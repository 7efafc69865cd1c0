# Needs Python (3.11 or newer), pip and make. Everything is installed into VENV.
#   make demo ARGS="--steps 50"       make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Test processes: `auto` is one a core, four at most; 0 runs in this process.
WORKERS ?= auto

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
PYTEST = $(RUN) -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

.PHONY: help demo qlora study multihost tpu test fast laws newest lint format types bench hooks clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo     fine-tune a small pretrained transformer, and print the comparison"
	@echo "make qlora    fine-tune a pretrained 135M decoder held in four bits a weight"
	@echo "make study    what low-rank updates do inside that transformer, claim by claim (over an hour)"
	@echo "make multihost  train in two processes on this machine"
	@echo "make tpu      compile training steps for TPUs that are not there (half an hour)"
	@echo "make test     the whole test suite       make fast   without the slow tests"
	@echo "make laws METHOD=lora_xs   what must hold for one method, by the name of its row in tests/methods.py"
	@echo "make newest   what a new JAX breaks first"
	@echo "make lint     ruff, style and format     make types  pyright"
	@echo "make format   rewrite what lint can      make bench  the timings of benchmarks/"
	@echo "make hooks    pre-commit hooks           make clean  remove what was built"

demo: $(VENV)/.examples
	$(RUN) examples/finetune.py $(ARGS)

qlora: $(VENV)/.examples
	$(RUN) examples/qlora_decoder.py $(ARGS)

study: $(VENV)/.examples
	$(RUN) examples/study.py $(ARGS)

multihost: $(VENV)/.examples
	JAX_PLATFORMS=cpu $(RUN) examples/multihost.py --local=2 $(ARGS)

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

fast: $(VENV)/.test
	$(PYTEST) -m "not slow" $(ARGS)

laws: $(VENV)/.test
	$(PYTEST) tests/test_laws.py tests/test_closed_forms.py -k "[$(METHOD)- or [$(METHOD)]" $(ARGS)

newest: $(VENV)/.test
	$(PYTEST) -m "(not slow or newest) and not settled" $(ARGS)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.test
	$(RUN) -m pyright --pythonpath $(RUN)

# The comparisons with other libraries need the much larger `.[bench]` besides.
bench: $(VENV)/.examples
	$(RUN) benchmarks/step.py $(ARGS)

# In an environment of its own: JAX would look for a TPU wherever libtpu is. Where it does not install, this says so.
tpu:
	$(MAKE) VENV=.venv-tpu .venv-tpu/.examples
	-.venv-tpu/bin/python -m pip install --quiet libtpu
	.venv-tpu/bin/python benchmarks/tpu_aot.py $(ARGS)

hooks: $(VENV)/.test
	$(PIP) install pre-commit
	$(RUN) -m pre_commit install

clean:
	if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: installed again when pyproject.toml changes.
$(VENV)/.examples $(VENV)/.test: $(VENV)/.%: pyproject.toml | $(RUN)
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@
