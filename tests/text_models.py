"""Tiny models with tokenizers on disk, for tests that need text; and models with something wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from conftest import save_tiny_model

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("\u0120", "w")]  # U+0120 is how byte-level tokenizers write a space
BOS, EOS = 256, 257
VOCAB_SIZE = 258 + len(MERGES)
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[reply]{% endif %}"
)


def byte_level_tokenizer(*, renamed: dict[int, str] | None = None) -> Tokenizer:
    """Ids 0 to 255 are bytes in the order of their stand-in characters, then <s> and </s>, then MERGES. `renamed` gives
    ids another token."""
    vocab = {token: token_id for token_id, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": BOS, "</s>": EOS}
    vocab |= {left + right: EOS + 1 + order for order, (left, right) in enumerate(MERGES)}
    names = {token_id: token for token, token_id in vocab.items()} | (renamed or {})
    tokenizer = Tokenizer(BPE({token: token_id for token_id, token in names.items()}, [] if renamed else MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama-2's: words begin with U+2581, what has no token is spelt in byte tokens, decoding drops the first space."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh", "\u2581a", "\u2581b"]
    vocab = {token: token_id for token_id, token in enumerate(names)}
    merges = [("\u2581", "a"), ("\u2581", "b")]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _words() -> dict[str, int]:
    """Words that begin with U+2581, letters within words, and special tokens."""
    names = ["<unk>", "<s>", "</s>", "\u2581", *"abc.,", *(f"\u2581{word}" for word in ("a", "b", "ab", "cab"))]
    return {name: token_id for token_id, name in enumerate(names)}


def metaspace_tokenizer() -> Tokenizer:
    """As T5's and the newer Llama-2 files: a space in front of the text, which decoding drops again."""
    vocab = _words()
    scores = [(name, 0.0 if name in ("<unk>", "<s>", "</s>") else -1.0 / len(name)) for name in vocab]
    tokenizer = Tokenizer(Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    """Words are parted by spaces, and their later parts say so: ##b."""
    names = ["<unk>", "<s>", "</s>", *"abc.,", *(f"##{letter}" for letter in "abc")]
    tokenizer = Tokenizer(WordPiece({name: token_id for token_id, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def word_end_tokenizer() -> Tokenizer:
    """The last part of a word says so, and decoding writes a space behind it unless it is the last."""
    names = ["<unk>", "<s>", "</s>", *"abc", *(f"{letter}</w>" for letter in "abc")]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, *, chat_template: str | None = None) -> Path:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or byte_level_tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )
    wrapped.save_pretrained(folder)
    return folder


def save_text_model(folder: Path, *, chat_template: str | None = None, **changes: object) -> Path:
    """A random Llama of 3 layers with the byte-level tokenizer."""
    settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS, **changes}
    return save_tokenizer(save_tiny_model(folder, **settings), chat_template=chat_template)


def copy_model(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def change_json(path: Path, **changes: object) -> None:
    """Replace fields of a JSON object; None removes one."""
    document = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in document.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Replace every tensor by what `change` returns for its name and value, None removes it; the index is left alone."""
    for path in folder.glob("*.safetensors"):
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, metadata={"format": "pt"})
