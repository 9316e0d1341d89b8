# make showcase   train, evaluate and sample a small model on the CPU, from nothing, in five minutes; again: goes on
# make showcase-dense   its twin with dense attention, as many steps and parameters, and both on one page
# make test       lint, types and the whole CPU suite
#                 with other versions: rm -r .venv && make test CONSTRAINTS=constraints-oldest.txt, or CONSTRAINTS= for the newest
# make test-gpu   the GPU suite, on a machine with a CUDA device and torch already installed
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/train_showcase.yaml
RUN    ?= runs/showcase
TWIN   := $(RUN)_dense
READY  := $(VENV)/.installed-dev

.PHONY: showcase showcase-dense test test-gpu lint clean

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[$*]'
	touch $@

# A run folder that is there already is gone on with, or pointed at where it is finished.
showcase: $(VENV)/.installed-train
	@if grep -qs '"state": "finished"' $(RUN)/status.json; then \
	  echo "$(RUN) is finished: look at $(RUN)/report.html"; \
	  echo "to start over: rm -r $(RUN) && make showcase"; \
	elif test -e $(RUN)/config.yaml; then \
	  $(BIN)/nsa resume $(RUN); \
	else \
	  $(BIN)/nsa train $(CONFIG); \
	fi

# The SwiGLU is widened until both models have as many parameters.
showcase-dense: showcase
	@if grep -qs '"state": "finished"' $(TWIN)/status.json; then \
	  echo "$(TWIN) is finished; to start over: rm -r $(TWIN) && make showcase-dense"; \
	elif test -e $(TWIN)/config.yaml; then \
	  $(BIN)/nsa resume $(TWIN); \
	else \
	  $(BIN)/nsa train $(RUN)/config.yaml --run.name $(notdir $(TWIN)) --model.layer_types full_attention \
	    --model.intermediate_size 438; \
	fi
	$(BIN)/nsa page $(RUN) --beside $(TWIN)

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
