"""profiles/hardware/*.json: a HardwareProfile as a document, and back, every key checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ModelError
from .hardware import RATES, REQUIRED_RATES, DecodeTime, HardwareProfile, MeasuredModel, ModelTimes, TaskTimes
from .json_file import read_file

SCHEMA_VERSION = 1
PRESETS = Path(__file__).parents[2] / "profiles/hardware"
_TEXTS = ("device_name", "device_type", "source")
_LISTS = ("models", "laws", "decoders", "doubts")
_KNOWN = {"schema_version", "published", "layer_overhead_s", "facts", *_LISTS, *_TEXTS, *RATES}


def find_hardware(name: str) -> HardwareProfile:
    """The profile in the file `name`, or that of profiles/hardware which is called so. ModelError when there is neither."""
    presets = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = PRESETS / f"{name}.json" if name in presets else Path(name)
    if not path.exists():
        raise ModelError(
            f"no hardware profile {name!r}",
            where="--profile",
            cure=f"make one with `profile hardware`, or take one of {', '.join(presets)}",
        )
    return read_hardware(path)


def read_hardware(path: Path) -> HardwareProfile:
    """The profile in `path`. ModelError when it is not one."""
    return read_file(path, from_json, "a hardware profile", "see profiles/README.md, or make one with `profile hardware`")


def to_json(profile: HardwareProfile) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(profile, name) for name in (*_TEXTS, "published", *RATES, "layer_overhead_s")},
        "models": [
            {"role": model.role, "shape": dict(model.shape), "times": [_model_table(times) for times in model.times]}
            for model in profile.models
        ],
        "laws": [_task_table(times) for times in profile.tasks],
        "decoders": [_fields(known) for known in profile.decoders],
        "doubts": list(profile.doubts),
        "facts": dict(profile.facts),
    }


def from_json(document: object) -> HardwareProfile:
    """From a parsed document. ValueError names the fault: a key that is missing or unknown, a rate that is none."""
    if not isinstance(document, Mapping):
        raise ValueError(f"a hardware profile is a JSON object, not {type(document).__name__}")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {document.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    if unknown := sorted(set(document) - _KNOWN):
        raise ValueError(f"unknown key {unknown[0]!r}")
    if missing := [name for name in (*_TEXTS, *REQUIRED_RATES) if document.get(name) is None]:
        raise ValueError(f"missing key {missing[0]!r}")
    facts = document.get("facts", {})
    if not isinstance(facts, Mapping):
        raise ValueError("facts is not an object")

    def rate(name: str) -> float | None:
        return None if document.get(name) is None else _number(document[name], name)

    def size(name: str) -> int | None:
        return None if document.get(name) is None else _whole(document[name], name)

    return HardwareProfile(
        device_name=str(document["device_name"]),
        device_type=str(document["device_type"]),
        source=str(document["source"]),
        published=document.get("published") is True,
        device_memory_bytes=size("device_memory_bytes"),
        host_memory_bytes=size("host_memory_bytes"),
        link_bytes_per_s=_number(document["link_bytes_per_s"], "link_bytes_per_s"),
        pageable_link_bytes_per_s=rate("pageable_link_bytes_per_s"),
        disk_bytes_per_s=rate("disk_bytes_per_s"),
        flops_per_s=_number(document["flops_per_s"], "flops_per_s"),
        device_memory_bytes_per_s=_number(document["device_memory_bytes_per_s"], "device_memory_bytes_per_s"),
        layer_overhead_s=_number(document.get("layer_overhead_s", 0.0), "layer_overhead_s"),
        models=tuple(_measured_model(entry) for entry in _list(document, "models")),
        tasks=tuple(_task_times(entry) for entry in _list(document, "laws")),
        decoders=tuple(_decode_time(entry) for entry in _list(document, "decoders")),
        doubts=tuple(map(str, _list(document, "doubts"))),
        facts=dict(facts),
    )


def _model_table(times: ModelTimes) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in _fields(times).items()}


def _fields(times: ModelTimes | DecodeTime) -> dict[str, object]:
    return {name: getattr(times, name) for name in times.__dataclass_fields__}


def _task_table(times: TaskTimes) -> dict[str, object]:
    return {
        "task": times.task,
        "law": times.sampling,
        "vocab_size": times.vocab_size,
        "rows": list(times.rows),
        "task_s": list(times.task_s),
    }


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value


def _list(document: Mapping[str, object], name: str) -> Sequence[object]:
    value = document.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _measured_model(entry: object) -> MeasuredModel:
    match entry:
        case {"role": "target" | "draft" | "host draft" as role, "shape": dict(shape), "times": [_, *_] as tables}:
            times = tuple(sorted((_model_times(table) for table in tables), key=lambda table: table.context_rows))
            return MeasuredModel(role=role, shape={name: _whole(value, name) for name, value in shape.items()}, times=times)
    raise ValueError("an entry of models is not {role, shape, times}")


def _model_times(entry: object) -> ModelTimes:
    match entry:
        case {"context_rows": int(context_rows), "rows": [*rows], "layer_s": [*layer_s], "rest_s": [*rest_s], **others}:
            return ModelTimes(
                context_rows=context_rows,
                rows=_wholes(rows, "rows"),
                layer_s=_numbers(layer_s, "layer_s"),
                rest_s=_numbers(rest_s, "rest_s"),
                wake_s=_number(others.get("wake_s", 0.0), "wake_s"),
            )
    raise ValueError("an entry of times is not {context_rows, rows, layer_s, rest_s}")


def _task_times(entry: object) -> TaskTimes:
    match entry:
        case {
            "task": "draw" | "verify" as task,
            "law": "greedy" | "sampled" | "nucleus" as sampling,
            "vocab_size": int(vocab_size),
            "rows": [*rows],
            "task_s": [*task_s],
        }:
            return TaskTimes(
                task=task,
                sampling=sampling,
                vocab_size=vocab_size,
                rows=_wholes(rows, "rows"),
                task_s=_numbers(task_s, "task_s"),
            )
    raise ValueError("an entry of laws is not {task, law, vocab_size, rows, task_s}")


def _decode_time(entry: object) -> DecodeTime:
    match entry:
        case {"weights": str(weights), "dtype_bytes": dtype_bytes, "computed_bytes": computed_bytes, "layer_s": layer_s}:
            return DecodeTime(
                weights=weights,
                dtype_bytes=_whole(dtype_bytes, "dtype_bytes"),
                computed_bytes=_whole(computed_bytes, "computed_bytes"),
                layer_s=_number(layer_s, "layer_s"),
            )
    raise ValueError("an entry of decoders is not {weights, dtype_bytes, computed_bytes, layer_s}")


def _wholes(values: Sequence[object], name: str) -> tuple[int, ...]:
    return tuple(_whole(value, name) for value in values)


def _numbers(values: Sequence[object], name: str) -> tuple[float, ...]:
    return tuple(_number(value, name) for value in values)
