"""The contract of the command line: what goes to which stream, the JSON object, exit codes, prompts, signals, pipes."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from command_line import DOES_NOT_FIT, LOST, Finished, assert_error, assert_holds, assert_usage_error, run_command
from offload.cli.main import main
from offload.cli.signals import leaving_at_once
from offload.engine.decode import DecodeLoop, Outcome
from offload.text.tokenizer import Tokenizer
from text_models import BOS, CHAT_TEMPLATE, EOS, VOCAB_SIZE, change_json, copy_model, save_text_model

Run = Callable[..., Finished]
Models = Callable[..., Path]
ROOT = Path(__file__).resolve().parent.parent
PROMPT, NUM_TOKENS = "hello world", 12

# Every key of the --json object in docs/cli.md. `plan` may hold more.
KEYS = {
    "": {
        *("schema_version", "text", "prompt_token_ids", "token_ids", "finish_reason"),
        *("timing", "speculation", "streaming", "memory", "plan", "environment"),
    },
    "timing": {"load_s", "reused_tokens", "first_token_s", "decode_s", "s_per_token", "tokens_per_s"},
    "speculation": {"tree_nodes", "tree_levels", "verifier", "passes", "tokens_per_pass", "accepted_per_pass"}
    | {"nodes_per_pass", "ngram_tokens", "foreseen_nodes", "wasted_nodes"},
    "streaming": {
        *("streamed_layers", "resident_layers", "disk_layers", "slots", "bytes_per_pass", "link_bytes_per_s"),
        *("raw_bytes_per_pass", "codecs", "link_peak_bytes_per_s", "link_utilisation", "stall_s", "emulated_link"),
    },
    "memory": {
        *("device_peak_bytes", "device_base_bytes", "host_weights_bytes", "host_pinned_bytes", "host_sessions_bytes"),
        "host_shared_layers",
    },
    "plan": {"predicted_pass_s", "predicted_round_s", "predicted_s_per_token"},
    "environment": {"device", "torch", "transformers", "commit", "weights"},
}


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, a byte-level tokenizer, no chat template."""
    return save_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("draft"), num_layers=1, seed=1)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: Path) -> Run:
    """`run("--flag", ...)`: twelve tokens of the model on the CPU; a later flag overrides."""
    return lambda *argv: run_command(
        capsys, "--model", model, "--device", "cpu", "--max-new-tokens", NUM_TOKENS, "--ignore-eos", *argv
    )


def json_of(finished: Finished, code: int = 0) -> dict[str, Any]:
    """The one object on stdout."""
    assert finished.code == code, finished
    assert finished.stdout.endswith("}\n") and len(finished.stdout.splitlines()) == 1
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


# -- streams -----------------------------------------------------------------------------------------------------------


def test_stdout_holds_the_text_and_stderr_why_there_is_no_tree_and_one_line(run: Run) -> None:
    finished = run("--prompt", PROMPT, "--ngram", "off")
    assert finished.code == 0
    assert finished.stdout == json_of(run("--prompt", PROMPT, "--json"))["text"] != ""
    why, line = finished.stderr.splitlines()
    assert why == "one token a pass: there is no draft model; --draft-model names one of the same family"
    assert run("--prompt", PROMPT, "--tree", "none").stderr.count("\n") == 1  # somebody asked for it
    assert_holds(line, "12 tokens in ", " s/token", "first token ", "1.0 tokens/pass of 1 nodes", "device 0.000")
    assert "device 0.000 GiB" not in line


@pytest.mark.parametrize("flags", [("--quiet",), ("--stats", "none")], ids=" ".join)
def test_stderr_is_silent_when_asked(run: Run, flags: tuple[str, ...]) -> None:
    finished = run("--prompt", PROMPT, *flags)
    assert finished.code == 0 and finished.stdout and finished.stderr == ""


def test_full_statistics_have_a_line_per_pass(run: Run) -> None:
    finished = run("--prompt", PROMPT, "--stats", "full")
    assert finished.stdout == run("--prompt", PROMPT).stdout
    lines = [line for line in finished.stderr.splitlines() if line[:5].strip().isdecimal()]
    assert len(lines) == NUM_TOKENS
    assert_holds(finished.stderr, "KiB  key/value cache", "12 tokens in ")


def test_no_json_and_no_text_follow_each_other_on_stdout(run: Run) -> None:
    document = json_of(run("--prompt", PROMPT, "--json", "--stats", "full"))
    assert document["finish_reason"] == "length"


def test_without_model_the_demo_runs_and_says_how_to_name_a_real_one(
    capsys: pytest.CaptureFixture[str], model: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.cli.flags_to_settings.TARGET", model)
    monkeypatch.setattr("offload.cli.flags_to_settings.DRAFT", draft)
    finished = run_command(capsys, "--max-new-tokens", 4, "--ignore-eos")
    assert finished.code == 0 and finished.stdout
    assert_holds(finished.stderr, "no --model given", "--model PATH_OR_HUB_ID", "emulated link of 100MB/s", "4 tokens in")
    assert run_command(capsys, "--max-new-tokens", 4, "--ignore-eos", "--quiet").stderr == ""


def test_text_that_the_terminal_cannot_show_is_escaped(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes bytes that are no characters: U+FFFD, which ASCII does not have."""
    expected = run("--prompt", PROMPT).stdout
    assert not expected.isascii()
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))
    flags = ["--device", "cpu", "--max-new-tokens", str(NUM_TOKENS), "--ignore-eos", "--quiet"]
    assert main(["--model", str(model), "--prompt", PROMPT, *flags]) == 0
    assert shown.getvalue() == expected.encode("ascii", "backslashreplace")


# -- the JSON object ---------------------------------------------------------------------------------------------------


def test_json_has_every_key_of_the_contract(run: Run, draft: Path) -> None:
    document = json_of(run("--prompt", PROMPT, "--json", "--draft-model", draft, "--tree", "2x3:kary"))
    for part, keys in KEYS.items():
        found = set(document[part] if part else document)
        assert found == keys or (part == "plan" and found > keys), part
    assert document["schema_version"] == 1
    assert document["speculation"]["tree_nodes"] == 7 and document["speculation"]["tree_levels"] == 4


def test_json_numbers_agree_with_each_other(run: Run, draft: Path, tokenizer: Tokenizer) -> None:
    flags = ("--draft-model", draft, "--tree", "2x3:kary", "--resident-layers", "1", "--slots", "2")
    document = json_of(run("--prompt", PROMPT, "--json", *flags))
    timing, speculation, streaming = document["timing"], document["speculation"], document["streaming"]
    assert document["prompt_token_ids"] == tokenizer.encode(PROMPT)
    assert document["text"] == tokenizer.decode(document["token_ids"])
    assert len(document["token_ids"]) == NUM_TOKENS
    accepted = speculation["accepted_per_pass"]
    assert len(accepted) == speculation["passes"] and sum(accepted) >= NUM_TOKENS and min(accepted) >= 1
    assert speculation["tokens_per_pass"] == pytest.approx(sum(accepted) / len(accepted))
    assert timing["s_per_token"] == pytest.approx(timing["decode_s"] / (NUM_TOKENS - accepted[0]))
    assert timing["tokens_per_s"] == pytest.approx(1 / timing["s_per_token"])
    assert (streaming["streamed_layers"], streaming["resident_layers"], streaming["slots"]) == (2, 1, 2)
    assert streaming["bytes_per_pass"] > 0 and streaming["link_utilisation"] > 0 and not streaming["emulated_link"]
    assert document["memory"]["host_weights_bytes"] == streaming["bytes_per_pass"] == streaming["raw_bytes_per_pass"]


def test_an_emulated_link_is_said_in_every_output(run: Run) -> None:
    finished = run("--prompt", PROMPT, "--emulate-link", "100MB/s")
    assert_holds(finished.stderr, "emulated link")
    document = json_of(run("--prompt", PROMPT, "--emulate-link", "100MB/s", "--json"))
    assert document["streaming"]["emulated_link"] is True
    assert document["streaming"]["link_peak_bytes_per_s"] == 100e6


@pytest.mark.parametrize(
    "flags", [(), ("--tree", "2x3:kary"), ("--tree", "16x5"), ("--temperature", "1", "--tree", "3x2:kary")]
)
def test_no_more_tokens_than_asked_for(run: Run, draft: Path, flags: tuple[str, ...]) -> None:
    for number in (1, 2, 5):
        finished = run("--prompt", PROMPT, "--json", "--draft-model", draft, *flags, "--max-new-tokens", number)
        document = json_of(finished)
        assert (len(document["token_ids"]), document["finish_reason"]) == (number, "length")


def test_the_seed_decides_the_text(run: Run, draft: Path) -> None:
    flags = ("--prompt", PROMPT, "--json", "--temperature", "1.5", "--draft-model", draft, "--tree", "3x2:kary")
    texts = [json_of(run(*flags, "--seed", seed))["token_ids"] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_output_and_trace_files_are_written_whole(run: Run, tmp_path: Path) -> None:
    output, trace = tmp_path / "out.json", tmp_path / "trace.json"
    finished = run("--prompt", PROMPT, "--output", output, "--trace", trace)
    document = json.loads(output.read_text())
    assert document["text"] == finished.stdout and set(document) == KEYS[""]
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}
    assert sorted(os.listdir(tmp_path)) == ["out.json", "trace.json"]  # no temporary file stays


def test_output_to_a_device_does_not_replace_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to(os.devnull)
    assert run("--prompt", PROMPT, "--output", tmp_path / "null").code == 0
    assert (tmp_path / "null").is_symlink()


def test_a_file_that_cannot_be_written_at_the_end_does_not_cost_the_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: object) -> Path:
        raise OSError(28, "No space left on device")

    expected = run("--prompt", PROMPT).stdout
    monkeypatch.setattr(Path, "replace", fail)
    finished = run("--prompt", PROMPT, "--output", tmp_path / "out.json", "--stats", "none")
    assert_error(finished, 7, "the text above is complete", "No space left", str(tmp_path / "out.json"), stdout=expected)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_same_from_the_flag_a_file_and_stdin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "two\r\nlines \u20ac\n"
    (tmp_path / "prompt").write_bytes(text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    prompts = [("--prompt", text), ("--prompt-file", tmp_path / "prompt"), ("--prompt", "-")]
    documents = [json_of(run(*prompt, "--json")) for prompt in prompts]
    assert documents[0]["prompt_token_ids"] == documents[1]["prompt_token_ids"] == documents[2]["prompt_token_ids"]
    assert documents[0]["token_ids"] == documents[1]["token_ids"] == documents[2]["token_ids"]


def test_stdin_that_is_not_text_is_a_usage_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert_usage_error(run("--prompt", "-"), "--prompt", "UTF-8")


def test_an_empty_prompt_is_a_usage_error(run: Run) -> None:
    assert_usage_error(run("--prompt", ""), "the prompt has no tokens", "--prompt")


def test_token_ids_need_no_tokenizer(run: Run, models: Models) -> None:
    document = json_of(run("--model", models(), "--prompt-ids", "5, 9,33", "--json"))
    assert document["text"] is None
    assert document["prompt_token_ids"] == [5, 9, 33] and len(document["token_ids"]) == NUM_TOKENS
    finished = run("--model", models(), "--prompt-ids", "5,9,33")
    assert [int(token_id) for token_id in finished.stdout.split()] == document["token_ids"]


def test_token_ids_are_not_templated_and_their_text_is_decoded(run: Run, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    by_ids = json_of(run("--prompt-ids", ",".join(map(str, ids)), "--json"))
    by_text = json_of(run("--prompt", PROMPT, "--json"))
    assert (by_ids["text"], by_ids["token_ids"]) == (by_text["text"], by_text["token_ids"])


def test_a_chat_template_is_applied_unless_raw_is_asked_for(run: Run, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save_text_model(tmp_path / "chat", chat_template=CHAT_TEMPLATE)

    def prompt_of(*flags: str) -> str:
        document = json_of(run("--model", folder, "--prompt", "hi", "--json", *flags))
        return tokenizer.decode(document["prompt_token_ids"])

    assert prompt_of() == prompt_of("--chat") == "[user]hi[reply]"
    assert prompt_of("--system-prompt", "be") == "[system]be[user]hi[reply]"
    assert prompt_of("--raw") == "hi"


def test_chat_without_a_template_is_a_usage_error(run: Run, models: Models) -> None:
    assert_usage_error(run("--prompt", "hi", "--chat"), "no chat template", "--raw")
    assert_usage_error(run("--prompt", "hi", "--system-prompt", "be"), "no chat template", "--system-prompt")
    assert_usage_error(run("--model", models(), "--prompt", "hi", "--chat"), "no tokenizer", "--prompt-ids")


# -- how a text ends ---------------------------------------------------------------------------------------------------


def test_every_eos_id_of_the_generation_config_ends_the_text(
    run: Run, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    token_ids = json_of(run("--prompt", PROMPT, "--json"))["token_ids"]
    new = next(token_id for token_id in token_ids[1:] if token_id != token_ids[0])
    folder = copy_model(model, tmp_path / "model")
    change_json(folder / "generation_config.json", eos_token_id=[BOS, new])
    flags = ("--model", folder, "--device", "cpu", "--prompt", PROMPT, "--json", "--max-new-tokens", NUM_TOKENS)
    ended = json_of(run_command(capsys, *flags))
    assert ended["finish_reason"] == "eos"
    assert ended["token_ids"] == token_ids[: token_ids.index(new) + 1]
    assert json_of(run("--model", folder, "--prompt", PROMPT, "--json"))["token_ids"] == token_ids  # --ignore-eos


def test_a_stop_string_ends_the_text_before_it(run: Run) -> None:
    full = json_of(run("--prompt", PROMPT, "--json"))["text"]
    stop = full[3:5]
    document = json_of(run("--prompt", PROMPT, "--json", "--stop", "never to be seen", "--stop", stop))
    assert document["finish_reason"] == "stop"
    assert document["text"] == full[: full.index(stop)]
    assert run("--prompt", PROMPT, "--stop", stop).stdout == document["text"]


# -- interruptions -----------------------------------------------------------------------------------------------------


def interrupt_in_pass(monkeypatch: pytest.MonkeyPatch, number: int, interrupt: Callable[[], None]) -> None:
    """Let `interrupt` happen when pass `number` (from 1) is about to be computed."""
    passes = iter(range(1, 1000))
    run_pass = DecodeLoop.run_pass

    def interrupted(loop: DecodeLoop, sequences: Any) -> tuple[Outcome, ...]:
        if next(passes) == number:
            interrupt()
        return run_pass(loop, sequences)

    monkeypatch.setattr(DecodeLoop, "run_pass", interrupted)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_the_imports_ends_the_process_whatever_they_catch(name: str, code: int) -> None:
    """Some of what torch and transformers import catches everything, and goes on."""
    script = (
        "import os, signal\n"
        "from offload.cli.signals import leaving_at_once\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with leaving_at_once():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "    except BaseException:\n"
        "        pass\n"
        "print('went on')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (code, ""), ran


@pytest.mark.parametrize(("closed", "num_lines"), [("<&-", 1), (">&-", 0), ("2>&-", 1)])
def test_nothing_fails_for_a_closed_stream_and_nothing_moves_to_another(closed: str, num_lines: int) -> None:
    script = f'exec "$0" run_70b.py plan --json {closed}'
    ran = subprocess.run(["bash", "-c", script, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0 and "error" not in ran.stderr, ran
    assert len(ran.stdout.splitlines()) == num_lines, ran


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_stdout_is_said_in_three_lines() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "run_70b.py", "plan", "--json", "-q"]
        ran = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert_error(Finished(ran.returncode, "", ran.stderr), LOST, "No space left", "stdout")


def test_after_the_imports_signals_are_exceptions_again() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with leaving_at_once():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_an_interruption_prints_what_there_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, signal_number: signal.Signals, code: int
) -> None:
    whole = json_of(run("--prompt", PROMPT, "--json"))
    with monkeypatch.context() as patch:
        interrupt_in_pass(patch, 4, lambda: signal.raise_signal(signal_number))
        document = json_of(run("--prompt", PROMPT, "--json"), code)
    assert document["finish_reason"] == "interrupted"
    assert document["token_ids"] == whole["token_ids"][:3]
    assert set(document) == KEYS[""]
    interrupt_in_pass(monkeypatch, 4, lambda: signal.raise_signal(signal_number))
    finished = run("--prompt", PROMPT)
    assert (finished.code, finished.stdout) == (code, document["text"])
    assert_holds(finished.stderr, "3 tokens in ")


def test_an_interruption_before_the_first_token_has_an_answer_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in_pass(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    document = json_of(run("--prompt", PROMPT, "--json"), 130)
    assert (document["text"], document["token_ids"], document["finish_reason"]) == ("", [], "interrupted")
    assert document["timing"]["s_per_token"] is None


def test_an_interruption_while_loading_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("offload.assemble.open_engine", interrupted)
    assert run("--prompt", PROMPT) == Finished(130, "", "interrupted\n")


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended that was disturbed as soon as its first byte of text was there."""

    code: int
    stdout: bytes
    stderr: str


@pytest.fixture(scope="module")
def disturbed(models: Models) -> dict[str, Ended]:
    """Three runs at once, as each imports torch: a Ctrl-C, a SIGTERM, a reader that leaves. The link is so slow that none
    ends by itself within a minute."""
    flags = ["--model", models(), "--prompt-ids", "5,9,33", "--device", "cpu", "--emulate-link", "150KB/s", "--ignore-eos"]
    flags += ["--max-new-tokens", "140", "--tree", "none", "--profile", "l40"]  # a profile, so that none measures the machine
    command = [sys.executable, "run_70b.py", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other take the time of other tests
    runs = {
        name: subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        for name in ("int", "term", "pipe")
    }
    ended = {}
    for name, process in runs.items():
        assert process.stdout is not None
        first = process.stdout.read(1)
        if name == "pipe":
            process.stdout.close()
            process.stdout = None  # communicate() reads what is still open
        else:
            process.send_signal(signal.SIGINT if name == "int" else signal.SIGTERM)
        try:
            rest, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            for other in runs.values():
                other.kill()
            raise
        ended[name] = Ended(process.returncode, first + (rest or b""), errors.decode())
    return ended


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("int", 130), ("term", 143)])
def test_a_signal_ends_the_process_with_what_there_is(
    disturbed: dict[str, Ended], run: Run, models: Models, name: str, code: int
) -> None:
    ended = disturbed[name]
    flags = ("--model", models(), "--prompt-ids", "5,9,33", "--max-new-tokens", "140", "--tree", "none")
    whole = run(*flags).stdout
    assert ended.code == code
    assert whole.startswith(ended.stdout.decode()) and 0 < len(ended.stdout) < len(whole)
    (line,) = ended.stderr.splitlines()
    assert_holds(line, f"{len(ended.stdout.split())} tokens in ", "emulated link")


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_process_quietly(disturbed: dict[str, Ended]) -> None:
    assert (disturbed["pipe"].code, disturbed["pipe"].stderr) == (0, "")


HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "rich")
LIGHT_COMMANDS = [
    ["--help"],
    ["generate", "--help"],
    ["chat", "--help"],
    ["verify", "--help"],
    ["version", "--help"],
    ["frobnicate"],
    ["--no-such-flag"],
    ["--model", "m"],
    ["--model", "m", "--prompt", "x", "--max-new-tokens", "0"],
    ["--model", "m", "--prompt", "x", "--temperature", "nan"],
    ["--model", "m", "--prompt", "x", "--device", "tpu"],
    ["--model", "m", "--prompt", "x", "--verifier", "hope"],
    ["--model", "m", "--prompt", "x", "--dtype", "int4"],
    ["--model", "m", "--prompt", "x", "--gpu-memory", "lots"],
    ["--model", "m", "--prompt", "x", "--tree", "16x5"],
    ["--model", "m", "--prompt", "x", "--tree", "rubbish"],
    ["--model", "m", "--prompt", "x", "--draft-model", "d", "--tree", "/no/such/tree.json"],
    ["--model", "m", "--prompt", "x", "--acceptance", "/no/such/acceptance.json"],
    ["--model", "m", "--prompt", "x", "--output", "/no/such/folder/out.json"],
    ["--model", "m", "--prompt-file", "/no/such/prompt"],
    ["--model", "m", "--prompt-ids", "one"],
    ["--model", "m", "--prompt-ids", "1", "--chat"],
    ["chat", "--model", "m", "--top-p", "2"],
    ["chat", "--model", "m", "--tree", "rubbish"],
]


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    """They answer in under 0.5 s because of that; time itself depends on who else is using the machine."""
    code = f"""
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from json import dumps
from sys import modules
from offload.cli.main import main
from offload.cli.signals import leaving_at_once
for argv in {LIGHT_COMMANDS!r}:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as leaving:
            code = leaving.code
    print(dumps([code, out.getvalue(), err.getvalue(), [name for name in {HEAVY!r} if name in modules]]))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stderr == "" and len(ran.stdout.splitlines()) == len(LIGHT_COMMANDS)
    for argv, line in zip(LIGHT_COMMANDS, ran.stdout.splitlines(), strict=True):
        exit_code, out, err, imported = json.loads(line)
        assert imported == [], argv
        if "--help" in argv:
            assert exit_code == 0 and out.startswith("usage: run_70b.py") and err == ""
        else:
            num_lines = {2: 1, 3: 3}[exit_code]  # a tree or an acceptance file is a profile file: 3
            assert out == "" and len(err.splitlines()) == num_lines, (argv, err)


# -- the other commands, and help --------------------------------------------------------------------------------------


def test_help_names_every_flag_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_command(capsys, "generate", "--help")
    flags = (
        "model draft-model prompt prompt-file prompt-ids max-new-tokens temperature top-k top-p seed stop ignore-eos chat raw"
    )
    flags += " system-prompt tree verifier acceptance device dtype gpu-memory host-memory resident-layers slots max-context"
    flags += " emulate-link json stats trace output quiet verbose"
    assert shown.code == 0 and shown.stderr == ""
    assert_holds(shown.stdout, *(f"--{flag}" for flag in flags.split()))


def test_generate_is_the_default_command(run: Run, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    argv = ["--model", model, "--prompt", PROMPT, "--max-new-tokens", NUM_TOKENS, "--ignore-eos", "--device", "cpu", "--quiet"]
    assert run_command(capsys, "generate", *argv) == run_command(capsys, *argv)


def test_version_and_verify_print_one_object(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    versions = json_of(run_command(capsys, "version", "--json"))
    assert {"treestream", "torch", "transformers", "cuda", "commit", "python"} <= set(versions)
    verified = json_of(run_command(capsys, "verify", "--model", model, "--json"))
    assert (verified["schema_version"], verified["architecture"], verified["layers"]) == (1, "llama", 3)
    assert verified["weight_bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors")) - headers_of(model)


def headers_of(folder: Path) -> int:
    """Bytes of the safetensors headers."""
    firsts = (bytes(islice(path.read_bytes(), 8)) for path in folder.glob("*.safetensors"))
    return sum(8 + int.from_bytes(first, "little") for first in firsts)


def test_the_model_of_these_tests_is_what_they_say(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.vocabulary()) == VOCAB_SIZE
    assert (tokenizer.vocabulary()["<s>"], tokenizer.vocabulary()["</s>"]) == (BOS, EOS)


def test_a_context_that_is_too_short_names_only_what_would_help(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    """More rows do not help a model that knows no more positions, nor can a prompt that leaves no room be answered in 0."""
    base = ("--model", models(), "--device", "cpu", "--profile", "l40")
    long = run_command(capsys, *base, "--prompt-ids", ",".join(["5"] * 200), "-n", 4)
    assert_error(long, DOES_NOT_FIT, "prompt 200 + new 4", "fix: shorten the prompt: the model itself knows 160 positions")
    assert "--max-context (" not in long.stderr and "at most" not in long.stderr
    narrow = run_command(capsys, *base, "--prompt-ids", "5,9", "-n", 60, "--max-context", 40)
    assert_error(
        narrow, DOES_NOT_FIT, "ask for at most 38 new tokens", "raise --max-context (the model itself knows 160 positions)"
    )
