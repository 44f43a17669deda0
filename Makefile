# Surefoot: `make run` serves on port 8080, `make test` runs the tests. Both need Python 3.11+ and nothing else.
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test faults bench bench-growth bench-stages bench-gpu bench-peers lint check fix coverage constraints train clean

run: $(VENV)/.run ## Install what serving needs, then serve; all SUREFOOT_ variables are passed on
	exec $(BIN)/surefoot serve

test: $(VENV)/.test ## Install what tests need, then run the checks and the tests
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(COV) $(ARGS) || $(BIN)/python -m pytest --last-failed --last-failed-no-failures none --cov-append $(COV)
	$(BIN)/python -m coverage report --fail-under=100 --include='$(PURE)'

faults: $(VENV)/.test ## Break a whole service in every way of docs/faults.md, and count what was lost; ARGS="--quick --row 4"
	command -v faketime >/dev/null || { apt-get update -qq && apt-get install -y -qq faketime >/dev/null; } || true
	$(BIN)/python -m tests.faults $(ARGS)

bench: $(VENV)/.run ## How fast it is, against the least a server can cost and FastAPI; ARGS="--quick --only base"
	command -v wrk >/dev/null || { apt-get update -qq && apt-get install -y -qq wrk >/dev/null; } || true
	$(BIN)/python -m loadtests.bench $(ARGS)

bench-growth: $(VENV)/.bench ## What grows with versions, rules, pending decisions and keys; ARGS="--quick --plots docs"
	command -v wrk >/dev/null || { apt-get update -qq && apt-get install -y -qq wrk >/dev/null; } || true
	$(BIN)/python -m loadtests.growth $(ARGS)

bench-stages: $(VENV)/.bench ## Where the time of one decision goes, by stage
	command -v wrk >/dev/null || { apt-get update -qq && apt-get install -y -qq wrk >/dev/null; } || true
	$(BIN)/python -m loadtests.stages $(ARGS)

bench-gpu: $(VENV)/.bench ## One session in a bare loop against the service, on the CPU and on a GPU
	command -v wrk >/dev/null || { apt-get update -qq && apt-get install -y -qq wrk >/dev/null; } || true
	$(BIN)/python -m loadtests.bench_gpu $(ARGS)

bench-peers: $(VENV)/.run ## The same beside LitServe, BentoML, MLServer and Ray Serve
	command -v wrk >/dev/null || { apt-get update -qq && apt-get install -y -qq wrk >/dev/null; } || true
	for peer in litserve bentoml mlserver 'ray[serve]'; do name=$${peer%%[*}; test -x build/peers/$$name/bin/python || { \
		$(PYTHON) -m venv build/peers/$$name && build/peers/$$name/bin/python -m pip install --quiet $$peer onnxruntime numpy; }; done
	$(BIN)/python -m loadtests.bench --only peers --peers build/peers $(ARGS)

lint: $(VENV)/.test ## Style, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(VENV)/.test ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.export ## Train the CartPole example anew, into a folder of its own
	$(BIN)/python examples/cartpole/train.py --version v2 --out build/cartpole

constraints: ## Write down the versions of a fresh environment
	rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet -e '.[dev]' torch==2.13.0
	(sed -n '/^#/p' constraints.txt; build/fresh/bin/python -m pip freeze --exclude-editable | sed 's,+cpu,,' | sort -f -u) > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## Remove what make made; the data directory stays
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

# Modules that decide and do no I/O: every branch is tested.
# Tests run beside each other, file by file. What fails there is run once more alone: a machine that is too busy is no
# fault of the code, and what fails twice is.
WORKERS ?= 2
COV := --cov=policies --cov=safety --cov=shadow --cov=service --cov-report=term:skip-covered
PURE := policies/bundle.py,policies/continuous.py,policies/deployment.py,policies/draw.py,policies/errors.py,policies/explore.py,policies/extent.py,policies/graph.py,policies/heads.py,policies/manifest.py,policies/route.py,policies/types.py,safety/*.py,shadow/capital.py,shadow/compare.py,shadow/compare_points.py,shadow/estimate.py,shadow/estimators.py,shadow/evidence.py,shadow/gate.py,shadow/guards.py,shadow/lower_bound.py,shadow/memory.py,shadow/mixture.py,shadow/moments.py,shadow/paths.py,shadow/ratio.py,shadow/regression.py,shadow/rollout.py,shadow/rollout_plan.py,shadow/rows.py,shadow/scores.py,shadow/sequential.py,shadow/shown.py,shadow/totals.py,shadow/units.py,shadow/verdicts.py,shadow/waiting.py,service/acks.py,service/allowance.py,service/allowed.py,service/audit.py,service/backoff.py,service/calibration_state.py,service/columns.py,service/decision.py,service/document.py,service/dry_run.py,service/dry_run_facts.py,service/dry_run_limits.py,service/dry_run_report.py,service/dry_run_verdicts.py,service/history.py,service/ids.py,service/join.py,service/join_model.py,service/judge.py,service/limit_gradient.py,service/logged.py,service/memory.py,service/memory_writes.py,service/openapi.py,service/outcomes.py,service/packed.py,service/pins.py,service/plan.py,service/problems.py,service/record.py,service/settled_points.py,service/settled_rows.py,service/reward_events.py,service/roles.py,service/rolling.py,service/rollout_evidence_text.py,service/rollout_plan_file.py,service/rollout_text.py,service/rollout_view.py,service/ruling.py,service/scalar.py,service/settle.py,service/shadow_rows.py,service/shadow_text.py,service/shipcall.py,service/states.py,service/store_facts.py,service/throttle.py,service/tokens.py,service/waiting_room.py,service/wire.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[play]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.run

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.export: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[export]'
	touch $@
