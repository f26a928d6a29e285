"""The two ways to tokens: a byte-level BPE trained on the data, and GPT-2's through tiktoken.

Both have `bos`, the end-of-text id that every document starts with; `encode(texts)`, the ids of each text; and `path`,
the file that holds what they go by.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from kdclimb.artifacts import write_text, write_via

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of tiktoken's r50k_base.tiktoken
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # where words end


class TrainedBPE:
    """A byte-level BPE of exactly `vocab_size` entries, id 0 the end-of-text token; saved to `path`."""

    bos = 0

    def __init__(self, documents: Iterable[str], vocab_size: int, path: Path):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.path = path
        self.tokenizer = tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        found = tokenizer.get_vocab_size()
        if found != vocab_size:
            raise ValueError(f"data.vocab_size: {vocab_size} is more than this text gives ({found})")
        tokenizer.encode_special_tokens = True  # text that looks like the end-of-text token is text
        write_text(path, tokenizer.to_str(pretty=True))  # its own save raises a bare Exception where the disk is full

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]


class GPT2:
    """GPT-2's BPE. `ranks`: a local file, or None for tiktoken's own download. The ranks are saved to `path`.

    Raises ValueError that names the key if there are no ranks, or others than GPT-2's.
    """

    bos = 50256

    def __init__(self, ranks: Path | None, path: Path):
        import tiktoken

        self.path = path
        if ranks is None:
            self.encoding = _downloaded()
        else:
            specials = {END_OF_TEXT: self.bos}
            self.encoding = tiktoken.Encoding(
                "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=read_ranks(ranks), special_tokens=specials
            )
        tokens = self.encoding.token_byte_values()
        text = _ranks_text({token: self.encoding.encode_single_token(token) for token in tokens})
        write_via(path, lambda temporary: temporary.write_bytes(text))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)


def _downloaded():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: not the file it should be
        raise ValueError(
            "data.tokenizer.ranks: null lets tiktoken download GPT-2's ranks, and it could not "
            f"({type(error).__name__}); name a local file of them, such as gpt2.tiktoken"
        ) from error


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of GPT-2, from a .tiktoken file (lines of a token in base64 and its rank) or from the JSON of npm's
    tiktoken (`bpe_ranks`, lines of `! FIRST_RANK TOKEN TOKEN ...`).

    tiktoken's own reader would keep the first content of a path for good, in its cache. Raises ValueError.
    """
    try:
        text = path.read_text(encoding="ascii")
        ranks = _json_ranks(text) if text.lstrip().startswith("{") else _tiktoken_ranks(text)
    except OSError as error:
        raise ValueError(f"data.tokenizer.ranks: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data.tokenizer.ranks: {path}: neither a .tiktoken file nor the JSON of npm's tiktoken"
        ) from error
    if hashlib.sha256(_ranks_text(ranks)).hexdigest() != GPT2_SHA256:
        raise ValueError(f"data.tokenizer.ranks: {path}: holds {len(ranks)} ranks, which are not GPT-2's")
    return ranks


def _tiktoken_ranks(text: str) -> dict[bytes, int]:
    pairs = [line.split() for line in text.splitlines() if line]
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def _json_ranks(text: str) -> dict[bytes, int]:
    ranks = {}
    for line in json.loads(text)["bpe_ranks"].splitlines():
        _, first, *tokens = line.split()
        ranks |= {base64.b64decode(token, validate=True): rank for rank, token in enumerate(tokens, int(first))}
    return ranks


def _ranks_text(ranks: dict[bytes, int]) -> bytes:
    """The .tiktoken file of these ranks."""
    lines = (
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda pair: pair[1])
    )
    return b"".join(lines)
