"""The sets of texts that the field reports perplexity on: where they are, what a document is, how words are joined.

The sets:

- PTB: Wall Street Journal text of the Penn Treebank (Marcus et al. 1993), in the form used for language modelling: in
  lower case, without punctuation, every number `N`, every rare word `<unk>`;
- WikiText-2 and WikiText-103 (Merity et al. 2016, arXiv 1609.07843), the raw variant, which replaces no word;
- LM1B, the One Billion Word Benchmark (Chelba et al. 2013, arXiv 1312.3005);
- LAMBADA (Paperno et al. 2016, arXiv 1606.06031), in OpenAI's version, which is not word-tokenised;
- AG News (Zhang et al. 2015, arXiv 1509.01626);
- PubMed and arXiv, the bodies of scientific papers (Cohan et al. 2018, arXiv 1804.05685).

All but LAMBADA and AG News come word-tokenised (`the dogs ' tails , he said`). A model of natural text is to read
natural text, so the words are joined again. Which constructs are joined in which set follows the zero-shot perplexity
evaluations of SEDD (Lou et al. 2024, arXiv 2310.16834) and MDLM (Sahoo et al. 2024, arXiv 2406.07524), and so do the
split that is scored and three changes that make no text more natural: in PTB, `N` becomes `1` and `<unk>` becomes `?`;
in LAMBADA, a passage starts with a line end.

Where the rules of those evaluations miss cases of a construct, or hit what is none, the rules here give natural text,
so that figures may differ a little from theirs:

- stops and colons are joined before every space and at the end of a row (theirs: in LM1B not after a bracket or a
  hyphenated word);
- contractions are joined whatever their letters (theirs: in WikiText only `'s`, in PTB only `'s` and `n't`), and
  decades are (`the '80s`);
- an apostrophe after s is a possessive, unless it opens a quotation (theirs: always in WikiText, never in LM1B); those
  inside words are no quotation marks;
- a colon between digits is joined on both sides (`18:05`), a degree sign only to digits and units (`7° for Mercury`),
  a currency sign in WikiText too;
- the word `N` becomes `1` in PTB alone, at the end of a row too (theirs: in WikiText also, where it stands for north);
- a quotation ends with its line.

Word-tokenised copies of WikiText go through the same rules and keep their `<unk>`: figures on them are not figures on
the raw text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rules = tuple[tuple[re.Pattern[str], str], ...]
"""Patterns and what replaces them, applied one after the other."""


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in pairs)


# These end in s and have no plural possessive: a quotation mark after them opens a quotation.
_NO_POSSESSIVE = "|".join(rf"(?<=\b{word} )" for word in ("as", "has", "his", "is", "its", "this", "was"))

_MARGINS = _rules((r"\A\s+|\s+\Z", ""), (r"^[ \t]+|[ \t]+$", ""))
_NUMBERS = _rules((r" ?@([-,.])@ ?", r"\1"))
_HEADINGS = _rules((r"(?<==) (?==)", ""))
_DEGREES = _rules((r"(?<=\d) °", "°"), (r"° (?=\d|(?i:[cfnsew])\b)", "°"))
_ADDRESSES = _rules((r"\b(https?) : / / ", r"\1://"))
_PUNCTUATION = _rules(
    (r"\b(\d+) : (?=\d)", r"\1:"),
    (r" ([,.;:!?])(?= |$)", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r" ([)\]}])", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
    # What is left at a margin has lost its other half.
    (r'^" | "$', '"'),
)
# The word tokenizer leaves an apostrophe inside a word on the letters after it, and sets every other mark apart.
_APOSTROPHES = _rules(
    (r"(?<=\S) (?:'(?=[^\W\d_])|' (?=s\b))", "'"),
    (r"(?<!\w)(?<!s )' (?=\d\ds?\b)|(?<!\w)' (?=(?i:em|til|tis|twas)\b)", "'"),
    (rf"(?:(?<!\S)|(?<=[\"(\[]))(?:(?<!s )|{_NO_POSSESSIVE})' (.+?) '(?!\w)", r"'\1'"),
    (r"(?<=s) '(?!\w)", "'"),
)
_SLASHES = _rules((r" / ", "/"))
_CURRENCIES = _rules((r"([$£]) (?=\d)", r"\1"))

_NOTHING: Rules = ()
_PTB = _MARGINS + _rules(
    (r" (?='(?:s|d|m|ll|re|ve)\b|n't\b)", ""),
    (r"(?<=s) '(?!\w)", "'"),
    (r"\\/", "/"),
    # The words are in lower case, so this letter is never part of one.
    (r"\bN\b", "1"),
    (r"([$#]) (?=1\b)", r"\1"),
    (r"<unk>", "?"),
)
_WIKITEXT = _MARGINS + _HEADINGS + _NUMBERS + _DEGREES + _PUNCTUATION + _APOSTROPHES + _CURRENCIES
_LM1B = _MARGINS + _ADDRESSES + _PUNCTUATION + _APOSTROPHES + _SLASHES + _CURRENCIES
_LAMBADA = _rules((r"[“”]", '"'), (r"\s+\Z", ""), (r"\A\s*", "\n"))
_PAPERS = _MARGINS + _NUMBERS + _DEGREES + _ADDRESSES + _PUNCTUATION + _APOSTROPHES + _SLASHES + _CURRENCIES


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

    rules: Rules
    """How the words of a row are joined."""

    join: Callable[[list[str]], list[str]] = _every_row
    """The documents, given all rows with their words joined. Some may be blank."""

    column: str = "text"
    """The column that holds the text."""

    revision: str = "main"
    """Of the repository. `datasets` no longer runs loading scripts, so repositories that hold one are read from the
    branch to which the hub converted them."""

    def documents(self, rows: Sequence[str]) -> list[str]:
        """The documents that the rows of a split make. Some may be blank."""
        return self.join([self.detokenize(row) for row in rows])

    def detokenize(self, row: str) -> str:
        """Natural text, given a row."""
        for pattern, replacement in self.rules:
            row = pattern.sub(replacement, row)
        return row


_CONVERTED = "refs/convert/parquet"

BENCHMARK_SETS = {
    "ptb": BenchmarkSet(
        path="ptb-text-only/ptb_text_only",
        files="penn_treebank/validation/*.parquet",
        split="validation",
        num_rows=3370,
        rules=_PTB,
        join=_one_stream,
        column="sentence",
        revision=_CONVERTED,
    ),
    "wikitext-2": BenchmarkSet(
        path="Salesforce/wikitext",
        files="wikitext-2-raw-v1/validation-*.parquet",
        split="validation",
        num_rows=3760,
        rules=_WIKITEXT,
        join=_articles,
    ),
    "wikitext-103": BenchmarkSet(
        path="Salesforce/wikitext",
        files="wikitext-103-raw-v1/validation-*.parquet",
        split="validation",
        num_rows=3760,
        rules=_WIKITEXT,
        join=_articles,
    ),
    "lm1b": BenchmarkSet(
        path="billion-word-benchmark/lm1b",
        files="plain_text/test/*.parquet",
        split="test",
        num_rows=306_688,
        rules=_LM1B,
        revision=_CONVERTED,
    ),
    "lambada": BenchmarkSet(
        path="EleutherAI/lambada_openai",
        files="default/test/*.parquet",
        split="test",
        num_rows=5153,
        rules=_LAMBADA,
        revision=_CONVERTED,
    ),
    "ag-news": BenchmarkSet(
        path="fancyzhx/ag_news",
        files="data/test-*.parquet",
        split="test",
        num_rows=7600,
        rules=_NOTHING,
    ),
    "pubmed": BenchmarkSet(
        path="armanc/scientific_papers",
        files="pubmed/*validation/*.parquet",
        split="validation",
        num_rows=6633,
        rules=_PAPERS,
        column="article",
        revision=_CONVERTED,
    ),
    "arxiv": BenchmarkSet(
        path="armanc/scientific_papers",
        # The hub stops converting at 5 GB, which cuts the training split only, and then calls every split partial.
        files="arxiv/*validation/*.parquet",
        split="validation",
        num_rows=6436,
        rules=_PAPERS,
        column="article",
        revision=_CONVERTED,
    ),
}
"""The sets, by the names under which they are asked for."""
