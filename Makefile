# Everything works from a fresh clone with Python 3.10 to 3.13; `make aligner` also needs a Python 3.10 or 3.11 on the PATH:
#   make demo    make a 94M-parameter model from SmolLM2-135M on this machine, and print where the report is
#   make test    run the fast tests
# The default is the python3 on the PATH. To use another one: make demo PYTHON=python3.12
# To avoid CUDA builds of torch:
#   make demo TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
# The set of versions: newest (the newest for the Python), or oldest (the oldest supported, for Python 3.10).
PINS ?= newest
TORCH_VERSION ?=
TORCH_INDEX_URL ?=
RECIPE ?= recipes/smollm2_135m/width.yaml
ALIGN_RECIPE ?= recipes/smollm2_135m/aligned.yaml

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := constraints/$(PINS).txt
TORCH_PIN := constraints/torch-$(PINS).txt
LOCKS := constraints/build.lock constraints/$(PINS).lock constraints/dev.lock
PIP := $(BIN)/python -I -m pip install --quiet --disable-pip-version-check
HASHED := --no-deps --require-hashes --no-build-isolation --use-pep517
TORCH := $(if $(TORCH_VERSION),torch==$(TORCH_VERSION),-r $(TORCH_PIN))
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)
QUIET_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# NeMo-Aligner needs Python 3.10 or 3.11, whichever version this package runs on. Without one its tests are skipped.
IS_FOR_ALIGNER := -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2> /dev/null
ALIGNER_PYTHON = $(shell for python in $(PYTHON) python3.11 python3.10; do \
	$$python $(IS_FOR_ALIGNER) && { echo $$python; break; }; done)
WITH_ALIGNER = $(if $(ALIGNER_PYTHON),aligner,without-aligner)
TEST_ENV = $(if $(ALIGNER_PYTHON),MINITRON_REQUIRE_ALIGNER=1) $(QUIET_ENV)

.PHONY: aligner without-aligner demo test test-all test-compat test-slurm test-faults test-gpu check claims token-ratio one-shot-table results reference bench format lock install clean help

help:
	@echo "make demo | aligner | test | test-all | test-compat | test-slurm | test-faults | test-gpu | check | claims | token-ratio | one-shot-table | results | reference | bench | format | lock | clean"

install: $(STAMP)

# Every file is checked against the sha256 in its lock file, except torch, whose build is chosen here. torch is installed last
# and separately, so that its index serves nothing else and its dependencies are present. The build requirements of packages
# without a wheel come first.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(TORCH_PIN) $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "nemo-minitron needs Python 3.10 to 3.13; set PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once: a few minutes"
	@test -n "$(TORCH_INDEX_URL)" || command -v nvidia-smi > /dev/null || echo "this machine has no GPU: if pip fetches a CUDA build" \
		"of torch (several GB), stop it and add TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
	$(PIP) $(HASHED) -r constraints/build.lock
	$(PIP) $(HASHED) -r constraints/$(PINS).lock -r constraints/dev.lock
	$(PIP) $(TORCH_INDEX) -c $(CONSTRAINTS) $(TORCH)
	$(PIP) --no-deps --no-build-isolation -e .
	@# pip compiles installed files, but not those of a checkout; with PYTHONDONTWRITEBYTECODE each command would compile them.
	@$(BIN)/python -m compileall -q nemo_minitron
	@touch $(STAMP)

# The environment of NeMo-Aligner, which needs another Megatron-Core. Not needed in a container with NeMo-Aligner.
aligner: $(STAMP)
	TORCH_INDEX_URL=$(TORCH_INDEX_URL) $(BIN)/minitron env aligner

without-aligner: $(STAMP)
	@echo "skipping the tests of NeMo-Aligner: it needs python3.11 or python3.10 on the PATH"

demo: $(STAMP)
	$(BIN)/minitron assets fetch
	$(BIN)/minitron run $(RECIPE)
	@if $(BIN)/minitron env has-aligner; then $(BIN)/minitron run $(ALIGN_RECIPE); \
	else echo "To continue with SFT and preference training by NeMo-Aligner (about 6 minutes, after its installation): make aligner demo"; fi

test: $(WITH_ALIGNER)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not slurm and not gpu" $(ARGS)

test-all: $(WITH_ALIGNER)
	$(BIN)/minitron assets fetch
	MINITRON_MANY_EXAMPLES=1 $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The core tests on another set of versions, each in its own environment:
#   make test-compat STACK=oldest     Python 3.10 and the oldest supported version of everything (the default)
#   make test-compat STACK=py311      Python 3.11 and the newest versions that exist for it
#   make test-compat STACK=current    Python 3.12 and the newest versions; also: COMPAT_PYTHON=python3.13
# One package in another version: make test-compat STACK=py311 WITH='transformers==4.57.6 huggingface-hub<1'
STACK ?= oldest
WITH ?=
COMPAT_PYTHON ?= $(or $(PYTHON_$(STACK)),$(error STACK is oldest, py311 or current, not $(STACK)))
PYTHON_oldest := python3.10
PYTHON_py311 := python3.11
PYTHON_current := python3.12
COMPAT_VENV ?= .venv-$(STACK)
COMPAT_TESTS := tests/unit tests/parity tests/golden tests/property tests/e2e tests/fault tests/security --ignore tests/e2e/test_toy_aligned.py

test-compat:
	@$(MAKE) --no-print-directory install VENV=$(COMPAT_VENV) PYTHON=$(COMPAT_PYTHON) PINS=$(if $(filter oldest,$(STACK)),oldest,newest)
	$(if $(WITH),$(COMPAT_VENV)/bin/python -I -m pip install --quiet --disable-pip-version-check $(foreach pin,$(WITH),'$(pin)'))
	$(QUIET_ENV) $(COMPAT_VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not slurm and not gpu" $(COMPAT_TESTS) $(ARGS)

# The tests start and stop a Slurm of four nodes on this machine, with Debian's programs, unpacked and not installed.
test-slurm: $(STAMP)
	$(TEST_ENV) MINITRON_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm $(ARGS)

# The same models and trainings on one CUDA GPU as on the CPU, also with Transformer Engine's layers if it is installed.
# In a container with its own torch, without make: pytest tests/gpu
test-gpu: $(STAMP)
	$(QUIET_ENV) MINITRON_REQUIRE_GPU=1 $(BIN)/python -m pytest tests/gpu $(ARGS)

# Kills, full disks, damaged files, stops, and 20,000 hostile inputs for all readers, including the slow tests.
test-faults: $(WITH_ALIGNER)
	MINITRON_MANY_EXAMPLES=1 $(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/fault $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The constraint files and their hashes, within the bounds of pyproject.toml. Newer versions: make lock UPGRADE=1
UPGRADE ?=
lock: $(STAMP)
	@command -v uv > /dev/null || { echo "make lock needs uv: pip install uv"; exit 1; }
	$(BIN)/python -W ignore constraints/lock.py $(if $(UPGRADE),--upgrade)

# Generated: the page of all keys of recipes, their JSON schema, the list of keys that a test freezes, and the table of
# layers in docs/ARCHITECTURE.md.
reference: $(STAMP)
	$(BIN)/minitron schema --page > docs/reference/keys.md
	$(BIN)/minitron schema > docs/reference/recipe.schema.json
	$(BIN)/python -m tests.golden.test_recipe_keys
	$(BIN)/python -m tests.support.layers

results: $(STAMP)
	$(BIN)/minitron assets fetch
	$(BIN)/python benchmarks/results.py $(ARGS)

# The claims suite trains a teacher from scratch. TEXT is any text; form feeds separate documents.
TEXT ?= ./data/*.txt*
claims: $(STAMP)
	$(BIN)/minitron assets fetch
	$(BIN)/python benchmarks/distillation.py --text '$(TEXT)' $(ARGS)

# Tokens that a repair by least squares saves, and repaired students without training: docs/explanation/token-ratio.md.
token-ratio: $(STAMP)
	$(BIN)/minitron assets fetch
	$(BIN)/python benchmarks/token_ratio.py $(if $(filter command line environment,$(origin TEXT)),--text '$(TEXT)') $(ARGS)

one-shot-table: $(STAMP)
	$(BIN)/minitron assets fetch
	$(BIN)/python benchmarks/one_shot_table.py $(ARGS)

bench: $(STAMP)
	$(BIN)/minitron assets fetch
	$(BIN)/python benchmarks/bench.py
	PYTHONPATH=. $(BIN)/python benchmarks/distill.py       # 18 GB of memory for the plain loss
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/compensation.py
	$(BIN)/python benchmarks/tokenizing.py --mb 200
	$(BIN)/python benchmarks/streaming.py   # 16 GB: needs 26 GB of disk

clean:
	rm -rf $(VENV) .venv-oldest .venv-py311 .venv-current .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
