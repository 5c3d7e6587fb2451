"""Texts from a trained model: python -m ltm_pyro.generate RUN [--prompt TEXT]

Without a prompt z is drawn from the prior, and the text from z. With one, z is inferred from the prompt (which has no
end-of-text: it goes on), and the text continues. docs/generation.md shows both.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pyro
import torch
import tyro
from torch import Tensor

from ltm_pyro import cli
from ltm_pyro.config import AMORTIZED, NO_INFERENCE, InferenceName, TrainConfig, scheme_of
from ltm_pyro.data import token_num_bytes
from ltm_pyro.errors import InputError
from ltm_pyro.inference import PRIOR, SCHEMES, PosteriorScheme, SequenceNoise
from ltm_pyro.inference.schemes.chains import Chains
from ltm_pyro.models import Sampling
from ltm_pyro.runs.continuation import Tokens, infer_thoughts, write
from ltm_pyro.runs.thoughts import load_thoughts, save_thoughts
from ltm_pyro.runs.trained import TrainedModel, load


@dataclass(frozen=True)
class GenerateConfig:
    """Write texts with a trained model: new ones, or what follows a prompt."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run."""
    prompt: str = ""
    """Text to continue, of any length; z is inferred from its last tokens, as many as the model's sequences have.
    Empty: a new text, z from the prior."""
    prompt_file: str | None = None
    """File of prompts, one a line; an empty line stands for a new text."""
    num_samples: int = 1
    """Texts for each prompt, each with its own draw of z. map has but one z, from which all of them are drawn."""
    max_new_tokens: int | None = None
    """Tokens to write at most; a text ends before at its end-of-text. The text may become longer than the model's
    sequences in training, which z was never trained to describe. 0: none, to save the thought of a prompt.
    Default: the length of the model's sequences."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    inference: InferenceName | None = None
    """How z is inferred from the prompt. none: not at all, z from the prior. Default: as the run was trained."""
    fast_steps: int | None = None
    """Steps of inference (T). Default: as the run was trained."""
    rethink: int = 0
    """Infer z anew after every so many tokens, from prompt and text so far. 0: never."""
    thought: str | None = None
    """File of thoughts to write with instead of inferring z: one for all prompts of --prompt-file, or one for each.
    Without that file every thought is written with, from --prompt or anew."""
    save_thought: str | None = None
    """File (safetensors) for z of every text, with --rethink the last one; replaced where it exists."""
    batch_size: int = 16
    """Texts that are written together. With the same seed another one draws other texts."""
    seed: int = 0
    """Seed of all draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    json: bool = False
    """Print a JSON object for each text, one a line."""


def parse(args: Sequence[str]) -> GenerateConfig:
    """The settings.

    Raises:
        InputError: if they cannot be used.
    """
    config = cli.parse(GenerateConfig(), args, "generate")
    if not config.run:
        raise InputError("give the folder of a RUN that python -m ltm_pyro.train has written")
    for name, least in (
        ("num_samples", 1),
        ("batch_size", 1),
        ("max_new_tokens", 0),
        ("fast_steps", 0),
        ("rethink", 0),
        ("seed", 0),
    ):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if config.seed >= 2**32:
        raise InputError(f"--seed must be below 2^32, not {config.seed}")
    if config.prompt and config.prompt_file is not None:
        raise InputError("give --prompt or --prompt-file, not both")
    infers = config.rethink or (config.thought is None and (config.prompt or config.prompt_file))
    if (config.inference or config.fast_steps is not None) and not infers:
        reason = "there is no prompt" if config.thought is None else "z comes from --thought"
        raise InputError(
            f"--inference and --fast-steps say how z is inferred, but {reason}: leave them out, or add "
            f"{'--prompt or ' if config.thought is None else ''}--rethink"
        )
    if config.inference == NO_INFERENCE and (config.rethink or config.fast_steps):
        raise InputError("--inference none infers nothing: leave out --fast-steps and --rethink")
    path = config.save_thought
    if path is not None and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
        raise InputError(f"--save-thought {path}: there is no folder for such a file")
    return config


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts; an empty one for a new text.

    Raises:
        InputError: if they cannot be read, or are no text.
    """
    if config.prompt_file is None:
        prompts = [config.prompt]
    else:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt-file {config.prompt_file} cannot be read as UTF-8 text: {error}") from None
        if not text:
            raise InputError(f"--prompt-file {config.prompt_file} is empty: give one prompt a line")
        prompts = text.removesuffix("\n").split("\n")  # and not at a form feed, as `splitlines` does
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"the prompt {prompt!r} is not text: a part of it is not UTF-8")
    return prompts


def scheme_for(config: GenerateConfig, trained: TrainConfig) -> PosteriorScheme:
    """How z is inferred from a prompt.

    Raises:
        InputError: if what is asked for needs what the run does not have.
    """
    if trained.inference == NO_INFERENCE:
        for option in ("inference", "fast_steps", "rethink", "thought", "save_thought"):
            if getattr(config, option) not in (None, 0, NO_INFERENCE):
                raise InputError(f"--{option.replace('_', '-')}: {config.run} is a model without z; leave it out")
        return PRIOR
    name = config.inference or trained.inference
    scheme = scheme_of(trained, name, config.fast_steps)
    if config.fast_steps is None and not scheme.num_steps and name not in (AMORTIZED, NO_INFERENCE):
        raise InputError(f"--inference {name}: {config.run} was trained with 0 fast steps; say --fast-steps")
    return dataclasses.replace(scheme, num_chains=1, num_kept=1) if isinstance(scheme, Chains) else scheme


class Printer:
    """Prints texts: of a single one on a terminal, every token as it is written."""

    def __init__(self, ltm: TrainedModel, num_texts: int, as_json: bool) -> None:
        self.ltm = ltm
        self.num_texts = num_texts
        self.as_json = as_json
        self.num_printed = 0
        self.is_streaming = num_texts == 1 and not as_json and sys.stdout.isatty()
        self._num_bytes = token_num_bytes(ltm.tokenizer)
        # A character may take several tokens.
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self, prompt: str) -> None:
        """Before the tokens of a text."""
        if self.is_streaming:
            print(prompt, end="", flush=True)

    def token(self, token: int) -> None:
        """A token of the text that is being written."""
        if self.is_streaming and self._num_bytes[token]:
            piece = self.ltm.tokenizer.decode_single_token_bytes(token)
            print(self._characters.decode(piece), end="", flush=True)

    def text(self, prompt: str, tokens: Tokens, about: dict[str, Any]) -> None:
        """A text that is finished.

        Args:
            about: what else JSON says of it.
        """
        self.num_printed += 1
        text = self.ltm.tokenizer.decode([token for token in tokens if self._num_bytes[token]])
        if self.as_json:
            has_ended = tokens[-1:] == [self.ltm.model.end_of_text]
            record = {"prompt": prompt, "text": text, "num_tokens": len(tokens), "ended": has_ended, **about}
            print(json.dumps(record), flush=True)
        elif self.is_streaming:
            print(self._characters.decode(b"", final=True), flush=True)
        else:
            if self.num_texts > 1:
                print(f"=== text {self.num_printed} of {self.num_texts}")
            print(prompt + text, flush=True)


@dataclass(frozen=True)
class Plan:
    """What is to be written."""

    ltm: TrainedModel
    prompts: list[str]
    tokens: list[Tokens]
    """Of each prompt."""
    scheme: PosteriorScheme
    z: Tensor | None
    """From a file, [1 or one for each prompt, L, S, D]."""


def prepare(config: GenerateConfig) -> Plan:
    """Load what is needed.

    Raises:
        InputError: if it cannot be had, or does not go together.
    """
    device = cli.pick_device(config.device)
    prompts = read_prompts(config)
    ltm = load(config.run, device)
    scheme, latent_shape = scheme_for(config, ltm.config), ltm.config.model.latent_shape
    z = None if config.thought is None else load_thoughts(config.thought, latent_shape).to(device)
    if z is not None and config.prompt_file is None:
        prompts *= len(z)
    if z is not None and len(z) not in (1, len(prompts)):
        raise InputError(
            f"{config.thought} holds {len(z)} thoughts and {config.prompt_file} {len(prompts)} prompts: "
            "give one thought, or one for each prompt"
        )
    tokens = [ltm.tokenizer.encode_ordinary(prompt) for prompt in prompts]
    longest, length = max(map(len, tokens)), ltm.config.model.length
    if longest > length and scheme is not PRIOR and (z is None or config.rethink):
        print(
            f"note: a prompt has {longest:,} tokens; z is inferred from its last {length:,}, the length of the model's "
            "sequences",
            file=sys.stderr,
        )
    return Plan(ltm, prompts, tokens, scheme, z)


def first_thoughts(config: GenerateConfig, plan: Plan, rng: SequenceNoise) -> Tensor:
    """z that each text begins with, [number of texts, L, S, D], the samples of a prompt one after another."""
    if plan.z is not None:
        return plan.z.expand(len(plan.prompts), -1, -1, -1).repeat_interleave(config.num_samples, 0)
    scheme = plan.scheme
    if isinstance(scheme, Chains):  # of which each text has one of its own
        scheme = dataclasses.replace(scheme, num_chains=config.num_samples)
    parts = [
        infer_thoughts(plan.ltm, plan.tokens[start : start + config.batch_size], scheme, config.num_samples, rng, start)
        for start in range(0, len(plan.tokens), config.batch_size)
    ]
    return torch.cat(parts).flatten(0, 1)


def posterior_of(config: GenerateConfig, plan: Plan, prompt: str) -> str | None:
    """What z of a text was drawn from, in words; None of a model without z."""
    trained = plan.ltm.config.inference
    if trained == NO_INFERENCE:
        return None
    if not config.rethink:
        if config.thought is not None:
            return config.thought
        if not prompt or config.inference == NO_INFERENCE:
            return "the prior"
    return config.inference or trained


def main(args: Sequence[str]) -> int:
    config = parse(args)
    plan = prepare(config)
    ltm, model = plan.ltm, plan.ltm.config.model
    device = ltm.model.decoder.embedding.weight.device
    rng, generator = SequenceNoise(config.seed), torch.Generator(device).manual_seed(config.seed)
    max_new_tokens = model.length if config.max_new_tokens is None else config.max_new_tokens
    rows = [(prompt, sample) for prompt in range(len(plan.prompts)) for sample in range(config.num_samples)]
    printer = Printer(ltm, len(rows), config.json)
    used = []
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")  # such steps are left out
        z = first_thoughts(config, plan, rng)
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]

            def rethink(texts: list[Tokens], number: int, start: int = start) -> Tensor:
                # Ids that no prompt and no inference before has had: fresh noise.
                first_id = len(plan.prompts) + len(rows) * number + start
                return infer_thoughts(ltm, texts, plan.scheme, 1, rng, first_id)[:, 0]

            printer.begin(plan.prompts[part[0][0]])
            written, last_z = write(
                ltm,
                z[start : start + len(part)],
                [plan.tokens[prompt] for prompt, _ in part],
                max_new_tokens,
                config.sampling,
                generator,
                rethink,
                config.rethink,
                printer.token,
            )
            used.append(last_z)
            for (number, sample), tokens in zip(part, written, strict=True):
                prompt = plan.prompts[number]
                posterior = posterior_of(config, plan, prompt)
                steps = plan.scheme.num_steps if posterior in SCHEMES else 0
                about = {"sample": sample, "posterior": posterior, "fast_steps": steps, "seed": config.seed}
                printer.text(prompt, tokens, about)
    if config.save_thought is not None:
        save_thoughts(config.save_thought, torch.cat(used))
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
