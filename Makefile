# `make demo` and `make test` need Python 3.11 or newer and nothing else: they install first.
# Installing again is quick: the setup script leaves a stamp in .venv.

SETUP := setup_scripts/setup_$(if $(filter Darwin,$(shell uname -s)),macos,linux).sh
PYTHON := .venv/bin/python

.PHONY: all demo test web chaos processors lint typecheck format install clean

all: lint typecheck test

# At a terminal it goes on serving, with a page to look at.
demo:
	@if [ -t 1 ]; then bash $(SETUP) demo --serve; else bash $(SETUP) demo; fi

# Three processes for two cores: the tests of one of them mostly wait.
test: install
	$(PYTHON) -m pytest -n 3 $(ARGS)

# The page: its tests, whether what is committed is what its source gives, and a walk through it in a
# browser. Needs Node 20.19 or newer, npm and Chromium, which nothing else does.
web: install
	cd web && npm ci --no-audit --no-fund && npm test && npm run check-build
	$(PYTHON) scripts/walk_page.py

# 15,300 random schedules of a simulated cluster, other ones each time, and one for every type of
# model whose workers compute; takes about half an hour.
chaos: install
	$(PYTHON) -m pytest -n 2 tests/chaos tests/unit/test_core_random.py tests/model/test_clusters.py \
	  tests/model/test_damaged_configs.py --schedules 850 $(ARGS)

# The C library on processors and systems that this machine is not: built for them, and tested by emulation.
# Needs Debian, and to be root; takes an hour.
processors: install
	bash scripts/try_processors.sh

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/lint-imports

typecheck: install
	$(PYTHON) -m mypy

format: install
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

install:
	@bash $(SETUP)

# Everything that was made here, .venv too; not config/local.yaml, which is yours.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
