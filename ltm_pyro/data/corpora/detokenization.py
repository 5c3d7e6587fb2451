"""How the words of a benchmark set, which were taken apart, are joined again.

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

UNCHANGED: Rules = ()
PTB = _MARGINS + _rules(
    (r" (?='(?:s|d|m|ll|re|ve)\b|n't\b)", ""),
    (r"(?<=s) '(?!\w)", "'"),
    (r"\\/", "/"),
    # The words are in lower case, so this letter is never part of one.
    (r"\bN\b", "1"),
    (r"([$#]) (?=1\b)", r"\1"),
    (r"<unk>", "?"),
)
WIKITEXT = _MARGINS + _HEADINGS + _NUMBERS + _DEGREES + _PUNCTUATION + _APOSTROPHES + _CURRENCIES
LM1B = _MARGINS + _ADDRESSES + _PUNCTUATION + _APOSTROPHES + _SLASHES + _CURRENCIES
LAMBADA = _rules((r"[“”]", '"'), (r"\s+\Z", ""), (r"\A\s*", "\n"))
PAPERS = _MARGINS + _NUMBERS + _DEGREES + _ADDRESSES + _PUNCTUATION + _APOSTROPHES + _SLASHES + _CURRENCIES


def detokenize(row: str, rules: Rules) -> str:
    """Natural text, given a row whose words were taken apart."""
    for pattern, replacement in rules:
        row = pattern.sub(replacement, row)
    return row
