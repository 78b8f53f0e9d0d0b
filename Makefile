# Usage: make [TARGET] [QUICK=1]. The environments' own knobs: tools/setup_env.sh --help

.PHONY: help setup demo test lint smoke-upstream

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

setup:  ## Create .venv with all that mmtoken needs, or bring it up to date
	@tools/setup_env.sh onedl

demo: setup  ## Train, test and measure small models on synthetic scenes; QUICK=1 for the short one
	.venv/bin/python tools/demo.py $(if $(QUICK),--quick)

test: setup lint  ## Lint, then run all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest \
		--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup  ## Check style and formatting of Python and shell code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck tools/*.sh .ci/run

smoke-upstream:  ## Check mmtoken against the last releases of OpenMMLab itself, in .venv-upstream
	@tools/setup_env.sh upstream
	.venv-upstream/bin/python tools/smoke.py
