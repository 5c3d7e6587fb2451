"""A trained model as Python uses it: `LTM` writes texts, infers what they say, and scores them.

    ltm = ltm_pyro.load("demo")
    print(ltm.generate("It was a dark"))
    print(ltm.infer("It was a dark and stormy night.").mean.shape)
    print(ltm.score("It was a dark and stormy night."))

Each method does what a command does, by the same code and with the same defaults.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE
from ltm_pyro.data import encode
from ltm_pyro.errors import InputError, RunError, require_whole
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings, Meaning
from ltm_pyro.evaluation.estimators.prequential import code_of
from ltm_pyro.evaluation.inferred import Inference, Inferred, inference_of
from ltm_pyro.inference import Posterior, PosteriorScheme, SequenceNoise, frozen, infer
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.models import Sampling, TokenBatch
from ltm_pyro.runs import pretrained, trained
from ltm_pyro.runs.continuation import Writing, block_size_of, scheme_of_prompts
from ltm_pyro.runs.trained import TrainedModel, require_text

NUM_CHAINS = 4
"""The chains of a text that `infer` runs with a scheme of chains."""
BATCH_SIZE = 16
"""The texts that `score` scores together, which makes no difference to the figures."""


class TokenScore(NamedTuple):
    """A token and its part of the figure of its text."""

    string: str
    """The token as text; bytes that are no whole character are shown as \\xNN."""
    nats: float
    """-log of its probability given all of the text before it."""


@dataclass(frozen=True)
class Score:
    """What a text costs by a model: a figure that is valid, and says what it is."""

    text: str
    figure: str
    """The name of the figure, as in docs/metrics.md: prequential, elbo or exact."""
    meaning: Meaning
    """What the figure is to -log p(x): a code length, an upper bound in expectation, or exact."""
    z_from: str | None
    """What z was drawn from; None for a model without z."""
    nats: float
    """The figure, of all of the text with its end-of-text."""
    num_tokens: int
    """The predicted tokens of the text, end-of-text included."""
    num_bytes: int
    """The bytes of the text."""
    tokens: tuple[TokenScore, ...] | None
    """The tokens of the text, end-of-text included, whose nats add up to the figure. None for a bound: it infers z from
    all of the text at once, and no part of what z costs belongs to a token."""

    @property
    def bits_per_byte(self) -> float | None:
        """The figure in bits for each byte of the text; None for the empty text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    def __str__(self) -> str:
        in_bytes = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits/byte"
        return f"{self.figure} ({self.meaning.value}): {self.nats:.2f} nats{in_bytes}"


@dataclass(frozen=True)
class Thoughts:
    """What a model thinks of B texts: its posterior over z given each of them."""

    ltm: TrainedModel
    batch: TokenBatch
    """The texts, each with its end-of-text."""
    scheme: PosteriorScheme
    """How z was inferred."""
    posterior: Posterior
    mean: Tensor
    """[B, L, S, D]: the mean of the posterior, or its point."""

    def __repr__(self) -> str:
        draws = list(self.draws.shape)
        return f"Thoughts({len(self.batch)} texts, draws {draws} by {type(self.scheme).__name__}, of {self.ltm})"

    @property
    def draws(self) -> Tensor:
        """[chain, draw, B, L, S, D]: draws of z given each text."""
        return self.posterior.samples

    def to_arviz(self) -> Any:
        """The draws as ArviZ's container, with the log-likelihood of each token, as `az.loo` and `az.waic` take it.

        An observation is one token of one text, end-of-text included. Its log-likelihood at a draw is
        log p(x_n | z, x_<n) in nats, with z inferred from the *whole* text. So `az.loo` estimates how well each token
        is predicted from the tokens before it and from a z that its own prediction had no part in, but those of all
        other tokens did, also of later ones. It is no code length and no bound on -log p(x), and must not be compared
        with those (:meth:`LTM.score` gives them). Like `az.waic` it takes the draws to be from the posterior, which
        those of an approximation are only nearly. For a scheme that finds a point, all draws are the same: both then
        give the log-likelihood at the point, and the k̂ of `az.loo` is infinite, since a point says nothing of what z
        would be without a token.

        Groups: `posterior` (z, as in :meth:`~ltm_pyro.inference.Posterior.to_arviz`), `log_likelihood` (`tokens`,
        dimensions chain, draw and token) and `observed_data` (`tokens`, their ids). Along `token` stand the coordinates
        `token_sequence` (the number of the text), `token_position` and `token_string`.
        """
        where = self.batch.weights.cpu() != 0
        rows, positions = where.nonzero(as_tuple=True)
        ids = self.batch.tokens.cpu()[where]
        coords = {
            "token_sequence": ("token", self.batch.sequence_ids.cpu()[rows].numpy()),
            "token_position": ("token", positions.numpy()),
            "token_string": ("token", np.array(self.ltm.token_strings(ids.tolist()), dtype=object)),
        }
        groups = {
            "log_likelihood": {"tokens": self._token_log_probs()[:, :, where].numpy()},
            "observed_data": {"tokens": ids.numpy()},
        }
        return self.posterior.to_arviz(groups, self.ltm.texts(self.batch), {"tokens": ["token"]}, coords)

    @torch.no_grad()
    def _token_log_probs(self) -> Tensor:
        """log p(x_n | z, x_<n) at every draw, [chain, draw, B, T] float64 on the CPU."""
        num_draws = self.draws.shape[1]
        with frozen(self.ltm.model, self.batch) as batch:
            # The draws of a point are one. Otherwise the same draw of all chains at a time, to bound the memory.
            different = self.draws[:, :1] if self.scheme.num_draws == 1 else self.draws
            parts = [self.ltm.model.token_log_probs(batch, z).double().cpu() for z in different.unbind(1)]
        return torch.stack(parts, 1).expand(-1, num_draws, -1, -1)


@dataclass(frozen=True, repr=False)
class LTM(TrainedModel):
    """A trained model that writes texts, infers what they say, and scores them."""

    @overload
    def generate(
        self,
        prompt: str = ...,
        num_samples: None = ...,
        max_new_tokens: int | None = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        repetition_penalty: float = ...,
        inference: str | None = ...,
        fast_steps: int | None = ...,
        rethink: int = ...,
        seed: int = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str = ...,
        *,
        num_samples: int,
        max_new_tokens: int | None = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        repetition_penalty: float = ...,
        inference: str | None = ...,
        fast_steps: int | None = ...,
        rethink: int = ...,
        seed: int = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str = "",
        num_samples: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        inference: str | None = None,
        fast_steps: int | None = None,
        rethink: int = 0,
        seed: int = 0,
    ) -> str | list[str]:
        """Continue a prompt, or write a new text: what `python -m ltm_pyro.generate` prints with the same settings.

        Args:
            prompt: the text to continue, of any length; empty for a new text.
            num_samples: the number of texts, each given its own draw of z; None for one text that is not in a list.
            max_new_tokens: the most tokens to write; None for the length of the model's sequences.
            temperature, top_k, top_p, repetition_penalty: how tokens are chosen, as in transformers. Temperature 0
                always takes the most likely one.
            inference: the scheme that infers z from the prompt; none to draw z from the prior; None as in training.
            fast_steps: the steps of inference; None as in training.
            rethink: tokens after which z is inferred again from the prompt and the text so far; 0 for never.
            seed: the seed of all draws.

        Returns:
            the prompt with what continues it, up to where the text ends; with `num_samples` a list of such texts.

        Raises:
            ValueError: if an argument makes no sense, or asks for what the model does not have.
        """
        require_text(prompt)
        require_whole("rethink", rethink, 0)
        if rethink and self.config.inference == NO_INFERENCE:
            raise InputError(f"{self.name} is a model without z: leave out rethink")
        if inference == NO_INFERENCE and (rethink or fast_steps):
            raise InputError("inference none infers nothing: leave out fast_steps and rethink")
        if (inference is not None or fast_steps is not None) and not (prompt or rethink):
            raise InputError(
                "inference and fast_steps say how z is inferred, but there is no prompt: leave them out, or give "
                "prompt or rethink"
            )
        writing = Writing(
            self,
            self._scheme(inference, fast_steps),
            [encode(prompt, self.tokenizer).tolist()],
            1 if num_samples is None else num_samples,
            max_new_tokens,
            Sampling(temperature, top_k, top_p, repetition_penalty),
            rethink,
            seed=seed,
        )
        with cli.numerics_of_commands():
            texts = [prompt + self.decode(torch.tensor([tokens]))[0] for tokens in writing.finish()]
        return texts[0] if num_samples is None else texts

    def infer(
        self,
        texts: str | Sequence[str],
        inference: str | None = None,
        fast_steps: int | None = None,
        seed: int = 0,
        num_samples: int = 64,
    ) -> Thoughts:
        """Infer z of each text from all of it, with its end-of-text.

        By default this is done as in training. A model that was trained on the past of each block
        (`--infer-from past`) then reads a text block by block, if its scheme can absorb blocks: what comes out is the z
        that it would predict the next block with, the text may have any length, and `fast_steps` are those of each
        block. By a scheme that is named, and for any other model, z is inferred from the whole text at once: what comes
        out approximates the posterior p(z | x) of the program.

        Args:
            texts: a text, or several.
            inference: the scheme; None for that of the run.
            fast_steps: the steps of inference; None for those of the run, or for a scheme that is named and a model
                that was trained on the past of each block, whose run has steps of a block only, for the scheme's own
                default.
            seed: the seed of the noise, which each text has its own of: a result does not depend on the other texts.
            num_samples: the draws of z for each text. A scheme that finds a point has the same one so many times. A
                scheme of chains has 4 chains instead, and keeps the second half of each.

        Raises:
            ValueError: if an argument makes no sense, the model has no z, or z of a text that is longer than the
                model's sequences would have to be inferred at once.
        """
        require_whole("num_samples", num_samples, 1)
        if self.config.inference == NO_INFERENCE:
            raise InputError(f"{self.name} is a model without z: there is nothing to infer")
        reads_blocks = self.config.objective.block_size is not None
        if reads_blocks and fast_steps is None and inference is not None and inference in tuple(self.config.schemes):
            fast_steps = self.config.schemes[inference].num_steps
        scheme, rng = self._scheme(inference, fast_steps), SequenceNoise(seed)
        listed = _listed(texts)
        with cli.numerics_of_commands():
            block_size = block_size_of(self, scheme) if inference is None else None
            if block_size is None:
                if scheme.has_chains:
                    kept = max(1, scheme.num_steps // 2)
                    scheme = dataclasses.replace(scheme, num_chains=NUM_CHAINS, num_kept=kept)
                    num_samples = scheme.num_draws or num_samples
                batch = self.batch(listed)
                state = infer(scheme, self.model, batch, rng)
                return Thoughts(self, batch, scheme, scheme.posterior(state, num_samples, rng), scheme.mean(state))
            rows = self.encode(listed)
            batch = self.token_batch(rows)
            # One after another: the blocks that a longer text still has would count as read for a shorter one.
            streams = [self._read(row, number, scheme, block_size, rng) for number, row in enumerate(rows)]
            draws = torch.cat([stream.posterior(num_samples).samples for stream in streams], dim=2)
            mean = torch.cat([scheme.mean(stream.state) for stream in streams])
            return Thoughts(self, batch, scheme, Posterior(draws, batch.sequence_ids), mean)

    def _read(self, row: list[int], number: int, scheme: PosteriorScheme, size: int, rng: SequenceNoise) -> Stream:
        """A stream that has read all of a text, in blocks of this size."""
        stream = Stream(scheme, self.model, self.token_batch([row], number), rng)
        while stream.num_read < len(row):
            stream.read(size)
        return stream

    @overload
    def score(  # type: ignore[overload-overlap]  # a string is a sequence of strings too, and meets this one first
        self, texts: str, inference: str | None = ..., fast_steps: int | None = ..., seed: int = ...
    ) -> Score: ...

    @overload
    def score(
        self, texts: Sequence[str], inference: str | None = ..., fast_steps: int | None = ..., seed: int = ...
    ) -> list[Score]: ...

    def score(
        self,
        texts: str | Sequence[str],
        inference: str | None = None,
        fast_steps: int | None = None,
        seed: int = 0,
    ) -> Score | list[Score]:
        """What each text costs, by a figure that is valid and that `python -m ltm_pyro.evaluate` gives as well.

        - A model that was trained on the past of each block: `prequential`, a code length, token by token. Each block
          is predicted with z of the blocks before it, and with `fast_steps=0` by the same network without thinking.
          A text may have any length.
        - A model without z: `exact`, -log p(x) itself, token by token, for a text of any length.
        - Any other model: `elbo`, an upper bound on -log p(x) in expectation, for each text as a whole.

        Args:
            texts: a text, or several.
            inference: the scheme that infers z; None for that of the run.
            fast_steps: the steps of inference; None for those of the run.
            seed: the seed of the noise, which each text has its own of.

        Returns:
            a :class:`Score`, or a list of them for several texts.

        Raises:
            ValueError: if an argument makes no sense, asks for what the model does not have, or a text is longer than
                the model's sequences where z is inferred from all of it.
            RunError: if a figure is not a finite number.
        """
        self._scheme(inference, fast_steps)  # refuses what a model without z does not have
        how = inference_of(self.config, inference, fast_steps)
        with cli.numerics_of_commands():
            scores = list(self._scores(_listed(texts), how, SequenceNoise(seed)))
        return scores[0] if isinstance(texts, str) else scores

    @torch.no_grad()
    def _scores(self, texts: Sequence[str], how: Inference, rng: SequenceNoise) -> Iterator[Score]:
        """The score of each text."""
        model, settings, rows = self.model, EstimatorSettings(), self.encode(texts)
        has_z, reads_blocks = bool(model.config.num_slots), self.config.objective.block_size is not None
        name = "exact" if not has_z else "prequential" if reads_blocks else "elbo"
        if name == "elbo":
            self.batch(texts)  # refuses a text that is too long
        for start in range(0, len(rows), BATCH_SIZE):
            part = rows[start : start + BATCH_SIZE]
            batch = self.token_batch(part, start)
            inferred, by_token = Inferred(model, batch, how, rng), None
            if name == "exact":
                z = torch.zeros(len(batch), *model.config.latent_shape, device=self.device)
                by_token = -model.token_log_probs(batch, z).double().cpu()
            elif name == "prequential":
                by_token = code_of(inferred, settings, by_token=True).token_nats
            nats = ESTIMATORS[name].estimate(inferred, settings).nats if by_token is None else by_token.sum(1)
            if not nats.isfinite().all():
                raise RunError(f"the {name} of a text by {self.name} is not a finite number")
            for number, row in enumerate(part):
                tokens = None
                if by_token is not None:
                    of_row = zip(self.token_strings(row), by_token[number, : len(row)].tolist(), strict=True)
                    tokens = tuple(TokenScore(*token) for token in of_row)
                yield Score(
                    text=texts[start + number],
                    figure=name,
                    meaning=ESTIMATORS[name].meaning,
                    z_from=None if not has_z else how.name if reads_blocks else how.z_from,
                    nats=nats[number].item(),
                    num_tokens=len(row),
                    num_bytes=int(batch.num_bytes[number]),
                    tokens=tokens,
                )

    def _scheme(self, inference: str | None, fast_steps: int | None) -> PosteriorScheme:
        """How z is inferred.

        Raises:
            InputError: if what is asked for needs what the model does not have.
        """
        if self.config.inference == NO_INFERENCE and (inference not in (None, NO_INFERENCE) or fast_steps):
            raise InputError(f"{self.name} is a model without z: leave out inference and fast_steps")
        return scheme_of_prompts(self, inference, fast_steps)


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu", which: str | int = "newest") -> LTM:
    """The model of a run, of a folder of :func:`ltm_pyro.save_pretrained`, or the one that comes with the package.

    Args:
        path: the folder; "demo" is the model that comes with the package, unless there is a run in a folder of that
            name.
        device: where the model is put.
        which: the "newest" checkpoint, the one with the "best" held-out figure of the validations in training, or the
            one of a step, given by its number.

    Raises:
        InputError: if the folder holds no run or no such checkpoint, or one that cannot be read, or there is no such
            device.
    """
    return LTM(**vars(trained.load(path, device, which)))


def from_pretrained(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> LTM:
    """The model in a folder of :func:`ltm_pyro.save_pretrained`.

    Raises:
        InputError: if the folder is not such a folder, or cannot be read, or there is no such device.
    """
    return LTM(**vars(pretrained.from_pretrained(folder, device)))
