# Every target does all of its own set-up; `make demo` and `make test` are the two to know.
#   PYTHON   the Python for demo, test and lint (3.11 or newer)
#   TORCH    what to install as the oracle of the parity tests on Python 3.11; `make test TORCH=` goes without, and they skip
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
LATEST_VENV := .venv-latest
PIP := -m pip install --quiet --disable-pip-version-check

# A Python that can have the newest jax of the range; empty where there is none.
LATEST_PYTHON ?= $(shell for p in python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.1[23]*/bin/python3); do \
	"$$p" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$p" && break; done)

.PHONY: demo test test-slow test-latest fuzz fuzz-server fuzz-openapi accept parity lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/jaxpaged demo

test: $(VENV)/.tested
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

# Everything, with the long fuzzing.
test-slow: $(VENV)/.tested
	$(VENV)/bin/python -m pytest -n 2 --timeout 3600

# The figures of pages, scheduler and prefix cache in full, as a table.
fuzz: $(VENV)/.tested
	$(VENV)/bin/python tests/show_figures.py

# The figures of the server under attack, likewise: half an hour, and the machine for itself.
fuzz-server: $(VENV)/.tested
	$(VENV)/bin/python tests/server/show_server.py

# schemathesis against a server, in a virtual environment of its own.
fuzz-openapi: $(VENV)/.tested
	test -x .venv-schemathesis/bin/st || $(PYTHON) -m venv .venv-schemathesis
	.venv-schemathesis/bin/python $(PIP) schemathesis==4.32.5
	tests/server/negative.sh

# Real clients against the real server, each in a virtual environment of its own below .accept/: 6 GB, built once, some ten minutes.
accept: $(VENV)/.tested
	$(VENV)/bin/python tests/accept/run.py $(if $(ONLY),--only "$(ONLY)")

# vLLM's CPU build and the server, the same model, the same requests: what differs. Needs Python 3.11.
parity: $(VENV)/.tested
	$(VENV)/bin/python tests/accept/parity.py

test-latest:
ifeq ($(strip $(LATEST_PYTHON)),)
	@echo "test-latest: no Python 3.12 or 3.13 was found here, so the newest jax of the range is not tested (set LATEST_PYTHON)."
else
	$(MAKE) $(LATEST_VENV)/.tested
	$(LATEST_VENV)/bin/python -m pytest -n 2 -m "not slow"
endif

lint: $(VENV)/.linted
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(LATEST_VENV) .venv-schemathesis .accept .pytest_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(VENV)/bin/python $(PIP) -e ".[test]"
	@if [ -n "$(TORCH)" ] && $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		$(VENV)/bin/python $(PIP) "$(TORCH)" || echo "PyTorch could not be installed: the parity tests that need it will skip."; fi
	touch $@

$(VENV)/.linted: $(VENV)/.tested
	$(VENV)/bin/python $(PIP) -e ".[lint]"
	touch $@

$(LATEST_VENV)/.tested: pyproject.toml
	$(LATEST_PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_VENV)/bin/python $(PIP) --upgrade-strategy eager --upgrade -e ".[test]"
	touch $@
