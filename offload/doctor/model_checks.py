"""Is a model fit to be run: its files, its tokenizer, and whether a draft speaks the same tokens. Fetches nothing."""

from dataclasses import dataclass
from pathlib import Path

from ..coding.kernels import has_kernels
from ..config import bytes_text, counted
from ..errors import ModelError, OffloadError
from ..model.files import open_model
from ..model.locate import find_config, is_gguf
from ..planner.cost import GIB, ModelCost
from ..planner.shapes import ModelShape, find_shape, is_preset
from ..scale.preset import is_scale_model, scale_shape
from ..text.tokenizer import Tokenizer, check_same_vocabulary, open_tokenizer
from ..typed_model import TypedModel, resolve_dtype
from ..weights.checkpoint import Checkpoint
from ..weights.disk_speed import measure_disk
from .facts import Check, DiskFacts

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CPU_DTYPE = "float32"  # what --dtype auto is there
DISK_TEST_S = 2.0
DISK_TEST_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What could be learned of a model. Without `model` and `checkpoint`, its weights were not there or not sound."""

    checks: tuple[Check, ...]
    model: TypedModel | None = None
    cost: ModelCost | None = None
    vocab_size: int | None = None
    tokenizer: Tokenizer | None = None
    checkpoint: Checkpoint | None = None


def inspect_model(name: str, flag: str, label: str, *, on_gpu: bool) -> Inspected:
    """Everything about the model that `flag` names. Faults are among the checks; the first check is called `label`."""
    is_scaled = is_scale_model(name)
    try:
        config = None if is_scaled or is_preset(name) else find_config(name, flag)
        if config is not None:
            return _inspect_files(config if is_gguf(config) else config.parent, flag, label, on_gpu)
        shape = scale_shape(name, flag) if is_scaled else find_shape(name, flag)  # which refuses a name that is nowhere
    except OffloadError as error:
        return Inspected(checks=(_fault(label, error),))
    value = f"{name}: {shape.num_parameters / 1e9:.2f} B parameters by its shape, no files looked at"
    return Inspected(checks=(Check(name=label, value=value),), cost=_cost(shape, on_gpu), vocab_size=shape.vocab_size)


def compare_vocabularies(target: Inspected, draft: Inspected) -> tuple[Check, ...]:
    """Whether both number their tokens alike; nothing where one of them could not be read."""
    if target.vocab_size is None or draft.vocab_size is None:
        return ()
    sizes = (target.vocab_size, draft.vocab_size)
    if target.checkpoint is None or draft.checkpoint is None:
        if sizes[0] == sizes[1]:
            return (Check(name="vocabulary", value=f"{sizes[0]} tokens in both, by their shapes"),)
        value = f"{sizes[0]} tokens in the target, {sizes[1]} in the draft, by their shapes"
        return (Check(name="vocabulary", value=value, cure="right only if it is padding: run doctor on the models' folders"),)
    try:
        check_same_vocabulary(target.tokenizer, draft.tokenizer, sizes, "--draft-model")
    except ModelError as error:
        return (_fault("vocabulary", error),)
    return (Check(name="vocabulary", value=f"{sizes[0]} tokens, the same in draft and target"),)


def time_disk(checkpoint: Checkpoint, limit_s: float = DISK_TEST_S) -> DiskFacts:
    """How fast the model's files are read. DeviceError when the disk fails."""
    speed = measure_disk(checkpoint, limit_s, DISK_TEST_BYTES)
    return DiskFacts(
        read_bytes=speed.read_bytes, read_s=speed.read_s, total_bytes=checkpoint.num_bytes, is_direct=speed.is_direct
    )


def _inspect_files(path: Path, flag: str, label: str, on_gpu: bool) -> Inspected:
    """Of a folder, or a GGUF file."""
    files = open_model(str(path), flag)
    architecture, checkpoint = files.architecture, files.checkpoint
    size, num_files = bytes_text(checkpoint.num_bytes), counted(len(checkpoint.files), "file")
    layers = counted(architecture.num_layers, "layer")
    value = f"{architecture.config.model_type} in {files.weights}, {layers}, {size} in {num_files}, headers and index sound"
    device_type = "cuda" if on_gpu else "cpu"
    model = TypedModel(
        architecture=architecture,
        dtype=resolve_dtype("auto", files.dtype, device_type),
        weights=files.weights,
        packed=files.codecs,
        kernels=on_gpu and has_kernels(),
        bases=files.bases,
        base=files.base,
    )
    tokenizer, tokenizer_check = _inspect_tokenizer(path, label, architecture.vocab_size)
    return Inspected(
        checks=(Check(name=label, value=value), tokenizer_check),
        model=model,
        cost=model.cost,
        vocab_size=architecture.vocab_size,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
    )


def _inspect_tokenizer(path: Path, label: str, vocab_size: int) -> tuple[Tokenizer | None, Check]:
    name = "tokenizer" if label == "model" else f"{label} tokens"
    try:
        tokenizer = open_tokenizer(path)
    except ModelError as error:
        return None, _fault(name, error)
    if tokenizer is None:
        cure = "copy the tokenizer files into the folder; without them only --prompt-ids works"
        return None, Check(name=name, value="none in the model's folder", cure=cure)
    if tokenizer.num_tokens > vocab_size:
        value = f"numbers {tokenizer.num_tokens} tokens, the model's embedding has {vocab_size}"
        cure = "use the tokenizer files that belong to this model"
        return tokenizer, Check(name=name, value=value, cure=cure, exit_code=ModelError.exit_code)
    return tokenizer, Check(name=name, value=f"{tokenizer.num_tokens} tokens")


def _cost(shape: ModelShape, on_gpu: bool) -> ModelCost:
    return shape.cost(DTYPE_BYTES[shape.dtype if on_gpu else CPU_DTYPE])


def _fault(name: str, error: OffloadError) -> Check:
    return Check(name=name, value=error.what, cure=error.cure, exit_code=ModelError.exit_code)
