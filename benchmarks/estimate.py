"""Estimate what a fast step takes on a GPU that is not there, from every operation that the code does.

    python benchmarks/estimate.py [--presets small medium large] [--batch-size 64] [--rate 600] [--bandwidth 2.8]
                                  [--tokens]

The step runs on fake tensors, which have shapes and no numbers, in bfloat16, along the way that a device takes. Of each
operation the arithmetic is counted and the bytes that it reads and writes; it takes as long as the slower of both at
the given rate [10**12 operations a second] and bandwidth [10**12 bytes a second], and at least --launch [microseconds].
What a device can do is an assumption, and so is that each operation reaches it: this is no measurement, but says where
the time should go. Norms are counted as the passes that they are made of, which newer versions of torch fuse on a GPU.
The groups follow the file that an operation comes from.

"compiled" is what --compile is to save: operations that only read and write (no products, no attention) of the decoder
are taken to need a third of the bytes, and those on a block of logits 8 bytes a logit.

--tokens counts what is done for one token of each text that is written.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ltm_pyro.config import preset, scheme_of
from ltm_pyro.data import token_batch
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.base import frozen
from ltm_pyro.models import LatentThoughtModel, Sampling, attention, generation, tokens, vocabulary

HOME = str(Path(tokens.__file__).parents[1])
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
VARLEN = "_varlen_attn"
NOTHING = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")
"""Operations that move nothing."""
GROUPS = ("products", "attention", "vocabulary", "decoder", "noise", "scheme")


class Counter(TorchDispatchMode):
    """Adds up the seconds of each group of operations."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.seconds: dict[str, float] = defaultdict(float)
        self.compiled: dict[str, float] = defaultdict(float)
        self.operations, self.bytes, self.launches = 0.0, 0.0, 0
        self.place = "decoder"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if function.is_view or function.namespace not in ("aten", "torch_attn") or name in NOTHING:
            return out
        inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        outputs = [value for value in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(value, Tensor)]
        if name in ("gather", "embedding"):  # which read no more than they write
            inputs = []
        elif name == "index_copy_":  # which changes no more than it reads
            inputs, outputs = inputs[-1:], inputs[-1:]
        moved = sum(value.numel() * value.element_size() for value in [*inputs, *outputs])
        group = self._group(name)
        operations = self._operations(function, name, args, kwargs, out)
        self.operations += operations
        self.bytes += moved
        self.launches += 1
        self.seconds[group] += self._time(operations, moved)
        if group == "vocabulary":
            largest = max((value.numel() for value in inputs), default=0)
            # Of about seven passes over a block of logits, which together move so much.
            moved = min(moved, 8 * largest / 7)
        elif group == "decoder":
            moved /= 3
        self.compiled[group] += self._time(operations, moved, 3 if group in ("vocabulary", "decoder") else 1)
        return out

    def _time(self, operations: float, moved: float, fused: int = 1) -> float:
        options = self.options
        work = max(operations / (options.rate * 1e12), moved / (options.bandwidth * 1e12))
        return max(work, options.launch * 1e-6 / fused)

    def _group(self, name: str) -> str:
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            return "products"
        if ATTENTION in name or VARLEN in name:
            return "attention"
        files = {Path(frame.filename).name for frame in traceback.extract_stack() if frame.filename.startswith(HOME)}
        for file, group in (("vocabulary.py", "vocabulary"), ("philox.py", "noise"), ("decoder.py", "decoder")):
            if file in files:
                return group
        # The backward pass of the decoder is called from the scheme, in one call of autograd.
        return "decoder" if "grad" in {frame.name for frame in traceback.extract_stack()} else "scheme"

    def _operations(self, function: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
        if name == ATTENTION:
            q, k = args[0], args[1]
            return 4.0 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
        if name == f"{ATTENTION}_backward":
            q, k = args[1], args[2]
            return 10.0 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
        if name == VARLEN:
            return 4.0 * _num_scores(*args[3:5], *args[5:7], args[9][0] + 1) * args[0].shape[1:].numel()
        if name == f"{VARLEN}_backward":
            return 10.0 * _num_scores(*args[6:8], *args[8:10], args[13][0] + 1) * args[1].shape[1:].numel()
        counted = flop_registry.get(function.overloadpacket)
        return 0.0 if counted is None else float(counted(*args, **kwargs, out_val=out))


def _num_scores(starts: Tensor, _: Tensor, num_queries: int, num_keys: int, window: int) -> int:
    """The scores of one head that a window leaves, of all texts."""
    return (len(starts) - 1) * sum(min(window, key + 1) for key in range(num_keys - num_queries, num_keys))


def step(name: str, options: argparse.Namespace) -> Counter:
    """A fast step of a preset, counted."""
    config = preset(name, "vi", "whole")
    with FakeTensorMode():
        model = LatentThoughtModel(config.model, 50_258, 50_256)
        model.decoder.compute_dtype = torch.bfloat16
        shape = options.batch_size, config.model.length
        batch, rng = token_batch(torch.zeros(shape, dtype=torch.int64)), SequenceNoise(0)
        rng._by_numpy = False
        scheme = scheme_of(config)
        with frozen(model, batch) as precomputed:
            state = scheme.init(model, precomputed, rng)
            with Counter(options) as counter:
                scheme.step(model, state, precomputed, rng)
    return counter


def token(name: str, options: argparse.Namespace) -> Counter:
    """What is done for one token of each text, counted."""
    with FakeTensorMode(), torch.no_grad():
        model = LatentThoughtModel(preset(name).model, 50_258, 50_256)
        model.decoder.compute_dtype = torch.bfloat16
        u = torch.zeros(options.batch_size, *model.config.latent_shape)
        prompts, num_tokens = [()] * len(u), 1024
        texts = generation._unchecked_tokens(model.decoder, u, 50_256, num_tokens, prompts, Sampling(), None)
        next(texts)
        with Counter(options) as counter:
            next(texts)
    return counter


def print_tokens(options: argparse.Namespace) -> None:
    print("| preset | launches | G operations | MB | launches take [ms] | bytes take [ms] |")
    print("|---" * 6 + "|")
    for name in options.presets:
        found = token(name, options)
        times = f"{1e-3 * found.launches * options.launch:.2f} | {1e-9 * found.bytes / options.bandwidth:.2f}"
        print(f"| {name} | {found.launches} | {found.operations / 1e9:.1f} | {found.bytes / 1e6:.0f} | {times} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "medium", "large"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=600.0)
    parser.add_argument("--bandwidth", type=float, default=2.8)
    parser.add_argument("--launch", type=float, default=4.0)
    parser.add_argument("--tokens", action="store_true", help="count what is done for a token of each text instead")
    options = parser.parse_args()
    # What a device does: FlashAttention, all positions, in its blocks, and no condition on the host.
    attention._takes_flash_attention = lambda x: x.dtype == torch.bfloat16
    tokens.log_probs_of_chosen = tokens.log_probs_of_all
    vocabulary.CPU_BLOCK, vocabulary.CPU_MULTIPLE = vocabulary.DEVICE_BLOCK, vocabulary.DEVICE_MULTIPLE
    print(f"`python benchmarks/estimate.py {' '.join(sys.argv[1:])}`\n")
    print(f"At {options.rate:g} T operations and {options.bandwidth:g} TB a second; milliseconds.\n")
    (print_tokens if options.tokens else print_steps)(options)


def print_steps(options: argparse.Namespace) -> None:
    print(
        f"| preset | T operations | GB | launches | {' | '.join(GROUPS)} | all | share of the rate | compiled | share |"
    )
    print("|---" * (len(GROUPS) + 8) + "|")
    for name in options.presets:
        found = step(name, options)
        total, compiled = sum(found.seconds.values()), sum(found.compiled.values())
        share, share_compiled = (found.operations / seconds / (options.rate * 1e12) for seconds in (total, compiled))
        cells = [name, f"{found.operations / 1e12:.1f}", f"{found.bytes / 1e9:.0f}", f"{found.launches:,}"]
        cells += [f"{1e3 * found.seconds[group]:.1f}" for group in GROUPS]
        cells += [f"{1e3 * total:.0f}", f"{share:.0%}", f"{1e3 * compiled:.0f}", f"{share_compiled:.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
