"""Messages to prompts: templates give what transformers gives and cannot hang, starve or escape; without one, a transcript."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from offload.demo import TARGET
from offload.errors import ModelError, UsageError
from offload.text.conversation import TRANSCRIPT_STOPS, render, transcript
from offload.text.incremental import TextStream
from offload.text.template import apply_template
from offload.text.tokenizer import Tokenizer
from text_models import CHAT_TEMPLATE, save_tokenizer

Make = Callable[..., Tokenizer]
DIALOGUE = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "H\u00e9llo {{ 7 * 7 }} "},
    {"role": "assistant", "content": "'Hi'\n"},
    {"role": "user", "content": "why?"},
]
# What published templates do: special tokens, whitespace control, namespaces, loop controls, macros, JSON, training marks.
TEMPLATES = {
    "brackets": CHAT_TEMPLATE,
    "lines": """{% for message in messages %}
<|im_start|>{{ message.role }}
    {% if message['content'] is string %}
{{ message['content'] | trim }}<|im_end|>
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}""",
    "namespace": """{{ bos_token }}{% set ns = namespace(seen=0, system='') %}
{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% continue %}{% endif %}
{% set ns.seen = ns.seen + 1 %}[{{ loop.index0 }}/{{ ns.seen }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}
{% endfor %}{{ ns.system }}{% if tools is defined and tools is none %} no tools{% endif %}""",
    "macro": """{% macro turn(m) -%}{{ m | tojson }}{{ m.keys() | list | tojson(indent=1) }}{%- endmacro %}
{% for m in messages %}{% generation %}{{ turn(m) }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}
{{ dict(a=1) }}{{ strftime_now('%Y') | length }}{{ messages[1:] | length }}{{ documents }}""",
}
LOOPING = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "grows": "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "multiplies": "{{ 'x' * 10000000000 }}",
    "is long": "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads files": "{% include '/etc/passwd' %}",
    "changes its input": "{{ messages.append(1) }}",
    "stores dunders": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "is no template": "{% for %}",
    "divides": "{{ 1 / 0 }}",
}


@pytest.fixture
def tokenizer_with(tmp_path: Path) -> Make:
    def make(template: object = None) -> Tokenizer:
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        return Tokenizer(save_tokenizer(folder, chat_template=template))  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_it_gives_in_transformers(tokenizer_with: Make, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "tokenizer-0")
    prompt = render(tokenizer, DIALOGUE)
    assert prompt.text == theirs.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    assert list(prompt.token_ids) == theirs(prompt.text, add_special_tokens=False).input_ids
    assert prompt.templated and prompt.stop == ()


def test_a_template_may_be_told_more_than_the_messages(tokenizer_with: Make, tmp_path: Path) -> None:
    template = (
        "{{ messages | length }}{{ 'x' if enable_thinking is defined and not enable_thinking }}{{ level }}{{ bos_token }}"
    )
    tokenizer = tokenizer_with(template)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "tokenizer-0")
    for values in ({}, {"enable_thinking": False, "level": [1, {"a": None}]}, {"bos_token": "other"}):
        wanted = theirs.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True, **values)
        assert render(tokenizer, DIALOGUE, values=values).text == wanted


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_misbehaves_is_a_model_error(name: str) -> None:
    with pytest.raises(ModelError, match="the chat template failed: ") as caught:
        apply_template(HOSTILE[name], DIALOGUE, {}, limit_s=1)
    assert len(str(caught.value).splitlines()) == 3


def test_a_template_that_loops_ends_in_bounded_time() -> None:
    start_s = time.monotonic()
    with pytest.raises(ModelError, match="did not finish in 1 s"):
        apply_template(LOOPING, DIALOGUE, {}, limit_s=1)
    assert time.monotonic() - start_s < 25  # a second of CPU time, on a machine that others use, too


def test_a_process_that_never_gets_its_cpu_time_is_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.text.template.LIMIT_WALL_S", 0.0)
    with pytest.raises(ModelError, match="did not finish in 0 s"):
        apply_template("x", DIALOGUE, {})


def test_a_template_that_refuses_the_messages_says_why(tokenizer_with: Make) -> None:
    with pytest.raises(ModelError, match="the chat template failed: TemplateError: roles must alternate"):
        render(tokenizer_with("{{ raise_exception('roles must\nalternate') }}"), DIALOGUE)


def test_several_templates_need_a_default(tokenizer_with: Make) -> None:
    tokenizer = tokenizer_with({"default": "d{{ messages | length }}", "tool_use": "t"})
    assert render(tokenizer, DIALOGUE).text == "d4"
    with pytest.raises(ModelError, match="names none as the default"):
        render(tokenizer_with({"rag": "r", "tool_use": "t"}), DIALOGUE)


# -- transcripts --------------------------------------------------------------------------------------------------------


def test_a_model_without_template_gets_a_transcript(tokenizer_with: Make) -> None:
    tokenizer = tokenizer_with()
    prompt = render(tokenizer, DIALOGUE)
    assert prompt.text == "Be <brief> & kind.\n\nUser: H\u00e9llo {{ 7 * 7 }}\nAssistant: 'Hi'\nUser: why?\nAssistant:"
    assert not prompt.templated and list(prompt.token_ids) == tokenizer.encode(prompt.text)
    assert render(tokenizer_with(CHAT_TEMPLATE), DIALOGUE, template=False) == prompt


def test_an_answer_to_a_transcript_ends_before_the_next_role_line(tokenizer_with: Make) -> None:
    tokenizer = tokenizer_with()
    for line in ("\nUser: and", "\nAssistant: more", "\nSystem: x"):
        stream = TextStream(tokenizer, TRANSCRIPT_STOPS)
        tokens = iter(tokenizer.encode(" Because.\n\nUsers: no." + line))
        text = ""
        while not stream.stopped:
            text += stream.push(next(tokens))
        assert text == " Because.\n\nUsers: no."


def test_the_demo_pair_is_a_base_model_and_goes_by_transcript() -> None:
    assert not render(Tokenizer(TARGET), DIALOGUE).templated


def test_a_transcript_goes_on_where_the_last_one_ended() -> None:
    """So that the keys and values of earlier turns are reused."""
    answer = {"role": "assistant", "content": "  Because. \n"}
    assert transcript([*DIALOGUE, answer, DIALOGUE[1]]).startswith(transcript(DIALOGUE) + " Because.\nUser:")


# -- messages that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (["hi"], "str, no object"),
        ([{"role": "tool", "content": "x"}], "unknown role 'tool'"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": ["user"], "content": "x"}], "unknown role"),
        ([{"role": "user", "content": None}], "NoneType, not text"),
        ([{"role": "user"}], "NoneType, not text"),
        ([{"role": "user", "content": "\ud800"}], "not Unicode"),
    ],
    ids=["none", "text", "role", "no role", "role of a list", "null", "no content", "surrogate"],
)
@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE], ids=["transcript", "template"])
def test_bad_messages_are_usage_errors(tokenizer_with: Make, messages: Any, reason: str, template: str | None) -> None:
    with pytest.raises(UsageError, match=reason):
        render(tokenizer_with(template), messages)
