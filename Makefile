# Usage: make [TARGET] [QUICK=1]. The environments' own knobs: tools/setup_env.sh --help

.PHONY: help setup demo test lint test-upstream test-latest

# The whole suite, in the environment that is named.
run_tests = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest \
	--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

setup:  ## Create .venv with all that mmtoken needs, or bring it up to date
	@tools/setup_env.sh onedl

demo: setup  ## Train, test and measure small models on synthetic scenes; QUICK=1 for the short one
	.venv/bin/python tools/demo.py $(if $(QUICK),--quick)

test: setup lint  ## Lint, then run all tests
	$(call run_tests,.venv)

test-upstream:  ## Run all tests on the last releases of OpenMMLab itself, in .venv-upstream
	@tools/setup_env.sh upstream
	$(call run_tests,.venv-upstream)

test-latest:  ## Run all tests on the newest torch that mmcv's ops compile for, in .venv-latest
	@tools/setup_env.sh latest
	$(call run_tests,.venv-latest)

lint: setup  ## Check style and formatting of Python and shell code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck tools/*.sh .ci/run
