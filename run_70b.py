#!/usr/bin/env python3
"""treestream's command line. `python run_70b.py --help` says what it can do."""

import sys

from offload.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
