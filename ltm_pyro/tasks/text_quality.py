"""How varied and how natural texts are, without probabilities of the model that wrote them.

All of these depend on how many texts there are and how long they are: compare them with the same figure of as many
human texts of the same length.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ltm_pyro.errors import InputError

Words = Sequence[Sequence[str]]
"""The words of each text."""


def distinct_share(words: Words, n: int) -> float:
    """Number of different n-grams over that of all n-grams of the texts (Li et al. 2016, arXiv 1510.03055); nan where
    there is none."""
    grams = [tuple(row[start : start + n]) for row in words for start in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def unigram_entropy(words: Words) -> float:
    """Entropy of the distribution of the words of all texts, in nats; nan where there is no word."""
    if not any(words):
        return math.nan
    counts = np.array(list(Counter(word for row in words for word in row).values()), dtype=float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def self_bleu(texts: Sequence[str]) -> list[float]:
    """BLEU of each of at least two texts against all the others (Zhu et al. 2018, arXiv 1802.01886), from 0 to 1."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    return [
        metric.sentence_score(text, [*texts[:number], *texts[number + 1 :]]).score / 100
        for number, text in enumerate(texts)
    ]


@dataclass(frozen=True)
class ReadTexts:
    """Texts as another language model reads them."""

    nats: float
    """-log p of all tokens but the first of each text."""
    num_tokens: int
    """Number of those tokens."""
    features: npt.NDArray[np.float32]
    """[texts, width]: the last hidden state of each text."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.num_tokens)


class TextReader:
    """A causal language model of Hugging Face's transformers, which reads texts.

    Args:
        name: its folder, or its name on the hub.

    Raises:
        InputError: if transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise InputError("--scorer needs transformers, which the extra 'quality' installs")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self.model: Any = AutoModelForCausalLM.from_pretrained(name).eval().to(device)
        except (OSError, ValueError) as error:
            raise InputError(f"--scorer {name} cannot be loaded: {error}") from None
        self.length: int = getattr(self.model.config, "max_position_embeddings", 1024)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> ReadTexts:
        """Read as much of each text as the model can; texts of fewer than two tokens are left out.

        Raises:
            InputError: if nothing is left.
        """
        nats, num_tokens, features = 0.0, 0, []
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.length).input_ids
            if ids.shape[1] < 2:
                continue
            found = self.model(ids.to(self.model.device), output_hidden_states=True)
            log_probs = found.logits[0, :-1].double().log_softmax(-1)
            nats -= log_probs.gather(1, ids[0, 1:, None].to(log_probs.device)).sum().item()
            num_tokens += ids.shape[1] - 1
            features.append(found.hidden_states[-1][0, -1].float().cpu().numpy())
        if not features:
            raise InputError("the scorer has nothing to read: all texts are empty")
        return ReadTexts(nats, num_tokens, np.stack(features))


def mauve(one: ReadTexts, other: ReadTexts) -> float:
    """MAUVE (Pillutla et al. 2021, arXiv 2102.01454) of two sets of texts, from 0 to 1, 1 where they are alike.

    Raises:
        InputError: if its package is not installed.
    """
    if importlib.util.find_spec("mauve") is None:
        raise InputError("MAUVE needs mauve-text, which the extra 'quality' installs")
    import mauve as library

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages below it
        found = library.compute_mauve(p_features=one.features, q_features=other.features, verbose=False)
    return float(found.mauve)
