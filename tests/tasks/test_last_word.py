from __future__ import annotations

import pytest

from ltm_pyro.errors import InputError
from ltm_pyro.tasks.last_word import LastWord


def test_the_last_word_is_right_if_all_of_its_tokens_are(scripted):
    passages = ["the cat sat on the mat", "a dog saw a  bird\n", "one", "he said yes"]
    answers = {"the cat sat on the": " mats", "a dog saw a": "  bird", "he said": " no"}
    context = scripted(lambda prompt, number: answers[prompt], passages)
    (result,) = LastWord().score(context)
    assert sorted(context.asked) == sorted(answers)
    # " mats" begins with the four bytes that are asked for.
    assert result.value == pytest.approx(2 / 3)
    assert result.num_items == 3


def test_an_answer_that_ends_within_the_word_is_wrong(scripted):
    (result,) = LastWord().score(scripted(lambda prompt, number: " ma", ["on the mat"]))
    assert result.value == 0


def test_texts_of_single_words_are_refused(scripted):
    with pytest.raises(InputError, match="no text has two words"):
        LastWord().score(scripted(lambda prompt, number: "", ["one", "two"]))
