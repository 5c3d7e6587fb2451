"""Texts from a trained model: python -m ltm_pyro.generate RUN [--prompt TEXT]

Without a prompt, z is what it is before anything is read, and the text is written from z. With one, z is inferred from
the prompt, and the text continues it. docs/generation.md shows both.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tiktoken
import torch
import tyro
from torch import Tensor

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, InferenceName, SchemeSettings, parse_naming_schemes
from ltm_pyro.data import encode, token_num_bytes
from ltm_pyro.data.corpora.formats import read_text
from ltm_pyro.errors import InputError
from ltm_pyro.files.output import Output
from ltm_pyro.inference import PRIOR, SCHEMES, PosteriorScheme
from ltm_pyro.models import Sampling
from ltm_pyro.runs.continuation import Tokens, Writing, block_size_of, scheme_of_prompts
from ltm_pyro.runs.thoughts import load_thoughts, thoughts_file
from ltm_pyro.runs.trained import TrainedModel, load, require_text

COMMON = (
    "run",
    "prompt",
    "prompt_file",
    "num_samples",
    "max_new_tokens",
    "inference",
    "fast_steps",
    "sampling",
    "seed",
)
"""The settings that `--help` explains."""


@dataclass(frozen=True)
class GenerateConfig:
    """Write texts with a trained model: new texts, or the continuation of a prompt."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run; or demo, the model that comes with the package."""
    prompt: str = ""
    """Text to continue, of any length.
    z is inferred from its last tokens, at most as many as a sequence of the model has.
    Of a run that was trained with --infer-from past, map and vi read all of its whole blocks.
    An empty prompt stands for a new text, with z from the prior; for map after --infer-from past, with its mean."""
    prompt_file: str | None = None
    """File of prompts, one a line; an empty line stands for a new text."""
    num_samples: int = 1
    """Texts for each prompt, each given its own draw of z.
    A scheme that finds a single z for a prompt, as map does, has that one for all of them."""
    max_new_tokens: int | None = None
    """Largest number of tokens to write; a text that reaches its end-of-text is shorter.
    It may exceed the length of the model's sequences, although z was not trained to describe so much.
    0: no token, which serves to save the z of a prompt.
    Default: the length of the model's sequences."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    inference: Annotated[
        InferenceName | None,
        cli.choices(
            "How z is inferred from the prompt. Default: as the run was trained.\nnone: z is drawn from the prior",
            SCHEMES,
        ),
    ] = None
    fast_steps: int | None = None
    """Steps of inference (T). Default: as the run was trained."""
    rethink: int = 0
    """Tokens after which z is inferred again, each time from the prompt and the text so far. 0: never.
    Block by block, only whole new blocks are read, at the same cost wherever the text stands."""
    thought: str | None = None
    """File of thoughts (z) to use instead of inferring z: one for all prompts of --prompt-file, or one for each.
    Without --prompt-file, a text is written for each of the thoughts, after --prompt if there is one."""
    save_thought: str | None = None
    """File (safetensors) for the z of every text, with --rethink the last one; replaced where it exists."""
    batch_size: int = 16
    """Texts that are written together. With the same seed, another batch size draws other texts."""
    seed: int = 0
    """Seed of all draws."""
    which: str = "newest"
    """Checkpoint of a run: newest, best (by the validations in training), or the number of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    json: bool = False
    """Print a JSON object for each text, one a line."""


def parse(args: Sequence[str]) -> tuple[GenerateConfig, SchemeSettings]:
    """The settings, and those of schemes.

    Raises:
        InputError: if they cannot be used.
    """
    config, settings = parse_naming_schemes(GenerateConfig(), args, "generate", COMMON)
    if not config.run:
        raise InputError("give the folder of a RUN that python -m ltm_pyro.train has written")
    cli.require_at_least(config, num_samples=1, batch_size=1, max_new_tokens=0, fast_steps=0, rethink=0)
    cli.require_seed(config.seed)
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
    return config, settings


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts; an empty one stands for a new text.

    Raises:
        InputError: if they cannot be read, or are not text.
    """
    if config.prompt_file is None:
        prompts = [config.prompt]
    else:
        try:
            text = read_text(Path(config.prompt_file))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"--prompt-file {config.prompt_file} cannot be read as UTF-8 text: {error}") from None
        if not text:
            raise InputError(f"--prompt-file {config.prompt_file} is empty: give one prompt per line")
        prompts = text.removesuffix("\n").split("\n")  # and not at a form feed, as `splitlines` does
    for prompt in prompts:
        require_text(prompt)
    return prompts


def scheme_for(config: GenerateConfig, ltm: TrainedModel) -> PosteriorScheme:
    """How z is inferred from a prompt.

    Raises:
        InputError: if what is asked for needs what the run does not have.
    """
    if ltm.config.inference == NO_INFERENCE:
        for option in ("inference", "fast_steps", "rethink", "thought", "save_thought"):
            if getattr(config, option) not in (None, 0, NO_INFERENCE):
                raise InputError(f"--{option.replace('_', '-')}: {config.run} is a model without z; leave it out")
    return scheme_of_prompts(ltm, config.inference, config.fast_steps)


@dataclass(frozen=True)
class Plan:
    """What is to be written, with which model."""

    ltm: TrainedModel
    scheme: PosteriorScheme
    prompts: list[str]
    tokens: list[Tokens]
    """The tokens of each prompt."""
    z: Tensor | None
    """The z from a file, [1 or one for each prompt, L, S, D]."""


def load_plan(config: GenerateConfig, settings: SchemeSettings) -> Plan:
    """Load the model, the prompts and the thoughts, and check that they fit together.

    Raises:
        InputError: if they cannot be loaded, or do not fit.
    """
    device = cli.pick_device(config.device)
    prompts = read_prompts(config)
    ltm = load(config.run, device, config.which).with_settings(settings)
    scheme, latent_shape = scheme_for(config, ltm), ltm.config.model.latent_shape
    z = None if config.thought is None else load_thoughts(config.thought, latent_shape).to(device)
    if z is not None and config.prompt_file is None:
        prompts *= len(z)
    if z is not None and len(z) not in (1, len(prompts)):
        raise InputError(
            f"{config.thought} holds {len(z)} thoughts and {config.prompt_file} {len(prompts)} prompts: "
            "give one thought, or one for each prompt"
        )
    tokens = [encode(prompt, ltm.tokenizer).tolist() for prompt in prompts]
    longest, length = max(map(len, tokens)), ltm.config.model.length
    is_cut = longest > length and block_size_of(ltm, scheme) is None
    if is_cut and scheme is not PRIOR and (z is None or config.rethink):
        print(
            f"note: a prompt has {longest:,} tokens; z is inferred from its last {length:,}, the length of the model's "
            "sequences",
            file=sys.stderr,
        )
    return Plan(ltm, scheme, prompts, tokens, z)


def z_source(config: GenerateConfig, plan: Plan, prompt: str) -> str | None:
    """What the last z of a text was drawn from, in words; None for a model without z."""
    trained: str = plan.ltm.config.inference
    if trained == NO_INFERENCE:
        return None
    if not config.rethink:
        if config.thought is not None:
            return config.thought
        if plan.scheme is PRIOR or (not prompt and block_size_of(plan.ltm, plan.scheme) is None):
            return "the prior"
    return config.inference or trained


class TerminalStream:
    """Prints the tokens of a text on a terminal as they are written."""

    def __init__(self, encoding: tiktoken.Encoding, prompt: str) -> None:
        self.encoding = encoding
        self._num_bytes = token_num_bytes(encoding)
        # A character may take several tokens.
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        print(prompt, end="", flush=True)

    def print(self, token: int) -> None:
        """Print a token, or what of it completes a character."""
        if self._num_bytes[token]:
            piece = self.encoding.decode_single_token_bytes(token)
            print(self._characters.decode(piece), end="", flush=True)

    def finish(self) -> None:
        """End the line."""
        print(self._characters.decode(b"", final=True), flush=True)


def print_text(config: GenerateConfig, plan: Plan, number: int, tokens: Tokens) -> None:
    """Print a text: as a JSON object, or after its prompt.

    Args:
        number: the number of the text among all that are written, the samples of a prompt one after another.
    """
    ltm, (number_of_prompt, sample) = plan.ltm, divmod(number, config.num_samples)
    prompt, text = plan.prompts[number_of_prompt], ltm.decode(torch.tensor([tokens]))[0]
    if config.json:
        source = z_source(config, plan, prompt)
        record = {
            "prompt": prompt,
            "text": text,
            "num_tokens": len(tokens),
            "ended": tokens[-1:] == [ltm.model.end_of_text],
            "sample": sample,
            "posterior": source,
            "fast_steps": plan.scheme.num_steps if source in SCHEMES else 0,
            "seed": config.seed,
        }
        print(json.dumps(record), flush=True)
        return
    num_texts = len(plan.prompts) * config.num_samples
    if num_texts > 1:
        print(f"=== text {number + 1} of {num_texts}")
    print(prompt + text, flush=True)


def main(args: Sequence[str]) -> int:
    config, settings = parse(args)
    plan = load_plan(config, settings)
    thoughts = Output("--save-thought", config.save_thought) if config.save_thought else None
    writing = Writing(
        plan.ltm,
        plan.scheme,
        plan.tokens,
        config.num_samples,
        config.max_new_tokens,
        config.sampling,
        config.rethink,
        config.batch_size,
        config.seed,
        plan.z,
    )
    is_streaming = len(plan.tokens) * config.num_samples == 1 and not config.json and sys.stdout.isatty()
    last_z, number = [], 0
    with cli.numerics_of_commands():
        for texts, rethinking in writing.parts():
            if is_streaming:
                terminal = TerminalStream(plan.ltm.tokenizer, plan.prompts[0])
                for _, token in texts.write(writing.most_new_tokens, rethinking):
                    terminal.print(token)
                terminal.finish()
            else:
                for tokens in texts.finish(writing.most_new_tokens, rethinking):
                    print_text(config, plan, number, tokens)
                    number += 1
            last_z.append(texts.z_BLSD)
    if thoughts is not None:
        thoughts.finish(thoughts_file(torch.cat(last_z)))
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
