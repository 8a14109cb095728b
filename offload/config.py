"""Frozen settings as the user gives them; sizes, rates and times in words. "auto" is None here: the planner resolves it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UsageError

_SIZE_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _SIZE_UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}iB": 1024**_power, _letter: 1024**_power}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")

LEAST_PLAIN_RATE = 1e6  # bytes per second; nobody who writes less without a unit means bytes
DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")
SamplingKind = Literal["greedy", "sampled", "nucleus"]
VERIFIERS = ("auto", "sample", "traversal", "rejection")
DRAFT_PASSES = ("auto", "eager", "graphs")
GROW_AHEAD = ("auto", "off")
DRAFT_DEVICES = ("auto", "same", "cpu")
NGRAM_WORDS = ("auto", "on", "off")  # what else `--ngram` says is a file
SMALL_UPLOADS = ("auto", "copy", "mapped")
CODECS = ("auto", "none", "lossless", "residual")
BASES = ("int8", "int4", "int3")  # as coding/base_kinds.py, which knows what they are; a test holds both to the same
DEFAULT_BASE = "int4"
DECODE_KERNELS = ("auto", "none")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


def parse_size(text: str | int, *, flag: str) -> int:
    """Bytes of "24GiB", "24GB", "512MiB", "4096" or an int. UsageError naming `flag` when it is none of these."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _NUMBER_AND_UNIT.fullmatch(str(text))
    size = float(match[1]) * _SIZE_UNITS.get(match[2], math.inf) if match is not None else math.inf
    if size >= 2**63:
        raise UsageError(f"not a size: {text!r}", where=flag, cure="write it like 24GiB, 512MiB, 24GB or plain bytes")
    return round(size)


def parse_rate(text: str | float, *, flag: str) -> float:
    """Bytes per second of "25GB/s", "200MB/s" or a number. UsageError when it is none of these, or zero, or a text like
    "25", whose unit was forgotten."""
    number = text.removesuffix("/s") if isinstance(text, str) else text
    try:
        rate = float(number) if not isinstance(number, str) else float(parse_size(number, flag=flag))
    except (UsageError, TypeError, ValueError):
        rate = math.nan
    forgotten = isinstance(number, str) and not number[-1:].isalpha() and rate < LEAST_PLAIN_RATE
    if forgotten or not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"not a rate: {text!r}", where=flag, cure="write it like 25GB/s or 200MB/s")
    return rate


def sampling_kind(temperature: float, top_p: float = 1.0) -> SamplingKind:
    """How tokens are made from logits, by what it costs. "greedy" finds the largest ones, "sampled" takes noise for all of
    them, "nucleus" sorts them as well."""
    if temperature == 0:
        return "greedy"
    return "sampled" if top_p == 1 else "nucleus"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def bytes_text(num_bytes: float) -> str:
    """`22.1 GiB`, `0.98 GiB`, `16.6 MiB`, `48.0 KiB`, `0 bytes`: for reading, in a unit in which it is not all zeros."""
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20)):
        value = num_bytes / unit_bytes
        if value >= 0.1:
            return f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB" if num_bytes >= 2**10 else f"{num_bytes:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """`1 pass`, `2 passes`, `3 nodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def rate_text(bytes_per_s: float) -> str:
    if bytes_per_s < 1e6:
        return f"{bytes_per_s / 1e3:.0f} kB/s"
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What `offload.load` and the command line accept; field names are the flags. None means auto.

    `model` is a folder with config.json and safetensors, or a hub id; so is each of `draft_models`, of which the planner takes
    the best, or none. One of them may be "self" or "self:KIND", a base of the target's own layers, or "auto": that, where the
    target can have one. `acceptances` are acceptance files, one for each draft or one for all; `profile` a hardware profile.
    `tree` is a spec such as "4x6:kary", "none", "auto" or the path of a TreeShape JSON. Sizes are bytes, rates bytes/s. With
    `fixed_plan` nothing is chosen again while running; `needs_tree` leaves the planner no plan without one that has any.

    `ngram` says whether the text's own continuations are proposed, "auto", "on" or "off", or names datastores that have more;
    `grow_ahead` whether drafts go on growing while layers stream; `draft_device` whether the draft model computes where the
    target does, "same", or on the "cpu". `draft_passes` says whether the draft's passes are recorded as CUDA graphs,
    `small_uploads` how small tensors reach the device. `codec` says how 16-bit layers travel, `decode_kernels` whether what
    is packed or coded is decoded by kernels where there are some, or by plain torch.

    What is known of the requests to come makes plans better: their `sampling`, how many tokens prompt and answer have together
    at most, and how many of them an average pass looks back on. `max_sequences` texts may share a pass.
    """

    model: str
    draft_models: tuple[str, ...] = ()
    tree: str = "auto"
    verifier: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    resident_layers: int | None = None
    slots: int | None = None
    max_context: int | None = None
    emulate_link_bytes_per_s: float | None = None
    acceptances: tuple[str, ...] = ()
    profile: str | None = None
    ngram: tuple[str, ...] = ("auto",)
    grow_ahead: str = "auto"
    draft_device: str = "auto"
    draft_passes: str = "auto"
    small_uploads: str = "auto"
    codec: str = "auto"
    decode_kernels: str = "auto"
    fixed_plan: bool = False
    needs_tree: bool = False
    sampling: SamplingKind = "greedy"
    text_tokens: int | None = None
    context_tokens: int | None = None
    max_sequences: int = 1

    @property
    def self_draft(self) -> str | None:
        """The draft model that is a base of the target, as it was named: "self", "self:KIND" or "auto"."""
        return next((name for name in self.draft_models if base_of_draft(name) is not None), None)

    @property
    def self_kind(self) -> str | None:
        """The base that is offered as a draft, one of BASES."""
        return next((kind for name in self.draft_models if (kind := base_of_draft(name)) is not None), None)

    @property
    def other_drafts(self) -> tuple[str, ...]:
        """The draft models that are models of their own."""
        return tuple(name for name in self.draft_models if base_of_draft(name) is None)

    @property
    def has_ngram(self) -> bool:
        """Whether continuations may be looked up."""
        return self.ngram != ("off",)

    @property
    def needs_ngram(self) -> bool:
        """Whether somebody asked for that."""
        return self.ngram not in (("auto",), ("off",))

    @property
    def datastores(self) -> tuple[str, ...]:
        """The files that they are looked up in, beside the text."""
        return tuple(name for name in self.ngram if name not in NGRAM_WORDS)

    @property
    def draft_sampling(self) -> SamplingKind:
        """How the children of a tree are drawn: where the verifier samples, they are the draft's most probable tokens."""
        return "greedy" if self.verifier == "sample" else self.sampling

    @classmethod
    def parse(
        cls,
        *,
        draft_model: str | Sequence[str] | None = None,
        acceptance: str | Sequence[str] | None = None,
        ngram: str | Sequence[str] | None = None,
        gpu_memory: str | int = "auto",
        host_memory: str | int = "auto",
        resident_layers: str | int = "auto",
        slots: str | int = "auto",
        max_context: str | int = "auto",
        emulate_link: str | float | None = None,
        **fields: Any,
    ) -> "EngineSettings":
        """From values as the command line has them: "auto", "24GiB", "200MB/s", "3". `fields` are those that need no reading,
        such as `model` and `tree`. UsageError names the flag at fault."""
        return cls(
            draft_models=tuple(name for name in _names(draft_model) if name != "none"),
            acceptances=_names(acceptance),
            ngram=_names(ngram) or ("auto",),
            gpu_memory_bytes=None if gpu_memory == "auto" else parse_size(gpu_memory, flag="--gpu-memory"),
            host_memory_bytes=None if host_memory == "auto" else parse_size(host_memory, flag="--host-memory"),
            resident_layers=_count(resident_layers, "--resident-layers"),
            slots=_count(slots, "--slots"),
            max_context=_count(max_context, "--max-context"),
            emulate_link_bytes_per_s=None if emulate_link is None else parse_rate(emulate_link, flag="--emulate-link"),
            **fields,
        )

    def __post_init__(self) -> None:
        for flag, word, known in (
            ("--dtype", self.dtype, DTYPES),
            ("--verifier", self.verifier, VERIFIERS),
            ("--draft-passes", self.draft_passes, DRAFT_PASSES),
            ("--grow-ahead", self.grow_ahead, GROW_AHEAD),
            ("--draft-device", self.draft_device, DRAFT_DEVICES),
            ("--small-uploads", self.small_uploads, SMALL_UPLOADS),
            ("--codec", self.codec, CODECS),
            ("--decode-kernels", self.decode_kernels, DECODE_KERNELS),
        ):
            if word not in known:
                raise UsageError(
                    f"unknown {flag[2:].replace('-', ' ')} {word!r}", where=flag, cure=f"one of {', '.join(known)}"
                )
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"unknown device {self.device!r}", where="--device", cure="one of auto, cpu, cuda, cuda:N")
        if sum(base_of_draft(name) is not None for name in self.draft_models) > 1:
            raise UsageError("more than one base of the same target", where="--draft-model", cure="name one of self and auto")
        if len(self.ngram) > 1 and any(word in NGRAM_WORDS for word in self.ngram):
            raise UsageError(
                f"{' and '.join(self.ngram)} at once", where="--ngram", cure="give auto, on or off alone, or only files"
            )
        if len(self.acceptances) > 1 and len(self.acceptances) != len(self.draft_models):
            raise UsageError(
                f"{len(self.acceptances)} acceptance files for {len(self.draft_models)} draft models",
                where="--acceptance",
                cure="give one for all drafts, or one for each in their order",
            )
        for flag, value, least in (
            ("--resident-layers", self.resident_layers, 0),
            ("--slots", self.slots, 1),
            ("--max-context", self.max_context, 2),
            ("--max-sequences", self.max_sequences, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{value} is too small", where=flag, cure=f"give at least {least}, or auto")
        if self.emulate_link_bytes_per_s is not None and self.device.startswith("cuda"):
            raise UsageError(
                "an emulated link exists on the CPU device only",
                where="--emulate-link with --device cuda",
                cure="leave one of the two out",
            )


def base_of_draft(name: str) -> str | None:
    """Which base `--draft-model NAME` stands for; None for a model of its own. UsageError for a base that there is not."""
    if name in ("self", "auto"):
        return DEFAULT_BASE
    kind = name.removeprefix("self:")
    if kind == name:
        return None
    if kind not in BASES:
        raise UsageError(f"no base is called {kind!r}", where=f"--draft-model {name}", cure=f"one of {', '.join(BASES)}")
    return kind


def check_draft_passes(draft_passes: str, replays: bool, device_name: str) -> None:
    """UsageError when graphs are asked for of a device that has none."""
    if draft_passes == "graphs" and not replays:
        raise UsageError(
            f"{device_name} does not replay recorded passes: only CUDA devices do",
            where="--draft-passes graphs",
            cure="leave it at auto, or give --device cuda",
        )


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _count(value: str | int, flag: str) -> int | None:
    if value == "auto":
        return None
    try:
        return int(str(value))  # by way of its text: int(2.7) would be 2
    except ValueError:
        raise UsageError(f"not a whole number: {value!r}", where=flag, cure="give a number, or auto") from None
