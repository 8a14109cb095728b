"""What a round asks of a GPU, checked without one. Meta tensors, which have shapes and no memory, stand for those on the
device: what depends on their values raises by itself. Every other operation is looked at: a wait for the device that nobody
asked for is a failure, and so is one that takes tensors of both.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tree.logprobs
import tree.verify
from conftest import FAMILIES, VOCAB_SIZE
from offload.device.base import CopyTicket, Interval, Ticket
from offload.engine.decode import DecodeLoop
from offload.engine.sequence import Sequence as Text
from offload.engine.sessions import Sessions
from offload.model.attention import register
from offload.model.causal_lm import CausalLM
from offload.model.drafter import ModelDrafter
from offload.model.kv_cache import KVCache
from offload.source import check_source
from offload.streaming.stream import LayerStream, ResidentWeights
from offload.typed_model import TypedModel
from offload.weights.placement import Placement
from shapes import from_widths
from tree.aim import Aim
from tree.logprobs import Scoring
from tree.sampling import SamplingParams
from tree.verify import METHODS, Method

Models = Callable[..., Path]
aten = torch.ops.aten
META = torch.device("meta")
STAGED_BYTES = 2**16  # what the driver takes along with the command
NUM_SLOTS = 2
TREE = from_widths((5, 2, 1))
PROMPT = [5, 9, 33, 2, 71]


class _Now(CopyTicket):
    def __init__(self, buffer: torch.Tensor | None = None) -> None:
        self.buffer = buffer


class MetaDevice:
    """A META device as far as the types of its tensors go. Streams and tickets are other tests' business."""

    name, torch_device, host_addressable, small_uploads, at_once = "meta", META, False, None, False

    def __init__(self, *, replays: bool) -> None:
        self.replays = replays

    def alloc(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=META)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(META, non_blocking=True)

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        return _Now(dst)

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        assert isinstance(ticket, _Now) and ticket.buffer is not None
        return ticket.buffer

    def release(self, buffer: torch.Tensor) -> Ticket:
        return _Now()

    def mark(self) -> Ticket:
        return _Now()

    def first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def beside(self, after: Ticket) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with Audit(staged_bytes=-1) as audit:  # memory that is not pinned has no place in a recording, however little
            work()
        assert audit.found == []
        return work

    def passed(self, ticket: Ticket) -> bool:
        return True

    def translated(self) -> AbstractContextManager[None]:
        return nullcontext()

    def interval(self, ticket: Ticket) -> Interval:
        return Interval(0.0, 0.0)

    def renew_clock(self) -> None:
        pass


class MetaGenerator(torch.Generator):
    """One of the host that says that it is the device's."""

    device = META

    def __new__(cls, device: object = META) -> "MetaGenerator":
        return super().__new__(cls, "cpu")


class HiddenUploads(TorchFunctionMode):
    """What torch uploads, and waits for, inside one of its functions."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == META:
            self._found.append("torch.tensor(..., device=)")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            self._found += [
                f"an index that is a {type(index).__name__}" for index in indices if isinstance(index, list | range)
            ]
        return func(*args, **kwargs)


class Audit(TorchDispatchMode):
    """Notes what would wait for the device, uploads of more than `staged_bytes`, operations on tensors of host and device."""

    def __init__(self, staged_bytes: int = STAGED_BYTES) -> None:
        super().__init__()
        self._staged_bytes, self.found = staged_bytes, list[str]()
        self._hidden = HiddenUploads(self.found)

    def __enter__(self) -> "Audit":
        self._hidden.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._hidden.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is aten._to_copy.default:
            self._copied(args[0], output, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._copied(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            self._computed(str(func), [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)])
        return output

    def _copied(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        places = source.device.type, target.device.type
        if places == ("meta", "cpu"):
            self.found.append(f"a download of {tuple(source.shape)}")
        elif places == ("cpu", "meta") and not non_blocking:
            self.found.append(f"a blocking upload of {tuple(source.shape)}")
        elif places == ("cpu", "meta") and source.nbytes > self._staged_bytes:
            self.found.append(f"a large upload of {tuple(source.shape)}")

    def _computed(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        if len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
            self.found.append(f"{name} of host and device")
        elif name.startswith("aten.index") and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            self.found.append(f"{name} by a mask, whose size is that of the result")


def open_loop(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, replays: bool = True, method: Method = "traversal"
) -> tuple[DecodeLoop, list[int]]:
    """A loop over weights without values, and a list that grows with every transfer to the host, of as many numbers."""
    waits: list[int] = []

    def to_host(*columns: torch.Tensor) -> list[list[float]]:
        waits.append(len(torch.cat([column.double() for column in columns])))
        return [[0.0] * len(column) for column in columns]

    for module in (tree.verify, tree.logprobs):
        monkeypatch.setattr(module, "to_host", to_host)
    monkeypatch.setattr(torch, "Generator", MetaGenerator)
    device: Any = MetaDevice(replays=replays)
    model = check_source(str(folder), "--model", "bfloat16", "cuda").model
    register()
    target, stream = streamed(device, model)
    draft = check_source(str(folder), "--model", "bfloat16", "cuda").model
    drafter = ModelDrafter(resident(device, draft), device, VOCAB_SIZE, Aim(shape=TREE), 1024, max_nodes=TREE.num_nodes)
    drafter.prepare(Aim(shape=TREE))
    plan: Any = SimpleNamespace(tree=TREE, aim=Aim(shape=TREE), pass_rows=1024, ahead_steps=0)
    sessions = Sessions([target.cache, drafter.cache], max_bytes=0)
    return DecodeLoop(device, target, stream, drafter, sessions, plan, method=method), waits


def begin(loop: DecodeLoop, prompt: Sequence[int], params: SamplingParams, scoring: Scoring | None = None) -> Text:
    return loop.join(prompt, len(prompt), params, loop.seeded(0), scoring, tokens_left=1000)


def streamed(device: Any, model: TypedModel) -> tuple[CausalLM, LayerStream]:
    codecs, num_layers = model.codecs, model.architecture.num_layers
    layout, layer_bytes = codecs[1].computed, codecs[1].computed.num_bytes
    store: Any = SimpleNamespace(
        codecs=codecs,
        stored_bytes=[layer_bytes] * num_layers,
        slot_bytes=layer_bytes,
        scratch_bytes=0,
        placement=Placement(num_layers=num_layers, resident=frozenset({1})),
        resident={1: layout.views(device.alloc(layer_bytes))},
        coded={},
        base=lambda layer: {},
        ring=None,
        through_ring=lambda layer: False,
        ready=lambda layer: True,
        source=lambda layer: torch.empty(layer_bytes, dtype=torch.uint8),
        sent=lambda layer, ticket: None,
    )
    stream = LayerStream(device, store, NUM_SLOTS)
    return causal_lm(device, model, stream), stream


def resident(device: Any, model: TypedModel) -> CausalLM:
    layers = [codec.computed.views(device.alloc(codec.computed.num_bytes)) for codec in model.codecs]
    return causal_lm(device, model, ResidentWeights(layers))


def causal_lm(device: Any, model: TypedModel, weights: Any) -> CausalLM:
    architecture = model.architecture
    cache = KVCache(
        device,
        layer_shapes=architecture.kv_shapes,
        num_segments=1,
        segment_rows=2048,
        dtype=model.dtype,
        rope=architecture.rope,
    )
    outside = model.outside_layout.views(device.alloc(model.outside_layout.num_bytes))
    return CausalLM(architecture, device, model.dtype, outside, weights, cache)


def assert_a_later_pass_only_waits(loop: DecodeLoop, waits: list[int], text: Text, *, times: int) -> None:
    """`times`, and asks the device for nothing else."""
    loop.run_pass([text])
    waits.clear()
    with Audit() as audit:
        loop.run_pass([text])
    assert audit.found == [] and len(waits) == times


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("params", "method"),
    [
        pytest.param(params, method, marks=() if METHODS.index(method) == number else pytest.mark.slow)
        for number, params in enumerate([SamplingParams(), SamplingParams(0.6), SamplingParams(0.8, top_k=40, top_p=0.9)])
        for method in METHODS
    ],
)
def test_a_round_waits_once(monkeypatch: pytest.MonkeyPatch, models: Models, params: SamplingParams, method: Method) -> None:
    loop, waits = open_loop(monkeypatch, models(), method=method)
    assert_a_later_pass_only_waits(loop, waits, begin(loop, PROMPT, params), times=1)


@pytest.mark.parametrize(
    ("family", "replays"),
    [
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in FAMILIES[1:]),
        ("llama", True),
        ("llama", False),
    ],
)
def test_a_round_of_every_family_waits_once(
    monkeypatch: pytest.MonkeyPatch, models: Models, family: str, replays: bool
) -> None:
    loop, waits = open_loop(monkeypatch, models(family), replays=replays)
    assert_a_later_pass_only_waits(loop, waits, begin(loop, PROMPT, SamplingParams(0.6)), times=1)


@pytest.mark.slow
def test_trees_that_are_cut_at_the_end_of_an_answer_bring_no_masks_of_their_own(
    monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    """Once each of their shapes was uploaded, behind the layers under way: once for the target, once for the draft."""
    loop, _ = open_loop(monkeypatch, models())
    for _ in range(2):
        text = begin(loop, PROMPT, SamplingParams(0.6))
        with Audit() as audit:
            for text.tokens_left in (100, 3, 2, 1):
                loop.run_pass([text])
        assert audit.found == []


def test_scores_take_one_more_wait(monkeypatch: pytest.MonkeyPatch, models: Models) -> None:
    loop, waits = open_loop(monkeypatch, models())
    assert_a_later_pass_only_waits(loop, waits, begin(loop, PROMPT, SamplingParams(), Scoring(num_top=3)), times=2)


def test_a_long_prompt_is_read_without_a_wait(monkeypatch: pytest.MonkeyPatch, models: Models) -> None:
    loop, waits = open_loop(monkeypatch, models())
    text = begin(loop, [7] * 1500, SamplingParams())
    with Audit() as audit:
        outcomes = [loop.run_pass([text])[0] for _ in range(2)]
    assert audit.found == [] and len(waits) == 1 and outcomes[0] is None and outcomes[1] is not None


def test_the_audit_sees_what_would_wait() -> None:
    on_device = torch.zeros(8, device=META)
    waiting: list[Callable[[], object]] = [
        lambda: torch.zeros(8).to(META),
        lambda: torch.zeros(STAGED_BYTES).to(META, non_blocking=True),
        lambda: torch.tensor([1], device=META),
        lambda: on_device[[1, 2]],
        lambda: on_device[torch.ones(8, dtype=torch.bool)],
        lambda: on_device.copy_(torch.zeros(8)),
        lambda: MetaDevice(replays=True).upload(torch.zeros(STAGED_BYTES)),
        lambda: on_device.index_select(0, torch.zeros(2, dtype=torch.int64)),
    ]
    for work in waiting:
        with Audit() as audit:
            work()
        assert len(audit.found) == 1
    with pytest.raises(AssertionError):
        MetaDevice(replays=True).record(lambda: on_device.copy_(torch.zeros(8), non_blocking=True))
    depending: list[Callable[[], object]] = [
        lambda: on_device.tolist(),
        lambda: bool(on_device[0]),
        lambda: on_device.nonzero(),
        lambda: on_device[on_device > 0],
        lambda: on_device.cpu(),
    ]
    for work in depending:
        with pytest.raises((RuntimeError, NotImplementedError)), Audit():
            work()
