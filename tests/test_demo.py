"""The model that comes with the package: it is there, small, and does what its card says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import ltm_pyro
from ltm_pyro import evaluate, generate
from ltm_pyro.runs.trained import DEMO_FOLDER

MAX_BYTES = 4_000_000


@pytest.fixture(scope="module")
def demo() -> ltm_pyro.TrainedModel:
    return ltm_pyro.load("demo")


def test_it_is_no_larger_than_a_package_can_carry():
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= MAX_BYTES


def test_it_was_trained_on_the_past_and_its_card_says_on_what(demo):
    assert (demo.config.infer_from, demo.config.inference) == ("past", "map")
    card = (DEMO_FOLDER / "README.md").read_text()
    for word in ("public domain", "prequential", "classic-books", "Latent Thought Model"):
        assert word in card


def test_it_writes_english_without_a_run_or_a_network(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("demo", "--prompt", "It was a dark", "--max-new-tokens", "120", "--temperature", "0.3", "--json")
    status, out, err = run_main(generate.main, *args)
    assert (status, err) == (0, "")
    text = json.loads(out)["text"].split()
    common = {"the", "of", "and", "to", "a", "in", "that", "was", "he", "his", "it", "with", "had", "as", "for", "her"}
    assert sum(word in common for word in text) >= 0.25 * len(text)


def test_a_folder_of_its_name_comes_first(run_main, tmp_path, monkeypatch, train_run: Callable[..., None]):
    monkeypatch.chdir(tmp_path)
    train_run(tmp_path, "vi", "--steps", "1")
    (tmp_path / "vi").rename(tmp_path / "demo")
    assert ltm_pyro.load("demo").config.inference == "vi"
    assert ltm_pyro.load(Path("demo")).config.inference == "vi"


def test_what_is_made_of_it_stays_in_the_current_folder_and_leaves_its_name_alone(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The wolf saw the lamb, and the lamb saw the wolf. " * 20)
    args = ("demo", "--data", "text.txt", "--num-sequences", "1", "--length", "300", "--fast-steps", "0", "1")
    status, out, err = run_main(evaluate.main, *args)
    assert (status, err) == (0, "")
    assert "plot: fast-steps.png" in out
    assert "demo: z from map" in out
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "fast-steps.png"}
    assert ltm_pyro.load("demo").name == "demo"


def test_thinking_shortens_its_code_for_a_text_of_another_kind(demo):
    """A fable told twice: what has been read says how it goes on, far beyond the reach of 46 bytes."""
    from ltm_pyro.inference import SCHEMES, SequenceNoise
    from ltm_pyro.inference.prequential import prequential

    story = (
        "A wolf saw a lamb drinking at a brook, and looked for a reason to eat it. You have muddied my water, said the "
        "wolf. How can I, said the lamb, when the brook runs down from you to me? Then you spoke ill of my father last "
        "year. I was not born then. Well, said the wolf, if it was not you, it was all the same some other lamb. "
    )
    batch = demo.batch([story * 4])
    nats = [
        prequential(demo.model, batch, SCHEMES["map"](num_steps=steps), 128, 1, SequenceNoise(0), True).nats.item()
        for steps in (0, 1)
    ]
    assert nats[1] < 0.9 * nats[0] < math.inf
