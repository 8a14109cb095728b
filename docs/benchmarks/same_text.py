"""Whether two runs' `--output` hold the same text: `python docs/benchmarks/same_text.py EXPECTED FOUND`, exit 1 if not.

In 16-bit arithmetic a near tie between two tokens can fall either way when a pass has other shapes; it then says where."""

import json
import sys
from pathlib import Path


def main() -> int:
    expected, found = (json.loads(Path(name).read_text(encoding="utf-8"))["token_ids"] for name in sys.argv[1:3])
    pairs = list(zip(expected, found, strict=False))
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    print(f"{sys.argv[2]}: {same} of {len(pairs)} tokens as in {sys.argv[1]}")
    return 0 if pairs and same == len(pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
