# Each target does its own set-up in .venv, once; it is done again when pyproject.toml or
# constraints.txt changes. Another Python: make PYTHON=/path/to/python3.12

PYTHON ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

# Idle OpenMP threads that spin take the cores from the ones that work.
export OMP_WAIT_POLICY ?= PASSIVE

# One test process a core, up to four: each computes on one thread, and may hold 2 GB. Other: make test PARALLEL="-n 2"
PARALLEL ?= -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-slow browser lint format docs clean
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/compress-search run configs/digits.yaml

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

# Those in a browser one after the other: some of them measure its processor time.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout 1800 $(PARALLEL) --ignore tests/browser
	$(BIN)/python -m pytest -m slow --timeout 1800 tests/browser

# What tests/browser look at the pages with: Debian's Chromium, and playwright to drive it. Without, they skip.
browser: $(INSTALLED)
	command -v chromium >/dev/null || .ci/apt_install chromium
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[browser]'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The API reference in build/api. A warning is an error.
docs: $(INSTALLED)
	$(BIN)/python .ci/api_reference.py

# The studies in runs/ are the user's work: they stay.
clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without ensurepip, Debian's python3 makes virtual environments that have no pip.
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14); do \
		"$$python" -c '$(USABLE)' 2>/dev/null && found=$$python && break; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: no usable Python among: $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14)." >&2; \
		echo "It must be 3.11 or newer and able to make virtual environments (on Debian and Ubuntu:" >&2; \
		echo "apt install python3-venv). Name another one with: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	echo "Setting up .venv with $$found, once. PyTorch is several gigabytes: this can take a while."; \
	"$$found" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
