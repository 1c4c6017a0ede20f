# make, or make help, lists what there is. Each target sets up .venv by itself, with the packages pinned in
# requirements.lock; once that is done, nothing here uses the network but make lock, wheelhouse and audit.

PYTHON ?= python3
PROFILE ?= quick
LESSONS ?=

# A folder wheelhouse/ takes the place of the network; its wheels are held to requirements.lock like any others.
ifneq ($(wildcard wheelhouse),)
SOURCE := from wheelhouse/, without a network.
WHEELS := --no-index --find-links wheelhouse
MEND := || { echo "If a wheel is missing, damaged or of another hash: make wheelhouse, with this system, this Python" \
	"and this requirements.lock, where there is a network; or remove wheelhouse/ to use the network here." >&2; exit 1; }
else
SOURCE := (the first time, this downloads about 3 GB on Linux, PyTorch with CUDA, less elsewhere).
endif

.DEFAULT_GOAL := help
.PHONY: help course lab test faults browser bench notebooks lock wheelhouse audit clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Options: PYTHON=python3.12 (3.11 to 3.13), PROFILE=full, LESSONS=\"1 2\" (for course and notebooks)"

course: .venv/.ready ## execute the lessons and render them as pages: build/course/index.html
	@.venv/bin/aigc course --profile $(PROFILE) $(LESSONS)

lab: .venv/.ready ## open the first lesson in JupyterLab
	@.venv/bin/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
		--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
		--LabApp.extension_manager=readonly

test: .venv/.ready ## lint and run every test
	.venv/bin/python -m ruff check
	.venv/bin/python -m pytest

faults: .venv/.ready ## inject every fault as often as tests/faults/table.py says (15 minutes)
	AIGC_FAULTS=full .venv/bin/python -m pytest tests/faults

browser: .venv/.ready ## drive lessons in JupyterLab with the system's Chromium: build/browser/ (4 minutes)
	.venv/bin/python -m pytest -s tests/browser/lessons.py

bench: .venv/.ready ## time the course beside what one would use instead: benchmarks/RESULTS.md (25 minutes, an idle machine)
	.venv/bin/python -m benchmarks

notebooks: .venv/.ready ## for maintainers: execute the lessons and store them, with outputs, in notebooks/
	@.venv/bin/aigc course --store $(LESSONS)

lock: .venv/.uv ## for maintainers: compile requirements.lock from pyproject.toml (uses the network)
	@.venv/bin/uv pip compile --quiet --python .venv/bin/python --universal --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --all-extras pyproject.toml -o requirements.lock

wheelhouse: .venv/.uv ## for teachers: download every wheel into wheelhouse/, to set up without a network
	@.venv/bin/python -m pip download --disable-pip-version-check --progress-bar off --no-deps --only-binary :all: \
		--require-hashes -r requirements.lock -d wheelhouse.part
	@rm -rf wheelhouse && mv wheelhouse.part wheelhouse
	@.venv/bin/python -c 'import platform as p, sys; v = sys.version_info; \
		print(f"wheelhouse/ is complete, for Python {v.major}.{v.minor} on {p.system()}, {p.machine()}")'

audit: .venv/.uv ## for maintainers: look every pin up among the known vulnerabilities (uses the network)
	@mkdir -p build/audit && rm -f build/audit/*
	@# Pins of other systems and Pythons count too. A package that has two goes into two lists: pip-audit takes one a list.
	@awk '/^[^ ]/ {split($$1, pin, "=="); list = "build/audit/" ++n[pin[1]] ".txt"; $$0 = $$1 " \\"} {print > list}' \
		requirements.lock
	@for list in build/audit/*.txt; do \
		.venv/bin/uv tool run --quiet --python .venv/bin/python --from 'pip-audit>=2.9' pip-audit --strict \
			--progress-spinner off --disable-pip --require-hashes -r $$list || failed=1; \
	done; [ -z "$$failed" ] || { \
		echo "make audit: a package has a known vulnerability, or could not be looked up, as said above." \
			"PIP_AUDIT_VULNERABILITY_SERVICE=osv make audit asks another service." >&2; exit 1; }

clean: ## remove what was built, but neither .venv nor runs
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find aigc_course tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# The stamps are made last, so an interrupted set-up is taken up again by the next make: pip then installs over what
# lies there, and uv, when it finds the mark of an unfinished installation, installs every package anew.
.venv/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "The course needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo missing): make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@echo "Setting up .venv $(SOURCE)"
	@$(PYTHON) -m venv .venv
	@awk '/^[^ ]/{on=/^uv==/} on' requirements.lock > .venv/uv.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --ignore-installed $(WHEELS) \
		--require-hashes -r .venv/uv.txt $(MEND)
	@touch $@

.venv/.ready: pyproject.toml requirements.lock | .venv/.uv
	@quiet=--quiet; [ ! -t 2 ] || quiet=; \
	again=; [ ! -e .venv/.unfinished ] || again=--reinstall; \
	touch .venv/.unfinished && \
	{ .venv/bin/uv pip install $$quiet $$again --python .venv/bin/python $(WHEELS) \
		--require-hashes -r requirements.lock $(MEND); } && \
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-build-isolation --no-deps -e . && \
	rm .venv/.unfinished && touch $@
