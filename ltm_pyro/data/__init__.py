"""From a name or a file to batches of tokens.

Corpora, tokenizers, prepared corpora (written once, as tokens), packing into sequences, the order of batches, and
synthetic languages whose probabilities are known. It uses the batch that a model reads, and nothing of
inference.

To add something:

- a kind of corpus: a file in `corpora/` and a line in `CORPORA` (:mod:`ltm_pyro.data.corpora`);
- a format of files: an entry in `FORMATS` (`corpora/formats.py`);
- a benchmark set: an entry in `BENCHMARK_SETS` (`corpora/benchmark_sets.py`);
- a way of packing: a function with the signature of :func:`pack_by_document` and a line in `PACKING` (`packing.py`);
- a tokenizer: a tiktoken encoding that has an end-of-text token, registered as a tiktoken plugin;
  :func:`get_tokenizer` finds it by its name.
"""

from ltm_pyro.data.batches import batch_indices, stream_positions
from ltm_pyro.data.corpora import CORPORA, Corpus, Texts, absolute, load_corpus, load_texts, open_corpus
from ltm_pyro.data.corpora.base import CorpusKind, CorpusSource, Split
from ltm_pyro.data.corpora.benchmark_sets import BENCHMARK_SETS, BenchmarkSet
from ltm_pyro.data.documents import Documents, TokenizedCorpus, TokenizedTexts, byte_counts, token_dtype, tokenize
from ltm_pyro.data.packing import PACKING, PackedSequences, pack_as_stream, pack_by_document
from ltm_pyro.data.synthetic import TopicLanguage, UniformLanguage, UnigramLanguage, token_batch
from ltm_pyro.data.tokenized import is_local, is_there, load_corpus_sha256, load_tokenized_corpus, load_tokenized_texts
from ltm_pyro.data.tokenizers import begin_of_text, encode, end_of_text, fingerprint, get_tokenizer, token_num_bytes

__all__ = [
    "BENCHMARK_SETS",
    "CORPORA",
    "PACKING",
    "BenchmarkSet",
    "Corpus",
    "CorpusKind",
    "CorpusSource",
    "Documents",
    "PackedSequences",
    "Split",
    "Texts",
    "TokenizedCorpus",
    "TokenizedTexts",
    "TopicLanguage",
    "UniformLanguage",
    "UnigramLanguage",
    "absolute",
    "batch_indices",
    "begin_of_text",
    "byte_counts",
    "encode",
    "end_of_text",
    "fingerprint",
    "get_tokenizer",
    "is_local",
    "is_there",
    "load_corpus",
    "load_corpus_sha256",
    "load_texts",
    "load_tokenized_corpus",
    "load_tokenized_texts",
    "open_corpus",
    "pack_as_stream",
    "pack_by_document",
    "stream_positions",
    "token_batch",
    "token_dtype",
    "token_num_bytes",
    "tokenize",
]
