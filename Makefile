# `make train` and `make test` set themselves up in .venv; a second call installs nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUTPUT ?= runs/demo
DEMO   := mdpgrpo_fast/demo
ARGS   ?=
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: help setup train test check seed-policy bench clean

help:
	@echo "make train        install, then train the embedded demonstration into $(OUTPUT) (ARGS=... adds flags)"
	@echo "make test         install, then run the whole test suite (ARGS=... goes to pytest)"
	@echo "make check        formatter, linter and type checker"
	@echo "make setup        the installation alone"
	@echo "make seed-policy  make the embedded prompts and seed policy again"
	@echo "make bench        benchmarks that this machine can run"
	@echo "make clean        remove the virtual environment and caches"

# One stamp per set of packages, renewed when what they depend on changes.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and "Python 3.10 to 3.13 is needed; %s is %d.%d (set PYTHON=...)" % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)
	touch $@

CSRC := $(wildcard csrc/*.h csrc/*/*)

$(VENV)/.setup: $(VENV)/.python pyproject.toml setup.py constraints.txt $(CSRC)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.setup-test: $(VENV)/.setup constraints-test-nodeps.txt constraints-test-deepspeed.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-test-nodeps.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/deepspeed -r constraints-test-deepspeed.txt
	touch $@

setup: $(VENV)/.setup

train: $(VENV)/.setup
	$(BIN)/python -m mdpgrpo_fast.train --output-dir $(OUTPUT) $(ARGS)

test: $(VENV)/.setup-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(VENV)/.setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

seed-policy: $(VENV)/.setup
	$(BIN)/python -m mdpgrpo_fast.demo.prompts --output $(DEMO)
	$(BIN)/python -m mdpgrpo_fast.demo.seed_policy --output $(DEMO)/seed_policy $(ARGS)

bench: $(VENV)/.setup-test
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-only $(ARGS)
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
