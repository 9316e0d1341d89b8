# make showcase   train, evaluate and sample a small model on the CPU, from nothing
# make test       lint, types and the whole CPU suite
# make test-gpu   the GPU suite, on a machine with a CUDA device and torch already installed
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/train_showcase.yaml
READY  := $(VENV)/.installed-dev

.PHONY: showcase test test-gpu lint clean

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

showcase: $(VENV)/.installed-train
	$(BIN)/nsa train $(CONFIG)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/typos

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal tests --ignore=tests/gpu

test-gpu:
	$(PYTHON) -m pytest -n 4 --dist worksteal tests/gpu

clean:
	rm -rf $(VENV) build dist
