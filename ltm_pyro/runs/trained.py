"""A trained model: the model with its tokenizer, its settings, and the progress of its training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from ltm_pyro.config import NO_INFERENCE, PrecisionName, SchemeSettings, TrainConfig, with_settings
from ltm_pyro.data import (
    TokenizedCorpus,
    TokenizedTexts,
    encode,
    end_of_text,
    fingerprint,
    get_tokenizer,
    is_local,
    load_corpus_sha256,
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


def compute_dtype(precision: PrecisionName, device: torch.device) -> torch.dtype | None:
    """The dtype of the decoder's matrix products on a device; None for that of the weights."""
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.bfloat16 if precision == "bfloat16" else None


def build_model(config: TrainConfig, encoding: tiktoken.Encoding, device: torch.device) -> LatentThoughtModel:
    """The model of a config on a device, its weights drawn from torch's global generator on the CPU.

    Raises:
        InputError: if there is not enough memory for it.
    """
    try:
        model = LatentThoughtModel(config.model, encoding.n_vocab, end_of_text(encoding))
    except RuntimeError as error:
        raise InputError(f"a model of these sizes cannot be made: {error}") from None
    model.decoder.compute_dtype = compute_dtype(config.precision, device)
    return model.to(device)


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

    def __repr__(self) -> str:
        config = self.config
        z_from = "no z" if config.inference == NO_INFERENCE else f"{config.inference}, T = {config.fast_steps}"
        return (
            f"{type(self).__name__}({self.name}: {self.num_weights:,} weights on {self.device}, {z_from}, "
            f"{self.progress.step:,} slow steps)"
        )

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

    def with_settings(self, settings: SchemeSettings) -> TrainedModel:
        """The same model, where z is inferred with other settings of some schemes.

        Raises:
            InputError: if a setting is out of range.
        """
        return dataclasses.replace(self, config=with_settings(self.config, settings))

    def batch(self, texts: Sequence[str]) -> TokenBatch:
        """The texts as a batch the model can be run on, each with its end-of-text: [B, T], padded to the longest.

        Sequence ids count the texts from 0.

        Raises:
            ValueError: if there is no text, one that is longer than the model's sequences, or what is given is not a
                list of strings.
        """
        batch = self.token_batch(self.encode(texts))
        longest, most = batch.tokens.shape[1], self.config.model.length
        if longest > most:
            raise ValueError(f"a text has {longest} tokens with its end-of-text, but the model's sequences have {most}")
        return batch

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with its end-of-text.

        Raises:
            ValueError: if there is no text, or what is given is not a list of strings.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):  # the characters of a string are strings too
            raise ValueError(f"texts must be a list of strings, not {type(texts).__name__}")
        if not texts:
            raise ValueError("there is no text: give at least one")
        for text in texts:
            require_text(text)
        end = end_of_text(self.tokenizer)
        return [[*encode(text, self.tokenizer).tolist(), end] for text in texts]

    def token_batch(self, rows: Sequence[Sequence[int]], first_id: int = 0) -> TokenBatch:
        """Tokens as a batch, padded to the longest row: [B, T]. No end-of-text is added: a row may be a prefix.

        Args:
            first_id: sequence ids count the rows from here.

        Raises:
            ValueError: if there is no row.
        """
        if not len(rows):
            raise ValueError("the batch is empty: give at least one text")
        longest = max(map(len, rows))
        end, num_bytes = end_of_text(self.tokenizer), token_num_bytes(self.tokenizer)
        batch = TokenBatch(
            torch.tensor([[*row, *[end] * (longest - len(row))] for row in rows], dtype=torch.int64),
            torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows]),
            torch.arange(first_id, first_id + len(rows)),
            torch.tensor([int(num_bytes[list(row)].sum()) for row in rows]),
        )
        return batch.to(self.model.decoder.embedding.weight.device)

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text; bytes that are no whole character are shown as \\xNN."""
        pieces = map(self.tokenizer.decode_single_token_bytes, tokens)
        return [piece.decode("utf-8", "backslashreplace") for piece in pieces]

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
def load(path: str | os.PathLike[str], device: torch.device | str = "cpu", which: str | int = "newest") -> TrainedModel:
    """The model of a run, of a folder of :func:`ltm_pyro.save_pretrained`, or the one that comes with the package.

    Args:
        path: the folder; "demo" is the model that comes with the package, unless there is a run in a folder of that
            name.
        which: the "newest" checkpoint, the one with the "best" held-out figure of the validations in training, or the
            one of a step, given by its number.

    Raises:
        InputError: if the folder holds no run or no such checkpoint, or one that cannot be read, or there is no such
            device.
    """
    require_device(device)
    run = Run(Path(path))
    if os.fspath(path) == DEMO and not run.config_path.exists():
        run = Run(DEMO_FOLDER)
    config, resolved = run.read_config()
    encoding = get_tokenizer(config.tokenizer)
    if fingerprint(encoding) != resolved.get("tokenizer_sha256"):
        raise InputError(f"the tokenizer {config.tokenizer} is not the one that {path} was trained with")
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, encoding, torch.device(device))
    # The checkpoint is chosen once, since a training that is still running may write another one.
    chosen = run.checkpoint(which)
    checkpoint.load_weights(chosen, model)
    return TrainedModel(model, encoding, config, run.path, resolved, checkpoint.read_progress(chosen))


def require_device(device: torch.device | str) -> None:
    """Check that a model can be put on a device.

    Raises:
        InputError: if it cannot, in one line, where torch has one of many for each kind of device.
    """
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises errors of any kind for a device that is not there
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"there is no device {str(device)!r} here; use cpu ({reason})") from None


def require_text(text: object) -> None:
    """Check that something is text which a tokenizer can read.

    Raises:
        InputError: if it is not a string, or a part of it is no character.
    """
    if not isinstance(text, str):
        raise InputError(f"a text must be a string, not {type(text).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{text!r} is not text: a part of it is not UTF-8")


def texts_to_score(trained: TrainedModel, data: str | None, text_column: str | None) -> TokenizedTexts:
    """The texts that `data` names; with None, or where that is the run's own corpus, what the run has held out of it.

    A corpus is the run's own by its hash, wherever it lies.

    Raises:
        InputError: if they cannot be loaded, or the corpus is no longer the one the run was trained on, so that what is
            held out of it now may have been trained on.
    """
    config, encoding = trained.config, trained.tokenizer
    if data is not None and not _names_own_corpus(trained, data):
        own = _own_corpus_at(trained, data)
        return load_tokenized_texts(data, text_column, encoding) if own is None else _of_run(own)
    if trained.path == DEMO_FOLDER:
        raise InputError("the texts that demo was trained on do not come with the package: name others with --data")
    error: InputError | None = None
    # Where it was when the run was trained, and where the same name leads now, from another folder or machine.
    for place in dict.fromkeys((trained.resolved.get("corpus_path", config.data), config.data)):
        try:
            corpus = load_tokenized_corpus(place, config.text_column, encoding)
        except InputError as reason:
            error = error or InputError(f"the corpus of {trained.path}: {reason}; give other text with --data")
            continue
        if corpus.sha256 == trained.resolved.get("corpus_sha256"):
            return _of_run(corpus)
        error = InputError(
            f"{place} is not the corpus that {trained.path} was trained on: its hash has changed, so texts that are "
            "held out of it now may have been trained on; give another text with --data"
        )
    raise error or AssertionError("there is one place at least")


def _of_run(corpus: TokenizedCorpus) -> TokenizedTexts:
    return dataclasses.replace(corpus.validation, is_of_run=True)


def _names_own_corpus(trained: TrainedModel, data: str) -> bool:
    """Whether a value of `--data` names the corpus of the run, however it spells its path."""
    other = trained.config.data
    if data == other:
        return True
    try:
        return Path(data).expanduser().samefile(Path(other).expanduser())
    except (OSError, RuntimeError):  # one of them is no path
        return False


def _own_corpus_at(trained: TrainedModel, data: str) -> TokenizedCorpus | None:
    """The corpus of the run, if it is what `data` names by its hash."""
    config = trained.config
    try:
        if not is_local(data) or load_corpus_sha256(data, config.text_column) != trained.resolved.get("corpus_sha256"):
            return None
        return load_tokenized_corpus(data, config.text_column, trained.tokenizer)
    except InputError:  # it is other text, which may be there to be scored alone
        return None


def num_validation_sequences(trained: TrainedModel, texts: TokenizedTexts, length: int) -> int:
    """How many sequences of this length, of these texts, validation may have seen in training.

    0 for other texts than what the run has held out. In sequences of another length, pieces of them stand everywhere.
    """
    is_same = texts.is_of_run and length == trained.config.model.length
    return trained.config.validation_sequences if is_same else 0
