# make demo: train and evaluate a small real model here.   make test: lint and every test.   Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo readme picture test lint format clean

# torch comes first and pinned: what follows is then satisfied by it and pulls no other build.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/sparsekv demo

# The table in README.md, from the last demo.
readme: .venv/ready
	$(BIN)/python scripts/fill_readme.py

# The picture in README.md, from the last demo's report.
picture: .venv/ready
	scripts/install_browser.sh
	$(BIN)/python scripts/take_picture.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x scripts/*.sh .ci/run

# tests/browser opens the report in a real browser; tests/slurm runs jobs on a real Slurm, which it installs as root.
test: lint
	scripts/install_browser.sh
	$(BIN)/pytest -n auto --dist loadgroup --no-loadscope-reorder

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv out
