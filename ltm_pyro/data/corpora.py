"""Corpora: where the texts come from, and which of them are held out for validation."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltm_pyro.data.python_docs import read_python_docs
from ltm_pyro.errors import InputError

if TYPE_CHECKING:  # `datasets` takes a second to import, and python-docs does without it
    from datasets import Dataset, IterableDataset

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
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d.*)?")  # a shard is numbered
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.+)?")


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


def load_corpus(data: str, text_column: str = "text") -> Corpus:
    """Loads a corpus, and holds out a part of it where it brings no validation split of its own.

    What `data` may be:

    - `python-docs`: the documentation that comes with Python (:mod:`ltm_pyro.data.python_docs`);
    - a file: `.txt` (one document), `.jsonl` or `.json` (a document a row), either also as `.gz`, or `.parquet`;
    - a folder of such files, all of one format. A file or a folder at its top named `train`, `validation` (or `valid`,
      `val`, `dev`) or `test`, with a number or without (`train-00-of-06.jsonl.gz`), belongs to that split, and all
      else to `train`. Hidden files are left out;
    - `NAME` or `NAME:CONFIG`: a data set of the Hugging Face hub. A file or folder of that name goes first.

    Line ends of `.txt` files become `\\n`. Documents without a visible character are dropped.

    Validation is the split `validation`, else `valid`, `val` or `dev`; a `test` split is never read. Without one, the
    twentieth part of the distinct documents with the smallest SHA-256 is held out, so that equal documents fall on the
    same side, whatever their order. Of fewer than 20 distinct documents, the last twentieth of the characters of each
    is held out instead.

    Args:
        data: see above.
        text_column: the column that holds the text, in files and data sets with columns.

    Raises:
        InputError: there is no such corpus, it cannot be read, or it holds no text.
    """
    try:
        path = Path(data).expanduser()
        is_local = bool(data) and path.exists()
    except (OSError, RuntimeError) as error:  # no permission, no such home, a name that is too long
        raise InputError(f"{data!r} cannot be read: {_reason(error)}") from error
    if data == PYTHON_DOCS:
        name, splits = PYTHON_DOCS, {"train": read_python_docs}
    elif is_local:
        name, splits = _local_splits(path, text_column)
    elif path.name.lower().endswith(tuple(_FORMATS)) or not _HUB_NAME.fullmatch(data):
        raise InputError(f"there is no file or folder {data!r}; check the path")
    else:
        name, splits = re.sub(r"[^\w.-]", "-", data), _hub_splits(data, text_column)

    if "train" not in splits:
        raise InputError(f"{data} has no split 'train' to learn from, only {', '.join(sorted(splits))}")
    train = _without_blank(splits["train"]())
    if not train:
        raise InputError(f"{data} holds no text to learn from")
    held_out = next((split for split in _VALIDATION_SPLITS if split in splits), None)
    if held_out is not None:
        validation = _without_blank(splits[held_out]())
    else:
        train, validation = (_without_blank(side) for side in _hold_out(train))
    if not (train and validation):
        raise InputError(f"{data} holds no text to validate on; give more text")
    return Corpus(name, train, validation, _sha256(train, validation))


def _local_splits(path: Path, text_column: str) -> tuple[str, dict[str, Callable[[], list[str]]]]:
    """The name of a file or folder, and how to read each of its splits."""
    if not path.is_dir():
        extension = _extension(path)
        return path.name[: -len(extension)], {"train": functools.partial(_read_files, [path], text_column)}
    files: dict[str, list[Path]] = {}
    try:
        inside = sorted(_walk(path))
    except OSError as error:
        raise InputError(f"the folder {path} cannot be read: {_reason(error)}") from error
    for file in inside:
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            top = parts[0] if len(parts) > 1 else file.name[: -len(_extension(file))]
            match = _SPLIT_NAME.fullmatch(top.lower())
            files.setdefault(match[1] if match else "train", []).append(file)
    if not files:
        raise InputError(f"the folder {path} holds no files; give one that holds {', '.join(_FORMATS)} files")
    formats = {_FORMATS[_extension(file)]: file.name for group in files.values() for file in group}
    if len(formats) > 1:
        examples = ", ".join(f"{name} ({format})" for format, name in formats.items())
        raise InputError(f"the folder {path} holds files of several formats, such as {examples}; keep those of one")
    readers = {split: functools.partial(_read_files, group, text_column) for split, group in files.items()}
    return path.resolve().name, readers


def _hub_splits(data: str, text_column: str) -> dict[str, Callable[[], list[str]]]:
    """How to read each split of a data set of the Hugging Face hub."""
    import datasets

    name, _, config = data.partition(":")
    try:
        with _quiet():
            splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # each of the libraries below has its own
        raise InputError(
            f"{data!r} is neither {PYTHON_DOCS}, an existing file or folder, nor a Hugging Face dataset that can be "
            f"loaded: {_reason(error)}"
        ) from error
    return {split: functools.partial(_texts, rows, text_column, data) for split, rows in splits.items()}


def _read_files(files: list[Path], text_column: str) -> list[str]:
    return [text for file in files for text in _read_file(file, text_column)]


def _read_file(file: Path, text_column: str) -> list[str]:
    """The documents of one file."""
    import datasets

    file_format = _FORMATS[_extension(file)]
    # One file a call, so that an error can name it. Streaming keeps no copy of the text in a cache; the folder that
    # `datasets` makes nonetheless goes away with its lock files.
    pattern = glob.escape(str(file.absolute()))
    try:
        with _quiet(), tempfile.TemporaryDirectory() as cache:
            if file_format == "Parquet":
                return _texts(datasets.IterableDataset.from_parquet(pattern, cache_dir=cache), text_column, str(file))
            if file_format == "JSON":
                # Columns are inferred once for each chunk, and must be the same in all: one chunk lets rows differ.
                rows = datasets.IterableDataset.from_json(pattern, cache_dir=cache, chunksize=2**30)
                return _texts(rows, text_column, str(file))
            rows = datasets.IterableDataset.from_text(pattern, cache_dir=cache, sample_by="document")
            texts = _texts(rows, "text", str(file))
    except InputError:
        raise
    except StopIteration:  # how an empty JSON file ends
        return []
    except Exception as error:  # each of the libraries below has its own
        raise InputError(f"{file} cannot be read as {file_format}: {_reason(error)}") from error
    if any("\0" in text for text in texts):
        raise InputError(f"{file} is not {file_format}: it holds zero bytes; convert it, or leave it out")
    return texts


def _texts(rows: Dataset | IterableDataset, text_column: str, source: str) -> list[str]:
    """The column that holds the text, without missing values."""
    from pyarrow import types

    texts = []
    for table in rows.with_format("arrow").iter(batch_size=1000):
        if text_column not in table.column_names:
            columns = ", ".join(table.column_names)
            raise InputError(f"{source} has no column {text_column!r}; name the one of its columns to read: {columns}")
        kind = table.schema.field(text_column).type
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
            raise InputError(f"the column {text_column!r} of {source} holds {kind}, not text; name another")
        texts += [text for text in table[text_column].to_pylist() if text is not None]
    return texts


def _walk(folder: Path) -> Iterator[Path]:
    """All that lies below a folder; unlike `rglob`, an error where a part of it cannot be read."""
    for path in folder.iterdir():
        yield path
        if path.is_dir():
            yield from _walk(path)


def _extension(file: Path) -> str:
    """The extension of a file that can be read, `.gz` included."""
    for extension in _FORMATS:
        if file.name.lower().endswith(extension):
            return extension
    raise InputError(f"{file} has none of the extensions that can be read: {', '.join(_FORMATS)}")


def _without_blank(documents: Iterable[str]) -> list[str]:
    return [document for document in documents if document and not document.isspace()]


def _hold_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents, by the rule of :func:`load_corpus`."""
    distinct = sorted(set(documents), key=lambda document: hashlib.sha256(_utf8(document)).digest())
    if len(distinct) < 20:
        cuts = [len(document) - max(1, len(document) // 20) for document in documents]
        pairs = list(zip(documents, cuts, strict=True))
        return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]
    held_out = set(distinct[: len(distinct) // 20])
    return (
        [document for document in documents if document not in held_out],
        [document for document in documents if document in held_out],
    )


def _sha256(train: list[str], validation: list[str]) -> str:
    digest = hashlib.sha256()
    for documents in (train, validation):
        digest.update(len(documents).to_bytes(8, "big"))
        for document in documents:
            contents = _utf8(document)
            digest.update(len(contents).to_bytes(8, "big"))
            digest.update(contents)
    return digest.hexdigest()


def _utf8(text: str) -> bytes:
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
