# Two commands do everything: `make demo` and `make test`. Both set up what they need.
#   PYTHON     the Python to build the virtual environment with (3.10, 3.11 or 3.12)
#   TORCH      the torch to install; set PIP_ARGS to point pip at an index with CPU wheels where yours
#              would otherwise bring CUDA packages along
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.10 || command -v python3)
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-out
WORKERS ?= 2

.PHONY: demo test lint format types unit toolchain test-slow runtime wheel wheel-test docs clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, make a small Qwen checkout, build and verify an int4 bmodel"
	@echo "make test       lint, types and the whole test suite"
	@echo "make wheel      the wheel, in dist/"
	@echo "make wheel-test the test suite on the installed wheel, outside the source tree"
	@echo "make docs       the documentation site, in build/site"
	@echo "make test-slow  the real-geometry runs (minutes, gigabytes)"
	@echo "make runtime    of those, the vendor's runtimes: every mode, profile and chip, and --dynamic"

# torch goes first and alone: with it in place nothing that follows asks pip for another build of it.
$(VENV)/.installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python found  (install Python 3.10, 3.11 or 3.12, or set PYTHON=...)"; exit 4; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "error: $(PYTHON) is not Python 3.10, 3.11 or 3.12  (set PYTHON=...)"; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[test,lint]'
	@touch $@

toolchain: $(VENV)/.installed
	$(BIN)/qwen-surgery toolchain install

demo: toolchain
	rm -rf $(DEMO)
	$(BIN)/qwen-surgery demo-checkout $(DEMO)/Qwen-tiny-Chat
	$(BIN)/qwen-surgery build $(DEMO)/Qwen-tiny-Chat --mode int4 --seq-length 256 --verify full \
		--ask "So what is a bmodel?" --ask "Please count to 5." --ask "What is 2 + 7?" --ask "请讲一个小故事。" \
		--text golden/speaking/heldout.txt --text-tokens 128 --out $(DEMO)/build --trust-remote-code
	$(BIN)/qwen-surgery chat --bmodel $(DEMO)/build/BM1684X/qwen-tiny-chat_int4_seq256_1dev.bmodel \
		--tokenizer $(DEMO)/Qwen-tiny-Chat --greedy --prompt "Please tell me a short story."

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: toolchain
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: lint types unit

# The suite without what needs the repository's own files, on the wheel as installed, outside the source tree.
# ARGS go to pytest: make wheel-test ARGS="tests/patching -x"
wheel-test: toolchain
	$(BIN)/python -m tests.wheel -n $(WORKERS) --dist loadfile $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

test-slow: toolchain
	$(BIN)/python -m pytest -m slow -n 0

runtime: toolchain
	$(BIN)/python -m pytest tests/runtime -m slow -n 0

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The codemods' pages, then the site, in build/site: open build/site/index.html.
docs: $(VENV)/.installed
	$(BIN)/python -m codemods.docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
