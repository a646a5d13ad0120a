# Every target sets up what it needs (.ci/setup) and then runs; nothing is installed twice.
# Only relative paths below, so that a checkout path with spaces works.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint coverage bench fuzz load wheel deb test-deb test-pip clean

# The interpreter that .venv is made from; empty: the first of python3, python3.14 ... python3.11 that fits.
PYTHON ?=
# More arguments for the command behind a target: make test ARGS="-k leaks --cases 5000"
ARGS ?=
# The Debian releases that packages are tried in.
SUITES ?= bookworm trixie
# How long each fuzzer runs, or the load lasts.
SECONDS ?= 60

setup := PYTHON='$(PYTHON)' .ci/setup
python := .venv/bin/python

help:
	@echo 'make demo    mount a damaged sample image, show what is wrong, repair it, undo'
	@echo 'make test    run the tests, real mounts included           ARGS="-k leaks --cases 5000"'
	@echo 'make lint    ruff format, ruff lint, mypy strict (tests too)'
	@echo 'make coverage what the tests without mounts reach, against the floor in pyproject.toml'
	@echo 'make bench   measure each work against its peers         ARGS="--only check-1t --runs 9"'
	@echo 'make fuzz    fuzz everything that reads an image         SECONDS=60 ARGS="check plan"'
	@echo 'make load    put a mount under load for so long          SECONDS=600'
	@echo 'make wheel   a wheel and a source archive in dist/, the same bytes every time'
	@echo 'make deb     a package for this Debian in dist/, with all that it needs inside'
	@echo 'make test-deb  the same, installed, used and removed in new systems  SUITES="bookworm trixie"'
	@echo 'make test-pip  the wheel, installed by pip and used in new systems without a compiler'
	@echo 'make clean   remove .venv and everything else that make made'
	@echo
	@echo 'Each installs what is missing first (apt, pip into .venv). PYTHON=python3.13 picks the'
	@echo 'interpreter when .venv is made; without it the first Python >= 3.11 on PATH is taken.'

demo:
	@test -c /dev/fuse || { echo 'make demo: /dev/fuse is missing: load the fuse module (modprobe fuse), or give it to this container (--device /dev/fuse)' >&2; exit 1; }
	@$(setup) run
	@examples/demo.sh

test:
	@$(setup) test
	@$(python) -m pytest -n auto --maxprocesses 4 --dist loadfile --durations=5 $(ARGS)

lint:
	@$(setup) dev
	@$(python) -m ruff format --check --quiet .
	@$(python) -m ruff check --quiet .
	@$(python) -m mypy

coverage:
	@$(setup) dev
	@$(setup) test
	@$(python) -m coverage run -m pytest tests/planner tests/instarfs $(ARGS)
	@$(python) -m coverage report

bench:
	@$(setup) bench
	@$(python) -m tests.bench $(ARGS)

fuzz:
	@$(setup) fuzz
	@$(python) -m tests.fuzz --seconds $(SECONDS) $(ARGS)

load:
	@$(setup) test
	@# It lasts longer than a test that hangs.
	@$(python) -m pytest -s tests/load --cases $$(( $(SECONDS) * 60 )) \
		-o faulthandler_timeout=$$(( $(SECONDS) + 300 ))

wheel:
	@$(setup) package
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)} \
		$(python) -m hatchling build -d dist

deb:
	@$(setup) package
	@packaging/deb/build dist

test-deb:
	@$(setup) package
	@for suite in $(SUITES); do packaging/deb/test $$suite build/deb || exit 1; done

test-pip:
	@$(setup) package
	@for suite in $(SUITES); do packaging/pip/test $$suite build/deb || exit 1; done

clean:
	rm -rf .coverage .fuzz .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +
