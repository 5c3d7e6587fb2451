"""Tasks, with answers that are written by hand: what is asked, and what counts as right."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ltm_pyro import cli, evaluate, tasks, train
from ltm_pyro.config import preset
from ltm_pyro.data import get_tokenizer
from ltm_pyro.inference import PRIOR
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, Sampling
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.trained import TrainedModel
from ltm_pyro.tasks import Sitting, TaskSettings

SHAPE = DecoderConfig(num_layers=1, width=8, num_heads=1, hidden=8, num_slots=1, window=4, length=16)


@dataclasses.dataclass(frozen=True)
class Scripted(Sitting):
    """A sitting whose answers are given, by what is asked."""

    answer: object = None
    """(prompt, number of the answer) -> text."""
    asked: list = dataclasses.field(default_factory=list)

    def written(self, prompts, max_new_tokens, sampling, num_answers=1):
        encoding, end = self.ltm.tokenizer, self.ltm.model.end_of_text
        for prompt, most in zip(prompts, max_new_tokens, strict=True):
            text = encoding.decode(prompt)
            self.asked.append(text)
            rows = [[*encoding.encode_ordinary(self.answer(text, n)), end] for n in range(num_answers)]
            longest = max(most, *map(len, rows))
            yield torch.tensor([row + [end] * (longest - len(row)) for row in rows])


@pytest.fixture(scope="module")
def ltm():
    encoding = get_tokenizer("bytes")
    torch.manual_seed(0)
    model = LatentThoughtModel(SHAPE, encoding.n_vocab, 256)
    return TrainedModel(model, encoding, preset("tiny"), Path("run"), {}, Progress())


@pytest.fixture
def sitting(ltm, tmp_path):
    """Of a hundred sums to learn from and ten to be asked."""
    for split, numbers in (("train", range(100, 200)), ("test", range(10, 20))):
        rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n} + 1.\n#### {n + 1}"} for n in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(answer, texts=(), num_items=0, **settings):
        settings = TaskSettings(**settings)
        return Scripted(ltm, PRIOR, settings, str(tmp_path), lambda: list(texts), num_items, 4, 0, answer)

    return build


def number_asked(prompt: str) -> int:
    return int(re.findall(r"What is (\d+) \+ 1\?", prompt)[-1])


def test_gsm8k_counts_answers_whose_final_number_is_right(sitting):
    def answer(prompt: str, number: int) -> str:
        asked = number_asked(prompt)
        # Right for 10 to 12; then a right number elsewhere; then in a question that the model asks itself.
        if asked < 13:
            return f" {asked} + 1.\n#### {asked + 1}\n\nQuestion: What is 5 + 1?\nAnswer: #### 6"
        if asked < 16:
            return f" So {asked + 1}?\n#### 7"
        return f" So it is {asked}.\n\nQuestion: so?\nAnswer: #### {asked + 1}"

    task = sitting(answer, shots=3)
    (score,) = tasks.gsm8k(task)
    assert (score.metric, score.value, score.num_items) == ("pass@1", 0.3, 10)
    assert score.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert len(task.asked) == 10
    for prompt in task.asked:
        shown = [int(n) for n in re.findall(r"Question: What is (\d+) \+ 1\?\nAnswer: It is", prompt)]
        assert len(set(shown)) == 3
        assert all(100 <= n < 200 for n in shown)
        assert prompt.endswith(f"Question: What is {number_asked(prompt)} + 1?\nAnswer:")
        assert prompt.count("####") == 3
    assert sorted(map(number_asked, task.asked)) == list(range(10, 20))
    assert len({prompt[:40] for prompt in task.asked}) > 5  # each has demonstrations of its own


def test_several_answers_give_pass_at_1_as_their_mean_and_pass_at_k_if_any_is_right(sitting):
    """Of the problems 10 to 19, n - 10 of ten answers are right."""

    def answer(prompt: str, number: int) -> str:
        return f"#### {number_asked(prompt) + (1 if number < number_asked(prompt) - 10 else 0)}"

    one, several = tasks.gsm8k(sitting(answer, shots=0, attempts=10))
    assert (one.metric, several.metric) == ("pass@1", "pass@10")
    assert one.value == pytest.approx(0.45)
    assert several.value == pytest.approx(0.9)
    assert "any of 10" in several.meaning


def test_the_published_protocol_shows_other_test_problems_and_matches_anywhere(sitting):
    task = sitting(lambda prompt, number: f"In {number_asked(prompt) + 1}99 there it is. #### 0", shots=9)
    (score,) = tasks.gsm8k_published(task)
    assert score.value == 1
    assert "TEST" in score.meaning
    assert "not comparable" in score.meaning
    for prompt in task.asked:
        shown = [int(n) for n in re.findall(r"What is (\d+) \+ 1\?\nAnswer: It is", prompt)]
        assert sorted([*shown, number_asked(prompt)]) == list(range(10, 20))


def test_only_so_many_items_are_asked(sitting):
    task = sitting(lambda prompt, number: "", num_items=4)
    (score,) = tasks.gsm8k(task)
    assert score.num_items == len(task.asked) == 4


def test_the_last_word_is_right_if_all_of_its_tokens_are(sitting):
    passages = ["the cat sat on the mat", "a dog saw a  bird\n", "one", "he said yes"]
    answers = {"the cat sat on the": " mats", "a dog saw a": "  bird", "he said": " no"}
    task = sitting(lambda prompt, number: answers[prompt], texts=passages)
    (score,) = tasks.last_word(task)
    assert sorted(task.asked) == sorted(answers)
    # " mats" begins with the four bytes that are asked for.
    assert score.value == pytest.approx(2 / 3)
    assert score.num_items == 3


def test_free_text_is_held_against_held_out_text(sitting):
    texts = ["a b a b", "c d e f g"]
    scores = {score.metric: score for score in tasks.free_text(sitting(lambda prompt, number: "x x x", texts=texts))}
    assert scores["distinct-1, model"].value == pytest.approx(1 / 6)
    assert scores["distinct-2, model"].value == pytest.approx(1 / 4)
    assert math.isnan(scores["distinct-4, model"].value)
    assert scores["distinct-1, held-out text"].value == pytest.approx(7 / 9)
    assert scores["distinct-2, held-out text"].value == pytest.approx(6 / 7)
    assert scores["unigram entropy, model"].value == 0
    shares = np.array([2, 2, 1, 1, 1, 1, 1]) / 9
    assert scores["unigram entropy, held-out text"].value == pytest.approx(-(shares * np.log(shares)).sum())
    assert scores["self-BLEU, model"].value == pytest.approx(1)
    assert scores["self-BLEU, held-out text"].value < 0.2


def test_self_bleu_is_left_out_and_said_so_without_its_library(sitting, monkeypatch, capsys):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    scores = tasks.free_text(sitting(lambda prompt, number: "x", texts=["a b", "c d"]))
    assert not any("BLEU" in score.metric for score in scores)
    assert "self-BLEU is left out" in capsys.readouterr().err


def test_answers_of_a_model_are_those_of_its_own_greedy_decoding(ltm):
    """Without a script: the tokens that follow a prompt, one by one from the decoder itself."""
    sitting = Sitting(ltm, PRIOR, TaskSettings(), None, list, 0, 2, 0)
    prompts: Sequence[list[int]] = [[5, 6, 7], [1], []]
    rows = list(sitting.written(prompts, [4, 4, 4], Sampling(temperature=0.0)))
    z = tasks.infer_thoughts(ltm, prompts[:2], PRIOR, 1, tasks.SequenceNoise(0))[:, 0]
    for prompt, row, one in zip(prompts, rows, z, strict=False):
        tokens = list(prompt)
        for _ in range(4):
            inputs = torch.tensor([[ltm.model.decoder.begin_of_text, *tokens]])
            with torch.no_grad():
                tokens.append(int(ltm.model.decoder.logits(ltm.model.decoder(inputs, one[None])[0, -1]).argmax()))
        expected = tokens[len(prompt) :]
        assert row[0].tolist() == expected


@pytest.mark.parametrize(("name", "value"), [("shots", -1), ("attempts", 0), ("max_new_tokens", 0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TaskSettings(**{name: value})


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with a small run: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} plus {n} makes {2 * n}"}) + "\n" for n in range(60))
    )
    shape = "--model.width 16 --model.num-heads 2 --model.hidden 24 --model.num-layers 2 --model.window 8"
    sizes = "--model.length 32 --batch-size 4 --steps 2 --validation-sequences 2 --validation-samples 2 --device cpu"
    assert train.main([*shape.split(), *sizes.split(), "--data", "text.jsonl", "--out", "run"]) == 0
    capsys.readouterr()

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.run(evaluate.main, ["run", "--device", "cpu", *args])
        return exit.value.code, *capsys.readouterr()

    return run


def test_the_command_prints_a_table_and_writes_json(command, tmp_path):
    status, out, err = command(
        "--task", "last-word", "--fast-steps", "0", "2", "--num-sequences", "3", "--json", "task.json"
    )
    assert (status, err) == (0, "")
    assert "last word" in out
    assert "standard error over items" in out
    records = json.loads((tmp_path / "task.json").read_text())["tasks"]
    assert [record["fast_steps"] for record in records] == [0, 2]
    assert {record["num_items"] for record in records} == {3}
    status, out, err = command("--task", "free-text", "--num-sequences", "3", "--max-new-tokens", "20")
    assert (status, err) == (0, "")
    assert out.count("distinct-1") == 4  # two rows, and what they mean


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--task", "gsm8k", "--data", "nowhere"], "train.jsonl cannot be read"),
        (["--task", "gsm9k"], "gsm9k"),
        (["--task", "gsm8k", "--shots", "-1"], "shots must be at least 0"),
        (["--task", "last-word", "--certify", "2"], "leave out --certify"),
        (["--task", "free-text", "--temperature", "0", "--top-k", "3"], "temperature 0"),
    ],
)
def test_wrong_input_is_one_line(command, args, reason):
    status, _, err = command(*args)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err
