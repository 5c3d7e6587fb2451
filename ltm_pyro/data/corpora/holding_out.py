"""Which documents are held out for validation, of a corpus that brings no validation split of its own."""

from __future__ import annotations

import hashlib

from ltm_pyro.data.corpora.base import is_document

HELD_OUT_OF = 20
"""One in this many documents is held out; of fewer documents, that share of each of them."""


def hold_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents; one of the two lists may be empty.

    The twentieth part of the distinct documents with the smallest SHA-256 is held out, so that equal documents fall on
    the same side, whatever their order. Of fewer than 20 distinct documents, the last twentieth of the characters of
    each is held out instead.
    """
    distinct = sorted(set(documents), key=lambda document: hashlib.sha256(utf8(document)).digest())
    if len(distinct) < HELD_OUT_OF:
        cuts = [len(document) - max(1, len(document) // HELD_OUT_OF) for document in documents]
        pairs = list(zip(documents, cuts, strict=True))
        heads, ends = [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]
        return list(filter(is_document, heads)), list(filter(is_document, ends))
    held_out = set(distinct[: len(distinct) // HELD_OUT_OF])
    return (
        [document for document in documents if document not in held_out],
        [document for document in documents if document in held_out],
    )


def utf8(text: str) -> bytes:
    """The bytes of any text, even one with a lone surrogate, which no tokenizer takes."""
    return text.encode("utf-8", "surrogatepass")  # the error comes when the text is encoded
