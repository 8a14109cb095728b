"""Keys and values taken over from earlier requests: the text is that of a fresh run, only new tokens go through a pass."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import offload
from conftest import EOS
from fakes import DEVICES
from offload.demo import DRAFT, TARGET
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.engine import sessions
from offload.engine.engine import Engine
from offload.engine.sessions import MIN_KEPT_ROWS, Place, Sessions, host_limit_bytes, num_common
from offload.errors import HostMemoryError
from offload.model.kv_cache import KVCache, Segment
from offload.model.rope import Rope
from offload.report.report import Report
from test_offload_engine import open_tiny

Models = Callable[..., Path]
ANSWER, TREE = 8, "3x3:kary"
ROPE = Rope(kind="fixed", native_tokens=200, max_positions=200)
REQUESTS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 40, "seed": 3}}


def prompt_of(seed: int, length: int) -> list[int]:
    return [(seed * 31 + position * position * 7 + position) % EOS for position in range(length)]


def cold(engine: Engine, prompt: Sequence[int], **request: Any) -> Report:
    engine.forget()
    report = engine.generate(prompt, **request)
    assert report.stats.reused_tokens == 0
    return report


def segments_of(engine: Engine) -> tuple[Segment, ...]:
    """Of the one place."""
    return engine.loop.sessions._places[0].segments


def converse(engine: Engine, first: list[int], num_turns: int, **request: Any) -> list[Report]:
    """Every prompt is the conversation so far and three tokens more."""
    prompt, reports = first, list[Report]()
    for turn in range(num_turns):
        reports.append(engine.generate(prompt, max_new_tokens=ANSWER, ignore_eos=True, **request))
        prompt = [*prompt, *reports[-1].token_ids, 7, 30 + turn, 2]
    return reports


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "draft"), [*((kind, "random") for kind in sorted(DEVICES)), ("cpu", "perfect"), ("late", "none")]
)
@pytest.mark.parametrize("request_kind", REQUESTS)
def test_a_conversation_has_the_text_of_fresh_runs(models: Models, kind: str, request_kind: str, draft: str) -> None:
    folder = models()
    drafts = {"random": models(num_layers=1, seed=1), "perfect": folder, "none": None}
    request = REQUESTS[request_kind]
    settings: dict[str, Any] = {"tree": TREE if drafts[draft] else "none", "resident_layers": 1, "slots": 2}
    with open_tiny(folder, drafts[draft], DEVICES[kind](), **settings) as engine:
        turns = converse(engine, prompt_of(1, 10), 4, **request)
        for before, turn in itertools.pairwise(turns):
            reused = len(before.prompt_token_ids) + len(before.token_ids) - 1  # the last token has no keys yet
            assert turn.stats.reused_tokens == reused
            tree = engine.plan.tree.truncated(ANSWER) if drafts[draft] else engine.plan.tree
            assert turn.stats.passes[0].num_rows == len(turn.prompt_token_ids) - 1 - reused + tree.num_nodes
        for turn in turns:
            fresh = cold(engine, turn.prompt_token_ids, max_new_tokens=ANSWER, ignore_eos=True, **request)
            assert fresh.token_ids == turn.token_ids


@pytest.mark.slow
def test_the_demo_pair_gives_the_text_of_a_fresh_run() -> None:
    with offload.load(str(TARGET), draft_model=str(DRAFT), tree="16x6", device="cpu", resident_layers=1, slots=2) as engine:
        for request in REQUESTS.values():
            question = "The Congress of the United States should"
            first = engine.generate(question, max_new_tokens=24, **request)
            more = f"{question}{first.text} Furthermore, the people of"
            second = engine.generate(more, max_new_tokens=24, **request)
            assert second.stats.reused_tokens > len(first.prompt_token_ids) + 15
            assert second.text == cold(engine, engine.admission.encode(more), max_new_tokens=24, **request).text
            document: Any = second.to_json()
            assert document["timing"]["reused_tokens"] == second.stats.reused_tokens
            assert f"({second.stats.reused_tokens} of {len(second.prompt_token_ids)} prompt tokens reused)" in second.line()


def test_turn_two_streams_the_weights_once_where_a_fresh_run_reads_the_prompt_in_chunks(models: Models) -> None:
    folder = models(max_position_embeddings=400)
    with open_tiny(folder, folder, resident_layers=0) as engine:
        engine.loop._plan = replace(engine.plan, pass_rows=engine.plan.tree.num_nodes + 20)
        second = converse(engine, prompt_of(1, 150), 2)[1]
        fresh = cold(engine, second.prompt_token_ids, max_new_tokens=ANSWER, ignore_eos=True)
        assert second.token_ids == fresh.token_ids
        assert second.stats.passes[0].bytes_streamed == engine.plan.bytes_per_pass
        assert fresh.stats.passes[0].bytes_streamed > 3 * engine.plan.bytes_per_pass


def test_a_prompt_that_is_cached_whole_still_runs_its_last_token(models: Models) -> None:
    folder = models()
    with open_tiny(folder, folder, tree=TREE) as engine:
        prompt = prompt_of(2, 20)
        first = engine.generate(prompt, max_new_tokens=ANSWER)
        for length in (20, 7, 2, 1):
            again = engine.generate(prompt[:length], max_new_tokens=ANSWER)
            assert again.stats.reused_tokens == length - 1
            assert again.token_ids == cold(engine, prompt[:length], max_new_tokens=ANSWER).token_ids
            assert engine.generate(prompt, max_new_tokens=ANSWER).token_ids == first.token_ids


def test_a_prompt_that_parts_in_the_middle_is_reused_up_to_there(models: Models) -> None:
    folder = models()
    with open_tiny(folder, models(num_layers=1, seed=1), tree=TREE) as engine:
        prompt = prompt_of(3, 40)
        for part in (0, 1, 17, 39):
            engine.generate(prompt, max_new_tokens=ANSWER)
            other = [*prompt[:part], (prompt[part] + 1) % EOS, *prompt[part + 1 :]]
            report = engine.generate(other, max_new_tokens=ANSWER)
            assert report.stats.reused_tokens == part
            assert report.token_ids == cold(engine, other, max_new_tokens=ANSWER).token_ids


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(DEVICES))
def test_conversations_go_to_the_host_and_come_back(models: Models, kind: str) -> None:
    """What the caches held is overwritten with NaN while a conversation is away, so its rows can only come from the copy."""
    folder = models()
    draft = models(num_layers=1, seed=1)
    with open_tiny(folder, draft, DEVICES[kind](), tree=TREE, resident_layers=1, slots=2) as engine:
        starts = [prompt_of(seed, 40 + seed) for seed in (1, 2, 3)]
        texts = [list[int](start) for start in starts]
        for turn in range(3):
            for number in range(3):
                report = engine.generate(texts[number], max_new_tokens=ANSWER, ignore_eos=True)
                assert report.stats.reused_tokens == (len(texts[number]) - 2 if turn else 0)
                texts[number] = [*texts[number], *report.token_ids, 11]
                for segment in segments_of(engine):
                    segment.poison_tail()
        row_bytes = [segment.bytes_per_row for segment in segments_of(engine)]
        kept = engine.loop.sessions._kept
        # The two others, and the live one as it was when it came back.
        assert len(kept) == 3 and report.memory.host_sessions_bytes == engine.loop.sessions.host_bytes
        assert report.memory.host_sessions_bytes == sum(
            rows.nbytes // size * size for one in kept for rows, size in zip(one.rows, row_bytes, strict=True)
        )
        for start, text in zip(starts, texts, strict=True):
            prompt = start
            for _ in range(3):
                answer = cold(engine, prompt, max_new_tokens=ANSWER, ignore_eos=True).token_ids
                prompt = [*prompt, *answer, 11]
            assert prompt == text


def test_an_answer_that_was_closed_is_gone_on_from(models: Models) -> None:
    folder = models()
    prompt = prompt_of(4, 25)
    with open_tiny(folder, models(num_layers=1, seed=1)) as engine:
        generation = engine.stream(prompt, max_new_tokens=60, ignore_eos=True)
        for _ in range(3):
            next(generation)
        generation.stop()
        following = [*prompt, *generation.token_ids, 5]
        report = engine.generate(following, max_new_tokens=ANSWER)
        assert report.stats.reused_tokens == len(prompt) + len(generation.token_ids) - 1
        assert report.token_ids == cold(engine, following, max_new_tokens=ANSWER).token_ids


class InterruptAtLine:
    """Ctrl-C when line number `fail_at` of the files that keep the state of a sequence is about to run."""

    FILES = ("engine.py", "generation.py", "decode.py", "turn.py", "sequence.py", "sessions.py", "kv_cache.py", "drafter.py")

    def __init__(self, fail_at: int | None = None) -> None:
        self.num_lines, self._fail_at = 0, fail_at

    def __enter__(self) -> "InterruptAtLine":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def pause(self, work: Callable[[], None]) -> None:
        sys.settrace(None)
        work()
        sys.settrace(self._call)

    def _call(self, frame: FrameType, _event: str, _argument: object) -> Any:
        code = frame.f_code
        ours = os.path.basename(code.co_filename) in self.FILES and not code.co_name.startswith("<")  # no comprehensions
        return self._line if ours else None

    def _line(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self._fail_at:
                raise KeyboardInterrupt
        return self._line


@pytest.mark.slow
def test_an_interruption_anywhere_leaves_a_state_to_go_on_from(models: Models) -> None:
    """Rows must never be those of other tokens than the ones they are filed under, whenever Ctrl-C comes: in an answer that
    comes back from the host, in its passes, and in one that takes over a part of it."""
    folder = models(num_layers=1)
    first, second = prompt_of(5, 36), prompt_of(6, 36)
    prompts = [[*first, 4], [*first[:34], 1, 2, 3]]
    with open_tiny(folder, models(num_layers=1, seed=1), tree="3x2:kary", resident_layers=1) as engine:

        def answer(prompt: list[int]) -> tuple[int, ...]:
            return engine.generate(prompt, max_new_tokens=4, ignore_eos=True).token_ids

        def run(fail_at: int | None) -> int:
            for prompt in (first, second):
                answer(prompt)
            with InterruptAtLine(fail_at) as counter, suppress(KeyboardInterrupt):
                for prompt in prompts:
                    answer(prompt)
            return counter.num_lines

        expected = [cold(engine, prompt, max_new_tokens=4, ignore_eos=True).token_ids for prompt in prompts]
        engine.forget()
        num_lines = run(None)
        assert num_lines > 500
        for fail_at in range(7, num_lines, num_lines // 20):
            run(fail_at)
            assert [answer(prompt) for prompt in prompts] == expected, f"interrupted at line {fail_at} of {num_lines}"


# -- bounds -------------------------------------------------------------------------------------------------------------


class Rig:
    """Sessions over caches whose rows tell the token that they belong to."""

    def __init__(self, device: Device, num_places: int = 1, **bounds: int) -> None:
        sizes: dict[str, Any] = {"num_segments": num_places, "segment_rows": 200, "dtype": torch.float32, "rope": ROPE}
        self.caches = [KVCache(device, layer_shapes=[(3, 4)] * num_layers, **sizes) for num_layers in (2, 1)]
        self.sessions = Sessions(self.caches, **{"max_bytes": 2**30, **bounds})
        self.place = self.sessions._places[0]

    def ask(self, prompt: list[int], *busy: Place) -> int:
        """Rows of the target that are taken over."""
        self.place = self.sessions.take(prompt, len(prompt), busy)
        reused = self.place.segments[0].length
        self.fill()
        return reused

    def fill(self) -> None:
        """Rows for all tokens but the last one, or the last three."""
        self.check()
        for cache, lag in zip(self.caches, (1, 3), strict=True):
            segment = cache.segments[self.place.number]
            positions = range(segment.length, len(self.place.token_ids) - lag)
            new = torch.tensor(self.place.token_ids[positions.start : positions.stop]).float()
            appending = cache.appending([(segment, len(new))])
            for layer in range(len(appending.layers) if len(new) else 0):
                rows = (new + layer)[None, None, :, None].expand(1, 3, len(new), 4)
                appending.update(rows, -rows, layer)
            segment.appended(positions[: len(new)])
            segment.commit(range(len(new)))

    def check(self) -> None:
        """Every committed row is that of its place's token, in each layer, keys and values."""
        for place in self.sessions._places:
            for cache, segment in zip(self.caches, place.segments, strict=True):
                segment.poison_tail()
                tokens = torch.tensor(place.token_ids[: segment.length]).float()
                for layer, both in enumerate(cache.appending([]).layers):
                    keys, values = (rows[0, :, segment.start : segment.start + segment.length] for rows in both)
                    assert torch.equal(keys, (tokens + layer)[None, :, None].expand_as(keys)) and torch.equal(values, -keys)


def text(seed: int, length: int = 50) -> list[int]:
    return [seed * 1000 + position for position in range(length)]


@pytest.mark.slow
def test_an_interruption_at_any_line_files_no_row_under_another_token() -> None:
    device = CpuDevice()
    script = [text(1), text(2), text(1, 60), [*text(1, 40), 5, 6, 7], text(2, 45)]

    def run(fail_at: int | None) -> tuple[Rig, int]:
        rig = Rig(device, max_kept=2)
        with InterruptAtLine(fail_at) as counter, suppress(KeyboardInterrupt):
            for prompt in script:
                rig.place = rig.sessions.take(prompt, len(prompt))
                counter.pause(rig.fill)
        return rig, counter.num_lines

    _, num_lines = run(None)
    assert num_lines > 200
    for fail_at in range(1, num_lines + 1):
        rig, _ = run(fail_at)
        rig.check()
        for prompt in script[1:3]:
            rig.ask(prompt)
    device.close()


def test_at_most_so_many_are_kept_and_the_one_longest_unused_goes(device: Device) -> None:
    rig = Rig(device, max_kept=2)
    for seed in (1, 2, 3):
        assert rig.ask(text(seed)) == 0
    assert rig.ask(text(1, 60)) == 49  # its copy stays and is now the youngest but for 3, which was just put aside
    assert rig.ask(text(4)) == 0
    assert [one.token_ids[0] for one in rig.sessions._kept] == [3000, 1000]
    assert rig.ask(text(2)) == 0 and rig.ask(text(1, 70)) == 59


def test_bytes_are_bounded_and_counted(device: Device) -> None:
    size = sum(cache.bytes_per_row * rows for cache, rows in zip(Rig(device).caches, (49, 47), strict=True))
    rig = Rig(device, max_bytes=2 * size)
    for seed in (1, 2, 3, 4):
        rig.ask(text(seed))
        assert rig.sessions.host_bytes == min(seed - 1, 2) * size
    rig.ask(text(5, 150))
    rig.ask(text(6))  # 150 rows exceed the bound: not kept, and nothing had to go for it
    assert [one.token_ids[0] for one in rig.sessions._kept] == [3000, 4000]
    assert rig.ask(text(4, 150)) == 49
    rig.ask(text(7))  # nor does the beginning of what has grown beyond the bound: it serves the next turn
    assert rig.ask(text(4, 150)) == 49
    rig.sessions.forget()
    assert rig.sessions.host_bytes == 0 and [one.length for one in rig.place.segments] == [0, 0]


@pytest.mark.parametrize("bounds", [{"max_kept": 0}, {"max_bytes": 0}, {"max_kept": 1}])
def test_tight_bounds_cost_reuse_only(device: Device, bounds: dict[str, int]) -> None:
    rig = Rig(device, **bounds)
    for _ in range(3):
        for seed in (1, 2):
            rig.ask(text(seed))
            assert len(rig.sessions._kept) <= 1
    assert rig.ask(text(1)) == (49 if bounds.get("max_kept") == 1 else 0)


def test_a_short_tail_is_not_worth_a_copy_and_a_beginning_is_not_kept_twice(device: Device) -> None:
    rig = Rig(device)
    rig.ask(text(1, MIN_KEPT_ROWS))  # one row less than that
    rig.ask(text(2))
    assert rig.sessions._kept == []
    rig.ask(text(1, 40))
    rig.ask(text(2, 90))
    rig.ask(text(1, 70))
    assert [len(one.token_ids) for one in rig.sessions._kept] == [39, 89]  # 49 rows of text 2 went when it had grown


def test_a_host_without_room_keeps_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> None:
        raise HostMemoryError(f"{num_bytes} refused", where="host", cure="none")

    places: dict[str, Any] = {
        "offload.engine.sessions.available_bytes": lambda: 1000,
        "offload.model.kv_cache.HostMapping": refuse,
    }
    for place, replacement in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, replacement)
            rig = Rig(device)
            assert [rig.ask(text(seed)) for seed in (1, 2, 1)] == [0, 0, 0] and rig.sessions.host_bytes == 0


def test_the_limit_is_what_the_host_budget_leaves(models: Models) -> None:
    with open_tiny(models(), None, resident_layers=0, host_memory_bytes=10**6) as engine:
        weights = sum(engine.plan.host_ledger.values())
        assert host_limit_bytes(engine.plan) == 10**6 - weights > 0
        assert host_limit_bytes(replace(engine.plan, host_budget_bytes=weights - 1)) == 0
        assert host_limit_bytes(replace(engine.plan, host_budget_bytes=None)) == sessions.MAX_KEPT_BYTES


def test_a_text_takes_the_place_that_knows_most_of_it_and_leaves_the_busy_ones_alone(device: Device) -> None:
    rig = Rig(device, num_places=3, max_kept=0)
    places = []
    for seed in (1, 2, 3):
        assert rig.ask(text(seed), *places) == 0
        places.append(rig.place)
    assert len({place.number for place in places}) == 3
    assert rig.ask(text(2, 60)) == 49 and rig.place is places[1]
    assert rig.ask(text(2, 40), places[1]) == 0 and rig.place is places[0]  # not taken for longest, as the best is busy
    assert rig.ask(text(3, 60)) == 49 and rig.place is places[2]
    rig.check()
    assert [place.token_ids[0] for place in places] == [2000, 2000, 3000]


def test_a_text_that_lost_its_place_comes_back_from_the_host_to_another(device: Device) -> None:
    rig = Rig(device, num_places=2)
    assert [rig.ask(text(1)), rig.ask(text(2), rig.place)] == [0, 0]
    busy = rig.place
    assert [rig.ask(text(3), busy), rig.ask(text(1, 60), busy)] == [0, 49]
    rig.check()


def test_common_prefix_is_counted_token_by_token() -> None:
    assert [num_common(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 4, 3]), ([5], [6]))] == [0, 2, 1, 0]
