"""Which engines a benchmark puts side by side, their names, and which cannot run here. Cheap to import."""

from importlib.util import find_spec

from ..errors import UsageError

BASELINES = ("plain", "accelerate", "deepspeed", "transformers")
LABELS = {
    "ours": "treestream",
    "plain": "treestream, one token a pass (--tree none)",
    "accelerate": "Accelerate cpu_offload, as shipped",
    "accelerate-preload": "Accelerate cpu_offload, whole layers preloaded",
    "accelerate-dispatch": "Accelerate dispatch_model, same device budget",
    "accelerate-disk": "Accelerate disk_offload",
    "deepspeed-tuned": "DeepSpeed ZeRO-Inference, tuned",
    "deepspeed-example": "DeepSpeed ZeRO-Inference, as its example",
    "transformers": "transformers, all on the device",
}
_ON_GPU = {
    "accelerate": ("accelerate", "accelerate-preload", "accelerate-dispatch"),
    "deepspeed": ("deepspeed-tuned", "deepspeed-example"),
}
_ON_CPU = {"accelerate": ("accelerate-disk",), "deepspeed": ("deepspeed-tuned",)}


def parse_baselines(text: str) -> tuple[str, ...]:
    """Of "plain,accelerate". UsageError for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise UsageError(f"unknown baseline {unknown[0]!r}", where="--baseline", cure=f"any of {', '.join(BASELINES)}")
    return names


def engines_for(baselines: tuple[str, ...], *, on_gpu: bool) -> tuple[str, ...]:
    """Ours, then each baseline in the variants that this kind of machine has."""
    variants = _ON_GPU if on_gpu else _ON_CPU
    return ("ours", *(engine for baseline in baselines for engine in variants.get(baseline, (baseline,))))


def why_not(engine: str, *, on_gpu: bool) -> str | None:
    """Why an engine cannot run on this machine whatever the model."""
    library = engine.partition("-")[0]
    if library in ("accelerate", "deepspeed") and find_spec(library) is None:
        return "not installed"
    return "needs a GPU" if library == "deepspeed" and not on_gpu else None
