PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_INSTALLED := $(DOCS_VENV)/.installed
TRANSFORMERS_TESTS := .cache/transformers-source
TORCHAO := .cache/torchao
OPTIMUM := .cache/optimum
# The oldest transformers that pyproject.toml allows, and the newest that was tried.
SUPPORTED := 5.19.0 5.24.0

export HF_HUB_OFFLINE := 1

# In two processes, by files in the order of their names. By default xdist begins with the files of most tests, and one
# process waits at the end for the long tests of a short file.
IN_TWO := -n 2 --dist loadscope --no-loadscope-reorder

# What test-oldest, test-plain and test-main run, and with which torch and Python. The oldest torch that pyproject.toml
# allows is 2.7.0. PyPI has it with CUDA only, so it is taken only where it is asked for, with an index of PyTorch's CPU
# builds: make test-oldest OLDEST_TORCH=2.7.0.
TESTS ?= tests
OLDEST_TORCH ?= 2.13.0
OLDEST_PYTHON ?= $(PYTHON)
TRANSFORMERS_MAIN ?= transformers @ git+https://github.com/huggingface/transformers

.PHONY: demo test test-slow test-oldest test-plain test-main test-conformance test-torchao test-optimum scan-families bench-cuda check format
.PHONY: docs released-code release-check clean

demo: $(INSTALLED)  ## draw images, train a small ViT, reduce it by every method; a report in demo/
	$(BIN)/tokenreduce demo --output-dir demo

test: $(INSTALLED)
	$(BIN)/python -m pytest tests $(IN_TWO)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow

test-oldest: .venv-oldest/.installed  ## the oldest transformers and other packages that are allowed
	.venv-oldest/bin/python -m pytest $(TESTS) $(IN_TWO)

test-plain: .venv-plain/.installed  ## without the optional packages: no onnx, openvino, gradio, fvcore, scipy
	.venv-plain/bin/python -m pytest $(TESTS) $(IN_TWO)

test-main: .venv-main/.installed  ## transformers as it is developed, which may fail
	.venv-main/bin/python -m pytest $(TESTS) $(IN_TWO)

# Of the environment that is active, because its torch must be one for CUDA, which .venv does not have.
bench-cuda:  ## everything on one CUDA device, in at most 8 minutes: benchmarks/results/cuda-*.md
	PYTHONPATH=. $(PYTHON) benchmarks/cuda_device.py

scan-families: $(INSTALLED)  ## whether every family's entry fits its stock classes, in the oldest and the newest transformers
	for version in $(SUPPORTED); do \
		folder=.cache/transformers-$$version; \
		test -f $$folder/.whole || { rm -rf $$folder; \
			$(BIN)/python -m pip install --quiet --no-deps --target $$folder transformers==$$version && touch $$folder/.whole; } || exit 1; \
		PYTHONPATH=$$folder $(BIN)/python tests/scan_families.py || exit 1; \
	done

# torchao would slow down every import of transformers, and print warnings. So it lies in a folder of its own.
test-torchao: $(INSTALLED)  ## reduced models in the 8 bits of torchao
	test -f $(TORCHAO)/.whole || { rm -rf $(TORCHAO); \
		$(BIN)/python -m pip install --quiet --no-deps --target $(TORCHAO) torchao==0.18.0 && touch $(TORCHAO)/.whole; }
	PYTHONPATH=$(TORCHAO) $(BIN)/python -m pytest tests/test_quantization.py -n 2

# Each needs transformers of its own, older than those of this package. torchvision comes along, but not for this torch.
test-optimum: $(INSTALLED)  ## exported folders in optimum, in environments without this package
	for name in onnx intel; do \
		extra=$$(test $$name = onnx && echo onnxruntime || echo openvino); \
		test -f $(OPTIMUM)/$$name/.whole || { rm -rf $(OPTIMUM)/$$name && $(PYTHON) -m venv $(OPTIMUM)/$$name && \
			$(OPTIMUM)/$$name/bin/pip install --quiet torch==2.13.0 pillow "optimum-$$name[$$extra]" && \
			$(OPTIMUM)/$$name/bin/pip uninstall --quiet --yes torchvision && touch $(OPTIMUM)/$$name/.whole; } || exit 1; \
	done
	OPTIMUM_ONNX=$(CURDIR)/$(OPTIMUM)/onnx/bin/python OPTIMUM_OPENVINO=$(CURDIR)/$(OPTIMUM)/intel/bin/python \
		$(BIN)/python -m pytest tests/test_optimum.py

test-conformance: $(INSTALLED) scan-families test-torchao  ## transformers' own model tests, from its source distribution, on our classes
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

# Each of these environments answers one question. torch is pinned in the call that installs it.
.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch==$(OLDEST_TORCH) --editable ".[test]"
	touch $@

.venv-plain/.installed: pyproject.toml constraints.txt
	test -x .venv-plain/bin/python || $(PYTHON) -m venv .venv-plain
	.venv-plain/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

.venv-main/.installed: pyproject.toml constraints.txt
	test -x .venv-main/bin/python || $(PYTHON) -m venv .venv-main
	grep -v -e ^transformers -e ^huggingface-hub constraints.txt > .venv-main/constraints.txt
	.venv-main/bin/python -m pip install --quiet --constraint .venv-main/constraints.txt --editable ".[test]" \
		"$(TRANSFORMERS_MAIN)"
	touch $@

released-code: $(INSTALLED)  ## at a release: records the code that this version saves with models
	$(BIN)/python -m hf_tokenreduce.hub.released

# In a folder of its own, which is deleted: the wheel is built from the sdist, and installed where nothing else is.
release-check:  ## builds sdist and wheel, checks them, installs the wheel in an empty environment and uses it
	set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	mkdir "$$work/tree"; git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$$work/tree"; \
	$(PYTHON) -m venv "$$work/tools"; "$$work/tools/bin/pip" install --quiet build twine; \
	"$$work/tools/bin/python" -m build --outdir "$$work/dist" "$$work/tree" > "$$work/build.log" 2>&1 || { cat "$$work/build.log"; exit 1; }; \
	"$$work/tools/bin/twine" check --strict "$$work"/dist/*; \
	$(PYTHON) -m venv "$$work/empty"; \
	"$$work/empty/bin/pip" install --quiet --constraint constraints.txt "$$work"/dist/*.whl; \
	cd "$$work"; "$$work/empty/bin/tokenreduce" --help > /dev/null; "$$work/empty/bin/tokenreduce" methods > /dev/null; \
	"$$work/empty/bin/python" "$$work/tree/tests/use_wheel.py" "$$work/dist"; \
	"$$work/empty/bin/python" -m hf_tokenreduce.hub.released --check $(if $(RELEASE),,|| true)

clean:
	rm -rf $(VENV) $(DOCS_VENV) .venv-oldest .venv-plain .venv-main .cache demo build dist site *.egg-info
