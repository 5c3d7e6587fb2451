"""Problems as they are read, and the final number of an answer."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from ltm_pyro.data.gsm8k import final_number, load_gsm8k
from ltm_pyro.errors import InputError


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $2.50 each", "2.5"),
        ("#### -7", "-7"),
        ("#### 18.", "18"),
        ("#### 18\n\nand then 99\n#### 100", "18"),
        ("He has 3 and 4, so 7.", "7"),
        ("a total of .5", "0.5"),
        ("18.0", "18"),
    ],
)
def test_the_final_number_of_an_answer(answer, number):
    assert final_number(answer) == Decimal(number)


@pytest.mark.parametrize("answer", ["", "no number", "####", "12 and #### nothing"])
def test_an_answer_may_have_none(answer):
    assert final_number(answer) is None


def write(folder, **splits):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def test_a_folder_is_read(tmp_path):
    write(tmp_path, train=[{"question": "1 + 1?", "answer": "#### 2"}], test=[{"question": "6?", "answer": "#### 6"}])
    (train,), (test,) = load_gsm8k(str(tmp_path))
    assert (train.question, train.final) == ("1 + 1?", 2)
    assert test.final == 6


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "?"}, "problem 1, has no question and answer"),
        (["question", "answer"], "problem 1, has no question and answer"),
        ({"question": "?", "answer": "it is 3"}, "problem 1, has no final number after ####"),
        ({"question": "?", "answer": "#### three"}, "problem 1, has no final number after ####"),
    ],
)
def test_what_is_no_problem_is_refused(row, reason, tmp_path):
    write(tmp_path, train=[row], test=[row])
    with pytest.raises(InputError, match=reason):
        load_gsm8k(str(tmp_path))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"train.jsonl cannot be read"):
        load_gsm8k(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"train.jsonl is not JSON"):
        load_gsm8k(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no problems"):
        load_gsm8k(str(tmp_path))
