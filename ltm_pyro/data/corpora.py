"""Corpora: where the texts come from, which of them are held out for validation, and which of them are scored."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ltm_pyro.data.benchmark_sets import BENCHMARK_SETS, BenchmarkSet
from ltm_pyro.data.python_docs import read_python_docs
from ltm_pyro.errors import InputError

if TYPE_CHECKING:  # `datasets` takes a second to import, and only what lies on the hub needs it
    from datasets import Dataset, IterableDataset
    from pyarrow import Schema, Table

PYTHON_DOCS = "python-docs"

_FORMATS = {
    ".txt": "UTF-8 text",
    ".txt.gz": "UTF-8 text",
    ".json": "JSON",
    ".json.gz": "JSON",
    ".jsonl": "JSON",
    ".jsonl.gz": "JSON",
    ".parquet": "Parquet",
}
# As WikiText names its files.
_BENCHMARK_FORMATS = {**_FORMATS, ".raw": "raw UTF-8 text", ".tokens": "word-tokenised UTF-8 text"}
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d.*)?")  # a shard is numbered
_BENCHMARK_SPLIT_NAME = re.compile(rf"(?:\w+\.)?{_SPLIT_NAME.pattern}")  # `wiki.valid`, `ptb.test`
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.+)?")
HELD_OUT_OF = 20
"""One of so many documents is held out, and the ends of all where there are fewer."""
_ROWS_TO_FIND_A_COLUMN = 1000
"""A JSON file is taken not to have a column that none of so many rows has."""

BATCH_ROWS = 1000
"""Rows of a data set of the hub that are read at a time."""

Reading = Iterator[tuple[str, float | None]]
"""Texts, each with the share (0 to 1) of the whole that has been read with it; None where that is not known."""


class CutOff(InputError):
    """A data set that is read as it is downloaded could not be read to its end."""


@dataclass(frozen=True)
class Split:
    """A part of a corpus. Its documents are read, one after the other, whenever they are asked for."""

    size: int | None
    """What there is to read, in a unit that all parts of a corpus share: bytes of files, or rows. None where that is
    not known."""

    read: Callable[[], Reading]
    """Gives all texts, blank ones too."""

    def __iter__(self) -> Reading:
        """The documents, none of them blank, each with the share of the part that has been read with it."""
        return ((text, share) for text, share in self.read() if _is_document(text))

    def documents(self) -> list[str]:
        """All documents at once."""
        return [text for text, _ in self]


@dataclass(frozen=True)
class Source:
    """A corpus that has not been read yet."""

    name: str
    """Short, and fit for the name of a folder."""

    train: Split
    """What there is to learn from."""

    validation: Split | None
    """What it brings to validate on."""


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus, none of them blank."""

    name: str
    """Short, and fit for the name of a folder."""

    train: list[str]
    """The documents to learn from."""

    validation: list[str]
    """The documents held out."""

    sha256: str
    """Over all documents in their order and the side on which they are: two figures compare only where it is equal."""


def open_corpus(data: str, text_column: str = "text", streaming: bool = False) -> Source:
    """Finds a corpus, whose documents are then read one after the other: never are all of them in memory.

    What `data` may be:

    - `python-docs`: the documentation that comes with Python (:mod:`ltm_pyro.data.python_docs`);
    - a file: `.txt` (one document), `.jsonl` or `.json` (a document a row), either also as `.gz`, or `.parquet`;
    - a folder of such files, all of one format. A file or a folder at its top named `train`, `validation` (or `valid`,
      `val`, `dev`) or `test`, with a number or without (`train-00-of-06.jsonl.gz`), belongs to that split, and all
      else to `train`. Hidden files are left out;
    - `NAME=PATH`: a local copy of a benchmark set (see :func:`load_texts`), a folder with its splits or a file;
    - `NAME` or `NAME:CONFIG`: a data set of the Hugging Face hub. A file or folder of that name goes first.

    Line ends of `.txt` files become `\\n`. Documents without a visible character are dropped. A `.txt` file, a `.json`
    file that is one list, and a benchmark set are read as a whole; of Parquet, a group of rows at a time.

    Validation is the split `validation`, else `valid`, `val` or `dev`; a `test` split is never read.

    Args:
        data: see above.
        text_column: the column that holds the text, in files and data sets with columns.
        streaming: read a data set of the hub as it is downloaded, every time anew, instead of keeping it on the disk.

    Raises:
        InputError: there is no such corpus, or it is to be streamed and is not on the hub; when its documents are
            read, that they cannot be.
        CutOff: when its documents are read, that no more of them come.
    """
    set_name, is_copy, copy = data.partition("=")
    if streaming and (data == PYTHON_DOCS or set_name in BENCHMARK_SETS or _existing_path(data)):
        raise InputError(f"--streaming is for data sets of the Hugging Face hub, and {data} is none: leave it out")
    if data == PYTHON_DOCS:
        name, splits = PYTHON_DOCS, {"train": _whole(read_python_docs)}
    elif benchmark := BENCHMARK_SETS.get(set_name):
        if not is_copy:
            raise InputError(
                f"the benchmark set {data} is there to be scored; to train on it, give {data}=PATH, a copy"
            )
        name, splits = set_name, _copy_splits(copy, benchmark)
    elif path := _existing_path(data):
        name, splits = _local_splits(path, functools.partial(_read_file, text_column=text_column))
    else:
        name, splits = _hub_splits(data, text_column, known=[PYTHON_DOCS], streaming=streaming)

    if "train" not in splits:
        raise InputError(f"{data} has no split 'train' to learn from, only {', '.join(sorted(splits))}")
    return Source(name, splits["train"], _first_split(splits, _VALIDATION_SPLITS))


def load_corpus(data: str, text_column: str = "text") -> Corpus:
    """Loads all documents of a corpus, and holds out a part of it where it brings no validation split of its own.

    Then the twentieth part of the distinct documents with the smallest SHA-256 is held out, so that equal documents
    fall on the same side, whatever their order. Of fewer than 20 distinct documents, the last twentieth of the
    characters of each is held out instead.

    Args:
        data: as in :func:`open_corpus`.
        text_column: the column that holds the text, in files and data sets with columns.

    Raises:
        InputError: there is no such corpus, it cannot be read, or it holds no text.
    """
    source = open_corpus(data, text_column)
    train = source.train.documents()
    if not train:
        raise InputError(f"{data} holds no text to learn from")
    train, validation = (train, source.validation.documents()) if source.validation else hold_out(train)
    if not (train and validation):
        raise InputError(f"{data} holds no text to validate on; give more text")
    return Corpus(source.name, train, validation, _sha256(train, validation))


@dataclass(frozen=True)
class Texts:
    """Documents to score, none of them blank."""

    name: str
    """What they are, in a word or two."""

    documents: list[str]
    """All that are to be scored."""

    sha256: str
    """Over the documents in their order: two figures compare only where it is equal."""

    @classmethod
    def of(cls, name: str, documents: list[str]) -> Texts:
        """These documents, with their hash."""
        return cls(name, documents, _sha256(documents))


def load_texts(data: str, text_column: str = "text") -> Texts:
    """Loads documents to score. Nothing is held out of them.

    What `data` may be:

    - a benchmark set by its name (:data:`~ltm_pyro.data.benchmark_sets.BENCHMARK_SETS`), such as `wikitext-2`, from the
      Hugging Face hub;
    - `NAME=PATH`: a local copy of a benchmark set. Its rows are the lines of a text file, where `.raw` and `.tokens`
      count as text as well, or the column of that set in a `.jsonl`, `.json` or `.parquet` file. Of a folder of such
      files it is the split that the set scores, else as below; files may have a prefix (`wiki.test.tokens`);
    - `python-docs`: the documents that :func:`load_corpus` holds out;
    - a file: all of it; a folder: the split `test`, else the one that :func:`load_corpus` validates on, else all of
      it. Which files are read, and which split they belong to, is as in :func:`load_corpus`;
    - `NAME` or `NAME:CONFIG`: the split `test` of a data set of the Hugging Face hub, else its validation split.

    Names go before files and folders, which `./` tells apart, and those before the hub. Documents without a visible
    character are dropped.

    Args:
        data: see above.
        text_column: the column that holds the text, in files and data sets with columns; benchmark sets know theirs.

    Raises:
        InputError: there are no such texts, they cannot be read, or there is nothing to score in them.
    """
    set_name, is_copy, copy = data.partition("=")
    if data == PYTHON_DOCS:
        name, documents = PYTHON_DOCS, load_corpus(PYTHON_DOCS).validation
    elif benchmark := BENCHMARK_SETS.get(set_name):
        name = set_name
        if is_copy:
            splits = _copy_splits(copy, benchmark)
            preferred = ("test",) if benchmark.split == "test" else _VALIDATION_SPLITS
            scored = _first_split(splits, (*preferred, "test", *_VALIDATION_SPLITS)) or splits["train"]
            documents = scored.documents()
        else:
            documents = benchmark.documents(_rows_of_hub(set_name, benchmark))
    elif path := _existing_path(data):
        name, splits = _local_splits(path, functools.partial(_read_file, text_column=text_column))
        documents = (_first_split(splits, ("test", *_VALIDATION_SPLITS)) or splits["train"]).documents()
    elif is_copy and re.fullmatch(r"[\w.-]+", set_name):
        raise InputError(f"there is no benchmark set {set_name!r}, only {', '.join(BENCHMARK_SETS)}")
    else:
        name, splits = _hub_splits(data, text_column, known=[PYTHON_DOCS, *BENCHMARK_SETS])
        scored = _first_split(splits, ("test", *_VALIDATION_SPLITS))
        if not scored:
            raise InputError(f"{data} has no split 'test' or 'validation' to score, only {', '.join(sorted(splits))}")
        documents = scored.documents()

    documents = list(filter(_is_document, documents))
    if not documents:
        raise InputError(f"{data} holds no text to score")
    return Texts.of(name, documents)


def _copy_splits(copy: str, benchmark: BenchmarkSet) -> dict[str, Split]:
    """The splits of a local copy of a benchmark set."""
    path = _existing_path(copy)
    if not path:
        raise InputError(f"there is no file or folder {copy!r}; check the path")

    def read(file: Path, file_format: str) -> Reading:
        for text, share in _read_file(file, file_format, benchmark.column):
            rows = [text] if file_format in ("JSON", "Parquet") else text.split("\n")
            yield from ((row, share) for row in rows)

    def documents(split: Split) -> list[str]:
        return benchmark.documents([row for row, _ in split.read()])

    _, splits = _local_splits(path, read, _BENCHMARK_FORMATS, _BENCHMARK_SPLIT_NAME)
    return {name: _whole(functools.partial(documents, split)) for name, split in splits.items()}


def _rows_of_hub(name: str, benchmark: BenchmarkSet) -> list[str]:
    """The rows to score of a benchmark set, from the Hugging Face hub."""
    import datasets

    instead = f"give a local copy as {name}=PATH"
    try:
        with _quiet():
            loaded = datasets.load_dataset(
                benchmark.path,
                data_files={benchmark.split: benchmark.files},
                split=benchmark.split,
                revision=benchmark.revision,
            )
    except Exception as error:  # each of the libraries below has its own
        raise InputError(
            f"{name} cannot be loaded from {benchmark.path} of the Hugging Face hub; {instead}: {_reason(error)}"
        ) from error
    rows = [text for text, _ in _read_rows(loaded, benchmark.column, benchmark.path)]
    if len(rows) != benchmark.num_rows:  # the hub converts only a part of what is very large
        raise InputError(
            f"{benchmark.path} of the Hugging Face hub gives {len(rows)} rows of {name}, which has "
            f"{benchmark.num_rows}; {instead}"
        )
    return rows


def _existing_path(data: str) -> Path | None:
    """The file or folder of that name, if there is one."""
    try:
        path = Path(data).expanduser()
        return path if data and path.exists() else None
    except (OSError, RuntimeError) as error:  # no permission, no such home, a name that is too long
        raise InputError(f"{data!r} cannot be read: {_reason(error)}") from error


def _whole(texts: Callable[[], list[str]]) -> Split:
    """Texts that are made all at once."""

    def read() -> Reading:
        made = texts()
        return ((text, number / len(made)) for number, text in enumerate(made, 1))

    return Split(1, read)


def _first_split(splits: dict[str, Split], names: Iterable[str]) -> Split | None:
    """The first of these splits that is there."""
    return next((splits[name] for name in names if name in splits), None)


def _local_splits(
    path: Path,
    read: Callable[[Path, str], Reading],
    formats: dict[str, str] = _FORMATS,
    split_name: re.Pattern[str] = _SPLIT_NAME,
) -> tuple[str, dict[str, Split]]:
    """The name of a file or folder, and its splits.

    Args:
        path: the file or folder.
        read: gives the texts of a file, given it and its format.
        formats: what is read, by extension.
        split_name: what a file or folder is named that belongs to a split, which is the first group.
    """

    def split_of(files: list[Path]) -> Split:
        try:
            sizes = [file.stat().st_size for file in files]
        except OSError as error:
            raise InputError(f"{path} cannot be read: {_reason(error)}") from error

        def read_all() -> Reading:
            for file, size, before in zip(files, sizes, itertools.accumulate(sizes, initial=0), strict=False):
                for text, share in read(file, formats[_extension(file, formats)]):
                    yield text, (before + share * size) / max(1, sum(sizes))

        return Split(sum(sizes), read_all)

    if not path.is_dir():
        extension = _extension(path, formats)
        return path.name[: -len(extension)], {"train": split_of([path])}
    files: dict[str, list[Path]] = {}
    try:
        inside = sorted(_walk(path))
    except OSError as error:
        raise InputError(f"the folder {path} cannot be read: {_reason(error)}") from error
    for file in inside:
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            top = parts[0] if len(parts) > 1 else file.name[: -len(_extension(file, formats))]
            match = split_name.fullmatch(top.lower())
            files.setdefault(match[1] if match else "train", []).append(file)
    if not files:
        raise InputError(f"the folder {path} holds no files; give one that holds {', '.join(formats)} files")
    found = {formats[_extension(file, formats)]: file.name for group in files.values() for file in group}
    if len(found) > 1:
        examples = ", ".join(f"{name} ({file_format})" for file_format, name in found.items())
        raise InputError(f"the folder {path} holds files of several formats, such as {examples}; keep those of one")
    return path.resolve().name, {split: split_of(group) for split, group in files.items()}


def _hub_splits(
    data: str, text_column: str, known: Sequence[str], streaming: bool = False
) -> tuple[str, dict[str, Split]]:
    """The name of a data set of the Hugging Face hub, and its splits, which `datasets` keeps in files.

    Args:
        data: its name, and its configuration after a colon.
        text_column: the column that holds the text.
        known: the other names that `data` might have been, for the error.
        streaming: keep nothing in files; the splits are downloaded whenever they are read.
    """
    if data.lower().endswith(tuple(_FORMATS)) or not _HUB_NAME.fullmatch(data):
        raise InputError(f"there is no file or folder {data!r}; check the path")
    import datasets

    name, _, config = data.partition(":")
    try:
        with _quiet():
            splits = datasets.load_dataset(name, config or None, **({"streaming": True} if streaming else {}))
    except Exception as error:  # each of the libraries below has its own
        raise InputError(
            f"{data!r} is neither {', '.join(known)}, an existing file or folder, nor a Hugging Face dataset that can "
            f"be loaded: {_reason(error)}"
        ) from error
    split_of = _streamed_split if streaming else _stored_split
    return re.sub(r"[^\w.-]", "-", data), {
        split: split_of(split, rows, text_column, data) for split, rows in splits.items()
    }


def _stored_split(_: str, rows: Dataset, text_column: str, source: str) -> Split:
    return Split(len(rows), functools.partial(_read_rows, rows, text_column, source))


def _streamed_split(name: str, rows: IterableDataset, text_column: str, source: str) -> Split:
    said = (rows.info.splits or {}).get(name)  # by the description of the set, if it has one
    num_rows = (said and said.num_examples) or None
    return Split(num_rows, functools.partial(_read_stream, rows, num_rows, text_column, source))


def _read_file(file: Path, file_format: str, text_column: str) -> Reading:
    """The documents of one file."""
    try:
        if file_format == "Parquet":
            yield from _read_parquet(file, text_column)
        elif file_format == "JSON":
            yield from _read_json(file, text_column)
        else:
            yield from _read_text(file, file_format)
    except InputError:
        raise
    except Exception as error:  # each of the libraries below has its own
        raise InputError(f"{file} cannot be read as {file_format}: {_reason(error)}") from error


def _read_text(file: Path, file_format: str) -> Reading:
    with gzip.open(file, "rt", encoding="utf-8") if _is_packed(file) else file.open(encoding="utf-8") as opened:
        text = opened.read()
    if "\0" in text:
        raise InputError(f"{file} is not {file_format}: it holds zero bytes; convert it, or leave it out")
    yield text, 1.0


def _read_json(file: Path, text_column: str) -> Reading:
    columns: dict[str, None] = {}
    for number, (row, share) in enumerate(_json_rows(file), 1):
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise InputError(f"row {number} of {file} is {type(row).__name__}, not an object with a column of text")
        if text_column not in columns:
            columns |= dict.fromkeys(row)
            if number >= _ROWS_TO_FIND_A_COLUMN:
                _check_has_column(columns, text_column, file)
        text = row.get(text_column)
        if isinstance(text, str):
            yield text, share
        elif text is not None:
            kind = type(text).__name__
            raise InputError(f"the column {text_column!r} of {file} holds {kind} in row {number}, not text")
    if columns:
        _check_has_column(columns, text_column, file)


def _json_rows(file: Path) -> Iterator[tuple[Any, float]]:
    """The values of the lines of a file, or of the list that all of it is."""
    with file.open("rb") as packed:
        size = max(1, file.stat().st_size)
        lines: IO[bytes] = gzip.GzipFile(fileobj=packed) if _is_packed(file) else packed
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                rows = json.loads(line + lines.read())
                yield from ((row, count / len(rows)) for count, row in enumerate(rows, 1))
                return
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            yield row, packed.tell() / size


def _read_parquet(file: Path, text_column: str) -> Reading:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        _check_column(opened.schema_arrow, text_column, file)
        read, num_rows = itertools.count(1), opened.metadata.num_rows
        for rows in opened.iter_batches(batch_size=1000, columns=[text_column]):
            for text in rows.column(text_column).to_pylist():
                share = next(read) / num_rows
                if text is not None:
                    yield text, share


def _read_rows(rows: Dataset, text_column: str, source: str) -> Reading:
    """The column that holds the text, without missing values."""
    return _read_tables(_tables(rows), len(rows), text_column, source)


def _read_stream(rows: IterableDataset, num_rows: int | None, text_column: str, source: str) -> Reading:
    """The same of what is downloaded now.

    Raises:
        CutOff: no more of it comes.
    """

    def downloaded() -> Iterator[Table]:
        try:
            with _quiet():
                tables = _tables(rows)
            while True:
                with _quiet():  # not while the reader of these tables is at work
                    table = next(tables, None)
                if table is None:
                    return
                yield table
        except Exception as error:  # each of the libraries below has its own
            raise CutOff(f"{source} cannot be read any further: {_reason(error)}") from error

    return _read_tables(downloaded(), num_rows, text_column, source)


def _tables(rows: Dataset | IterableDataset) -> Iterator[Table]:
    return rows.with_format("arrow").iter(batch_size=BATCH_ROWS)


def _read_tables(tables: Iterator[Table], num_rows: int | None, text_column: str, source: str) -> Reading:
    read = itertools.count(1)
    for table in tables:
        _check_column(table.schema, text_column, source)
        for text in table[text_column].to_pylist():
            number = next(read)
            # What a data set says of itself may be wrong: once there are more rows, nothing is known.
            share = number / num_rows if num_rows and number <= num_rows else None
            if text is not None:
                yield text, share


def _check_has_column(columns: Iterable[str], text_column: str, source: str | Path) -> None:
    if text_column not in columns:
        raise InputError(
            f"{source} has no column {text_column!r}; name, or rename, the one of its columns to read: "
            f"{', '.join(columns)}"
        )


def _check_column(schema: Schema, text_column: str, source: str | Path) -> None:
    """Check that a table has a column of text of that name."""
    from pyarrow import types

    _check_has_column(schema.names, text_column, source)
    kind = schema.field(text_column).type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
        raise InputError(f"the column {text_column!r} of {source} holds {kind}, not text; name another")


def _walk(folder: Path) -> Iterator[Path]:
    """All that lies below a folder; unlike `rglob`, an error where a part of it cannot be read."""
    for path in folder.iterdir():
        yield path
        if path.is_dir():
            yield from _walk(path)


def _extension(file: Path, formats: dict[str, str]) -> str:
    """The extension of a file that can be read, `.gz` included."""
    for extension in formats:
        if file.name.lower().endswith(extension):
            return extension
    raise InputError(f"{file} has none of the extensions that can be read: {', '.join(formats)}")


def _is_packed(file: Path) -> bool:
    return file.name.lower().endswith(".gz")


def _is_document(text: str) -> bool:
    return bool(text) and not text.isspace()


def hold_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents, by the rule of :func:`load_corpus`; one of them may be empty."""
    distinct = sorted(set(documents), key=lambda document: hashlib.sha256(utf8(document)).digest())
    if len(distinct) < HELD_OUT_OF:
        cuts = [len(document) - max(1, len(document) // HELD_OUT_OF) for document in documents]
        pairs = list(zip(documents, cuts, strict=True))
        heads, ends = [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]
        return list(filter(_is_document, heads)), list(filter(_is_document, ends))
    held_out = set(distinct[: len(distinct) // HELD_OUT_OF])
    return (
        [document for document in documents if document not in held_out],
        [document for document in documents if document in held_out],
    )


def _sha256(*groups: list[str]) -> str:
    digest = hashlib.sha256()
    for documents in groups:
        digest.update(len(documents).to_bytes(8, "big"))
        for document in documents:
            contents = utf8(document)
            digest.update(len(contents).to_bytes(8, "big"))
            digest.update(contents)
    return digest.hexdigest()


def utf8(text: str) -> bytes:
    """The bytes of any text, of a lone surrogate too."""
    return text.encode("utf-8", "surrogatepass")  # what a tokenizer cannot take, packing reports


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What goes wrong in `datasets` is raised, not logged; progress bars are for a terminal."""
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
