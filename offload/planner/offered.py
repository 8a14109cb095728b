"""Which ways of storing a target are priced beside each other, and whether there is a base among them. No torch."""

from ..config import DEFAULT_BASE, EngineSettings
from ..errors import UsageError
from .shapes import ModelShape
from .what_if import coded_beside_base, coded_without_loss, with_base, without_code


def wanted_base(settings: EngineSettings, *, packed: str = "", base: str = "") -> str | None:
    """The kind of base that the target is offered with, None for none. `packed` is what its weights are called where they are
    packed, so that there can be none; `base` is the kind that a folder has which was coded beside one. UsageError where the
    settings ask for what cannot be."""
    asked = settings.self_kind
    flag = "--codec residual" if asked is None else f"--draft-model {_name(settings)}"
    if asked is None and settings.codec != "residual":
        return base or None
    if packed:
        if asked is not None and _name(settings) == "auto" and settings.codec != "residual":
            return None
        raise UsageError(
            f"the target's weights are packed ({packed}), and a base is made of 16-bit weights",
            where=flag,
            cure="leave it out, or name a model whose weights are not packed",
        )
    if base and asked not in (None, base) and _name(settings) != "auto":
        raise UsageError(
            f"the target was coded beside a base of {base}, and that is the one it has",
            where=flag,
            cure=f"name self:{base}, or convert the model anew with --base {asked}",
        )
    return base or asked or DEFAULT_BASE


def offered_targets(settings: EngineSettings, shape: ModelShape) -> tuple[ModelShape, ...]:
    """`shape` as each offer would have it stored: without a base first, where that is not asked for."""
    stored = shape.stored
    packed = stored.name if stored is not None and not stored.codec else ""
    kind = wanted_base(settings, packed=packed, base=stored.base if stored is not None else "")
    if stored is not None and stored.codec == "residual" and settings.codec != "none":
        return (shape,)
    if settings.codec == "none":
        shape = without_code(shape)
    elif settings.codec == "lossless":
        shape = coded_without_loss(shape)
    if kind is None or (settings.codec == "none" and settings.self_kind is None):
        return (shape,)
    if settings.codec == "residual":
        return (coded_beside_base(without_code(shape), kind),)
    coded = coded_beside_base(without_code(shape), kind) if settings.codec == "auto" else shape
    return shape, coded if coded.stored is not None and coded.stored.base else with_base(shape, kind)


def _name(settings: EngineSettings) -> str:
    return next((name for name in settings.draft_models if name not in settings.other_drafts), "")
