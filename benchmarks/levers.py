"""Measure what each optimisation of the fast loop saves, alone and together with the others: seconds of a fast step.

    python benchmarks/levers.py [--preset small] [--batch-size 4]

"plain" is the straightforward program: weights take gradients, everything is computed in every step, attention has a
dense mask, and all logits are computed at once. All variants are timed in turns; the table shows the median and the
range over the rounds. The rows after "all of these" add further optimisations to all of the former. Only strided
positions and bfloat16 change results by more than rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from timing import machine, seconds_in_turns
from torch import Tensor

from ltm_pyro.config import preset
from ltm_pyro.data import token_batch
from ltm_pyro.inference import BatchNoise
from ltm_pyro.inference.base import frozen
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import LatentThoughtModel, attention
from ltm_pyro.models.attention import CrossAttention, join_heads, rotary, split_heads

EXACT = {
    "frozen": "weights frozen",
    "below": "what lies below the first thoughts computed once for T steps (here: not counted)",
    "taken in": "the weights of queries and output taken into the thoughts' keys and values",
    "band": "window attention on the blocks of the band",
    "vocabulary": "vocabulary term without all logits",
}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of all queries to all keys, with a mask for the window."""
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(key <= query) & (key > query - window))


def cross_attention(self: CrossAttention, x: Tensor, z: Tensor) -> Tensor:
    """Cross-attention with a query and an output of each token."""
    k, v = (split_heads(part, self.num_heads) for part in self.key_value(z).chunk(2, dim=-1))
    attended = F.scaled_dot_product_attention(split_heads(self.query(x), self.num_heads), rotary(k), v)
    return self.output(join_heads(attended))


def gradient_of_all(output: Tensor, z: Tensor) -> tuple[Tensor | None]:
    """The gradient for z by a full backward pass, which also computes the gradients of all weights.

    This is what a loop does that has not frozen the weights.
    """
    output.backward()
    return (z.grad,)


@contextlib.contextmanager
def levers(model: LatentThoughtModel, pulled: frozenset[str]) -> Iterator[None]:
    """Within the block, the optimisations that are not among `pulled` are switched off."""
    decoder, banded, gradient = model.decoder, attention.windowed_attention, torch.autograd.grad
    taken_in = CrossAttention.forward
    with contextlib.ExitStack() as stack:
        if "frozen" in pulled:
            stack.enter_context(frozen(model))
        else:
            torch.autograd.grad = gradient_of_all
        if "taken in" not in pulled:
            CrossAttention.forward = cross_attention
        if "band" not in pulled:
            attention.windowed_attention = dense_attention
        if "vocabulary" not in pulled:
            decoder.log_probs = lambda hidden, tokens: (
                -F.cross_entropy(decoder.logits(hidden), tokens, reduction="none")
            )
        try:
            yield
        finally:
            attention.windowed_attention, torch.autograd.grad = banded, gradient
            CrossAttention.forward = taken_in
            decoder.__dict__.pop("log_probs", None)


@contextlib.contextmanager
def thoughts_at_once(model: LatentThoughtModel) -> Iterator[None]:
    """Within the block, the keys and values of all layers' thoughts are computed by one product, before the layers."""
    original, decoder_forward = CrossAttention.forward, model.decoder.forward
    made: list[Tensor] = []

    def decoder(inputs: Tensor, z: Tensor, below: Any = None, num_context: int = 0) -> Tensor:
        weights = torch.stack([block.cross_attention.key_value.weight for block in model.decoder.blocks])
        made[:] = torch.einsum("blsd,led->lbse", z, weights).unbind(0)
        return decoder_forward(inputs, z, below, num_context)

    def attend(self: CrossAttention, x: Tensor, z: Tensor) -> Tensor:
        k, v = (split_heads(part, self.num_heads) for part in made.pop(0).chunk(2, dim=-1))
        return self.attend(x, *self.taken_in(rotary(k), v))

    CrossAttention.forward, model.decoder.forward = attend, decoder
    try:
        yield
    finally:
        CrossAttention.forward = original
        del model.decoder.forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=["tiny", "small", "medium", "large"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = preset(options.preset, infer_from="whole")
    vocab_size = 258 if config.tokenizer == "bytes" else 50_258
    torch.manual_seed(0)
    model, compiled = (LatentThoughtModel(config.model, vocab_size, vocab_size - 2) for _ in range(2))
    compiled.load_state_dict(model.state_dict())
    compiled.decoder.compile()
    batch = token_batch(torch.randint(vocab_size - 2, (options.batch_size, config.model.length)))
    rng = BatchNoise(torch.Generator().manual_seed(0))

    def fast_step(its_model: LatentThoughtModel, scheme: VI, its_batch: Any) -> Callable[[], None]:
        state = scheme.init(its_model, batch, rng)
        return lambda: scheme.step(its_model, state, its_batch, rng)

    below, every = model.precompute(batch), frozenset(EXACT)
    ways: dict[str, tuple[Callable[[], None], Callable[[], Any]]] = {}
    sets = {"plain": frozenset(), **{f"plain and: {EXACT[name]}": frozenset([name]) for name in EXACT}}
    sets |= {f"all but: {EXACT[name]}": every - {name} for name in EXACT} | {"all of these": every}
    for name, pulled in sets.items():
        step = fast_step(model, VI(), below if "below" in pulled else batch)
        ways[name] = step, lambda pulled=pulled: levers(model, pulled)
    all_of = lambda its_model: lambda: levers(its_model, every)  # noqa: E731 - an entry of the table below
    ways["all, and keys and values of all layers' thoughts at once"] = (
        fast_step(model, VI(), below),
        lambda: _both(levers(model, every), thoughts_at_once(model)),
    )
    ways["all, and compiled decoder"] = fast_step(compiled, VI(), below), all_of(compiled)
    ways["all, and every 4th position (`--vi.stride 4`)"] = fast_step(model, VI(stride=4), below), all_of(model)
    ways["all, and bfloat16 (`--precision bfloat16`)"] = (
        fast_step(model, VI(), below),
        lambda: _both(levers(model, every), in_bfloat16(model)),
    )
    ways["all, and both"] = (
        fast_step(model, VI(stride=4), below),
        lambda: _both(levers(model, every), in_bfloat16(model)),
    )

    def within(step: Callable[[], None], context: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            with context():
                step()

        return work

    device = torch.device("cpu")
    works = {name: within(*way) for name, way in ways.items()}
    seconds = seconds_in_turns(works, options.rounds, device)
    print(machine(device))
    print(f"preset {options.preset}, {options.batch_size} sequences of {config.model.length} tokens\n")
    print("| | a fast step [s] | plain / this |\n|---|---|---|")
    plain = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} ({min(values):.2f}-{max(values):.2f}) | {plain / median:.2f} |")


@contextlib.contextmanager
def in_bfloat16(model: LatentThoughtModel) -> Iterator[None]:
    model.decoder.compute_dtype = torch.bfloat16
    try:
        yield
    finally:
        model.decoder.compute_dtype = None


@contextlib.contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
