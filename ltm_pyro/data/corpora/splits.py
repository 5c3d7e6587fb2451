"""Which files of a folder are which split. This is decided here and nowhere else.

A folder named after a split, as `train` or `validation-2`, gives it to all that lies below. Otherwise a split's word in
the name of a file or folder does, wherever it stands: `corpus_train.parquet`, `wiki.valid.tokens`,
`data/test-00000-of-00001.parquet`. Files without such a word are learnt from, if no file says that it is.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ltm_pyro.data.corpora.base import VALIDATION_SPLITS, reason
from ltm_pyro.errors import InputError

WORDS = {
    "train": ("train", "training"),
    "validation": VALIDATION_SPLITS,
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words that stand for a split in a name, in lower case."""

ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "dataset_infos", "dataset_info")
"""The names of files, in lower case and without an extension, that say something of a folder's texts and are none."""


@dataclass
class Found:
    """The files of a folder."""

    splits: dict[str, list[Path]] = field(default_factory=dict)
    """The files of each split that there is, in the order of their paths."""
    has_names: bool = False
    """Whether names say which files are which split; if not, all are `train`."""
    left_out: list[Path] = field(default_factory=list)
    """What is no text: files about the folder, and what is no file, such as a pipe or a link to nothing."""


def find_files(folder: Path, stem: Callable[[Path], str]) -> Found:
    """All files below a folder by their splits, every real file once, however many links lead to it.

    Hidden files and folders are passed over.

    Args:
        folder: where to look.
        stem: the name of a file without its extension; it may refuse a file by an InputError.

    Raises:
        InputError: the folder cannot be read, a name says two splits, two names of one file say different ones, or
            some names say `train` and others say nothing.
    """
    found, unnamed = Found(), []
    split_of: dict[tuple[int, int], str | None] = {}
    try:
        entries = sorted(_walk(folder, set()), key=lambda entry: (entry[1], entry[0]))
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {reason(error)}") from error
    for path, is_linked in entries:
        try:
            status = path.stat()
        except OSError:
            found.left_out.append(path)
            continue
        if not stat.S_ISREG(status.st_mode) or path.name.lower().partition(".")[0] in ABOUT:
            found.left_out.append(path)
            continue
        identity = (status.st_dev, status.st_ino)
        parts = path.relative_to(folder).parts
        if is_linked and identity in split_of and len(parts) > 1:
            continue  # by a link to a folder, of which the files are known by their own names
        split = _split_of((*parts[:-1], stem(path)), path)
        if identity in split_of:
            if split not in (None, split_of[identity]):
                raise InputError(
                    f"{path} is of the split {split} by its name, and of {split_of[identity] or 'none'} by another "
                    "name of the same file; remove one of the links"
                )
            continue
        split_of[identity] = split
        if split is None:
            unnamed.append(path)
        else:
            found.splits.setdefault(split, []).append(path)
    if unnamed and "train" in found.splits:
        raise InputError(
            f"the folder {folder} holds {found.splits['train'][0].name} to learn from, and {unnamed[0].name}, whose "
            f"name says no split ({', '.join(WORDS)}); rename it, or leave it out"
        )
    found.has_names = bool(found.splits)
    if unnamed:
        found.splits["train"] = unnamed
    found.splits = {split: sorted(found.splits[split]) for split in WORDS if split in found.splits}
    return found


def _walk(folder: Path, seen: set[tuple[int, int]], is_linked: bool = False) -> Iterator[tuple[Path, bool]]:
    """All that lies below a folder and is no folder, and whether a link leads there; every real folder once.

    What lies there under its own name comes before what a link leads to. Unlike with `rglob`, it is an error where a
    part cannot be read.
    """
    links = []
    for inside, linked in _folders(folder, seen, is_linked):
        for path in sorted(inside.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink():
                links.append(path)
            elif not path.is_dir():
                yield path, linked
    for link in links:
        if link.is_dir():
            yield from _walk(link, seen, is_linked=True)
        else:
            yield link, True


def _folders(folder: Path, seen: set[tuple[int, int]], is_linked: bool) -> Iterator[tuple[Path, bool]]:
    """The folder and all real ones below it that have not been seen."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield folder, is_linked
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _folders(path, seen, is_linked)


def _split_of(parts: tuple[str, ...], path: Path) -> str | None:
    """The split that the names of a file and of the folders above it say, or None.

    Raises:
        InputError: they say several.
    """
    named = {split for part in parts[:-1] for split in _splits_in(part) if _is_word_of(part, split)}
    said = named or {split for part in parts for split in _splits_in(part)}
    if len(said) > 1:
        raise InputError(
            f"{path} is of the splits {' and '.join(s for s in WORDS if s in said)} by its name; rename it"
        )
    return next(iter(said), None)


def _splits_in(name: str) -> set[str]:
    words = set(re.split(r"[\W\d_]+", name.lower()))
    return {split for split, names in WORDS.items() if words & set(names)}


def _is_word_of(name: str, split: str) -> bool:
    """Whether a name is a split's word, with a number or without."""
    return re.fullmatch(rf"({'|'.join(WORDS[split])})([-_. ]?\d+)*", name.lower()) is not None
