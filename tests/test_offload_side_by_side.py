"""Several texts in one pass: each is that of the text alone, whatever lies beside it."""

import gc
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exactness import LENGTH, TREE, chi_square, exact_probabilities, save_pair
from exactness import PROMPT as PAIR_PROMPT
from fakes import DEVICES, layer_fault
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import Device
from offload.engine.decode import DecodeLoop, StepResult
from offload.engine.engine import Engine
from offload.engine.generation import Generation
from offload.engine.sequence import Sequence as Text
from offload.errors import NumericError
from planning import L40
from test_offload_turns import in_turns
from tree.logprobs import Scoring
from tree.sampling import SamplingParams

Models = Callable[..., Path]
PROMPTS: tuple[list[int], ...] = (
    [5, 9, 33, 2, 71],
    [4],
    [(7 * i + 3) % 90 for i in range(50)],
    [(5 * i + 1) % 90 for i in range(21)],
    [8, 8],
)
TEMPERATURES = (0.0, 1.0, 0.6, 0.0, 0.8)
LENGTHS = (14, 9, 17, 12, 15)


def open_many(
    models: Models,
    max_sequences: int,
    device: Device | None = None,
    *,
    draft: str = "random",
    dtype: str = "float32",
    tree: str = "4x3:kary",
    family: str = "llama",
    **changes: Any,
) -> Engine:
    drafts = {"random": models(family, num_layers=1, seed=1), "perfect": models(family), "none": None}
    settings = EngineSettings(
        model=str(models(family)),
        draft_models=(str(drafts[draft]),) if drafts[draft] else (),
        tree=tree if drafts[draft] else "none",
        device="cpu",
        dtype=dtype,
        max_sequences=max_sequences,
        **{"resident_layers": 1, "slots": 2, **changes},
    )
    return open_engine(settings, device=device, hardware=L40)


def requests(num_texts: int, *, greedy: bool) -> list[dict[str, Any]]:
    return [
        {
            "prompt": PROMPTS[number],
            "max_new_tokens": LENGTHS[number],
            "temperature": 0.0 if greedy else TEMPERATURES[number],
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(num_texts)
    ]


def alone(engine: Engine, asked: Sequence[dict[str, Any]]) -> list[tuple[int, ...]]:
    tokens = []
    for request in asked:
        engine.forget()
        tokens.append(engine.generate(**request).token_ids)
    engine.forget()
    return tokens


def join(loop: DecodeLoop, request: dict[str, Any], beside: Sequence[Text] = ()) -> Text:
    prompt, params = request["prompt"], SamplingParams(request["temperature"])
    generator = loop.seeded(request["seed"])
    rest: dict[str, Any] = {"tokens_left": request["max_new_tokens"], "repeatable": not params.greedy, "beside": beside}
    return loop.join(prompt, len(prompt), params, generator, None, **rest)


def together(loop: DecodeLoop, asked: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """All from the first pass on, each until it is complete: their tokens, and how many got some in each pass."""
    texts: list[Text] = []
    for request in asked:
        texts.append(join(loop, request, texts))
    num_served = []
    while left := [text for text in texts if text.tokens_left]:
        num_served.append(sum(isinstance(outcome, StepResult) for outcome in loop.run_pass(left)))
    prompts = [request["prompt"] for request in asked]
    return [tuple(text.token_ids[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True)], num_served


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("num_texts", "kind", "draft"),
    [
        *((num_texts, "cpu", draft) for num_texts in (1, 2, 5) for draft in ("random", "perfect", "none")),
        *(pytest.param(5, kind, "random", marks=pytest.mark.slow) for kind in sorted(DEVICES) if kind != "cpu"),
    ],
)
def test_greedy_texts_of_one_pass_are_those_of_each_alone(models: Models, num_texts: int, kind: str, draft: str) -> None:
    asked = requests(num_texts, greedy=True)
    with open_many(models, num_texts, DEVICES[kind](), draft=draft) as engine:
        expected = alone(engine, asked)
        tokens, num_served = together(engine.loop, asked)
        assert tokens == expected
        assert num_served[0] == num_texts  # prompts and trees of all are one pass
        longest = max(len(engine.generate(**request).stats.passes) for request in asked)
        assert len(num_served) == longest


@pytest.mark.matrix
@pytest.mark.parametrize("num_texts", [2, 5])
@pytest.mark.parametrize("tree", ["4x3:kary", "2x5:kary"])
def test_drawn_texts_of_one_pass_have_the_tokens_of_each_alone(models: Models, num_texts: int, tree: str) -> None:
    """In float64, where passes of other widths do not round otherwise: the randomness of a text is its own."""
    asked = requests(num_texts, greedy=False)
    with open_many(models, num_texts, dtype="float64", tree=tree) as engine:
        assert together(engine.loop, asked)[0] == alone(engine, asked)


@pytest.mark.slow
def test_texts_that_are_drawn_side_by_side_have_the_law_of_the_target(tmp_path: Path) -> None:
    """Three at a time, of other prompts and temperatures. False-alarm probability 1e-5 for each of two; the seeds are fixed."""
    target, draft = save_pair(tmp_path)
    settings = EngineSettings(
        model=str(target), draft_models=(str(draft),), tree=TREE, device="cpu", dtype="float32", max_sequences=3
    )
    counts: tuple[Counter[tuple[int, ...]], ...] = (Counter(), Counter())
    num_texts = 200
    with open_engine(settings, hardware=L40) as engine:
        for seed in range(num_texts):
            asked = [
                {"prompt": PAIR_PROMPT, "temperature": 1.0, "seed": seed, "max_new_tokens": LENGTH},
                {"prompt": [*PAIR_PROMPT, *PAIR_PROMPT], "temperature": 0.3, "seed": seed, "max_new_tokens": LENGTH + 2},
                {"prompt": PAIR_PROMPT, "temperature": 1.0, "seed": 10_000 + seed, "max_new_tokens": LENGTH},
            ]
            first, _, last = together(engine.loop, asked)[0]
            counts[0][first] += 1
            counts[1][last] += 1
    for counted in counts:
        assert chi_square(counted, exact_probabilities(target, SamplingParams(temperature=1.0)), num_texts)[0] > 1e-5


def test_texts_come_and_go_between_passes(models: Models) -> None:
    """A text joins while others are being written, in the place of one that is complete; a long prompt is read beside them."""
    asked = requests(5, greedy=True)
    with open_many(models, 2, dtype="float64") as engine:
        expected = alone(engine, asked)
        loop, left = engine.loop, list(enumerate(asked))
        live: dict[int, Text] = {}
        done: dict[int, tuple[int, ...]] = {}
        while left or live:
            while left and len(live) < 2:
                number, request = left.pop(0)
                live[number] = join(loop, request, tuple(live.values()))
            loop.run_pass(tuple(live.values()))
            for number in [number for number, text in live.items() if not text.tokens_left]:
                done[number] = tuple(live.pop(number).token_ids[len(PROMPTS[number]) :])
        assert [done[number] for number in range(5)] == expected


def test_a_prompt_in_many_pieces_holds_nobody_up(models: Models) -> None:
    asked = requests(3, greedy=True)
    asked[2] |= {"prompt": [(7 * i + 3) % 90 for i in range(90)]}
    with open_many(models, 3, dtype="float64") as engine:
        expected = alone(engine, asked)
        loop = engine.loop
        loop._plan = replace(loop.plan, pass_rows=2 * loop.plan.tree.num_nodes + 10)
        texts: list[Text] = []
        for request in asked:
            texts.append(join(loop, request, texts))
        outcomes = [loop.run_pass([text for text in texts if text.tokens_left]) for _ in range(3)]
        assert all(isinstance(one, StepResult) for of_pass in outcomes for one in of_pass[:2])
        assert [of_pass[2] for of_pass in outcomes] == [None] * 3
        while left := [text for text in texts if text.tokens_left]:
            loop.run_pass(left)
        got = [tuple(text.token_ids[len(request["prompt"]) :]) for text, request in zip(texts, asked, strict=True)]
        assert got == expected


# -- through the engine -------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("max_sequences", [pytest.param(1, marks=pytest.mark.slow), 2, 5])
def test_streams_share_passes_as_far_as_there_are_places(models: Models, max_sequences: int) -> None:
    asked = requests(5, greedy=False)
    with open_many(models, max_sequences, dtype="float64") as engine:
        expected = alone(engine, asked)
        num_passes = count_passes(engine)
        assert in_turns([engine.stream(**request) for request in asked]) == expected
        shared = next(num_passes)
        alone(engine, asked)
        separate = next(num_passes)
        # Two places for five that take turns are as good as one: whoever comes next has just lost its place.
        assert shared < 0.6 * separate if max_sequences == 5 else shared <= separate


def count_passes(engine: Engine) -> Any:
    """Passes of the target since it was last asked."""
    counter, forward = itertools.count(), engine.loop._target.forward

    def counted(*arguments: Any, **others: Any) -> Any:
        next(counter)
        return forward(*arguments, **others)

    engine.loop._target.forward = counted  # type: ignore[method-assign]
    before = 0
    while True:
        so_far = next(counter)
        counter = itertools.count(so_far)
        yield so_far - before
        before = so_far


def test_threads_that_ask_at_once_share_passes_and_get_their_own_texts(models: Models) -> None:
    asked = requests(5, greedy=False)
    with open_many(models, 3, dtype="float64") as engine:
        expected = alone(engine, asked)
        barrier = threading.Barrier(5)

        def ask(number: int) -> tuple[int, ...]:
            barrier.wait(60)
            return tuple(token_id for step in engine.stream(**asked[number]) for token_id in step.token_ids)

        with ThreadPoolExecutor(max_workers=5) as pool:
            assert list(pool.map(ask, range(5))) == expected


def test_a_reader_who_is_gone_is_not_run_ahead_of(models: Models) -> None:
    asked = requests(3, greedy=True)
    with open_many(models, 2, dtype="float64") as engine:
        expected = alone(engine, asked)
        left, read = engine.stream(**asked[2]), engine.stream(**asked[0])
        next(left)
        steps = list(read)
        assert tuple(read.token_ids) == expected[0] and len(steps) > 3
        assert len(left.stats.passes) == 1 and isinstance(left.outcome, StepResult)  # one beside the first of the other's
        assert tuple(engine.generate(**asked[1]).token_ids) == expected[1]
        list(left)
        assert tuple(left.token_ids) == expected[2]


def test_a_text_whose_logits_are_not_finite_fails_alone(models: Models) -> None:
    asked = requests(3, greedy=True)
    with open_many(models, 3, dtype="float64") as engine:
        expected = alone(engine, asked)
        streams = [engine.stream(**request) for request in asked]
        for stream in streams:
            next(stream)
        poison_segment_of(engine, streams[1])
        with pytest.raises(NumericError):
            list(streams[1])  # if a step of it was waiting already, that comes first
        assert not list(streams[1])
        for number in (0, 2):
            list(streams[number])
            assert tuple(streams[number].token_ids) == expected[number]
        assert engine.generate(**asked[1]).token_ids == expected[1]


def poison_segment_of(engine: Engine, stream: Generation) -> None:
    """The last row that was committed of the text becomes NaN, in all layers."""
    segment = engine._live[stream].segment
    for buffer in segment._memory.buffers:
        buffer[..., segment.start + segment.length - 1, :] = torch.nan


def test_memory_that_runs_out_in_a_shared_pass_changes_no_text(models: Models) -> None:
    asked = requests(3, greedy=True)
    with open_many(models, 3, dtype="float64") as engine:
        expected, planned = alone(engine, asked), engine.plan
        with layer_fault(engine, 2, lambda: engine.plan.tree.num_nodes == planned.tree.num_nodes) as failed:
            assert together(engine.loop, asked)[0] == expected
        assert failed and engine.plan.tree.num_nodes < planned.tree.num_nodes


def test_an_interruption_costs_the_others_a_pass_and_no_token(models: Models) -> None:
    asked = requests(3, greedy=True)
    with open_many(models, 3, dtype="float64") as engine:
        expected = alone(engine, asked)
        layer = engine.loop._target._model.get_submodule("model.layers.1")
        streams = [engine.stream(**request) for request in asked]
        for stream in streams:
            next(stream)

        def interrupt(*_: object) -> None:
            handle.remove()
            raise KeyboardInterrupt

        handle = layer.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(streams[0])
        for number in (1, 2):
            list(streams[number])
            assert tuple(streams[number].token_ids) == expected[number]
        assert engine.generate(**asked[0]).token_ids == expected[0]


def test_scores_are_those_of_each_text_alone(models: Models) -> None:
    asked = requests(3, greedy=True)
    with open_many(models, 3, dtype="float64") as engine:

        def scored() -> list[Generation]:
            return [
                engine.run(engine.admission.request(**request, scoring=Scoring(num_top=2, prompt=True))) for request in asked
            ]

        def scores(streams: list[Generation]) -> list[list[Any]]:
            found: list[list[Any]] = [[] for _ in streams]
            for number in itertools.cycle(range(len(streams))):
                step = next(streams[number], None)
                if step is not None:
                    found[number] += [*step.prompt_scores, *step.scores]
                if all(stream._is_over for stream in streams):
                    return found
            raise AssertionError("no streams")

        separate = [scores([stream])[0] for stream in scored()]
        engine.forget()
        for some, others in zip(separate, scores(scored()), strict=True):
            assert [one.token_id for one in some] == [one.token_id for one in others]
            assert [one.logprob for one in some] == pytest.approx([one.logprob for one in others], abs=1e-6)


def test_streams_that_nobody_holds_any_more_give_their_places_up(models: Models) -> None:
    asked = requests(5, greedy=True)
    with open_many(models, 2, dtype="float64") as engine:
        expected = alone(engine, asked)
        for number in (0, 2):
            next(engine.stream(**asked[number]))
        gc.collect()
        assert [engine.generate(**request).token_ids for request in asked] == expected
