"""Benchmarks: figures are those of the samples, partial ones stay valid, tokens are compared, other things are refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import INVALID, Finished, assert_error, assert_usage_error, run_command
from conftest import reference_model
from offload.bench.case_and_outcome import Case, Event, Outcome, Sample, as_error, error_to_json, outcome_of
from offload.bench.compare import check_comparable, compare
from offload.bench.deepspeed import zero_config
from offload.bench.engine_process import open_decoder
from offload.bench.engines import LABELS, engines_for
from offload.bench.latency import LatencyRequest
from offload.bench.launch import run_isolated
from offload.bench.measure import CannotRun, run_case
from offload.bench.summary import bootstrap, by_category, percentile, ratio, summarise
from offload.cli.main import main
from offload.config import EngineSettings
from offload.errors import DeviceError, FitError, ModelError, NumericError, OffloadError, UsageError
from text_models import CHAT_TEMPLATE, save_text_model

Models = Callable[..., Path]
CASE = Case(engine="ours", settings=EngineSettings(model="m"), prompts=((1, 2), (3,)), max_new_tokens=6, runs=2)


class FakeDecoder:
    """Two tokens a pass: prompt length, then pass number. Sleeps on no clock but the one given."""

    def __init__(self, clock: "Clock", *, predicted_pass_s: float | None = None) -> None:
        self._clock, self.predicted_pass_s = clock, predicted_pass_s

    def decode(self, prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> Iterator[tuple[int, ...]]:
        for number in range(max_new_tokens // 2):
            self._clock.now_s += 4.0 if number == 0 else 1.0
            yield len(prompt), number

    def facts(self) -> dict[str, Any]:
        return {"at_s": self._clock.now_s}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("offload.bench.measure.time", made)
    return made


def events_of(case: Case, decoder: FakeDecoder) -> list[Event]:
    @contextmanager
    def opened(_case: Case) -> Iterator[FakeDecoder]:
        yield decoder

    events: list[Event] = []
    run_case(case, opened, events.append)
    return [json.loads(json.dumps(event)) for event in events]


def test_every_prompt_is_decoded_in_every_run_after_the_warm_up(clock: Clock) -> None:
    outcome = outcome_of("ours", events_of(CASE, FakeDecoder(clock)))
    assert outcome.reason is None and outcome.facts == {"at_s": 4 + 4 * 6}
    assert [(sample.run, sample.prompt) for sample in outcome.samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for sample in outcome.samples:
        assert sample.pass_s == [4, 1, 1] and sample.pass_tokens == [2, 2, 2]
        assert (sample.first_token_s, sample.s_per_token) == (4, 0.5)
    assert outcome.samples[1].token_ids == [1, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("max_seconds", [1, 9, 11, 13, 20])
def test_what_was_measured_when_the_time_is_over_stays_valid(clock: Clock, max_seconds: float) -> None:
    """Also when the worker is killed: any prefix of its events is a result."""
    events = events_of(replace(CASE, max_seconds=max_seconds), FakeDecoder(clock))
    for end in range(1, len(events) + 1):
        outcome = outcome_of("ours", events[:end])
        assert outcome.reason == "its time was over"
        assert all(sample.pass_s == [4, 1, 1][: len(sample.pass_s)] for sample in outcome.samples)
    assert outcome.ran  # one pass at least
    assert clock.now_s <= max(max_seconds + 4, 8)


def test_a_time_too_short_for_one_pass_says_how_much_would_do(clock: Clock) -> None:
    decoder = FakeDecoder(clock, predicted_pass_s=5.0)
    outcome = outcome_of("ours", events_of(replace(CASE, max_seconds=9.0), decoder))
    assert outcome.least_s == 10.0 and not outcome.ran
    assert outcome_of("ours", events_of(replace(CASE, max_seconds=10.0), decoder)).ran


@pytest.mark.parametrize("kind", [OffloadError, UsageError, ModelError, FitError, NumericError, DeviceError])
def test_an_error_of_ours_crosses_processes_whole(kind: type[OffloadError]) -> None:
    error = kind("what", where="where", cure="cure")
    again = as_error(json.loads(json.dumps(error_to_json(error))))
    assert (str(again), again.exit_code, type(again)) == (str(error), error.exit_code, kind)


def test_an_engine_that_cannot_run_has_its_reason_in_its_row() -> None:
    @contextmanager
    def opened(_case: Case) -> Iterator[FakeDecoder]:
        raise CannotRun("does not fit")
        yield

    events: list[Event] = []
    run_case(CASE, opened, events.append)
    outcome = outcome_of("transformers", events)
    row = summarise([outcome], greedy=True)[0]
    assert (row["reason"], row["s_per_token_p50"], row["identical_tokens"]) == ("does not fit", None, None)


def test_a_case_travels_as_json() -> None:
    assert Case.from_json(json.loads(json.dumps(CASE.to_json()))) == CASE


def outcome(engine: str, times: list[float], tokens: list[int], **facts: object) -> Outcome:
    samples = [
        Sample(run, 0, tokens, [9.0, *([time] * (len(tokens) - 1))], [1] * len(tokens)) for run, time in enumerate(times)
    ]
    return Outcome(engine=engine, samples=samples, facts=facts)


def test_rows_by_hand() -> None:
    physics = {"bytes_per_pass": 200, "link_bytes_per_s": 100.0, "plan": {"predicted_round_s": 2.5}}
    rows = summarise(
        [
            outcome("ours", [2.5, 2.0, 3.0], [5, 6, 7], **physics),
            outcome("plain", [10.0, 10.0, 10.0], [5, 6, 7, 8]),
            outcome("accelerate", [50.0], [5, 6, 9]),
        ],
        greedy=True,
    )
    ours, plain, accelerate = rows
    assert (ours["s_per_token_p50"], ours["first_token_s_p50"], ours["tokens_per_pass"], ours["speedup"]) == (2.5, 9, 1, 4)
    assert (ours["floor_s_per_token"], ours["over_floor"], ours["over_predicted"]) == (2, 1.25, 1)
    assert ours["speedup_interval"] == (10 / 3, 5)
    assert (plain["speedup"], plain["ours_by"]) == (1, 4)
    assert (accelerate["ours_by"], accelerate["ours_by_interval"], accelerate["speedup"]) == (20, None, 0.2)
    assert [row["identical_tokens"] for row in rows] == [True, True, False]
    assert [row["identical_tokens"] for row in summarise([outcome("ours", [1.0], [5, 6])], greedy=False)] == [None]


def test_no_ratio_is_formed_across_an_emulated_link() -> None:
    """It would be as large as one likes, by the rate that was chosen."""
    outcomes = [outcome("ours", [1.0], [5, 6], emulated_link=True), outcome("plain", [4.0], [5, 6], emulated_link=True)]
    rows = summarise([*outcomes, outcome("accelerate-disk", [2.0], [5, 6])], greedy=True)
    assert [(row["speedup"], row["ours_by"]) for row in rows] == [(4, 1), (1, 4), (None, None)]
    assert all(row["identical_tokens"] for row in rows)


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert [percentile([4.0, 1.0, 2.0], percent) for percent in (0, 50, 75, 100)] == [1, 2, 3, 4]
    assert percentile([], 50) is None and percentile([7.0], 90) == 7


def test_the_bootstrap_interval_holds_the_ratio_and_narrows_with_samples() -> None:
    """Normal noise of 10 %: over 20 and over 300 samples; seeded, so it never fails by chance."""
    import random

    generator = random.Random(1)
    widths = []
    for count in (20, 300):
        slow, fast = ([base * generator.gauss(1, 0.1) for _ in range(count)] for base in (3.0, 1.0))
        low, high = bootstrap(slow, fast) or (0, 0)
        assert low < (ratio(slow, fast) or 0) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_categories_are_kept_apart() -> None:
    samples = [Sample(0, 0, [1, 2], [1.0, 2.0], [1, 1]), Sample(0, 1, [1, 2], [1.0, 4.0], [1, 1])]
    rows = by_category([Outcome(engine="ours", samples=samples)], ["math", "chat"])
    assert [(row["category"], row["s_per_token_p50"]) for row in rows] == [("math", 2), ("chat", 4)]


def test_gpu_machines_get_every_variant_and_all_have_a_name() -> None:
    baselines = ("plain", "accelerate", "deepspeed", "transformers")
    on_gpu, on_cpu = engines_for(baselines, on_gpu=True), engines_for(baselines, on_gpu=False)
    assert on_cpu == ("ours", "plain", "accelerate-disk", "deepspeed-tuned", "transformers")
    assert len(on_gpu) == 8 and set(on_gpu) | set(on_cpu) == set(LABELS)


def test_deepspeed_tuned_prefetches_a_whole_layer_of_70b() -> None:
    tuned, example = (
        zero_config(variant, hidden_size=8192, layer_parameters=855_654_400, dtype_name="float16")["zero_optimization"]
        for variant in ("tuned", "example")
    )
    assert tuned["stage3_prefetch_bucket_size"] >= 855_654_400 and tuned["offload_param"]["pin_memory"]
    assert example["stage3_prefetch_bucket_size"] == example["stage3_max_live_parameters"] == 134_217_728
    assert not example["offload_param"]["pin_memory"]


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *argv: run_command(capsys, "bench", *argv)


def run_here(case: Case, *, patient: bool) -> Outcome:
    """As run_isolated, without the process, whose start takes seconds."""
    events: list[Event] = []
    run_case(case, open_decoder, events.append)
    return outcome_of(case.engine, json.loads(json.dumps(events)))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose question does not depend on processes."""
    monkeypatch.setattr("offload.bench.latency.run_isolated", run_here)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours alone has a process of its own."""

    def run(case: Case, *, patient: bool) -> Outcome:
        return (run_isolated if case.engine == "ours" else run_here)(case, patient=patient)

    monkeypatch.setattr("offload.bench.latency.run_isolated", run)


@pytest.mark.slow
def test_engines_side_by_side_write_the_same_tokens(
    models: Models, tmp_path: Path, one_process: None, bench: Callable[..., Finished]
) -> None:
    """Every engine that runs on a CPU, on one model; the others say why not."""
    import torch

    folder = models()
    expected = reference_model(folder).generate(
        torch.tensor([[5, 9, 33]]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    argv = ("--model", folder, "--draft-model", folder, "--device", "cpu", "--tree", "2x3:kary", "--emulate-link", "20MB/s")
    others = "accelerate,deepspeed,transformers"
    finished = bench(
        *argv,
        "--prompt-ids",
        "5,9,33",
        "-n",
        6,
        "--runs",
        2,
        "--baseline",
        others,
        "--output",
        tmp_path / "b.json",
        "--plot",
        tmp_path / "b.png",
    )
    assert finished.code == 0, finished
    document = json.loads((tmp_path / "b.json").read_text())
    rows = {row["engine"]: row for row in document["summary"]}
    ran = ("ours", "accelerate-disk", "transformers")
    assert [rows[engine]["identical_tokens"] for engine in ran] == [True] * 3, finished.stderr
    assert all(rows[engine]["s_per_token_p50"] > 0 for engine in ran) and rows["ours"]["host_peak_bytes"] > 0
    assert {tuple(record["token_ids"]) for record in document["runs"]} == {tuple(expected[0, 3:].tolist())}
    assert rows["deepspeed-tuned"]["reason"] in ("not installed", "needs a GPU")
    assert rows["ours"]["tokens_per_pass"] == 3 and rows["transformers"]["tokens_per_pass"] == 1
    assert {"schema_version", "host", "gpu", "model", "runs", "summary"} <= set(document)
    assert "| treestream | " in finished.stdout and "emulated link of 20 MB/s" in finished.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert compare(document, document)[0]["change"] == 0


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_every_engine_of_a_gpu_machine_writes_the_same_tokens(models: Models, bench: Callable[..., Finished]) -> None:
    argv = ("--model", models(), "--device", "cuda", "--dtype", "float32", "--gpu-memory", "2GiB", "--prompt-ids", "5,9,33")
    document = json.loads(bench(*argv, "-n", 6, "--runs", 1, "--json", "--baseline", "plain,accelerate,transformers").stdout)
    rows = {row["engine"]: row for row in document["summary"]}
    assert set(rows) == {"ours", "plain", "accelerate", "accelerate-preload", "accelerate-dispatch", "transformers"}
    assert all(row["identical_tokens"] and row["device_peak_bytes"] > 0 for row in rows.values()), rows


def test_other_forms_and_a_comparison(models: Models, tmp_path: Path, in_process: None, bench: Callable[..., Finished]) -> None:
    folder, old = models(), tmp_path / "old.json"
    argv = ("--model", folder, "--device", "cpu", "--prompt-ids", "5,9", "-n", 3, "--runs", 1, "--baseline", "")
    first = bench(*argv, "-o", "jsonl", "--output", old)
    assert (first.code, json.loads(first.stdout)["engine"]) == (0, "ours"), first
    document = json.loads(old.read_text())
    document["summary"][0]["s_per_token_p50"] /= 100
    old.write_text(json.dumps(document))
    slower = bench(*argv, "--compare", old, "--fail-if-slower", "5%", "-o", "csv")
    assert slower.code == 1 and slower.stdout.startswith("engine,") and "slower than before: ours" in slower.stderr
    other = json.loads(old.read_text())
    other["host"]["processor"] = "another"
    with pytest.raises(UsageError, match="processor 'another' and now"):
        check_comparable(other, document, where="--compare")
    old.write_text(json.dumps(other))
    refused = bench(*argv, "--compare", old, "-o", "jsonl")
    assert refused.code == 2 and "processor 'another'" in refused.stderr
    assert json.loads(refused.stdout)["engine"] == "ours"  # what was measured is not lost


def test_a_preset_is_benchmarked_as_a_model_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[EngineSettings] = []

    def see(request: LatencyRequest, _say: object) -> dict[str, Any]:
        settings.append(request.settings)
        return {"interrupted": False}

    monkeypatch.setattr("offload.bench.latency.measure_latency", see)
    monkeypatch.setattr("offload.cli.bench._write", lambda *_arguments: None)
    assert main(["bench", "--model", "llama-2-7b", "--draft-model", "llama-68m", "-q"]) == 0
    assert (settings[0].model, settings[0].draft_models) == ("scale:llama-2-7b", ("scale:llama-68m",))


def test_prompts_are_laid_out_as_generate_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[LatencyRequest] = []

    def see(request: LatencyRequest, _say: object) -> dict[str, Any]:
        requests.append(request)
        return {"interrupted": False}

    monkeypatch.setattr("offload.bench.latency.measure_latency", see)
    monkeypatch.setattr("offload.cli.bench._write", lambda *_arguments: None)
    folder = save_text_model(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    for flags in (["--raw"], ["--chat"], ["--system-prompt", "be brief", "--ignore-eos"]):
        assert main(["bench", "--model", str(folder), "--prompt", "hello", *flags, "-q"]) == 0
    lengths = [len(request.prompt_ids[0]) for request in requests]
    assert lengths == sorted(set(lengths)), "plain text, then with its turn, then with the system's"
    assert main(["bench", "--model", str(folder), "--prompt", "hello", "--raw", "--system-prompt", "x"]) == 2


def test_errors_of_our_engine_end_the_command_with_its_exit_code(
    models: Models, in_process: None, bench: Callable[..., Finished]
) -> None:
    argv = ("--model", models(), "--prompt-ids", "5,9", "--device", "cpu", "--baseline", "", "-n", 4)
    assert_error(bench(*argv, "--gpu-memory", "1KiB", "-q"), 4, "--gpu-memory")


def test_an_interruption_keeps_the_engines_that_had_ended(
    models: Models, bench: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(case: Case, *, patient: bool) -> Outcome:
        if case.engine == "plain":
            raise KeyboardInterrupt
        return outcome(case.engine, [2.0], [5, 6], device="cpu")

    monkeypatch.setattr("offload.bench.latency.run_isolated", run)
    finished = bench(
        "--model", models(), "--prompt-ids", "5,9", "--device", "cpu", "--baseline", "plain,transformers", "--json", "-q"
    )
    assert finished.code == 130
    rows = json.loads(finished.stdout)["summary"]
    assert [(row["s_per_token_p50"], row["reason"]) for row in rows] == [
        (2.0, None),
        (None, "interrupted"),
        (None, "interrupted"),
    ]


def test_a_budget_too_short_for_one_pass_is_refused(models: Models, in_process: None, bench: Callable[..., Finished]) -> None:
    argv = ("--model", models(), "--prompt-ids", "5,9", "--device", "cpu", "--baseline", "", "-n", 4)
    finished = bench(*argv, "--emulate-link", "1KB/s", "--max-seconds", 20, "-q")
    assert_usage_error(finished, "leave 20 s to ours", "--max-seconds", "give at least")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--baseline", "plain,vllm"), ("unknown baseline 'vllm'", "plain, accelerate, deepspeed, transformers")),
        (("latency", "--out", "x"), ("--out and suite go together",)),
        (("suite",), ("--out and suite go together",)),
        (("spec", "--baseline", "plain"), ("--baseline belongs to bench latency",)),
        (("--fail-if-slower", "5%"), ("slower than what?",)),
        (("--fail-if-slower", "five", "--compare", "x"), ("not a number",)),
        (("--json", "-o", "csv"), ("--json and -o csv",)),
        (("--max-seconds", "0"), ("not positive",)),
        (("--output", "/nowhere/b.json"), ("cannot write",)),
        (("throughput",), ("invalid choice",)),
        (("--dataset", "x", "--prompt", "y"), ("not allowed with",)),
        (("spec", "--temperatures", "0,hot"), ("not numbers", "--temperatures")),
        (("spec", "--draft-model", "none"), ("without a draft",)),
        (("--model", "scale:llama-3"), ("no preset 'llama-3'",)),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    bench: Callable[..., Finished], argv: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert_usage_error(bench(*argv, "-q"), *parts)


@pytest.mark.parametrize(
    "contents", ["", "{}", "[]", '{"prompt": "hello"}', '{"turns": []}', '{"turns": [3]}', '{"turns": "abc"', "\x00"]
)
def test_a_dataset_with_other_fields_is_refused(tmp_path: Path, bench: Callable[..., Finished], contents: str) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(contents)
    assert_error(bench("--dataset", path, "-q"), INVALID, "not a set of prompts", "prompt 1", '{"turns": ["the prompt"]}')


@pytest.mark.parametrize(
    "contents", ["", "[]", '{"schema_version": 1}', '{"schema_version": 2, "kind": "latency", "summary": []}']
)
def test_a_comparison_with_something_else_is_refused(tmp_path: Path, bench: Callable[..., Finished], contents: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(contents)
    assert_error(bench("--compare", path, "-q"), INVALID, "not a latency benchmark", str(path))


def test_tokens_per_pass_and_acceptance_by_tree_temperature_and_top_p(
    models: Models, tmp_path: Path, bench: Callable[..., Finished]
) -> None:
    """With the target as its own draft: greedily every level's first child is accepted; of a chain of three, four tokens."""
    folder = models()
    argv = ("--model", folder, "--draft-model", folder, "--device", "cpu", "--prompt-ids", "5,9,33", "-n", 24, "--runs", 2)
    lists = ("--trees", "1x3:kary,2x3:kary", "--temperatures", "0,0.8", "--top-ps", "1,0.9")
    finished = bench("spec", *argv, *lists, "--output", tmp_path / "s.json")
    assert finished.code == 0 and "| 1x3:kary | 4 | 0 | 1 | 4.00 " in finished.stdout, finished
    rows = json.loads((tmp_path / "s.json").read_text())["summary"]
    laws = [(row["temperature"], row["top_p"]) for row in rows]
    assert laws == [(0, 1), (0.8, 1), (0.8, 0.9)] * 2
    greedy = rows[0]
    assert greedy["acceptance_by_rank"] == [1] and greedy["acceptance_by_level"] == [[1], [1], [1]]
    assert greedy["tokens_per_pass"] == greedy["expected_tokens_per_pass"] == 4
    assert all(1 < row["tokens_per_pass"] <= 4 for row in rows)


def test_prompts_of_a_dataset_keep_their_category(
    models: Models, tmp_path: Path, in_process: None, bench: Callable[..., Finished]
) -> None:
    folder = save_text_model(tmp_path / "model")
    dataset = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81, "category": name, "turns": [text, "again"]} for name, text in (("writing", "he"), ("math", "ll"))
    ]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("--model", folder, "--device", "cpu", "--dataset", dataset, "-n", 3, "--runs", 1, "--baseline", "plain", "--json")
    document = json.loads(bench(*argv).stdout)
    assert [row["category"] for row in document["categories"]] == ["writing", "writing", "math", "math"]
    assert document["request"]["prompts"] == 2 and len(document["runs"]) == 4
