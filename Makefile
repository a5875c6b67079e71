PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_INSTALLED := $(DOCS_VENV)/.installed
TRANSFORMERS_TESTS := .cache/transformers-source
# The oldest transformers that pyproject.toml allows, and the newest that was tried.
SUPPORTED := 5.19.0 5.24.0

export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow test-conformance scan-families bench-cuda check format docs clean

demo: $(INSTALLED)  ## draw images, train a small ViT, reduce it by every method; a report in demo/
	$(BIN)/tokenreduce demo --output-dir demo

test: $(INSTALLED)
	$(BIN)/python -m pytest tests -n 2

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow

# Of the environment that is active, because its torch must be one for CUDA, which .venv does not have.
bench-cuda:  ## everything on one CUDA device, in at most 8 minutes: benchmarks/results/cuda-*.md
	PYTHONPATH=. $(PYTHON) benchmarks/cuda.py

scan-families: $(INSTALLED)  ## whether every family's entry fits its stock classes, in the oldest and the newest transformers
	for version in $(SUPPORTED); do \
		folder=.cache/transformers-$$version; \
		test -f $$folder/.whole || { rm -rf $$folder; \
			$(BIN)/python -m pip install --quiet --no-deps --target $$folder transformers==$$version && touch $$folder/.whole; } || exit 1; \
		PYTHONPATH=$$folder $(BIN)/python tests/scan_families.py || exit 1; \
	done

test-conformance: $(INSTALLED) scan-families  ## transformers' own model tests, from its source distribution, on our classes
	$(BIN)/python tests/conformance/fetch.py $(TRANSFORMERS_TESTS)
	TRANSFORMERS_SOURCE=$(TRANSFORMERS_TESTS) $(BIN)/python -m pytest tests/conformance -n 2

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Reads the package's sources and imports nothing of it, so an environment of its own is enough.
docs: $(DOCS_INSTALLED)  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

$(DOCS_INSTALLED): docs/requirements.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

# One call installs everything, so that pip sees torch's pin before any package asks for torch.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) .cache demo build dist site *.egg-info
