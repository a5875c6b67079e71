PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRANSFORMERS_TESTS := .cache/transformers-source

export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow test-conformance check format clean

demo: $(INSTALLED)  ## draw images, train a small ViT, reduce it by every method; a report in demo/
	$(BIN)/tokenreduce demo --output-dir demo

test: $(INSTALLED)
	$(BIN)/python -m pytest tests -n 2

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow

test-conformance: $(INSTALLED)  ## transformers' own model tests, from its source distribution, on our classes
	$(BIN)/python tests/conformance/fetch.py $(TRANSFORMERS_TESTS)
	TRANSFORMERS_SOURCE=$(TRANSFORMERS_TESTS) $(BIN)/python -m pytest tests/conformance -n 2

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One call installs everything, so that pip sees torch's pin before any package asks for torch.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .cache demo build dist *.egg-info
