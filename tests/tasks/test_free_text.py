from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest

from ltm_pyro.tasks.free_text import FreeText


def test_texts_are_compared_with_held_out_text(scripted):
    context = scripted(lambda prompt, number: "x x x", ["a b a b", "c d e f g"])
    results = {result.metric: result for result in FreeText().score(context)}
    assert results["distinct-1, model"].value == pytest.approx(1 / 6)
    assert results["distinct-2, model"].value == pytest.approx(1 / 4)
    assert math.isnan(results["distinct-4, model"].value)
    assert results["distinct-1, held-out text"].value == pytest.approx(7 / 9)
    assert results["distinct-2, held-out text"].value == pytest.approx(6 / 7)
    assert results["unigram entropy, model"].value == 0
    shares = np.array([2, 2, 1, 1, 1, 1, 1]) / 9
    assert results["unigram entropy, held-out text"].value == pytest.approx(-(shares * np.log(shares)).sum())
    assert results["self-BLEU, model"].value == pytest.approx(1)
    assert results["self-BLEU, held-out text"].value < 0.2


def test_held_out_text_is_cut_to_the_length_of_the_texts(scripted):
    """Of bytes, four hold the first two words."""
    context = scripted(lambda prompt, number: "x", ["a b c d", "e f g h"])
    results = {result.metric: result for result in FreeText(max_new_tokens=4).score(context)}
    assert results["unigram entropy, held-out text"].value == pytest.approx(math.log(4))


def test_self_bleu_is_omitted_with_a_note_without_its_library(scripted, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    results = FreeText().score(scripted(lambda prompt, number: "x", ["a b", "c d"]))
    assert not any("BLEU" in result.metric for result in results)
    assert "self-BLEU is omitted" in capsys.readouterr().err
