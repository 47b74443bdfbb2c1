# `make install` once, then `make test`. Inside a virtual environment, with plain pip.
PYTHON ?= python3

.PHONY: install test lint types test-vllm demo model sample build ci

install:
	$(PYTHON) -m pip install -e '.[dev]'

test:            ## all tests but those that need a real vLLM
	$(PYTHON) -m pytest -n 2

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m pyright

test-vllm:       ## a real vLLM: MAESTRO_VLLM=/path/bin/vllm MAESTRO_VLLM_MODEL=/path/tiny (docs/vllm-cpu.md makes both)
	$(PYTHON) -m pytest -m vllm --timeout 900

demo:
	$(PYTHON) -m maestro_agents.cli demo

TRACE ?= ../shared/data/traces/calls.jsonl.gz

model:           ## train the model that ships with the package, and write its card (TRACE: recorded calls, MIT licensed)
	$(PYTHON) -m maestro_agents.cli predict train $(TRACE) -o maestro_agents/predict/default.model \
	  --data "23,835 calls of 12 public multi-agent apps (AI Hospital, tau-bench, tau2-bench, moatless-tools, deer-flow, STORM, Who-and-When), from run logs under the MIT licence; prompts in numbers only"

sample:          ## the workload that ships with the package, in numbers only (TRACE: as above, and nothing else)
	$(PYTHON) -m maestro_agents.cli workload $(TRACE) --rate 0.5 --window 600 --warmup 60 -o maestro_agents/simulator/sample.jsonl.gz

build:
	$(PYTHON) -m build --no-isolation

ci:              ## what continuous integration runs, in a new virtual environment
	.ci/run
