"""`chat`: streams, commands, files, interruptions; in a pipe and on a terminal."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import Finished, assert_error, assert_holds, assert_usage_error, run_command
from conftest import save_tiny_model
from offload.assemble import open_engine
from offload.cli.answer import Trimmed
from offload.cli.dialogue import AnswerSettings, Dialogue
from offload.cli.progress import progress_line
from offload.cli.turns import read_turn
from offload.config import EngineSettings
from offload.errors import DeviceError, ModelError, NumericError
from offload.streaming.stream import PassProgress
from offload.text.conversation import render
from test_offload_cli import interrupt_in_pass
from text_models import CHAT_TEMPLATE, save_text_model

ROOT = Path(__file__).resolve().parent.parent
Chat = Callable[..., Finished]
SETTINGS = AnswerSettings(max_new_tokens=8, temperature=0.0, top_k=None, top_p=1.0, seed=0)


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("model"), max_position_embeddings=400)


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path) -> Chat:
    """`chat("hi", "/stats", flags=["--raw"])`: these lines on stdin."""

    def run(*lines: str | bytes, flags: tuple[object, ...] = (), quiet: bool = True) -> Finished:
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        flags = (*(["--quiet"] if quiet else []), *flags)
        return run_command(capsys, "chat", "--model", model, "--device", "cpu", "--ignore-eos", "--max-new-tokens", 8, *flags)

    return run


def saved(chat: Chat, folder: Path, *lines: str, flags: tuple[object, ...] = ()) -> dict[str, Any]:
    """The conversation after these lines."""
    assert chat(*lines, f"/save {folder / 'saved.json'}", flags=flags).code == 0
    document: dict[str, Any] = json.loads((folder / "saved.json").read_text())
    return document


def contents(document: dict[str, Any]) -> list[str]:
    return [message["content"] for message in document["messages"]]


# -- turns --------------------------------------------------------------------------------------------------------------


def test_each_line_is_a_turn_and_stdout_holds_the_answers_alone(chat: Chat, model: Path, tmp_path: Path) -> None:
    """The answers are those of an engine that is given the whole conversation afresh each time."""
    finished = chat("hello", "  ", "well", f"/save {tmp_path / 'saved.json'}")
    document = json.loads((tmp_path / "saved.json").read_text())
    assert [message["role"] for message in document["messages"]] == ["user", "assistant"] * 2
    first, second = contents(document)[1::2]
    assert (finished.code, finished.stdout, finished.stderr) == (0, f"{first}\n{second}\n", "")
    with open_engine(EngineSettings(model=str(model), device="cpu", tree="none")) as engine:
        for number in (1, 3):
            assert engine.tokenizer is not None
            prompt = render(engine.tokenizer, document["messages"][:number])
            answer = engine.generate(prompt.token_ids, max_new_tokens=8, stop=prompt.stop, ignore_eos=True).text
            assert answer is not None and answer.strip() == contents(document)[number]


def test_a_model_without_template_is_told_about_once(chat: Chat) -> None:
    notice = "the model has no chat template: it gets a plain transcript"
    shown = chat("hello", "well", flags=("--stats", "line"), quiet=False)
    assert shown.stderr.count(notice) == 1 and notice not in chat("hello", flags=("--raw",), quiet=False).stderr
    assert_holds(shown.stderr, "cut after 8 tokens; /set max-new-tokens N allows more", " s/token", "prompt tokens reused)")


def test_the_template_of_the_model_is_used_unless_raw_is_asked_for(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_text_model(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    prompts: list[str] = []

    def record(tokenizer: Any, messages: Any, *, template: bool) -> Any:
        prompt = render(tokenizer, messages, template=template)
        prompts.append(prompt.text)
        return prompt

    monkeypatch.setattr("offload.cli.answer.render", record)
    flags = ("--model", folder, "--system-prompt", "be kind")
    chat("hi", "/system off", '"""/two', 'lines"""', flags=flags)
    assert prompts[0] == "[system]be kind[user]hi[reply]"
    assert re.fullmatch(r"\[user\]hi\[assistant\].*\[user\]/two\nlines\[reply\]", prompts[1], re.DOTALL)
    chat("hi", flags=(*flags, "--raw"))
    assert prompts[2] == "be kind\n\nUser: hi\nAssistant:"


def test_text_between_quotes_is_one_turn() -> None:
    def turns(*lines: str) -> list[tuple[str, bool]]:
        source = iter(lines)

        def read(_prompt: str) -> str:
            for line in source:
                return line
            raise EOFError

        found = []
        while (turn := read_turn(read)) is not None:
            found.append((turn.text, turn.is_command))
        return found

    assert turns('"""one', "", 'two"""', "three") == [("one\n\ntwo", False), ("three", False)]
    assert turns('"""/help"""', "/help ", '"""', "open") == [("/help", False), ("/help", True), ("open", False)]


def test_white_space_around_an_answer_is_left_out_and_that_within_is_not() -> None:
    text = Trimmed()
    assert [text.push(piece) for piece in (" ", "\n a", " ", " b\n", "\nc", " \n")] == ["", "a", "", "  b", "\n\nc", ""]
    assert text.text == "a  b\n\nc"


# -- commands -----------------------------------------------------------------------------------------------------------


def test_undo_clear_and_system_change_what_is_remembered(chat: Chat, tmp_path: Path) -> None:
    assert contents(saved(chat, tmp_path, "one", "two", "/undo"))[::2] == ["one"]
    assert contents(saved(chat, tmp_path, "one", "/clear")) == []
    assert contents(saved(chat, tmp_path, "one", "/system be brief", "/system be long", "/clear")) == ["be long"]
    assert contents(saved(chat, tmp_path, "/system off", flags=("--system-prompt", "be"))) == []


def test_exit_leaves_what_follows_unread(chat: Chat) -> None:
    assert chat("/exit", "hello") == Finished(0, "", "")


def test_retry_samples_with_the_next_seed(chat: Chat, tmp_path: Path) -> None:
    hot = ("--temperature", "1", "--seed", "4")
    first, again = (contents(saved(chat, tmp_path, "hi", *more, flags=hot)) for more in ((), ("/retry",)))
    assert first[0] == again[0] and len(again) == 2 and first[1] != again[1]
    assert contents(saved(chat, tmp_path, "hi", flags=("--temperature", "1", "--seed", "5")))[1] == again[1]
    assert contents(saved(chat, tmp_path, "hi", "/retry", "/retry")) == contents(saved(chat, tmp_path, "hi"))


def test_set_reads_values_as_the_command_line_does(chat: Chat, tmp_path: Path) -> None:
    lines = (
        "/set temperature 0.5",
        "/set --top-k 7",
        "/set max_new_tokens 3",
        "/set top-p 0.9",
        "/set seed 2",
        "/set top-p off",
    )
    document = saved(chat, tmp_path, *lines)
    assert document["settings"] == {"max_new_tokens": 3, "temperature": 0.5, "top_k": 7, "top_p": 1.0, "seed": 2}
    assert_holds(chat("/set").stderr, "max-new-tokens 8", "temperature 0.0", "top-k None")


@pytest.mark.parametrize(("flag", "line"), [("0", ""), ("-1", ""), ("7", "/set top-k 0"), ("7", "/set top-k -1")])
def test_a_top_k_by_which_others_say_off_keeps_all_tokens(chat: Chat, tmp_path: Path, flag: str, line: str) -> None:
    assert saved(chat, tmp_path, line, flags=("--top-k", flag))["settings"]["top_k"] is None


def test_help_and_stats_go_to_stderr(chat: Chat) -> None:
    finished = chat("/stats", "hi", "/stats", "/help", "/system")
    assert finished.stdout.count("\n") == 1
    assert_holds(finished.stderr, "no answer yet", "8 tokens in ", "MiB  key/value cache", "/load FILE", "no system message")


BAD_COMMANDS = {
    "/frobnicate": ("no such command: /frobnicate", "/help"),
    "/set temperature": ("a name and a value", "/set temperature 0.7"),
    "/set temperature hot": ("not a number: 'hot'", "/set"),
    "/set temperature -1": ("-1 is not 0 (greedy) or positive", "/set"),
    "/set color red": ("no such setting: color", "max-new-tokens"),
    "/retry": ("nothing was asked yet", "ask"),
    "/undo": ("nothing was asked yet", "ask"),
    "/save": ("no file named", "/save FILE"),
    "/load": ("no file named", "/load FILE"),
    "/save /no/such/folder/x": ("cannot write", "/no/such/folder/x"),
    "/save a\0b": ("cannot write", "fix: name a file"),
    "/load /no/such/file": ("cannot read", "/no/such/file"),
    "/load /": ("cannot read: it is not a file", "fix: name a file"),
    "/load /dev/zero": ("cannot read: it is not a file", "/dev/zero"),
}


def test_a_bad_command_is_three_lines_and_the_conversation_goes_on(chat: Chat) -> None:
    finished = chat(*BAD_COMMANDS, "hi")
    assert finished.code == 0 and finished.stdout.strip()
    lines = finished.stderr.splitlines()
    assert len(lines) == 3 * len(BAD_COMMANDS)
    for number, (command, parts) in enumerate(BAD_COMMANDS.items()):
        block = lines[3 * number : 3 * number + 3]
        assert [line.split()[0] for line in block] == ["error:", "in:", "fix:"], command
        assert_holds("\n".join(block), *parts)


# -- files --------------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_where_it_was(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = chat("/set top-k 5", "one", "two")
    first = chat("/set top-k 5", "one", f"/save {path}")
    resumed = chat(f"/load {path}", "two", "/set")
    assert first.stdout + resumed.stdout == whole.stdout and "top-k 5" in resumed.stderr


GOOD = {"schema_version": 1, "settings": {"seed": 3}, "messages": [{"role": "user", "content": "x"}]}
BAD_FILES = {
    "no JSON": b"{",
    "deeply nested": b"[" * 200_000,
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "a list": b"[]",
    "no version": {**GOOD, "schema_version": None},
    "another version": {**GOOD, "schema_version": 2},
    "no settings": {**GOOD, "settings": None},
    "no messages": {"schema_version": 1, "settings": {}},
    "an unknown setting": {**GOOD, "settings": {"colour": "red"}},
    "a bad value": {**GOOD, "settings": {"temperature": "hot"}},
    "a value of a wrong type": {**GOOD, "settings": {"max_new_tokens": [1]}},
    "an infinite value": b'{"schema_version": 1, "settings": {"temperature": Infinity}, "messages": []}',
    "messages that are text": {**GOOD, "messages": ["hi"]},
    "an unknown role": {**GOOD, "messages": [{"role": "tool", "content": "x"}]},
    "content that is no text": {**GOOD, "messages": [{"role": "user", "content": 1}]},
    "a lone surrogate": {**GOOD, "messages": [{"role": "user", "content": "\ud800"}]},
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_changes_nothing(tmp_path: Path, name: str) -> None:
    path, document = tmp_path / "bad.json", BAD_FILES[name]
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    dialogue = Dialogue(SETTINGS, [{"role": "user", "content": "kept"}])
    with pytest.raises(ModelError, match="not a saved conversation: ") as caught:
        dialogue.load(path)
    assert len(str(caught.value).splitlines()) == 3 and str(path) in str(caught.value)
    assert dialogue == Dialogue(SETTINGS, [{"role": "user", "content": "kept"}])
    path.write_text(json.dumps(GOOD))
    dialogue.load(path)
    assert dialogue.messages == GOOD["messages"] and dialogue.settings.seed == 3


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(GOOD))
    monkeypatch.setattr("offload.cli.dialogue.LIMIT_BYTES", 20)
    with pytest.raises(ModelError, match="larger than 20 bytes"):
        Dialogue(SETTINGS).load(path)


# -- context ------------------------------------------------------------------------------------------------------------


def test_the_oldest_turns_are_left_out_when_the_context_is_full(chat: Chat, tmp_path: Path) -> None:
    flags = ("--max-context", "90", "--tree", "none")
    lines = [f"question number {number}" for number in range(5)]
    shown = chat(*lines, flags=flags, quiet=False)
    assert shown.code == 0 and len(re.findall(r"oldest messages no longer fit into the context", shown.stderr)) >= 1
    assert len(contents(saved(chat, tmp_path, *lines, flags=flags))) == 10  # what is saved is whole


def test_a_question_that_does_not_fit_is_refused_with_the_counts_and_forgotten(chat: Chat, tmp_path: Path) -> None:
    finished = chat("hi", "x" * 100, "ho", f"/save {tmp_path / 'a.json'}", flags=("--max-context", "80"))
    assert finished.code == 4
    assert_holds(finished.stderr, "error: prompt ", "> 80 rows of context", "fix: ")
    assert contents(json.loads((tmp_path / "a.json").read_text()))[::2] == ["hi", "ho"]


def test_views_keep_the_system_message_and_begin_with_a_question() -> None:
    roles = ["system", "assistant", "user", "assistant", "user", "user"]
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    dialogue = Dialogue(SETTINGS, messages)
    seen = ["".join(message["content"] for message in view) for _, view in dialogue.views(messages)]
    assert seen == ["012345", "045", "05"]
    dialogue.num_left_out = 3
    assert [left_out for left_out, _ in dialogue.views(messages)] == [3, 4]
    assert [left_out for left_out, _ in dialogue.views(messages[:3])] == [0]  # after /undo, fewer are there


# -- what can go wrong --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_template_that_loops_ends_the_chat_before_the_weights_are_read(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looping = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    folder = save_text_model(tmp_path, chat_template=looping)
    monkeypatch.setattr("offload.weights.store.WeightStore.load", lambda *_: pytest.fail("the weights are being read"))
    assert_error(chat("hi", flags=("--model", folder)), 3, "the chat template failed: it did not finish in 2 s", "--raw")


def test_a_model_without_tokenizer_is_refused(chat: Chat, tmp_path: Path) -> None:
    assert_usage_error(chat("hi", flags=("--model", save_tiny_model(tmp_path))), "no tokenizer", "--model")


def test_a_line_that_is_not_utf8_is_refused_and_the_next_is_answered(chat: Chat) -> None:
    finished = chat(b"caf\xe9", "hi")
    assert finished.code == 2 and finished.stdout.count("\n") == 1
    assert_holds(finished.stderr, "error: the content is not Unicode", "in: message 0", "fix: ")
    assert_holds(chat(b"/system \xe9", "hi").stderr, "not Unicode")


@pytest.mark.parametrize(("error", "code"), [(NumericError, 6), (DeviceError, 7)])
def test_an_error_in_a_pass_takes_the_question_back_or_ends_the_chat(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[NumericError | DeviceError], code: int
) -> None:
    def fail() -> None:
        raise error("gone", where="here", cure="none")

    path = tmp_path / "a.json"
    interrupt_in_pass(monkeypatch, 11, fail)  # the third pass of the second answer
    finished = chat("one", "two", f"/save {path}", "three")
    assert finished.code == code
    assert_holds(finished.stderr, "error: gone")
    if error is NumericError:  # said to a script at the end; meanwhile the conversation goes on
        assert contents(json.loads(path.read_text()))[::2] == ["one"] and finished.stdout.count("\n") == 3
    else:
        assert not path.exists() and finished.stdout.count("\n") == 2


def test_ctrl_c_keeps_what_was_accepted_and_the_conversation_goes_on(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(saved(chat, tmp_path, "one"))[1]
    with monkeypatch.context() as patch:
        interrupt_in_pass(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        document = saved(chat, tmp_path, "one", "two")
    stopped = contents(document)[1]
    assert whole.startswith(stopped) and 0 < len(stopped) < len(whole) and len(contents(document)) == 4
    with monkeypatch.context() as patch:
        interrupt_in_pass(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert contents(saved(chat, tmp_path, "one", "two"))[::2] == ["two"]


def test_sigterm_and_a_ctrl_c_at_the_prompt_leave(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_pass(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        finished = chat("one", "two")
        assert finished.code == 143 and finished.stdout.count("\n") == 1

    def interrupted(_read: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offload.cli.chat.read_turn", interrupted)
    assert chat("one").code == 130


def test_usage_errors_are_one_line(chat: Chat) -> None:
    assert_usage_error(chat(flags=("--frobnicate",)), "--frobnicate")
    assert_usage_error(chat(flags=("--prompt", "hi")), "--prompt")
    assert_usage_error(chat(flags=("--temperature", "-1")), "-1 is not 0")
    assert_usage_error(chat("hi", flags=("--system-prompt", "\udcff")), "not Unicode")


# -- on a terminal ------------------------------------------------------------------------------------------------------


def test_the_progress_line_tells_layer_rate_and_time() -> None:
    def line(layers_done: int, streamed_bytes: int) -> str:
        progress = PassProgress(layers_done=layers_done, num_layers=80, streamed_bytes=streamed_bytes, elapsed_s=2.0)
        return progress_line(progress, 3.14)

    assert [line(37, 49_200_000_000), line(1, 0), line(80, 10**9)] == [
        "layer 37/80 | 24.6 GB/s | 3.1 s",
        "layer 1/80 | 3.1 s",
        "drafting | 3.1 s",
    ]


class Terminal:
    """`run_70b.py chat` on a pseudo-terminal, whose keyboard and screen are pipes."""

    SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"

    def __init__(self, *flags: object, **environment: str) -> None:
        command = [sys.executable, "-c", self.SPAWN, sys.executable, "run_70b.py", "chat", *map(str, flags)]
        inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**inherited, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1", **environment},
        )
        self.screen, self._seen = "", 0

    def type(self, keys: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(keys.encode())

    def wait_for(self, pattern: str, timeout_s: float = 60) -> None:
        """Until `pattern` has appeared behind what was waited for before."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.screen[self._seen :], re.DOTALL)):
            assert self._read(deadline_s - time.monotonic()), f"no {pattern!r} in {self.screen[self._seen :]!r}"
        self._seen += found.end()

    def end(self) -> int:
        while self._read(30):
            pass
        return self._process.wait(30)

    def close(self) -> None:
        with self._process:  # closes the pipes, then waits
            self._process.kill()

    def _read(self, timeout_s: float) -> bool:
        """Whether something new is on the screen."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(timeout_s, 0))
        fresh = self._process.stdout.read(4096) if ready else b""
        self.screen += (fresh or b"").decode(errors="replace")
        return bool(fresh)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*flags: object, **environment: str) -> Terminal:
        opened.append(Terminal(*flags, **environment))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_a_second_one_leaves(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    """The link is so slow that an answer would take minutes; progress is drawn meanwhile, and passes are coloured."""
    flags = ("--model", model, "--device", "cpu", "--profile", "l40", "--emulate-link", "150KB/s", "--tree", "none")
    one = terminal(*flags, "--ignore-eos", "--max-new-tokens", "300", "--show-passes")
    one.wait_for("> ")
    one.type("hello\r")
    one.wait_for(r"layer [123]/3 \| ")
    one.wait_for("\033\\[36m.*\033\\[0m")
    one.type("\x03")
    one.wait_for("stopped; the answer up to here is kept")
    one.wait_for("> ")
    one.type(f"/save {tmp_path / 'a.json'}\r")
    one.wait_for("saved 2 messages")
    one.wait_for("> ")
    one.type("\x03\r")  # Python sees a signal that falls between readline's prompt and its wait with the next key only
    assert one.end() == 130 and one.screen.rstrip().endswith("interrupted")
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "hello"} and messages[1]["content"]


@pytest.mark.slow
def test_on_a_terminal_the_end_of_input_leaves_with_0_and_no_color_is_honoured(
    terminal: Callable[..., Terminal], model: Path
) -> None:
    flags = ("--model", model, "--device", "cpu", "--profile", "l40", "--max-new-tokens", 4, "--ignore-eos", "--show-passes")
    one = terminal(*flags, NO_COLOR="1")
    one.wait_for("NO_COLOR is set")
    one.wait_for("> ")
    one.type("hello\r")
    one.wait_for("cut after 4 tokens[^>]*> ")
    one.type("\x04")
    assert one.end() == 0 and "\033[36m" not in one.screen
