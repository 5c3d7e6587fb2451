"""Quality of texts: by hand, and by a scorer that is made here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ltm_pyro.errors import InputError
from ltm_pyro.tasks import text_quality
from ltm_pyro.tasks.text_quality import ReadTexts, TextReader, distinct_share, mauve, self_bleu, unigram_entropy


def test_shares_of_different_n_grams():
    words = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct_share(words, 1) == pytest.approx(2 / 6)
    assert distinct_share(words, 2) == pytest.approx(2 / 4)
    assert distinct_share(words, 4) == 1
    assert math.isnan(distinct_share(words, 5))


def test_entropy_of_words():
    assert unigram_entropy([["a", "a"], ["a"]]) == 0
    assert unigram_entropy([["a", "b"], ["c", "d"]]) == pytest.approx(math.log(4))
    assert math.isnan(unigram_entropy([[], []]))


def test_self_bleu_tells_texts_that_are_alike():
    one = "the quick brown fox jumps over the lazy dog"
    other = "seven grey whales swam past an empty harbour at noon"
    assert self_bleu([one, one]) == pytest.approx([1, 1])
    assert max(self_bleu([one, other])) < 0.1
    assert self_bleu([one, other, one])[0] == pytest.approx(1)


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory):
    """A GPT-2 of two layers with weights at random, and a tokenizer of single characters."""
    transformers = pytest.importorskip("transformers", reason="an optional extra")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder = tmp_path_factory.mktemp("scorer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    shape = transformers.GPT2Config(vocab_size=len(characters), n_positions=16, n_embd=8, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


def test_a_scorer_gives_perplexity_and_features(scorer_folder):
    """Token by token, each from a pass over what stands before it."""
    reader = TextReader(str(scorer_folder), torch.device("cpu"))
    texts = ["hello", "x", "a text that is longer than sixteen"]
    read = reader.read(texts)
    nats, count = 0.0, 0
    for text in (texts[0], texts[2][:16]):
        ids = [ord(c) - 32 for c in text]
        for n in range(1, len(ids)):
            with torch.no_grad():
                logits = reader.model(torch.tensor([ids[:n]])).logits[0, -1]
            nats -= logits.log_softmax(0)[ids[n]].item()
            count += 1
    assert read.num_tokens == count == 4 + 15
    assert read.nats == pytest.approx(nats, rel=1e-5)
    assert read.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert read.features.shape == (2, 8)
    with pytest.raises(InputError, match="nothing to read"):
        reader.read(["", "y"])


def test_a_scorer_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="an optional extra")
    with pytest.raises(InputError, match="cannot be loaded"):
        TextReader(str(tmp_path), torch.device("cpu"))
    monkeypatch.setattr(text_quality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="extra 'quality'"):
        TextReader(str(tmp_path), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
def test_mauve_tells_sets_that_are_alike():
    pytest.importorskip("mauve", reason="an optional extra")
    normal = np.random.default_rng(0).standard_normal
    one, same, far = (ReadTexts(1.0, 1, (normal((200, 8)) + shift).astype(np.float32)) for shift in (0, 0, 9))
    assert mauve(one, same) > 0.8
    assert mauve(one, far) < 0.1
