"""The tokenizer that a GGUF file describes, as one of the library `tokenizers`.

Kinds "gpt2" (byte pairs over bytes, whose rules for words `tokenizer.ggml.pre` names) and "llama" (sentencepiece's byte pairs
with scores). Sources: ggml's docs/gguf.md; the rules for words are those of the models' own tokenizer.json.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..config import counted
from ..weights.gguf_cursor import Value

logger = logging.getLogger(__name__)

# Of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE: Final = "\u2581"  # what sentencepiece writes for a space

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED: Final = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """How text is cut into words before bytes are paired: by each pattern in turn. `whole`: a word that is a token is that
    token, whatever the merges say. `begins`: a text begins with <bos> unless the file says otherwise."""

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    composed: bool = False  # characters and their accents are one (NFC)


def _cl100k(digits: str, *, whole: bool = False, begins: bool = False, composed: bool = False) -> Words:
    """The rules of OpenAI's cl100k vocabulary, which later ones vary in how many digits are a word."""
    pattern = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
    return Words(patterns=(pattern,), whole=whole, begins=begins, composed=composed)


_UPPER, _LOWER = _CASED
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
_LLAMA3, _QWEN2 = _cl100k(r"\p{N}{1,3}", whole=True, begins=True), _cl100k(r"\p{N}", composed=True)
_SMOLLM: Final = Words(patterns=(r"\p{N}", _GPT2))

WORDS: Final = {
    "gpt-2": Words(patterns=(_GPT2,)),
    "gpt2": Words(patterns=(_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "tekken": Words(patterns=(_TEKKEN,), whole=True, begins=True),
}
DEFAULT: Final = Words(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))  # llama.cpp's


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """`roles` are the texts of special tokens, such as "eos_token". `template` lays out chats."""

    tokenizer: Tokenizer
    roles: Mapping[str, str]
    template: str | None


def build_tokenizer(metadata: Mapping[str, Value]) -> Built:
    """ValueError says what is wrong with the vocabulary, or that we do not read its kind."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokens")
    if kind == "gpt2":
        tokenizer, begins = _byte_pairs(metadata, tokens)
    elif kind == "llama":
        tokenizer, begins = _sentencepiece(metadata, tokens), True
    else:
        raise ValueError(f"it is of the kind {str(kind)[:40]!r}, and we read gpt2 and llama from GGUF files")
    _add_special(tokenizer, tokens, _types(metadata, tokens))
    roles = _roles(metadata, tokens)
    _add_ends(tokenizer, metadata, tokens, begins=begins)
    template = metadata.get("tokenizer.chat_template")
    return Built(tokenizer=tokenizer, roles=roles, template=template if isinstance(template, str) else None)


def _byte_pairs(metadata: Mapping[str, Value], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    words = _words(metadata.get("tokenizer.ggml.pre"))
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(metadata, "merges"))]
    vocabulary = _vocabulary(tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole))
    if words.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.begins


def _words(name: Value | None) -> Words:
    if name is None or name == "default":
        logger.warning("the GGUF file does not say how its tokenizer cuts text into words: it may be cut wrongly")
        return DEFAULT
    if name not in WORDS:
        raise ValueError(f"it cuts words as {str(name)[:40]!r} does, and we read {', '.join(WORDS)}")
    return WORDS[str(name)]


def _sentencepiece(metadata: Mapping[str, Value], tokens: Sequence[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, tuple) or len(scores) != len(tokens):
        raise ValueError(f"it has {counted(len(tokens), 'token')} and not as many scores")
    vocabulary = _vocabulary(tokens)
    types = _types(metadata, tokens)
    numbers = [score if isinstance(score, float) else float(str(score)) for score in scores]
    merges = scored_merges(tokens, numbers, types)
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown[0] if unknown else None, fuse_unk=True, byte_fallback=True
        )
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    before = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(content=" ", left=1, right=0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return tokenizer


def scored_merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Merges that pair what sentencepiece pairs: of all neighbours those first whose pair is the token of the highest score."""
    known = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED, UNUSED)}
    order = sorted(range(len(tokens)), key=lambda number: -scores[number])  # stable: equal scores by number
    merges: list[tuple[str, str]] = []
    for number in order:
        token = tokens[number]
        if token not in known:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are found in a text whole, before anything else; control tokens are shown in none."""
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Value], tokens: Sequence[str], *, begins: bool) -> None:
    """Plain text gets <bos> in front and <eos> behind where the file says so."""
    asked = {"bos": metadata.get("tokenizer.ggml.add_bos_token", begins), "eos": metadata.get("tokenizer.ggml.add_eos_token")}
    found = {name: _token(metadata, tokens, name) for name, wanted in asked.items() if wanted is True}
    ends = {name: token for name, token in found.items() if token is not None}
    if ends:
        template = [*(["<bos>"] if "bos" in ends else []), "$A", *(["<eos>"] if "eos" in ends else [])]
        numbers = [{"id": f"<{name}>", "ids": [number], "tokens": [tokens[number]]} for name, number in ends.items()]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)


def _roles(metadata: Mapping[str, Value], tokens: Sequence[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {role: _token(metadata, tokens, key) for role, key in keys.items()}
    return {role: tokens[number] for role, number in found.items() if number is not None}


def _token(metadata: Mapping[str, Value], tokens: Sequence[str], name: str) -> int | None:
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"it has {counted(len(tokens) - len(vocabulary), 'token')} twice")
    return vocabulary


def _strings(metadata: Mapping[str, Value], name: str) -> Sequence[str]:
    value: Any = metadata.get(f"tokenizer.ggml.{name}", ())
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"it has {name} that are not an array of strings")
    return value


def _types(metadata: Mapping[str, Value], tokens: Sequence[str]) -> Sequence[int]:
    value: Any = metadata.get("tokenizer.ggml.token_type", (NORMAL,) * len(tokens))
    if not isinstance(value, tuple) or len(value) != len(tokens) or not all(type(item) is int for item in value):
        raise ValueError(f"it has {counted(len(tokens), 'token')} and not as many types")
    return value
