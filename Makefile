# Two commands for newcomers: `make demo` and `make test`. Everything is set up by them, in .venv.

BIN := .venv/bin
# pip's own find-links may hold a CPU build of torch; otherwise uv takes it from where PyTorch publishes it.
TORCH := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",--torch-backend cpu)

.PHONY: demo up down test test-methods bench bench-flood bench-generate bench-grade bench-onpolicy bench-operator bench-train chaos-generate chaos-train chaos-operator chaos-signals fuzz replicate pictures docs lint format crds constraints images pin-base check-images clean help

help: ## Show the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

demo: .venv/ready ## Run a whole CGDRun on this machine: real operator, kubectl, vLLM, DeepSpeed, S3; also: make demo MANIFEST=run.yaml
	@$(BIN)/python -m cgd_local $(if $(MANIFEST),--manifest "$(MANIFEST)")

up: .venv/ready ## Start what a cluster provides, as the demo does, to apply manifests with kubectl
	@$(BIN)/python -m cgd_local up

down: .venv/ready ## End what `make demo` or `make up` has left running; what is stored stays
	@$(BIN)/python -m cgd_local down

WORKERS ?= 3
# In CI a test that fails is run once more, and named: one failure there costs everybody the whole run.
RERUNS := $(if $(CI),--reruns 1 --reruns-delay 5 -raR)

test: .venv/ready ## Run all tests
	$(BIN)/pytest -n $(WORKERS) $(RERUNS) -m "not methods"

test-methods: .venv/ready ## Whole runs on real parts that take too long for CI, such as those of examples/thinking
	$(BIN)/pytest -n 0 -m methods tests/methods tests/stages/train/test_rounds.py

bench: bench-generate bench-grade bench-train bench-operator ## Measure against peers, as ratios; on a machine that does nothing else

bench-generate: .venv/ready
	PYTHONPATH=tests $(BIN)/python tests/bench/generate.py

bench-grade: .venv/ready ## Compare the grader with others: make bench-grade DATA="math500.jsonl gsm8k_test.jsonl"
	@PYTHONPATH=tests $(BIN)/python tests/bench/grade.py $(DATA)

RUNS ?= 1000

bench-operator: .venv/ready ## 1,000 CGDRuns with played children: latency, memory, writes (15 minutes); also another commit's: make bench-operator RUNS=1000 BASE=<commit>
	@PYTHONPATH=tests $(BIN)/python tests/bench/scale.py --runs $(RUNS) $(if $(BASE),--base $(BASE))

bench-flood: .venv/ready ## 10,000 hostile reports from one run's token, and what they cost the others (8 minutes)
	@PYTHONPATH=tests $(BIN)/python tests/bench/flood.py $(if $(BASE),--base $(BASE))

bench-train: .venv/ready
	PYTHONPATH=tests $(BIN)/python tests/bench/train.py

bench-onpolicy: .venv/ready
	PYTHONPATH=tests $(BIN)/python tests/bench/onpolicy.py

chaos-generate: .venv/ready ## Kill generate at random instants and at every write, and break its store (10 minutes)
	@PYTHONPATH=tests $(BIN)/python -m chaos.generate

chaos-train: .venv/ready ## Kill training at every 5th step and in uploads; its weights must not change (10 minutes)
	@PYTHONPATH=tests $(BIN)/python -m chaos.train

chaos-operator: .venv/ready ## Kill or refuse the operator at every call of a run, break its watches; it must end the same (17 minutes)
	@PYTHONPATH=tests $(BIN)/python -m support.crash
	@PYTHONPATH=tests $(BIN)/python -m chaos.weather

chaos-signals: .venv/ready ## SIGTERM at random instants of every program, as PID 1 (root, 45 minutes): make chaos-signals PROGRAMS="prepare report" INSTANTS=50 SEED=1
	@PYTHONPATH=tests $(BIN)/python -m chaos.signals $(if $(PROGRAMS),--programs $(PROGRAMS)) $(if $(INSTANTS),--instants $(INSTANTS)) $(if $(SEED),--seed $(SEED))

fuzz: .venv/ready ## 10,000 wrong and strange manifests, each refused with a message or started, and as many files of prompts (6 minutes)
	@PYTHONPATH=tests $(BIN)/python -m support.fuzz
	@PYTHONPATH=tests $(BIN)/python -m support.fuzz_lines

replicate: .venv/ready ## Does the method work? Distil SmolLM2 and compare, on this machine (SEEDS=3 or SEED=2, FULL=1; QUICK=1: only whether it runs)
	@PYTHONPATH=examples $(BIN)/python -m replicate $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SEED),--seed $(SEED)) $(if $(FULL),--full) $(if $(QUICK),--quick)

pictures: .venv/ready ## Run the quick start and make the pictures of README and docs from it (10 minutes; needs chromium)
	@$(BIN)/python docs/pictures/make.py

lint: .venv/ready ## Check format, style, types, the layers, Dockerfiles and workflows
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint images/*/Dockerfile
	$(BIN)/zizmor --offline --no-progress --quiet .github/workflows
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir .venv/site

docs: .venv/ready ## Build the documentation as a site, into site/: links that lead nowhere are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir site

format: .venv/ready ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

crds: .venv/ready ## Generate crds/, the chart's copy and docs/api.md from the models
	$(BIN)/python -m cgd_operator.api.crd | tee charts/cgd-operator/files/cgdruns.yaml > crds/cgdruns.yaml
	$(BIN)/python -m cgd_operator.api.manual > docs/api.md

COMPILE = $(BIN)/uv pip compile --quiet --no-annotate --generate-hashes --custom-compile-command "make constraints" $(UPGRADE)

constraints: .venv/ready ## Make constraints/ anew, with the hashes of the index that uv looks at: make constraints UPGRADE=--upgrade
	for image in operator generate train; do \
	  $(COMPILE) $$([ $$image = operator ] && echo operator/pyproject.toml || echo images/pyproject.toml --extra $$image) \
	    --no-emit-package cgd-stages --python-version 3.13 --python-platform x86_64-manylinux_2_28 \
	    -o constraints/$$image.txt || exit 1; done
	sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' constraints/local.txt | $(COMPILE) --no-deps - -o .venv/local.txt \
	  && mv .venv/local.txt constraints/

BUILD ?= docker build
REGISTRY ?= cgd
TAG ?= 0.1.0
IMAGES ?= operator generate train
DEBIAN := docker.io/library/debian:trixie-slim
DIGEST ?= skopeo inspect --format '{{.Digest}}' docker://$(DEBIAN)
BASE_IMAGE ?= $(shell cat images/base.txt 2>/dev/null)

images: dist ## Build the three images: make images BUILD="buildah build" REGISTRY=ghcr.io/you TAG=0.1.0
	for name in $(IMAGES); do \
	  $(BUILD) $(if $(BASE_IMAGE),--build-arg BASE=$(BASE_IMAGE)) -f images/$$name/Dockerfile -t $(REGISTRY)/cgd-$$name:$(TAG) . || exit 1; done

pin-base: ## Write which Debian the images stand on, by digest, to images/base.txt, for `make images` (needs skopeo)
	@digest=$$($(DIGEST)) && expr "$$digest" : 'sha256:[0-9a-f]\{64\}$$' >/dev/null \
	  || { echo "no digest of $(DEBIAN): \"$(value DIGEST)\" must print sha256: and 64 digits" >&2; exit 1; }; \
	echo "$(DEBIAN)@$$digest" > images/base.txt

check-images: .venv/ready ## Build the three images with buildah on debootstrap's Debian and try them without a GPU (root, 45 GB of disk)
	@PYTHONPATH=tests IMAGES="$(IMAGES)" $(BIN)/python -m containers.check

.PHONY: dist
dist: .venv/ready
	@rm -rf dist
	@for folder in images operator .; do \
	  $(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist $$folder || exit 1; done

clean: ## Remove what was installed and what the demo stored
	[ ! -x $(BIN)/python ] || $(BIN)/python -m cgd_local down
	rm -rf .venv .demo

.venv/ready: constraints/venv constraints/local.txt constraints/torch.txt pyproject.toml operator/pyproject.toml images/pyproject.toml
	@echo "setting up .venv (3 GB, some minutes; once)"
	@PYTHON="$(PYTHON)" constraints/venv
	@sed -n '/^uv==/,/[^\\]$$/p' constraints/local.txt > .venv/uv.txt
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r .venv/uv.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode --require-hashes -r constraints/local.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode $(TORCH) -r constraints/torch.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e images -e operator -e .
	@touch $@
