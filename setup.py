"""Packaging. Tool settings are in pyproject.toml.

The packages are listed one by one. Never `find_packages()`: it would also ship `tests`. And never a published wheel:
dm-tree installs a top-level `tree` too, and a wheel of ours laid over it would overwrite its files
(docs/adr/0001-plain-package-names.md). Install into a virtual environment, editable, for development and use.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "offload" / "version.py").read_text(encoding="utf-8"))
assert VERSION is not None, "offload/version.py holds no version"

BENCH = ["accelerate", "matplotlib"]
# uvicorn is bounded: offload/serve/connections.py builds on its HTTP/1.1 protocol class
SERVE = ["fastapi>=0.120", "uvicorn>=0.50,<0.60", "prometheus-client>=0.20"]
# The server's clients, in its tests. lm-eval is not among them: see `make clients`.
CLIENTS = ["openai>=2", "playwright>=1.50", "schemathesis>=4,<5"]
# worksteal came with 3.2, and since 3.6 tests run on a worker's main thread, where signals arrive
PYTEST = ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.6"]

setup(
    name="treestream",
    version=VERSION.group(1),
    description="Exact speculative decoding of a model that does not fit its GPU, its layers streamed from host memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "offload",
        "offload.bench",
        "offload.calibrate",
        "offload.cli",
        "offload.demo",
        "offload.device",
        "offload.doctor",
        "offload.model",
        "offload.planner",
        "offload.scale",
        "offload.serve",
        "offload.streaming",
        "offload.weights",
        "tree",
    ],
    py_modules=["run_70b"],
    package_data={
        "offload.demo": ["target/*", "draft/*", "*.json", "*.jsonl"],
        "offload.serve": ["page/*"],
    },
    install_requires=[
        "torch>=2.6,<2.14",
        "transformers>=5.10,<6",
        "safetensors>=0.8",
        "jinja2>=3.1.6",  # chat templates; older sandboxes have known holes
        "numpy",
        "psutil",
        "nvidia-ml-py",
        "rich",
    ],
    extras_require={
        "bench": BENCH,
        "serve": SERVE,
        # ruff and mypy are bounded: a new release of either may find new faults in old code
        "test": [*BENCH, *SERVE, *CLIENTS, *PYTEST, "hypothesis", "mypy>=2.4,<2.5", "ruff>=0.17,<0.18"],
    },
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Programming Language :: Python :: 3",
        "Private :: Do Not Upload",  # the index refuses it: `tree` would collide with dm-tree's, see above
    ],
)
