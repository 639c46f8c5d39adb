# `make` lists the targets. PYTHON chooses the interpreter for the environments (>= 3.11).
PYTHON ?= python3
TARGET ?= embedded
LAB_ARGS ?= $(if $(filter 0,$(shell id -u)),--allow-root)
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help install run lab aws aws-stop test lint unit integration notebooks refresh \
	bench-cold-start bench-init bench-bundle bench-handler \
	bench-latency clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { gsub(/\$$\$$/, "$$", $$2); printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## create or update the environments (every target below does it by itself)
	@$(PYTHON) -m local.install

run: install ## run all notebooks against the embedded AWS; print its answer (TARGET=aws: against your account)
	@$(BIN)/python -m local.walkthrough --target $(TARGET)

lab: install ## start the embedded AWS and open JupyterLab
	@eval "$$($(BIN)/python -m local.aws start)" && \
	exec $(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(LAB_ARGS) notebooks/00_setup.ipynb

aws: install ## start the embedded AWS; eval "$$(make -s aws)" points this shell at it
	@$(BIN)/python -m local.aws start

aws-stop: ## stop the embedded AWS and delete what is deployed there
	@test ! -x $(BIN)/python || $(BIN)/python -m local.aws stop

test: install lint unit integration notebooks ## all checks

lint: install ## ruff, shellcheck, cfn-lint, sam validate, links between notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck layer/*.sh .ci/run
	$(BIN)/cfn-lint template.yaml
	AWS_DEFAULT_REGION=us-east-1 SAM_CLI_TELEMETRY=0 $(BIN)/sam validate --lint
	$(BIN)/python -m local.navigation --check

unit integration notebooks: export BUILD_DIR = $(CURDIR)/build/test

unit: install ## unit tests: no network, seconds
	$(BIN)/python -m pytest tests/unit

integration: install ## tests against the embedded AWS and Lambda's runtime emulator
	$(BIN)/python -m pytest tests/integration

notebooks: install ## run the notebooks; compare what they print with what is stored
	$(BIN)/python -m local.aws run --home build/test/aws -- $(BIN)/python -m pytest \
		--nbval --nbval-current-env --nbval-sanitize-with tests/notebooks/sanitize.cfg notebooks

refresh: install ## run the notebooks and store their outputs in place
	@$(BIN)/python -m local.walkthrough --refresh

bench-cold-start: install ## our layer against the reference's method, under Lambda's runtime
	$(BIN)/python -m benchmarks.cold_start

bench-init: install ## INIT of the real function and its first requests
	$(BIN)/python -m benchmarks.init

bench-bundle: install ## a bundle from S3, loaded, against the bare model file
	$(BIN)/python -m benchmarks.bundle

bench-handler: install ## the handler's guards, preprocessing, memory and log, against the alternatives
	$(BIN)/python -m benchmarks.handler

bench-latency: install ## warm latency: our variants, plain PyTorch, ONNX Runtime
	$(BIN)/python -m benchmarks.latency

clean: aws-stop ## delete everything generated but the environments
	rm -rf build layer/*.zip .aws-sam packaged.yaml

distclean: clean ## delete the environments too
	rm -rf .venv .venv-aws
