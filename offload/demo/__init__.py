"""The bundled pair: a trained target of 5.5 M parameters and its draft of 0.5 M. `train.py` made them; see README.md here."""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"
_PROFILES = Path(__file__).parents[2] / "profiles/acceptance"
ACCEPTANCE = _PROFILES / "demo-draft__demo-target__t0.json"
PROMPTS = Path(__file__).parent / "prompts.jsonl"

# Chosen so that copying takes most of a pass on two CPU cores, as it does for a 70B over PCIe.
LINK = "100MB/s"


def acceptance_at(temperature: float, base: str | None = None) -> Path:
    """The pair's acceptance, measured at 0, 0.6 and 1.0, nearest to `temperature`; or that of a base of the target, "int8",
    "int4" or "int3"."""
    nearest = min(("0", "0.6", "1.0"), key=lambda measured: abs(float(measured) - temperature))
    return _PROFILES / f"demo-{f'self-{base}' if base else 'draft'}__demo-target__t{nearest}.json"
