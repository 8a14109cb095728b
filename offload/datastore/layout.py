"""The head of a datastore's file, and where its parts lie. docs/formats.md has it in words.

    head | tokens | places | sample          each from a multiple of PAGE_BYTES on

tokens: all texts, each read backwards, a mark behind each; big-endian, so that tokens compare as their bytes do. A mark is a
    token id that no text has: the size of the vocabulary. MARKS_AT_END marks end them.
places: uint32, little-endian: where in `tokens` a context begins, the token before a continuation. As texts are backwards,
    the context is what lies behind, and the continuation what lies before. They are sorted by their first CONTEXT_TOKENS.
sample: the first SAMPLE_TOKENS tokens of every SAMPLE_STEP-th place's context.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

MAGIC = b"treestream-ngram"
VERSION = 1
PAGE_BYTES = 4096
CONTEXT_TOKENS = 16
SAMPLE_STEP, SAMPLE_TOKENS = 1024, 8
MARKS_AT_END = 32  # at least the tokens of a context and of a sort key, so that none is cut off
MOST_TOKENS = 2**32 - 1  # places are uint32
MOST_VOCABULARY = 2**31 - 1

_HEAD = struct.Struct("<16sIIQQQII32s32s32s32s")
_DIGEST = struct.Struct("32s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a file says of itself. `tokenizer` is a digest of the vocabulary that its tokens are of; `digests` are the
    SHA-256 of its parts."""

    vocab_size: int
    num_tokens: int
    num_places: int
    tokenizer: bytes
    digests: tuple[bytes, bytes, bytes]

    @property
    def token_bytes(self) -> int:
        return token_bytes(self.vocab_size)

    @property
    def num_samples(self) -> int:
        return -(-self.num_places // SAMPLE_STEP)

    @property
    def parts(self) -> Mapping[str, range]:
        """The bytes of the file that each part takes, by its name, in order."""
        sizes = {
            "tokens": self.num_tokens * self.token_bytes,
            "places": self.num_places * 4,
            "sample": self.num_samples * SAMPLE_TOKENS * self.token_bytes,
        }
        begin, parts = PAGE_BYTES, dict[str, range]()
        for name, num_bytes in sizes.items():
            parts[name] = range(begin, begin + num_bytes)
            begin += up_to_page(num_bytes)
        return parts

    @property
    def file_bytes(self) -> int:
        return up_to_page(self.parts["sample"].stop)

    def pack(self) -> bytes:
        """PAGE_BYTES, the digest of all before it at the end of what is used."""
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            self.token_bytes,
            self.vocab_size,
            self.num_tokens,
            self.num_places,
            SAMPLE_STEP,
            SAMPLE_TOKENS,
            self.tokenizer,
            *self.digests,
        )
        return (head + hashlib.sha256(head).digest()).ljust(PAGE_BYTES, b"\0")


def token_bytes(vocab_size: int) -> int:
    """Of one token, or of a mark."""
    return 2 if vocab_size < 2**16 else 4


def up_to_page(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def parse_head(data: bytes) -> Head:
    """ValueError for anything but the head of a file of this version, whole and unchanged."""
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin as one does")
    if len(data) < PAGE_BYTES:
        raise ValueError(f"it ends after {len(data)} bytes, within its head")
    head, (digest,) = data[: _HEAD.size], _DIGEST.unpack_from(data, _HEAD.size)
    _, version, width, vocab_size, num_tokens, num_places, step, tokens, tokenizer, *digests = _HEAD.unpack(head)
    if version != VERSION:
        raise ValueError(f"it is of version {version} of the format, and this program reads version {VERSION}")
    if digest != hashlib.sha256(head).digest() or (step, tokens) != (SAMPLE_STEP, SAMPLE_TOKENS):
        raise ValueError("its head is damaged")
    sizes_fit = 0 < vocab_size <= MOST_VOCABULARY and MARKS_AT_END <= num_tokens <= MOST_TOKENS and num_places <= num_tokens
    if not sizes_fit or width != token_bytes(vocab_size):
        raise ValueError(f"it claims {num_tokens} tokens of {vocab_size}, in {num_places} places")
    first, second, third = digests
    return Head(
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        num_places=num_places,
        tokenizer=tokenizer,
        digests=(first, second, third),
    )
