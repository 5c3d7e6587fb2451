"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems, each with a worked answer.

A worked answer ends in `#### ` and the final number.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from ltm_pyro.errors import InputError

HUB_NAME = "openai/gsm8k"
MARK = "####"
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")


@dataclass(frozen=True)
class Problem:
    """A word problem."""

    question: str
    answer: str
    """The worked answer, with its final number behind the mark."""

    @property
    def final(self) -> Decimal:
        """The number that is asked for."""
        number = final_number(self.answer)
        assert number is not None  # as `load_gsm8k` has checked
        return number


def final_number(answer: str) -> Decimal | None:
    """The number that an answer ends in: the first behind the first mark, or, without a mark, the last of all.

    None where there is no such number.
    """
    _, mark, marked = answer.partition(MARK)
    numbers = _NUMBER.findall(marked if mark else answer)
    if not numbers:
        return None
    # Decimal, for which 18 and 18.0 are the same, and 0.1 is no approximation.
    return Decimal(re.sub(r"[$,]", "", numbers[0 if mark else -1]))


def load_gsm8k(data: str | None) -> tuple[list[Problem], list[Problem]]:
    """The problems for training and those for testing.

    Args:
        data: a folder with `train.jsonl` and `test.jsonl`, whose lines have `question` and `answer`; None for the data
            set on the Hugging Face hub.

    Raises:
        InputError: if they cannot be read, or are not such problems.
    """
    if data is None:
        return _read_hub("train"), _read_hub("test")
    train, test = (_read_file(Path(data).expanduser() / f"{split}.jsonl") for split in ("train", "test"))
    return train, test


def _read_file(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; give a folder with train.jsonl and test.jsonl") from None
    try:
        return _problems([json.loads(line) for line in lines if line.strip()], str(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, one object a line: {error}") from None


def _read_hub(split: str) -> list[Problem]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB_NAME, "main", split=split)
    except Exception as error:  # the library raises many kinds
        raise InputError(
            f"{HUB_NAME} cannot be loaded from the Hugging Face hub ({type(error).__name__}); give --data a folder "
            "with train.jsonl and test.jsonl"
        ) from None
    return _problems(list(rows), HUB_NAME)


def _problems(rows: list[Any], source: str) -> list[Problem]:
    problems = []
    for number, row in enumerate(rows, 1):
        question, answer = (row.get(name) if isinstance(row, dict) else None for name in ("question", "answer"))
        if not isinstance(question, str) or not isinstance(answer, str):
            raise InputError(f"{source}, problem {number}, has no question and answer")
        problem = Problem(question, answer)
        if MARK not in problem.answer or final_number(problem.answer) is None:
            raise InputError(f"{source}, problem {number}, has no final number after {MARK}")
        problems.append(problem)
    if not problems:
        raise InputError(f"{source} holds no problems")
    return problems
