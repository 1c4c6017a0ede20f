# make, or make help, lists what there is. Each target sets up .venv by itself, with the packages pinned in
# requirements.lock; once that is done, nothing here uses the network but make lock.

PYTHON ?= python3
PROFILE ?= quick
LESSONS ?=

.DEFAULT_GOAL := help
.PHONY: help course lab test notebooks lock clean

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

notebooks: .venv/.ready ## for maintainers: execute the lessons and store them, with outputs, in notebooks/
	@.venv/bin/aigc course --store $(LESSONS)

lock: .venv/.uv ## for maintainers: compile requirements.lock from pyproject.toml (uses the network)
	@.venv/bin/uv pip compile --quiet --python .venv/bin/python --universal --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --all-extras pyproject.toml -o requirements.lock

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
	@echo "Setting up .venv. The first time, this downloads about 3 GB on Linux (PyTorch with CUDA), less elsewhere."
	@$(PYTHON) -m venv .venv
	@awk '/^[^ ]/{on=/^uv==/} on' requirements.lock > .venv/uv.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --ignore-installed --require-hashes -r .venv/uv.txt
	@touch $@

.venv/.ready: pyproject.toml requirements.lock | .venv/.uv
	@quiet=--quiet; [ ! -t 2 ] || quiet=; \
	again=; [ ! -e .venv/.unfinished ] || again=--reinstall; \
	touch .venv/.unfinished && \
	.venv/bin/uv pip install $$quiet $$again --python .venv/bin/python --require-hashes -r requirements.lock && \
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-build-isolation --no-deps -e . && \
	rm .venv/.unfinished && touch $@
