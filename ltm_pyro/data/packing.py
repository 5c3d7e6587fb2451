"""Packing: documents become sequences of a fixed number of tokens, each of which will have its own latent z.

Every document is followed by its end-of-text token, which is predicted and counts as any other. What follows the end is
padding, of weight 0. Nothing is copied: a sequence is a range of the documents, read when a batch asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from torch import Tensor

from ltm_pyro.data.documents import Documents, check_tokens
from ltm_pyro.data.tokenizers import end_of_text, token_num_bytes
from ltm_pyro.models.batch import TokenBatch


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """N sequences of T tokens each, which are pieces of documents."""

    documents: Documents
    """What the sequences are pieces of."""

    encoding: tiktoken.Encoding
    """What the documents were encoded with."""

    length: int
    """How many tokens a sequence has (T)."""

    starts: Tensor
    """Where each sequence starts in the documents joined, [N] int64."""

    num_tokens: Tensor
    """How many tokens of each sequence are predicted, text and end-of-text, [N] int64; what follows is padding."""

    document_ids: Tensor
    """The number of the document that each sequence is a piece of, [N] int64; in a stream, each sequence counts as a
    document of its own."""

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> TokenBatch:
        """The sequences at these indices, [B], which also become the sequence ids; weight 0 on padding, 1 elsewhere.

        Padding is the end-of-text id. A character cut by the end of a sequence counts on each side by the bytes that
        lie there.

        Raises:
            InputError: a file of the corpus is damaged.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        starts, num_tokens = self.starts[indices], self.num_tokens[indices]
        tokens = np.full((len(indices), self.length), end_of_text(self.encoding), dtype=np.int64)
        for row, start, count in zip(tokens, starts.tolist(), num_tokens.tolist(), strict=True):
            row[:count] = self.documents.read(start, start + count)
        check_tokens(tokens, self.encoding.n_vocab)
        weights = (torch.arange(self.length) < num_tokens[:, None]).float()
        # End-of-text stands for 0 bytes, so padding adds none.
        num_bytes = torch.from_numpy(self._token_num_bytes[tokens].sum(axis=1))
        return TokenBatch(torch.from_numpy(tokens), weights, indices, num_bytes)

    def num_words(self, indices: Sequence[int] | np.ndarray) -> int:
        """How many words begin in the sequences at these indices.

        A word is what stands between white space (ASCII's, as in `bytes.split`) or the ends of a document. One that a
        sequence's end cuts is counted where it begins, so that all sequences together have the words of the documents.

        Raises:
            InputError: a file of the corpus is damaged.
        """
        end, total = end_of_text(self.encoding), 0
        for index in indices:
            start = int(self.starts[index])
            tokens = self.documents.read(max(0, start - 1), start + int(self.num_tokens[index])).tolist()
            check_tokens(np.array(tokens), self.encoding.n_vocab)
            # The token before tells whether the first word has begun there; end-of-text separates as white space does.
            pieces = [b"\n" if token == end else self.encoding.decode_single_token_bytes(token) for token in tokens]
            before = pieces.pop(0) if start else b""
            total += len((before + b"".join(pieces)).split()) - len(before.split())
        return total

    @functools.cached_property
    def _token_num_bytes(self) -> np.ndarray:
        return token_num_bytes(self.encoding)


def pack_by_document(documents: Documents, encoding: tiktoken.Encoding, length: int) -> PackedSequences:
    """Sequences of consecutive tokens of one document each.

    A document of n tokens and its end-of-text become ceil((n + 1) / length) sequences, of which only the last is
    padded: no z is shared between documents.

    Args:
        documents: what to cut into sequences, at least one document.
        encoding: the tokenizer that they were encoded with.
        length: how many tokens a sequence has (T).
    """
    num_sequences = -(-documents.sizes // length)
    stops = np.cumsum(documents.sizes)
    document_ids = np.repeat(np.arange(len(documents)), num_sequences)
    number_in_document = np.arange(len(document_ids)) - (np.cumsum(num_sequences) - num_sequences)[document_ids]
    starts = (stops - documents.sizes)[document_ids] + number_in_document * length
    num_tokens = np.minimum(length, stops[document_ids] - starts)
    return PackedSequences(documents, encoding, length, *map(torch.from_numpy, (starts, num_tokens, document_ids)))


def pack_as_stream(documents: Documents, encoding: tiktoken.Encoding, length: int) -> PackedSequences:
    """Sequences cut from all documents joined, with no padding but in the very last.

    Several documents, or parts of them, may lie in one sequence. They share its z, and the later ones see the earlier
    through the attention window: figures per document do not apply.

    Args:
        documents: what to cut into sequences, at least one document.
        encoding: the tokenizer that they were encoded with.
        length: how many tokens a sequence has (T).
    """
    starts = torch.arange(0, documents.num_tokens, length)
    num_tokens = (documents.num_tokens - starts).clamp(max=length)
    return PackedSequences(documents, encoding, length, starts, num_tokens, torch.arange(len(starts)))


PACKING = {"document": pack_by_document, "stream": pack_as_stream}
"""The ways of packing, by the name that settings use."""
