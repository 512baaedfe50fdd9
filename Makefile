# make help lists the targets. Everything runs in a virtual environment of its own, made on first use.

PYTHON ?= python3
VENV ?= .venv
LABEL_VENV ?= .venv-label
DEPLOY_VENV ?= .venv-deploy
# For example: make test PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_OPTIONS ?=
DEMO ?= demo
# Processes of make test; most tests keep one core busy.
WORKERS ?= 2
# Of make release: an overlay (default: the plain configs), a version (default: that of configs/metadata.json), and the rest.
TASK :=
VERSION :=
RELEASE_OPTIONS :=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
BUNDLE := $(BIN)/python -m monai.bundle run
DEMO_TASK := configs/tasks/phantom.yaml

.PHONY: help demo test label-test deploy-test lint bench gpu-bench release clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train, evaluate and infer on synthetic phantoms; prints Dice and the paths of pictures"
	@echo "make test   all tests"
	@echo "make label-test  the bundle in a real MONAI Label server; needs 4 GB of disk, and the hippocampus data"
	@echo "make deploy-test  the bundle as an application of MONAI Deploy; needs 2 GB of disk with the CPU build of PyTorch, and the data"
	@echo "make lint   style and types"
	@echo "make bench  what the scan engines and the networks cost on this CPU; writes docs/benchmarks"
	@echo "make gpu-bench  the same on a CUDA GPU, beside MONAI's networks"
	@echo "make release  a zip for registries in dist/; TASK=configs/tasks/T.yaml VERSION=X RELEASE_OPTIONS=\"--checkpoint model.pt\""
	@echo "make clean  remove $(DEMO)/, caches, $(VENV)/, $(LABEL_VENV)/ and $(DEPLOY_VENV)/"

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --requirement requirements.txt
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m scripts.phantom --output_dir $(DEMO)/phantom
	$(BUNDLE) --config_file "['configs/train.json','$(DEMO_TASK)']" \
		--dataset_dir $(DEMO)/phantom --ckpt_dir $(DEMO)/models --output_dir $(DEMO)/training
	$(BUNDLE) --config_file "['configs/train.json','configs/evaluate.json','$(DEMO_TASK)']" \
		--dataset_dir $(DEMO)/phantom --ckpt_dir $(DEMO)/models --output_dir $(DEMO)/evaluation
	$(BUNDLE) --config_file "['configs/inference.json','$(DEMO_TASK)']" \
		--dataset_dir $(DEMO)/phantom --ckpt_dir $(DEMO)/models --output_dir $(DEMO)/inference
	$(BIN)/python -m scripts.demo --dataset_dir $(DEMO)/phantom --prediction_dir $(DEMO)/inference \
		--picture_dir $(DEMO)

# mamba-ssm without its CUDA kernels, for the reference scan in it; where it cannot be had, its tests are skipped.
$(TESTABLE): $(INSTALLED)
	-MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install $(PIP_OPTIONS) \
		--no-build-isolation --no-deps mamba-ssm==2.3.1 && touch $@

test: $(TESTABLE)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests/quick_start \
		$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

# By the environment variable the constraints also hold where pip builds a package.
$(LABEL_VENV)/.installed: tests/monai_label_constraints.txt
	$(PYTHON) -m venv $(LABEL_VENV)
	PIP_CONSTRAINT=$(CURDIR)/$< SAM2_BUILD_CUDA=0 $(LABEL_VENV)/bin/python -m pip install $(PIP_OPTIONS) \
		torch torchvision monailabel==0.8.5 monai==1.6.1 numba
	@touch $@

label-test: $(TESTABLE) $(LABEL_VENV)/.installed
	SEGRESMAMBA_LABEL_VENV=$(LABEL_VENV) $(BIN)/python -m pytest -q tests/test_monai_label.py

$(DEPLOY_VENV)/.installed: tests/deploy_constraints.txt
	$(PYTHON) -m venv $(DEPLOY_VENV)
	PIP_CONSTRAINT=$(CURDIR)/$< $(DEPLOY_VENV)/bin/python -m pip install $(PIP_OPTIONS) \
		torch monai-deploy-app-sdk==4.0.0 monai==1.6.1 pydicom highdicom nibabel numba matplotlib PyYAML
	@touch $@

# Holoscan, which the SDK runs on, asks for 32 MB of stack.
deploy-test: $(INSTALLED) $(DEPLOY_VENV)/.installed
	ulimit -s 32768; SEGRESMAMBA_DEPLOY_VENV=$(DEPLOY_VENV) $(BIN)/python -m pytest -q tests/test_deploy.py

lint: $(INSTALLED)
	$(BIN)/ruff check scripts tests
	$(BIN)/isort --check scripts tests
	$(BIN)/black --check scripts tests
	$(BIN)/flake8 scripts tests
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m scripts.benchmark cpu
	$(BIN)/python -m scripts.benchmark efficiency --device cpu

gpu-bench: $(INSTALLED)
	$(BIN)/python -m scripts.benchmark gpu

release: $(INSTALLED)
	$(BIN)/python -m scripts.release $(if $(TASK),--task $(TASK)) $(if $(VERSION),--version $(VERSION)) $(RELEASE_OPTIONS)

clean:
	rm -rf $(DEMO) $(VENV) $(LABEL_VENV) $(DEPLOY_VENV) .pytest_cache .ruff_cache .mypy_cache
	find scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
