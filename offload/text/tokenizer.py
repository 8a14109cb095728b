"""Text to token ids and back. Tokens arrive a few at a time; text leaves as soon as it can no longer change.

Knows nothing of models. A model folder may lack a tokenizer; token ids still work there.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError
from ..weights.gguf_header import read_gguf
from .template import apply_template

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not yet a character
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # how sentencepiece writes a byte that no other token covers
_CURE_OF_FOLDER = "download the tokenizer files again, or delete them and give token ids with --prompt-ids"
_CURE_OF_GGUF = "take another GGUF file of the model, or its folder with config.json and safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, path: Path) -> None:
        """Of a folder or a GGUF file. ModelError when it is damaged, or of a kind that we do not read."""
        try:
            self._tokenizer: Any = _of_gguf(path) if path.is_file() else _of_folder(path)
            self.encode("")  # drops padding and truncation of tokenizer.json for good: threads that follow change nothing
        except Exception as error:  # transformers and tokenizers raise anything here
            raise ModelError(
                f"the tokenizer cannot be read: {' '.join(str(error).split())[:300]}",
                where=str(path),
                cure=_CURE_OF_GGUF if path.is_file() else _CURE_OF_FOLDER,
            ) from error
        added = self._tokenizer.added_tokens_decoder.items()
        self._special_ids = frozenset([*self._tokenizer.all_special_ids, *(number for number, it in added if it.special)])

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds itself (such as <s>)."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)

    def encode_chat(self, text: str, system_prompt: str | None) -> list[int]:
        """Token ids of one user turn, laid out by the model's own chat template."""
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return self.encode_laid_out(self.lay_out([*messages, {"role": "user", "content": text}]))

    def lay_out(self, messages: Sequence[Mapping[str, str]], values: Mapping[str, object] | None = None) -> str:
        """`messages` as text that opens an answer, laid out by the model's own chat template. The template may use `values` by
        their names. Raises as `apply_template` does."""
        if not self.has_chat_template:
            raise UsageError(
                "the model has no chat template", where="--chat or --system-prompt", cure="use --raw, or leave them out"
            )
        try:
            template = str(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelError(
                f"the model has several chat templates and names none as the default: {' '.join(str(error).split())[:200]}",
                where="chat template of the model",
                cure="use --raw",
            ) from error
        special_tokens = {name: str(it) for name, it in self._tokenizer.special_tokens_map.items()}
        return apply_template(template, messages, {**special_tokens, **(values or {})})

    def encode_laid_out(self, text: str) -> list[int]:
        """Token ids of what `lay_out` made: a template writes the special tokens itself."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token within a text, special tokens by their names; REPLACEMENT where its bytes are part of a character."""
        once, twice = (
            str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for ids in ([token_id], [token_id] * 2)
        )
        return twice[len(once) :]  # at the beginning of a text, many decoders drop a token's space

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8: the bytes of a text's tokens together are the text. b"" for special
        tokens, which no text shows."""
        if self.is_special(token_id):
            return b""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        stands_for = _bytes_of_stand_ins()
        return bytes(stands_for[it] for it in token) if stands_for.keys() >= set(token) else text.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves it out."""
        return token_id in self._special_ids

    def special_tokens(self) -> dict[str, str]:
        """Role, such as "eos_token", to text."""
        return {role: str(token) for role, token in self._tokenizer.special_tokens_map.items() if isinstance(token, str)}

    @property
    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template if isinstance(self._tokenizer.chat_template, str) else None

    @property
    def num_tokens(self) -> int:
        """One more than the largest token id of the vocabulary proper. Tokens added to it, such as padding, do not count: they
        may lie beyond a model's embedding, and no text has one unless it spells it out."""
        return max(set(self.vocabulary().values()) - self._tokenizer.added_tokens_decoder.keys(), default=-1) + 1

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    def vocabulary_digest(self) -> bytes:
        """SHA-256 of which token has which id: what tells whether a file of token ids is of this tokenizer."""
        return hashlib.sha256(json.dumps(sorted(self.vocabulary().items())).encode()).digest()


@cache
def _bytes_of_stand_ins() -> dict[str, int]:
    """Byte-level tokenizers write each byte as a printable character: as itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def open_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a folder or a GGUF file, None when it has none."""
    if path.is_file():
        has_one = "tokenizer.ggml.tokens" in read_gguf(path, long_arrays=False).metadata
    else:
        has_one = any((path / name).exists() for name in _TOKENIZER_FILES)
    return Tokenizer(path) if has_one else None


def _of_folder(folder: Path) -> Any:
    from ..model.transformers_api import read_tokenizer

    return read_tokenizer(folder)


def _of_gguf(path: Path) -> Any:
    from ..model.transformers_api import make_tokenizer
    from .gguf_tokenizer import build_tokenizer

    built = build_tokenizer(read_gguf(path).metadata)
    return make_tokenizer(built.tokenizer, built.roles, built.template)


def check_same_vocabulary(target: Tokenizer | None, draft: Tokenizer | None, sizes: tuple[int, int], where: str) -> None:
    """ModelError naming the first token that draft and target number differently. Without two tokenizers to compare, the
    sizes (target, draft) must be equal; with equal tokenizers they may differ by padding."""
    cure = "use a draft model of the same family: it must share the target's tokenizer"
    if target is None or draft is None:
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"the draft's vocabulary has {sizes[1]} tokens, the target's {sizes[0]}; the first that differs is token "
                f"{min(sizes)}",
                where=where,
                cure=cure,
            )
        return
    by_id, draft_by_id = (
        {token_id: token for token, token_id in tokenizer.vocabulary().items()} for tokenizer in (target, draft)
    )
    if by_id != draft_by_id:
        first = min(i for i in {*by_id, *draft_by_id} if by_id.get(i) != draft_by_id.get(i))
        raise ModelError(
            f"the draft's vocabulary differs from the target's ({len(draft_by_id)} and {len(by_id)} tokens): token "
            f"{first} is {draft_by_id.get(first)!r} in the draft and {by_id.get(first)!r} in the target",
            where=where,
            cure=cure,
        )
