"""Tokenizers: tiktoken encodings that have an end-of-text and a begin-of-text token.

The begin-of-text token is always the last id of the vocabulary. It is never predicted: the model puts it in front of
every sequence. The end-of-text token ends every document, is predicted, and serves as padding behind it.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import regex
import tiktoken

from ltm_pyro.errors import InputError

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
BEGIN_OF_TEXT = "<|beginoftext|>"
LONG_RUN = 50_000
"""Runs of so many blanks are not left to tiktoken, which panics where they have about a million."""
_SUFFIX = "+beginoftext"


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name, with its begin-of-text token.

    Args:
        name: `bytes` (ids 0 to 255 are the bytes of the UTF-8 text, 258 ids in all), or the name of a tiktoken encoding
            such as `gpt2` (50,258 ids in all), which is downloaded when it is used for the first time.

    Raises:
        InputError: there is no such encoding, it cannot be downloaded, or it has no end-of-text token.
    """
    if name == BYTES:
        return tiktoken.Encoding(
            BYTES,
            # No two bytes ever merge, so the pieces are free: runs of 64 characters encode about 3 times as fast as
            # single characters, and twice as fast as one piece that is the whole text.
            pat_str=r"[\s\S]{1,64}",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={END_OF_TEXT: 256, BEGIN_OF_TEXT: 257},
        )
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise InputError(f"there is no tokenizer {name!r}; choose one of {', '.join([BYTES, *known])}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or not the file it should be
        reason = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer {name!r} cannot be downloaded; use the tokenizer 'bytes', or set TIKTOKEN_CACHE_DIR to a "
            f"folder that holds its files as tiktoken keeps them ({reason})"
        ) from error
    if END_OF_TEXT not in encoding.special_tokens_set:
        raise InputError(f"the tokenizer {name!r} has no {END_OF_TEXT} token; choose one that has one")
    return tiktoken.Encoding(
        name + _SUFFIX,
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={**encoding._special_tokens, BEGIN_OF_TEXT: encoding.n_vocab},
    )


def encode(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """The tokens of a text, [n] uint32. This is the one way in which text becomes tokens.

    Text is encoded as it stands: a special token written in it is plain text. tiktoken panics on very long runs of
    blanks, since it looks for their end by recursion. Such a text is split into words by the same pattern here, so
    that the tokens are the same.

    Args:
        text: any text.
        encoding: a tokenizer of :func:`get_tokenizer`.

    Raises:
        InputError: it is not valid Unicode.
    """
    if len(text) > LONG_RUN and regex.search(rf"\s{{{LONG_RUN}}}", text):
        check_unicode(text, "the text")
        words = regex.finditer(encoding._pat_str, text)
        return np.array([token for word in words for token in encoding._encode_single_piece(word[0])], np.uint32)
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        check_unicode(text, "the text")
        raise


def check_unicode(text: str, place: str) -> None:
    """Check that a text can be encoded.

    Args:
        place: where the text stands, for the error.

    Raises:
        InputError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} is not valid Unicode ({error.reason}, at character {error.start}); remove that character from "
            "the text"
        ) from None


def name_of(encoding: tiktoken.Encoding) -> str:
    """The name under which :func:`get_tokenizer` gives this tokenizer."""
    return encoding.name.removesuffix(_SUFFIX)


def end_of_text(encoding: tiktoken.Encoding) -> int:
    """The id of the token that ends every document."""
    return encoding.encode_single_token(END_OF_TEXT)


def begin_of_text(encoding: tiktoken.Encoding) -> int:
    """The id of the token that the model puts in front of every sequence, the last of the vocabulary."""
    return encoding.encode_single_token(BEGIN_OF_TEXT)


def token_num_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of text each id stands for, [n_vocab] int64; 0 for special tokens and for ids not in use."""
    num_bytes = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token, index in encoding._mergeable_ranks.items():
        num_bytes[index] = len(token)
    return num_bytes


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """SHA-256 (hexadecimal) of all that decides how text is encoded: pattern, ranks and special tokens."""
    ranks = sorted((index, token.hex()) for token, index in encoding._mergeable_ranks.items())
    contents = [encoding._pat_str, ranks, sorted(encoding._special_tokens.items())]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
