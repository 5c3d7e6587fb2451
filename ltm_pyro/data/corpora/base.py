"""What every kind of corpus is made of: its splits, how they are read, and the interface of a kind of corpus."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltm_pyro.errors import InputError

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
"""The names of a split that is there to validate on; the first that exists is used."""

Reading = Iterator[tuple[str, float | None]]
"""Texts, each with the share (0 to 1) of the whole that has been read with it; None where that is not known."""


class NotFound(InputError):
    """There is no corpus of this name. The message is the reason alone."""


class CutOff(InputError):
    """A data set that is read while it is downloaded could not be read to its end."""


@dataclass(frozen=True)
class Split:
    """A part of a corpus. Its documents are read, one after the other, whenever they are asked for."""

    size: int | None
    """How much there is to read, in a unit that all splits of a corpus share: bytes of files, or rows. None where that
    is not known."""

    read: Callable[[], Reading]
    """Gives all texts, blank ones too."""

    origin: str = ""
    """What it consists of, for a reader: its files, or its rows."""

    def __iter__(self) -> Reading:
        """The documents, none of them blank, each with the share of the split that has been read with it."""
        return ((text, share) for text, share in self.read() if is_document(text))

    def documents(self) -> list[str]:
        """All documents at once."""
        return [text for text, _ in self]

    @classmethod
    def of(cls, texts: Callable[[], list[str]], origin: str = "") -> Split:
        """A split whose texts are made all at once, when they are asked for."""

        def read() -> Reading:
            made = texts()
            return ((text, number / len(made)) for number, text in enumerate(made, 1))

        return cls(1, read, origin)


@dataclass(frozen=True)
class CorpusSource:
    """A corpus that has not been read yet."""

    name: str
    """A short name that is fit for the name of a folder."""

    train: Split
    """The documents to learn from."""

    validation: Split | None = None
    """The documents that the corpus brings to validate on."""

    unread: Mapping[str, str] = field(default_factory=dict)
    """What else there is and is not read, such as a split `test`: names, and what they consist of."""


@dataclass(frozen=True)
class Splits:
    """The splits that a file, a folder or a data set has."""

    name: str
    """A short name that is fit for the name of a folder."""

    parts: Mapping[str, Split]
    """The splits by their names; `train` alone where there are none."""

    whole: str | None = None
    """What all of it is called, where it has no splits."""

    left_out: str = ""
    """Files that belong to no split, for a reader."""

    def to_learn(self, data: str) -> CorpusSource:
        """The source with these splits: `train`, and the first for validation. None other is ever read.

        Raises:
            InputError: there is no split `train` among them.
        """
        if "train" not in self.parts:
            raise InputError(f"{data} has no split 'train' to learn from, only {', '.join(sorted(self.parts))}")
        validation = next((name for name in VALIDATION_SPLITS if name in self.parts), None)
        unread = {name: split.origin for name, split in self.parts.items() if name not in ("train", validation)}
        unread |= {"left out": self.left_out} if self.left_out else {}
        return CorpusSource(self.name, self.parts["train"], self.parts[validation] if validation else None, unread)

    def to_score(self, data: str, names: Sequence[str]) -> tuple[str, Split]:
        """The first split of these names, or all of what has no splits; and a name that says which.

        Raises:
            InputError: none of them is there.
        """
        if self.whole:
            return f"{self.name}, all of {self.whole}", self.parts["train"]
        found = next((name for name in names if name in self.parts), None)
        if found is None:
            wanted = " or ".join(map(repr, names[:2]))
            raise InputError(f"{data} has no split {wanted} to score, only {', '.join(sorted(self.parts))}")
        return f"{self.name}, split {found}", self.parts[found]


class CorpusKind(abc.ABC):
    """One kind of corpus: which `data` it recognises, and how that is opened to be learnt from and to be scored.

    The docstring of a kind says in full what it recognises, and which of its documents are learnt from and scored.
    """

    label: str
    """What errors call a corpus of this kind, in a list of what `data` may be."""
    summary: str
    """What help texts say of this kind, in a line."""

    @abc.abstractmethod
    def recognises(self, data: str) -> bool:
        """Whether `data` names a corpus of this kind. It may still turn out not to exist.

        Raises:
            InputError: what `data` names cannot be looked at.
        """

    def absolute(self, data: str) -> str:
        """The same corpus, named so that it is found from any folder."""
        return data

    @abc.abstractmethod
    def open(self, data: str, text_column: str | None) -> CorpusSource:
        """The corpus that `data` names, to learn from.

        Args:
            data: what this kind recognises.
            text_column: the column that holds the text, where there are columns; None for `text`, or for what the
                corpus knows itself.

        Raises:
            NotFound: there is no such corpus after all.
            InputError: it is not there to learn from, or cannot be read.
        """

    def stream(self, data: str, text_column: str | None) -> CorpusSource:
        """The same corpus, read while it is downloaded, every time anew, instead of being kept on the disk.

        Raises:
            NotFound: there is no such corpus after all.
            InputError: this kind is not downloaded, or the corpus cannot be read.
        """
        raise InputError(f"--streaming is for data sets of the Hugging Face hub, and {data} is not one: leave it out")

    @abc.abstractmethod
    def open_to_score(self, data: str, text_column: str | None) -> tuple[str, Split]:
        """What is scored of the corpus that `data` names: its short name, and the documents.

        Args:
            data: what this kind recognises.
            text_column: the column that holds the text, where there are columns; None for `text`, or for what the
                corpus knows itself.

        Raises:
            NotFound: there is no such corpus after all.
            InputError: nothing in it is there to be scored, or it cannot be read.
        """


def is_document(text: str) -> bool:
    """Whether a text has a visible character."""
    return bool(text) and not text.isspace()


def existing_path(data: str) -> Path | None:
    """The file or folder of that name, if there is one.

    Raises:
        InputError: it cannot be looked for.
    """
    try:
        path = Path(data).expanduser()
        return path if data and path.exists() else None
    except (OSError, RuntimeError) as error:  # no permission, no such home, a name that is too long
        raise InputError(f"{data!r} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
