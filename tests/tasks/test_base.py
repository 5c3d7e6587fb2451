from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise
from ltm_pyro.models import Sampling
from ltm_pyro.runs.continuation import infer_thoughts
from ltm_pyro.tasks import TASKS, TaskContext, TaskResult

GREEDY = Sampling(temperature=0.0)


def test_answers_of_a_model_are_those_of_its_own_greedy_decoding(untrained):
    """The oracle takes the tokens after a prompt one by one from the decoder's logits."""
    context = TaskContext(untrained, PRIOR, batch_size=2)
    prompts: Sequence[list[int]] = [[5, 6, 7], [1], []]
    rows = list(context.written(prompts, [4, 4, 4], GREEDY))
    z = infer_thoughts(untrained, prompts, PRIOR, 1, SequenceNoise(0))[:, 0]
    decoder, end = untrained.model.decoder, untrained.model.end_of_text
    for prompt, (row,), one in zip(prompts, rows, z, strict=True):
        tokens = list(prompt)
        for _ in range(4):
            inputs = torch.tensor([[decoder.begin_of_text, *tokens]])
            with torch.no_grad():
                tokens.append(int(decoder.logits(decoder(inputs, one[None])[0, -1]).argmax()))
            if tokens[-1] == end:
                break
        assert row == tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["vi", "langevin"])
def test_every_answer_to_a_prompt_has_its_own_draw_of_z(name, untrained, monkeypatch):
    z_used = []

    class Recorded:
        def __init__(self, untrained, prompts, z, sampling, generator):
            z_used.append((prompts, z))

        def finish(self, max_new_tokens):
            return [[1]] * len(z_used[-1][1])

    monkeypatch.setattr("ltm_pyro.tasks.base.Continuation", Recorded)
    context = TaskContext(untrained, SCHEMES[name](num_steps=2), batch_size=2)
    rows = list(context.written([[5, 6]] * 3, [1, 1, 1], GREEDY, num_answers=3))
    assert rows == [[[1]] * 3] * 3
    assert [prompts for prompts, _ in z_used] == [[[5, 6]] * 6, [[5, 6]] * 3]
    z = torch.cat([z for _, z in z_used])
    assert not any(torch.equal(z[i], z[j]) for i in range(9) for j in range(i))


def test_a_mean_over_items_has_the_standard_error_of_its_sample():
    result = TaskResult.mean("right", [1.0, 0.0, 0.0, 1.0], "")
    assert (result.value, result.num_items) == (0.5, 4)
    assert result.standard_error == pytest.approx(math.sqrt(0.25 / 3))
    assert TaskResult.mean("right", [1.0], "").standard_error is None


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_in_a_sentence_what_it_is(name):
    assert (TASKS[name].__doc__ or "").partition(". ")[0].count(" ") >= 5
