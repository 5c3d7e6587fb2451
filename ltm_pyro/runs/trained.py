"""A trained model: the model with its tokenizer, its settings, and the progress of its training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch

from ltm_pyro.config import TrainConfig
from ltm_pyro.data import (
    TokenizedTexts,
    end_of_text,
    fingerprint,
    get_tokenizer,
    load_tokenized_corpus,
    load_tokenized_texts,
    token_num_bytes,
)
from ltm_pyro.errors import InputError
from ltm_pyro.inference.surroundings import entry
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.run import Run

DEMO = "demo"
"""The name of the model that comes with the package."""
DEMO_FOLDER = Path(__file__).parent / "demo"


def build_model(config: TrainConfig, encoding: tiktoken.Encoding) -> LatentThoughtModel:
    """The model of a config, its weights drawn from torch's global generator.

    Raises:
        InputError: if there is not enough memory for it.
    """
    try:
        model = LatentThoughtModel(config.model, encoding.n_vocab, end_of_text(encoding))
    except RuntimeError as error:
        raise InputError(f"a model of these sizes cannot be made: {error}") from None
    if config.precision == "bfloat16":
        model.decoder.compute_dtype = torch.bfloat16
    return model


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer and the settings it was trained with."""

    model: LatentThoughtModel
    tokenizer: tiktoken.Encoding
    config: TrainConfig
    path: Path
    """The folder that it was loaded from."""
    resolved: dict[str, str]
    """What the settings were resolved against: hashes of corpus and tokenizer, and versions."""
    progress: Progress
    """The progress of the run at the checkpoint that the weights are from."""

    @property
    def name(self) -> str:
        """The folder as a user names it."""
        return DEMO if self.path == DEMO_FOLDER else str(self.path)

    @property
    def results(self) -> Path:
        """The folder for what is made of the model: its own, or for the one that comes with the package the current."""
        return Path() if self.path == DEMO_FOLDER else self.path

    @property
    def num_weights(self) -> int:
        """The number of weights of the model, counted as single numbers."""
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.model.decoder.embedding.weight.device

    def batch(self, texts: Sequence[str]) -> TokenBatch:
        """The texts as a batch the model can be run on, each with its end-of-text: [B, T], padded to the longest.

        Sequence ids count the texts from 0.

        Raises:
            ValueError: if there is no text, or one that is longer than the model's sequences.
        """
        if not texts:
            raise ValueError("no texts were given")
        end = end_of_text(self.tokenizer)
        rows = [[*self.tokenizer.encode_ordinary(text), end] for text in texts]
        longest = max(map(len, rows))
        if longest > self.config.model.length:
            raise ValueError(
                f"a text has {longest} tokens with its end-of-text, but the model's sequences have "
                f"{self.config.model.length}"
            )
        return self.token_batch(rows)

    def token_batch(self, rows: Sequence[Sequence[int]], first_id: int = 0) -> TokenBatch:
        """Tokens as a batch, padded to the longest row: [B, T]. No end-of-text is added: a row may be a prefix.

        Args:
            first_id: sequence ids count the rows from here.
        """
        longest = max(map(len, rows))
        end, num_bytes = end_of_text(self.tokenizer), token_num_bytes(self.tokenizer)
        batch = TokenBatch(
            torch.tensor([[*row, *[end] * (longest - len(row))] for row in rows], dtype=torch.int64),
            torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows]),
            torch.arange(first_id, first_id + len(rows)),
            torch.tensor([int(num_bytes[list(row)].sum()) for row in rows]),
        )
        return batch.to(self.model.decoder.embedding.weight.device)

    def texts(self, batch: TokenBatch) -> list[str]:
        """The texts of the sequences of a batch, without end-of-text and padding."""
        num_bytes = token_num_bytes(self.tokenizer)
        rows = zip(batch.tokens.tolist(), batch.weights.tolist(), strict=True)
        return [
            self.tokenizer.decode([token for token, weight in zip(*row, strict=True) if weight and num_bytes[token]])
            for row in rows
        ]

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """The texts of [B, T] tokens, each up to its end-of-text; ids that stand for no text are left out."""
        end, num_bytes = end_of_text(self.tokenizer), token_num_bytes(self.tokenizer)
        texts = []
        for row in tokens.tolist():
            row = row[: row.index(end)] if end in row else row
            texts.append(self.tokenizer.decode([token for token in row if num_bytes[token]]))
        return texts


@entry()
def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", which: Literal["newest", "best"] = "newest"
) -> TrainedModel:
    """The model of a run, of a folder of :func:`ltm_pyro.save_pretrained`, or the one that comes with the package.

    Args:
        path: the folder; "demo" is the model that comes with the package, unless there is a run in a folder of that
            name.
        which: the newest checkpoint, or the one with the best held-out figure of the validations in training.

    Raises:
        InputError: if the folder holds no run or no such checkpoint, or one that cannot be read.
    """
    run = Run(Path(path))
    if os.fspath(path) == DEMO and not run.config_path.exists():
        run = Run(DEMO_FOLDER)
    config, resolved = run.read_config()
    encoding = get_tokenizer(config.tokenizer)
    if fingerprint(encoding) != resolved.get("tokenizer_sha256"):
        raise InputError(f"the tokenizer {config.tokenizer} is not the one that {path} was trained with")
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, encoding)
    # The checkpoint is chosen once, since a training that is still running may write another one.
    chosen = run.newest_checkpoint() if which == "newest" else run.best_checkpoint()
    checkpoint.load_weights(chosen, model)
    return TrainedModel(model.to(device), encoding, config, run.path, resolved, checkpoint.read_progress(chosen))


def texts_to_score(trained: TrainedModel, data: str | None, text_column: str) -> TokenizedTexts:
    """The texts that `data` names; with None, or where that is the run's own corpus, what the run has held out of it.

    Raises:
        InputError: if they cannot be loaded, or the corpus is no longer the one the run was trained on, so that what is
            held out of it now may have been trained on.
    """
    config, encoding = trained.config, trained.tokenizer
    if data is not None and not is_own_corpus(trained, data):
        return load_tokenized_texts(data, text_column, encoding)
    try:
        corpus = load_tokenized_corpus(config.data, config.text_column, encoding)
    except InputError as error:
        raise InputError(f"the corpus of {trained.path}: {error}; give other text with --data") from None
    if corpus.sha256 != trained.resolved.get("corpus_sha256"):
        raise InputError(
            f"{config.data} is not the corpus that {trained.path} was trained on: its hash has changed, so texts "
            "that are held out of it now may have been trained on; give another text with --data"
        )
    return corpus.validation


def num_validation_sequences(trained: TrainedModel, data: str | None, length: int) -> int:
    """How many sequences of this length, of the texts that `data` names, validation may have seen in training.

    0 for other texts than the run's own. In sequences of another length, pieces of them stand everywhere.
    """
    is_same = data is None or is_own_corpus(trained, data)
    return trained.config.validation_sequences if is_same and length == trained.config.model.length else 0


def is_own_corpus(trained: TrainedModel, data: str) -> bool:
    """Whether a value of `--data` names the corpus of the run, however it spells its path."""
    other = trained.config.data
    if data == other:
        return True
    try:
        return Path(data).expanduser().samefile(Path(other).expanduser())
    except (OSError, RuntimeError):  # one of them is no path
        return False
