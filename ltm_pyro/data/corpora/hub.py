"""Data sets of the Hugging Face hub, which the library `datasets` keeps in files or reads while it downloads them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ltm_pyro.data.corpora.base import (
    VALIDATION_SPLITS,
    CorpusKind,
    CorpusSource,
    CutOff,
    NotFound,
    Reading,
    Split,
    Splits,
    reason,
)
from ltm_pyro.data.corpora.formats import FORMATS, PACKED, check_column, extensions
from ltm_pyro.data.tokenizers import check_unicode

if TYPE_CHECKING:  # `datasets` takes a second to import, and only what lies on the hub needs it
    from datasets import Dataset, IterableDataset
    from pyarrow import Table

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.+)?")

BATCH_ROWS = 1000
"""Rows of a data set that are read at a time."""


class HuggingFaceHub(CorpusKind):
    """A data set of the Hugging Face hub, as NAME or NAME:CONFIG.

    Validation is the split `validation`, else `valid`, `val` or `dev`. What is scored is the split `test`, else that
    of validation.
    """

    label = "a Hugging Face data set that can be loaded"
    summary = "NAME or NAME:CONFIG of a data set of the hub"

    def recognises(self, data: str) -> bool:
        return _HUB_NAME.fullmatch(data) is not None and not data.lower().endswith((*extensions(FORMATS), PACKED))

    def open(self, data: str, text_column: str | None) -> CorpusSource:
        return self._stored_splits(data, text_column).to_learn(data)

    def stream(self, data: str, text_column: str | None) -> CorpusSource:
        def split_of(name: str, rows: IterableDataset) -> Split:
            said = (rows.info.splits or {}).get(name)  # by the description of the set, if it has one
            num_rows = (said and said.num_examples) or None
            read = functools.partial(_read_stream, rows, num_rows, text_column or "text", f"{data}, split {name}")
            return Split(num_rows, read, f"{num_rows:,} rows" if num_rows else "rows as they are downloaded")

        splits = {name: split_of(name, rows) for name, rows in _load(data, streaming=True).items()}
        return Splits(_folder_name(data), splits).to_learn(data)

    def open_to_score(self, data: str, text_column: str | None) -> tuple[str, Split]:
        return self._stored_splits(data, text_column).to_score(data, ("test", *VALIDATION_SPLITS))

    def _stored_splits(self, data: str, text_column: str | None) -> Splits:
        def split_of(name: str, rows: Dataset) -> Split:
            read = functools.partial(read_rows, rows, text_column or "text", f"{data}, split {name}")
            return Split(len(rows), read, f"{len(rows):,} rows")

        return Splits(_folder_name(data), {name: split_of(name, rows) for name, rows in _load(data).items()})


def _load(data: str, **options: bool) -> Mapping[str, Any]:
    """The splits of a data set, by their names."""
    import datasets

    name, _, config = data.partition(":")
    try:
        with quiet():
            splits: Mapping[str, Any] = datasets.load_dataset(name, config or None, **options)
    except Exception as error:  # each of the libraries below has its own
        raise NotFound(reason(error)) from error
    return splits


def _folder_name(data: str) -> str:
    return re.sub(r"[^\w.-]", "-", data)


def read_rows(rows: Dataset, text_column: str, source: str) -> Reading:
    """The column that holds the text, without missing values.

    Args:
        rows: a split that is kept in files.
        text_column: the name of the column.
        source: what errors call the data set.
    """
    return _read_tables(_tables(rows), len(rows), text_column, source)


def _read_stream(rows: IterableDataset, num_rows: int | None, text_column: str, source: str) -> Reading:
    """The same of a split that is downloaded now.

    Raises:
        CutOff: no more of it comes.
    """

    def downloaded() -> Iterator[Table]:
        try:
            with quiet():
                tables = _tables(rows)
            while True:
                with quiet():  # not while the reader of these tables is at work
                    table = next(tables, None)
                if table is None:
                    return
                yield table
        except Exception as error:  # each of the libraries below has its own
            raise CutOff(f"{source} cannot be read to its end: {reason(error)}") from error

    return _read_tables(downloaded(), num_rows, text_column, source)


def _tables(rows: Dataset | IterableDataset) -> Iterator[Table]:
    tables: Iterator[Table] = rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
    return tables


def _read_tables(tables: Iterator[Table], num_rows: int | None, text_column: str, source: str) -> Reading:
    read = itertools.count(1)
    for table in tables:
        check_column(table.schema, text_column, source)
        for text in table[text_column].to_pylist():
            number = next(read)
            # What a data set says of itself may be wrong: once there are more rows, nothing is known.
            share = number / num_rows if num_rows and number <= num_rows else None
            if text is not None:
                check_unicode(text, f"row {number} of {source}")
                yield text, share


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, what goes wrong in `datasets` is raised, not logged, and only a terminal gets its bars."""
    import datasets

    logged, bars = logging.root.manager.disable, not datasets.are_progress_bars_disabled()
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if bars and not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            yield
        finally:
            logging.disable(logged)
            if bars:
                datasets.enable_progress_bars()
