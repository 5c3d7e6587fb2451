"""The command: tasks given to runs that `python -m ltm_pyro.train` has written."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ltm_pyro
from ltm_pyro import evaluate
from ltm_pyro.inference import PRIOR, SequenceNoise, infer
from ltm_pyro.models import Sampling
from ltm_pyro.models import generate as generate_tokens
from ltm_pyro.tasks import TASKS, Task, TaskContext, TaskResult
from ltm_pyro.tasks import __main__ as tasks
from ltm_pyro.tasks.last_word import LastWord


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_run: Callable[..., None]) -> Path:
    """A folder with a corpus, a run with z and one without."""
    folder = tmp_path_factory.mktemp("runs")
    train_run(folder, "vi", "--fast-steps", "1", "--steps", "1")
    train_run(folder, "none", "--steps", "1")
    return folder


@pytest.fixture
def command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in the folder of the runs."""
    monkeypatch.chdir(runs)
    return functools.partial(run_main, lambda args: tasks.main(args))


def test_several_runs_and_ways_of_inference_are_a_table_and_a_json_file(command):
    args = ("last-word", "vi", "none", "--fast-steps", "0", "2", "--num-items", "3", "--json", "task.json")
    status, out, err = command(*args, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "standard error over items" in out
    assert out.endswith("all results: task.json\n")
    written = json.loads(Path("task.json").read_text())
    assert written["settings"]["task"] == "last-word"
    assert written["settings"]["num_items"] == 3
    expected = [("vi", "vi", 0), ("vi", "vi", 2), ("none", None, None)]
    assert [(r["run"], r["z_from"], r["fast_steps"]) for r in written["tasks"]] == expected
    for record in written["tasks"]:
        about = {"run", "task", "z_from", "fast_steps"}
        assert set(record) == about | {"metric", "value", "standard_error", "num_items", "meaning"}
        assert (record["task"], record["metric"], record["num_items"]) == ("last-word", "last word", 3)


def test_the_figures_are_those_of_texts_that_are_written_by_hand(command):
    """z from the prior, the texts from z by the model itself, and their words counted."""
    args = ("free-text", "vi", "--num-items", "3", "--max-new-tokens", "20", "--top-k", "9", "--seed", "4")
    assert command(*args, "--json", "free.json")[0] == 0
    found = {r["metric"]: r["value"] for r in json.loads(Path("free.json").read_text())["tasks"]}
    ltm, rng = ltm_pyro.load("vi"), SequenceNoise(4)
    batch = ltm.batch(["one", "two", "six"])
    z = PRIOR.posterior(infer(PRIOR, ltm.model, batch, rng), 1, rng).samples[0, 0]
    generator, end = torch.Generator().manual_seed(4), ltm.model.end_of_text
    texts = ltm.decode(generate_tokens(ltm.model.decoder, z, end, 20, None, Sampling(top_k=9), generator))
    counts = Counter(word for text in texts for word in text.split())
    assert counts
    entropy = math.log(counts.total()) - sum(n * math.log(n) for n in counts.values()) / counts.total()
    assert found["distinct-1, model"] == len(counts) / counts.total()
    assert found["unigram entropy, model"] == pytest.approx(entropy)


def test_after_ctrl_c_the_finished_results_are_there(command, monkeypatch):
    score, calls = LastWord.score, []

    def interrupted(self: LastWord, context: TaskContext) -> list[TaskResult]:
        calls.append(context)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, context)

    monkeypatch.setattr(LastWord, "score", interrupted)
    status, out, err = command("last-word", "vi", "none", "--num-items", "2", "--json", "part.json")
    assert (status, err) == (130, "interrupted\n")
    assert "last word" in out
    assert [record["run"] for record in json.loads(Path("part.json").read_text())["tasks"]] == ["vi"]


BAD = {
    "no task": ([], "give a TASK"),
    "a task that is none": (["gsm9k", "vi"], "gsm9k is not a TASK: choose one of gsm8k"),
    "an option before the task": (["--num-items", "3", "gsm8k", "vi"], "--num-items is not a TASK"),
    "no run": (["last-word"], "RUN"),
    "a folder that is no run": (["last-word", "nowhere"], "nowhere"),
    "an option of another task": (["last-word", "vi", "--shots", "3"], "--shots"),
    "sampling of what is greedy": (["last-word", "vi", "--temperature", "0.5"], "--temperature"),
    "a text column of problems": (["gsm8k", "vi", "--text-column", "text"], "--text-column"),
    "no problems": (["gsm8k", "vi", "--data", "nowhere"], "train.jsonl cannot be read"),
    "no texts": (["last-word", "vi", "--data", "nowhere.txt"], "nowhere.txt"),
    "fewer demonstrations than none": (["gsm8k", "vi", "--shots", "-1"], "shots must be at least 0"),
    "no answer": (["gsm8k", "vi", "--attempts", "0"], "attempts must be at least 1"),
    "no token": (["free-text", "vi", "--max-new-tokens", "0"], "max-new-tokens must be at least 1"),
    "greedy sampling of some": (["free-text", "vi", "--temperature", "0", "--top-k", "3"], "temperature 0"),
    "fewer items than none": (["last-word", "vi", "--num-items", "-1"], "--num-items must be at least 0"),
    "an empty batch": (["last-word", "vi", "--batch-size", "0"], "--batch-size must be at least 1"),
    "a negative seed": (["last-word", "vi", "--seed", "-1"], "--seed must be"),
    "a seed that is too large": (["last-word", "vi", "--seed", "4294967296"], "--seed must be"),
    "fewer steps than none": (["last-word", "vi", "--fast-steps", "2", "-1"], "--fast-steps"),
    "an unknown scheme": (["last-word", "vi", "--inference", "nuts"], "nuts"),
    "an encoder that is not there": (["last-word", "vi", "--inference", "amortized"], "no encoder"),
    "a file in no folder": (["last-word", "vi", "--json", "nowhere/task.json"], "--json nowhere/task.json"),
    "a folder for a file": (["last-word", "vi", "--json", "vi"], "--json vi"),
}


def test_a_reader_that_goes_away_does_not_cost_the_file(command, monkeypatch):
    def gone(records):
        raise BrokenPipeError

    finished = []
    monkeypatch.setattr(tasks, "print_results", gone)
    monkeypatch.setattr(tasks.Output, "finish", lambda self, content: finished.append(json.loads(content)))
    assert command("last-word", "vi", "--num-items", "2", "--json", "unread.json")[0] == 1
    assert len(finished[0]["tasks"]) > 0


@pytest.mark.parametrize(("args", "reason"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_with_status_2(args, reason, command):
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err


def test_evaluate_names_the_command_for_its_earlier_option(run_main):
    for args in (["--task", "gsm8k"], ["--task=last-word"]):
        status, _, err = run_main(evaluate.main, "vi", *args)
        assert status == 2
        assert err.count("\n") == 1
        assert "python -m ltm_pyro.tasks TASK" in err


def test_help_lists_the_tasks_and_that_of_a_task_only_its_own_options(command):
    status, out, _ = command("--help")
    assert status == 0
    assert all(f"{name}: " in out for name in TASKS)
    for name in TASKS:
        status, out, _ = command(name, "--help")
        assert status == 0
        assert ("--shots" in out) == name.startswith("gsm8k")
        assert ("--scorer" in out) == (name == "free-text")
        assert ("--temperature" in out) == (name != "last-word")
        assert "--num-items" in out


@dataclass(frozen=True)
class Ends(Task):
    """Whether texts end within a number of tokens. They are written with z from the prior."""

    within: int = 8
    """Number of tokens within which a text must end."""

    def score(self, context: TaskContext) -> list[TaskResult]:
        prompts: list[list[int]] = [[]] * context.num_items
        written = context.written(prompts, [self.within] * len(prompts), Sampling())
        ended = [float(tokens[-1] == context.ltm.model.end_of_text) for (tokens,) in written]
        return [TaskResult.mean("ended", ended, f"an end-of-text within {self.within} tokens")]


@pytest.fixture
def with_task(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A task is written, and given a line in TASKS."""
    with monkeypatch.context() as patched:
        patched.setitem(TASKS, "ends", Ends)
        importlib.reload(tasks)
        yield
    importlib.reload(tasks)


def test_a_new_task_needs_its_class_and_one_line(with_task, command):
    assert "ends: Whether texts end within a number of tokens" in command("--help")[1]
    assert "Number of tokens within which a text must end" in command("ends", "--help")[1]
    status, out, err = command("ends", "vi", "--num-items", "5", "--within", "200")
    assert (status, err) == (0, "")
    assert "ended: an end-of-text within 200 tokens" in out
    assert "| vi  | ends |" in out
