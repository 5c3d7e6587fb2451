"""The sets of texts that the field reports perplexity on: where they are, and what a document of each is.

The sets:

- PTB: Wall Street Journal text of the Penn Treebank (Marcus et al. 1993), in the form used for language modelling: in
  lower case, without punctuation, every number `N`, every rare word `<unk>`;
- WikiText-2 and WikiText-103 (Merity et al. 2016, arXiv 1609.07843), the raw variant, which replaces no word;
- LM1B, the One Billion Word Benchmark (Chelba et al. 2013, arXiv 1312.3005);
- LAMBADA (Paperno et al. 2016, arXiv 1606.06031), in OpenAI's version, which is not word-tokenised;
- AG News (Zhang et al. 2015, arXiv 1509.01626);
- PubMed and arXiv, the bodies of scientific papers (Cohan et al. 2018, arXiv 1804.05685).

How their words are joined is the subject of :mod:`~ltm_pyro.data.corpora.detokenization`. To add a set, give it an
entry in `BENCHMARK_SETS`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltm_pyro.data.corpora import detokenization
from ltm_pyro.data.corpora.base import (
    CorpusKind,
    CorpusSource,
    Split,
    Splits,
    existing_path,
    reason,
)
from ltm_pyro.data.corpora.formats import FORMATS, FileFormat, FileReading, text_format
from ltm_pyro.data.corpora.hub import quiet, read_rows
from ltm_pyro.data.corpora.local import local_splits
from ltm_pyro.errors import InputError


def _every_row(rows: list[str]) -> list[str]:
    return rows


def _one_stream(rows: list[str]) -> list[str]:
    """PTB's sentences follow each other in the newspaper's articles, but where those end is not recorded."""
    return ["\n".join(row for row in rows if row)]


def _articles(rows: list[str]) -> list[str]:
    """WikiText's articles: each starts at a heading of the first level (`= Title =`) between blank rows.

    Pieces of tables and formulas can look like such a heading, but do not stand between blank rows: 2 in the test split
    of WikiText-2, 29 in its training split. Without them its articles are the 600, 60 and 60 of the paper.
    """
    articles: list[list[str]] = [[]]
    for above, row, below in zip(["", *rows], rows, [*rows[1:], ""], strict=False):
        if re.fullmatch("= .+ =", row) and not above and not below:
            articles.append([])
        articles[-1].append(row)
    return ["\n".join(article).strip() for article in articles]


@dataclass(frozen=True)
class BenchmarkSet:
    """A set: where the Hugging Face hub has it, and how its rows become documents."""

    path: str
    """The repository on the hub."""

    files: str
    """The Parquet files in that repository that hold the split to score; no other is downloaded."""

    split: str
    """The split to score."""

    num_rows: int
    """The rows of that split."""

    rules: detokenization.Rules
    """How the words of a row are joined."""

    join: Callable[[list[str]], list[str]] = _every_row
    """The documents, given all rows with their words joined. Some may be blank."""

    column: str = "text"
    """The column that holds the text."""

    revision: str = "main"
    """The revision of the repository. `datasets` no longer runs loading scripts, so repositories that hold one are read
    from the branch to which the hub converted them."""

    def documents(self, rows: Sequence[str]) -> list[str]:
        """The documents that the rows of a split make. Some may be blank."""
        return self.join([self.detokenize(row) for row in rows])

    def detokenize(self, row: str) -> str:
        """Natural text, given a row."""
        return detokenization.detokenize(row, self.rules)


_CONVERTED = "refs/convert/parquet"

BENCHMARK_SETS = {
    "ptb": BenchmarkSet(
        path="ptb-text-only/ptb_text_only",
        files="penn_treebank/validation/*.parquet",
        split="validation",
        num_rows=3370,
        rules=detokenization.PTB,
        join=_one_stream,
        column="sentence",
        revision=_CONVERTED,
    ),
    "wikitext-2": BenchmarkSet(
        path="Salesforce/wikitext",
        files="wikitext-2-raw-v1/validation-*.parquet",
        split="validation",
        num_rows=3760,
        rules=detokenization.WIKITEXT,
        join=_articles,
    ),
    "wikitext-103": BenchmarkSet(
        path="Salesforce/wikitext",
        files="wikitext-103-raw-v1/validation-*.parquet",
        split="validation",
        num_rows=3760,
        rules=detokenization.WIKITEXT,
        join=_articles,
    ),
    "lm1b": BenchmarkSet(
        path="billion-word-benchmark/lm1b",
        files="plain_text/test/*.parquet",
        split="test",
        num_rows=306_688,
        rules=detokenization.LM1B,
        revision=_CONVERTED,
    ),
    "lambada": BenchmarkSet(
        path="EleutherAI/lambada_openai",
        files="default/test/*.parquet",
        split="test",
        num_rows=5153,
        rules=detokenization.LAMBADA,
        revision=_CONVERTED,
    ),
    "ag-news": BenchmarkSet(
        path="fancyzhx/ag_news",
        files="data/test-*.parquet",
        split="test",
        num_rows=7600,
        rules=detokenization.UNCHANGED,
    ),
    "pubmed": BenchmarkSet(
        path="armanc/scientific_papers",
        files="pubmed/*validation/*.parquet",
        split="validation",
        num_rows=6633,
        rules=detokenization.PAPERS,
        column="article",
        revision=_CONVERTED,
    ),
    "arxiv": BenchmarkSet(
        path="armanc/scientific_papers",
        # The hub stops converting at 5 GB, which cuts the training split only, and then calls every split partial.
        files="arxiv/*validation/*.parquet",
        split="validation",
        num_rows=6436,
        rules=detokenization.PAPERS,
        column="article",
        revision=_CONVERTED,
    ),
}
"""The sets, by the names under which they are asked for."""


_COPY_FORMATS = (
    *FORMATS,
    # As WikiText names its files.
    text_format("raw UTF-8 text", ".raw"),
    text_format("word-tokenised UTF-8 text", ".tokens"),
)


class BenchmarkSets(CorpusKind):
    """A benchmark set, as NAME=PATH for a local copy, or as NAME for the one on the Hugging Face hub, which is there to
    be scored only.

    The rows of a copy are the lines of a text file, where `.raw` and `.tokens` count as text as well, or the column of
    that set, or the one asked for, in a file with columns. All of a file is scored. Of a folder, whose splits are told
    as for any other (`wiki.test.tokens`), the split that the field scores of that set is scored, else the split `test`,
    the one to validate on, or `train`. A copy is read as a whole.
    """

    label = ", ".join(BENCHMARK_SETS)
    summary = (
        "NAME=PATH for a local copy, or NAME alone for the set on the Hugging Face hub, which is for evaluation "
        f"only (NAME is one of {label})"
    )

    def recognises(self, data: str) -> bool:
        name, is_copy, _ = data.partition("=")
        # Another name before a path is a mistake that `open` explains, unless a file or folder is called so.
        return name in BENCHMARK_SETS or bool(is_copy and re.fullmatch(r"[\w.-]+", name) and not existing_path(data))

    def absolute(self, data: str) -> str:
        name, is_copy, path = data.partition("=")
        return f"{name}={Path(path).expanduser().absolute()}" if is_copy else data

    def open(self, data: str, text_column: str | None) -> CorpusSource:
        name, is_copy, path = data.partition("=")
        benchmark = _set_of(name)
        if not is_copy:
            raise InputError(f"the benchmark set {data} is for evaluation; to train on a local copy, give {data}=PATH")
        return _copy_splits(name, path, benchmark, text_column).to_learn(data)

    def open_to_score(self, data: str, text_column: str | None) -> tuple[str, Split]:
        name, is_copy, path = data.partition("=")
        benchmark = _set_of(name)
        if not is_copy:
            if text_column is not None and text_column != benchmark.column:
                raise InputError(f"--text-column {text_column}: the text of {name} is in its column {benchmark.column}")
            of_hub = Split.of(
                lambda: benchmark.documents(_rows_on_hub(name, benchmark)), f"{benchmark.num_rows:,} rows"
            )
            return f"{name}, split {benchmark.split}", of_hub
        splits = _copy_splits(name, path, benchmark, text_column)
        return splits.to_score(data, (benchmark.split, "test", "validation", "train"))


def _set_of(name: str) -> BenchmarkSet:
    if name not in BENCHMARK_SETS:
        raise InputError(f"there is no benchmark set {name!r}, only {', '.join(BENCHMARK_SETS)}")
    return BENCHMARK_SETS[name]


def _copy_splits(name: str, path: str, benchmark: BenchmarkSet, text_column: str | None) -> Splits:
    """The splits of a local copy of a benchmark set."""
    found = existing_path(path)
    if not found:
        raise InputError(f"there is no file or folder {path!r}; check the path")

    def read(file: Path, file_format: FileFormat) -> FileReading:
        for text, share in file_format.read(file, text_column or benchmark.column):
            rows = [text] if file_format.has_rows else text.split("\n")
            yield from ((row, share) for row in rows)

    def documents(split: Split) -> list[str]:
        return benchmark.documents([row for row, _ in split.read()])

    splits = local_splits(found, read, _COPY_FORMATS)
    parts = {part: Split.of(functools.partial(documents, split), split.origin) for part, split in splits.parts.items()}
    return dataclasses.replace(splits, name=name, parts=parts)


def _rows_on_hub(name: str, benchmark: BenchmarkSet) -> list[str]:
    """The rows to score of a benchmark set, from the Hugging Face hub."""
    import datasets

    instead = f"give a local copy as {name}=PATH"
    try:
        with quiet():
            loaded = datasets.load_dataset(
                benchmark.path,
                data_files={benchmark.split: benchmark.files},
                split=benchmark.split,
                revision=benchmark.revision,
            )
    except Exception as error:  # each of the libraries below has its own
        raise InputError(
            f"{name} cannot be loaded from {benchmark.path} of the Hugging Face hub; {instead}: {reason(error)}"
        ) from error
    rows = [text for text, _ in read_rows(loaded, benchmark.column, benchmark.path)]
    if len(rows) != benchmark.num_rows:  # the hub converts only a part of what is very large
        raise InputError(
            f"{benchmark.path} of the Hugging Face hub gives {len(rows)} rows of {name}, which has "
            f"{benchmark.num_rows}; {instead}"
        )
    return rows
