"""Packing: documents become sequences of a fixed number of tokens, each of which will have its own latent z.

Text is encoded as it stands (a special token written in it is plain text), and every document is followed by its
end-of-text token, which is predicted and counts as any other. What follows the end is padding, of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from torch import Tensor

from ltm_pyro.data.tokenizers import end_of_text, token_num_bytes
from ltm_pyro.errors import InputError
from ltm_pyro.models.batch import TokenBatch


@dataclass(frozen=True)
class PackedSequences:
    """N sequences of T tokens."""

    tokens: Tensor
    """[N, T] int32, padded with the end-of-text id."""

    num_tokens: Tensor
    """[N] int64: the tokens that are predicted, text and end-of-text; what follows them is padding."""

    document_ids: Tensor
    """[N] int64: numbers what is scored as one piece of evidence: the sequences of one document; in a stream, each
    sequence by itself."""

    num_bytes: Tensor
    """[N] int64: the bytes of text that the tokens stand for. A character cut by the end of a sequence counts on each
    side by the bytes that lie there."""

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> TokenBatch:
        """The sequences at these indices, [B], which also become the sequence ids; weight 0 on padding, 1 elsewhere."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        tokens = self.tokens[indices].long()
        weights = (torch.arange(tokens.shape[1]) < self.num_tokens[indices, None]).float()
        return TokenBatch(tokens, weights, indices, self.num_bytes[indices])


def pack_by_document(documents: Sequence[str], encoding: tiktoken.Encoding, length: int) -> PackedSequences:
    """Sequences of consecutive tokens of one document each.

    A document of n tokens and its end-of-text become ceil((n + 1) / length) sequences, of which only the last is
    padded: no z is shared between documents.

    Args:
        documents: the texts.
        encoding: of :func:`~ltm_pyro.data.tokenizers.get_tokenizer`.
        length: tokens of a sequence (T).

    Raises:
        InputError: a document is not valid Unicode.
    """
    encoded = _encode(documents, encoding)
    sizes = np.array([len(tokens) for tokens in encoded])
    num_sequences = -(-sizes // length)
    ends = np.cumsum(num_sequences)
    tokens = np.full(ends[-1] * length, end_of_text(encoding), dtype=np.int32)
    for start, document in zip((ends - num_sequences) * length, encoded, strict=True):
        tokens[start : start + len(document)] = document
    num_tokens = np.full(ends[-1], length)
    num_tokens[ends - 1] = sizes - (num_sequences - 1) * length
    document_ids = np.repeat(np.arange(len(documents)), num_sequences)
    return _packed(tokens.reshape(-1, length), num_tokens, document_ids, encoding)


def pack_as_stream(documents: Sequence[str], encoding: tiktoken.Encoding, length: int) -> PackedSequences:
    """Sequences cut from all documents joined, with no padding but in the very last.

    Several documents, or parts of them, may lie in one sequence. They share its z, and the later ones see the earlier
    through the attention window: figures per document do not apply.

    Args:
        documents: the texts.
        encoding: of :func:`~ltm_pyro.data.tokenizers.get_tokenizer`.
        length: tokens of a sequence (T).

    Raises:
        InputError: a document is not valid Unicode.
    """
    stream = np.concatenate(_encode(documents, encoding))
    num_sequences = -(-len(stream) // length)
    tokens = np.full(num_sequences * length, end_of_text(encoding), dtype=np.int32)
    tokens[: len(stream)] = stream
    num_tokens = np.full(num_sequences, length)
    num_tokens[-1] = len(stream) - (num_sequences - 1) * length
    return _packed(tokens.reshape(-1, length), num_tokens, np.arange(num_sequences), encoding)


PACKING = {"document": pack_by_document, "stream": pack_as_stream}
"""The ways of packing, by the name that settings use."""


def _encode(documents: Sequence[str], encoding: tiktoken.Encoding) -> list[np.ndarray]:
    """The tokens of each document and its end-of-text."""
    end = np.array([end_of_text(encoding)], dtype=np.uint32)
    encoded = []
    for index, text in enumerate(documents):
        try:
            tokens = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise InputError(
                f"document {index} (from 0) is not valid Unicode ({error.reason}, at character {error.start}); "
                "remove that character from the text"
            ) from error
        encoded.append(np.concatenate([tokens, end]))
    return encoded


def _packed(
    tokens: np.ndarray, num_tokens: np.ndarray, document_ids: np.ndarray, encoding: tiktoken.Encoding
) -> PackedSequences:
    # End-of-text stands for 0 bytes, so padding adds none.
    num_bytes = token_num_bytes(encoding)[tokens].sum(axis=1)
    return PackedSequences(*map(torch.from_numpy, (tokens, num_tokens, document_ids, num_bytes)))
