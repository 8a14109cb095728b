"""Device memory of decoding, as a number: planning counts it, and does without torch."""

from typing import Final

WORKSPACE_BYTES: Final = 64 * 2**20  # that a decoder may take for itself while it runs
