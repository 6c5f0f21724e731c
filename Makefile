# Every target makes .venv if it is missing. Nothing here needs a GPU, a download of weights, a container or root.
#
#   PYTHON=python3.11    which Python (3.10 to 3.12)
#   TORCH_INDEX=URL      torch's own package index, where the default build would bring several GB of CUDA
#   MARKS="..."          test: which tests, by pytest's marks; "and not data" leaves out those that read ../shared/data
#   DATA=file            quickstart: train on this file instead of the built-in dialogues
#   ARGS="key=value ..." quickstart: changes to the recipe, e.g. data.validation_rows=20 for a small file
#
# make quickstart, seconds of each stage on 2 cores (README has the table): install, train to the half and be killed,
# resume and finish with answers, a reward model from pairs, DPO from pairs, report.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MARKS ?= not soak and not gpu and not oracle
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test marks test-gpu oracle soak bench lint clean

$(READY): pyproject.toml constraints-cpu.txt
	@echo "installing into $(VENV) ..."
	@started=$$(date +%s); test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(INSTALL) -c constraints-cpu.txt -e '.[test]' && echo $$(($$(date +%s) - started)) > $@

$(VENV)/.oracle: $(READY)
	@$(INSTALL) -c constraints-cpu.txt -e '.[test,oracle]'
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/triton-3.6.0 triton==3.6.0 'numpy<2.4' # the Triton of GPU machines
	@touch $@

quickstart: $(READY)
	@$(BIN)/python launch/quickstart.py $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(READY) lint
	$(BIN)/python -m pytest -m "$(MARKS)"

marks:
	@echo "$(MARKS)"

test-gpu: $(READY)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

oracle: $(VENV)/.oracle
	$(BIN)/python -m pytest -m oracle

soak: $(READY)
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/.oracle
	$(BIN)/python benchmarks/sft_speed/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright --warnings

clean:
	rm -rf $(VENV) runs *.egg-info
