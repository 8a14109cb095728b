PYTHON ?= python

.PHONY: check test clients format clean

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal

# What tests use and pip cannot bring beside the rest: a browser, and lm-eval in an environment of its own. Without root, the
# tests that need a browser are skipped.
clients:
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || true
	[ -x .venv-clients/bin/lm_eval ] || { python3 -m venv .venv-clients && .venv-clients/bin/pip install -q "lm-eval[api]>=0.4.13,<0.5"; }

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
