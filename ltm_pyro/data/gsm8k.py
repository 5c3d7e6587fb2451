"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems of grade school, each with a worked answer.

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
    question: str
    answer: str
    """Worked out, with its final number behind the mark."""

    @property
    def final(self) -> Decimal:
        """The number that is asked for."""
        number = final_number(self.answer)
        assert number is not None  # as `load_gsm8k` has checked
        return number


def final_number(answer: str) -> Decimal | None:
    """The first number behind the first mark; of an answer without a mark its last number; None where there is none."""
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
        InputError: if they cannot be had, or are no such problems.
    """
    if data is None:
        return _of_hub("train"), _of_hub("test")
    train, test = (_of_file(Path(data).expanduser() / f"{split}.jsonl") for split in ("train", "test"))
    return train, test


def _of_file(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; give a folder with train.jsonl and test.jsonl") from None
    try:
        return _problems([json.loads(line) for line in lines if line.strip()], str(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, one object a line: {error}") from None


def _of_hub(split: str) -> list[Problem]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB_NAME, "main", split=split)
    except Exception as error:  # the library raises many kinds
        raise InputError(
            f"{HUB_NAME} cannot be had from the Hugging Face hub ({type(error).__name__}); give --data a folder with "
            "train.jsonl and test.jsonl"
        ) from None
    return _problems(list(rows), HUB_NAME)


def _problems(rows: list[Any], source: str) -> list[Problem]:
    problems = []
    for number, row in enumerate(rows, 1):
        fields = [row.get(name) if isinstance(row, dict) else None for name in ("question", "answer")]
        if not all(isinstance(field, str) for field in fields):
            raise InputError(f"{source}, problem {number}, has no question and answer")
        problem = Problem(*fields)
        if MARK not in problem.answer or final_number(problem.answer) is None:
            raise InputError(f"{source}, problem {number}, has no final number behind {MARK}")
        problems.append(problem)
    if not problems:
        raise InputError(f"{source} holds no problems")
    return problems
