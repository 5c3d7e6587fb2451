"""From a name or a file to batches of tokens.

Corpora, benchmark sets, tokenizers, prepared corpora, packing into sequences, the order of batches, and synthetic
languages whose probabilities are known. This room knows the batch that a model reads, and nothing of inference.

To add a corpus, give :func:`open_corpus` another source of documents (`corpora.py`). To add a benchmark set, give it an
entry in `BENCHMARK_SETS` (`benchmark_sets.py`). To add a tokenizer, register a tiktoken encoding that has an
end-of-text token as a tiktoken plugin: :func:`get_tokenizer` finds it by its name. To add a way of packing, write a
function with the signature of :func:`pack_by_document` and give it a line in `PACKING`.
"""

from ltm_pyro.data.batches import batch_indices, places
from ltm_pyro.data.benchmark_sets import BENCHMARK_SETS, BenchmarkSet
from ltm_pyro.data.corpora import Corpus, Texts, load_corpus, load_texts, open_corpus
from ltm_pyro.data.documents import Documents, TokenizedCorpus, TokenizedTexts, byte_counts, token_dtype, tokenize
from ltm_pyro.data.packing import PACKING, PackedSequences, pack_as_stream, pack_by_document
from ltm_pyro.data.synthetic import TopicLanguage, UniformLanguage, UnigramLanguage, token_batch
from ltm_pyro.data.tokenized import load_tokenized_corpus, load_tokenized_texts
from ltm_pyro.data.tokenizers import begin_of_text, end_of_text, fingerprint, get_tokenizer, token_num_bytes

__all__ = [
    "BENCHMARK_SETS",
    "PACKING",
    "BenchmarkSet",
    "Corpus",
    "Documents",
    "PackedSequences",
    "Texts",
    "TokenizedCorpus",
    "TokenizedTexts",
    "TopicLanguage",
    "UniformLanguage",
    "UnigramLanguage",
    "batch_indices",
    "begin_of_text",
    "byte_counts",
    "end_of_text",
    "fingerprint",
    "get_tokenizer",
    "load_corpus",
    "load_texts",
    "load_tokenized_corpus",
    "load_tokenized_texts",
    "open_corpus",
    "pack_as_stream",
    "pack_by_document",
    "places",
    "token_batch",
    "token_dtype",
    "token_num_bytes",
    "tokenize",
]
