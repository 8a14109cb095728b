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

# Every dependency is bounded: below by the oldest release that was tested, above by the newest; `make compat` runs both ends.
# What we build on the inside of, or what moves fast, ends with the tested minor release, the rest with the major one. To
# take a newer release: raise its bound, `make constraints`, `make compat`, and commit what passes.
BENCH = ["accelerate>=1.10,<2", "matplotlib>=3.10,<4"]
SERVE = [
    "fastapi>=0.120,<0.166",
    "starlette>=0.48,<1.11",
    "uvicorn>=0.50,<0.55",  # offload/serve/connections.py builds on its HTTP/1.1 protocol class
    "pydantic>=2.11,<2.15",
    "anyio>=4.10,<5",
    "prometheus-client>=0.20,<0.27",
]
CLIENTS = ["openai>=2.0,<4", "httpx2>=2.14,<3", "playwright>=1.60,<2", "schemathesis>=4.30,<5"]
# A client in an environment of its own, see `make clients`
LM_EVAL = ["lm-eval[api]>=0.4.13,<0.5"]
# worksteal came with 3.2, and since 3.6 tests run on a worker's main thread, where signals arrive
PYTEST = ["pytest>=9.0,<10", "pytest-timeout>=2.4,<3", "pytest-xdist>=3.6,<4"]
# What decoders are compared with: kernels run in Triton's interpreter, formats against readers of others
FORMATS = ["triton>=3.3,<3.10; sys_platform == 'linux'", "gguf>=0.18,<0.20", "compressed-tensors>=0.19,<0.21"]
# A new release of ruff or mypy may find new faults in old code
CHECK = ["hypothesis>=6.150,<7", "mypy>=2.4,<2.5", "ruff>=0.17,<0.18"]

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
        "offload.coding",
        "offload.datastore",
        "offload.demo",
        "offload.device",
        "offload.doctor",
        "offload.engine",
        "offload.model",
        "offload.planner",
        "offload.report",
        "offload.scale",
        "offload.serve",
        "offload.streaming",
        "offload.text",
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
        "transformers>=5.16,<5.25",
        "tokenizers>=0.23.1,<0.24",
        "huggingface_hub>=1.5,<2.5",
        "safetensors>=0.8,<0.9",
        "jinja2>=3.1.6,<4",  # chat templates; older sandboxes have known holes
        "numpy>=2.1,<3",
        "numba>=0.64,<0.69",  # codes of weights on the CPU, in loops that are compiled
        "packaging>=24.0,<27",
        "psutil>=6.0,<8",
        "nvidia-ml-py>=12.560.30,<14",
        "rich>=14.0,<16",
    ],
    extras_require={
        "bench": BENCH,
        "serve": SERVE,
        "lm-eval": LM_EVAL,
        "test": [*BENCH, *SERVE, *CLIENTS, *FORMATS, *PYTEST, *CHECK],
    },
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Programming Language :: Python :: 3",
        "Private :: Do Not Upload",  # the index refuses it: `tree` would collide with dm-tree's, see above
    ],
)
