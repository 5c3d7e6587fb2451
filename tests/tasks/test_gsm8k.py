"""Word problems, with answers that are written by hand: what is asked, and what counts as right."""

from __future__ import annotations

import math
import re

import pytest

from ltm_pyro.errors import InputError
from ltm_pyro.tasks.gsm8k import GSM8K
from ltm_pyro.tasks.gsm8k_published import GSM8KPublished


def test_answers_whose_final_number_is_right_are_counted(scripted, sums, number_asked):
    def answer(prompt: str, number: int) -> str:
        asked = number_asked(prompt)
        # Right for 10 to 12; then a right number elsewhere; then in a question that the model asks itself.
        if asked < 13:
            return f" {asked} + 1.\n#### {asked + 1}\n\nQuestion: What is 5 + 1?\nAnswer: #### 6"
        if asked < 16:
            return f" So {asked + 1}?\n#### 7"
        return f" So it is {asked}.\n\nQuestion: so?\nAnswer: #### {asked + 1}"

    context = scripted(answer)
    (result,) = GSM8K(sums, shots=3).score(context)
    assert (result.metric, result.value, result.num_items) == ("pass@1", 0.3, 10)
    assert result.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert len(context.asked) == 10
    for prompt in context.asked:
        shown = [int(n) for n in re.findall(r"Question: What is (\d+) \+ 1\?\nAnswer: It is", prompt)]
        assert len(set(shown)) == 3
        assert all(100 <= n < 200 for n in shown)
        assert prompt.endswith(f"Question: What is {number_asked(prompt)} + 1?\nAnswer:")
        assert prompt.count("####") == 3
    assert sorted(map(number_asked, context.asked)) == list(range(10, 20))
    assert len({prompt[:40] for prompt in context.asked}) > 5  # each has demonstrations of its own


def test_several_answers_give_pass_at_1_as_their_mean_and_pass_at_k_if_any_is_right(scripted, sums, number_asked):
    """Of the ten answers to each problem n from 10 to 19, n - 10 are right."""

    def answer(prompt: str, number: int) -> str:
        return f"#### {number_asked(prompt) + (1 if number < number_asked(prompt) - 10 else 0)}"

    one, several = GSM8K(sums, shots=0, attempts=10).score(scripted(answer))
    assert (one.metric, several.metric) == ("pass@1", "pass@10")
    assert one.value == pytest.approx(0.45)
    assert several.value == pytest.approx(0.9)
    assert "at least one of 10" in several.meaning


def test_the_published_protocol_shows_other_test_problems_and_matches_anywhere(scripted, sums, number_asked):
    context = scripted(lambda prompt, number: f"In {number_asked(prompt) + 1}99 there it is. #### 0")
    (result,) = GSM8KPublished(sums, shots=9).score(context)
    assert result.value == 1
    assert "TEST" in result.meaning
    assert "not comparable" in result.meaning
    for prompt in context.asked:
        shown = [int(n) for n in re.findall(r"What is (\d+) \+ 1\?\nAnswer: It is", prompt)]
        assert sorted([*shown, number_asked(prompt)]) == list(range(10, 20))


def test_only_so_many_items_are_asked(scripted, sums):
    context = scripted(lambda prompt, number: "", num_items=4)
    (result,) = GSM8K(sums).score(context)
    assert result.num_items == len(context.asked) == 4


@pytest.mark.parametrize(("name", "value"), [("shots", -1), ("attempts", 0), ("max_new_tokens", 0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        GSM8K(**{name: value})


@pytest.mark.parametrize(("task", "most"), [(GSM8K, 100), (GSM8KPublished, 9)])
def test_more_demonstrations_than_there_are_problems_are_refused(task, most, scripted, sums):
    task(sums, shots=most).score(scripted(lambda prompt, number: ""))
    with pytest.raises(InputError, match=f"--shots {most + 1} is more than the {most} problems"):
        task(sums, shots=most + 1).score(scripted(lambda prompt, number: ""))
