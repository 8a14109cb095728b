"""`version`: what a bug report needs."""

import argparse
import json
import platform

from ..device import cuda
from ..report.report import environment
from ..version import __version__


def run(arguments: argparse.Namespace) -> int:
    versions = environment("")
    del versions["device"]
    document = {"treestream": __version__, **versions, "cuda": cuda.version(), "python": platform.python_version()}
    print(json.dumps(document) if arguments.json else "\n".join(f"{name:12} {value}" for name, value in document.items()))
    return 0
