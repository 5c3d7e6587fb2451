"""Compare speed and memory with the published implementation, in one process, on the same weights and the same text.

    python benchmarks/vs_reference.py --reference PATH [--presets small medium large] [--json FILE]
        [--device cuda --precision bfloat16 --compile]

PATH is a clone of https://github.com/mingluzhao/Latent-Thought-LM, the reference; none of its code is copied here. Our
weights are copied into the reference's model, with the rows of the projections reordered for its interleaved rotary
pairs. Two differences are structural: the reference rotates the queries and keys of cross-attention to positions along
the text, and it gives begin-of-text a logit. Our model imitates both, but only for the comparison of log-likelihoods,
in which both models must give the same log p(x | z). Then the two are timed in turns (A B A B …), each with its own
code and with T = 16: ours with `adamvi`, which takes the steps that the reference takes, and with `vi`. Our fast step
here includes the part that `infer` computes only once for all steps. The log-likelihoods are compared in float32;
--precision is that of the timing, and --compile that of our decoder. (The reference compiles its attention by itself,
and its settings compile nothing else.)

On a CPU the reference cannot use its Triton kernels. The module that contains them is replaced here by PyTorch's own
operations. On a CUDA device that module is used if it can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from timing import machine, matrix_rate, seconds_in_turns
from torch import Tensor, nn

from ltm_pyro.config import preset
from ltm_pyro.evaluation.operations import count as operations_of
from ltm_pyro.inference import SCHEMES, BatchNoise, bounds, infer
from ltm_pyro.inference.base import frozen, log_joint
from ltm_pyro.inference.svi import WeightOptimizer, elbo_backward
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.models.attention import CrossAttention, join_heads, rotary, split_heads
from ltm_pyro.models.vocabulary import target_log_probs

VOCAB_SIZE = 50_258
"""The tokens of GPT-2's encoding, and begin-of-text."""
FAST_RATE, FAST_STEPS = 0.34, 16
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, adamvi": ("adamvi", {}),
    "ours, vi": ("vi", {}),
    "ours, vi, stride 4": ("vi", {"stride": 4}),
}
"""Our schemes that are compared, and their settings. The first takes the steps of the reference: Adam's, each of one
gradient. `vi` evaluates the density once more in each step, and needs fewer of them."""


def import_reference(path: str, use_kernels: bool) -> types.SimpleNamespace:
    """The reference's classes for its configuration, model and posterior optimiser."""
    if not use_kernels:
        stand_in = types.ModuleType("liger_module")
        stand_in.LigerRMSNorm = lambda dim, eps: nn.RMSNorm(dim, eps=eps)
        for name in ("LigerSwiGLUMLP", "liger_rotary_pos_emb", "LigerCrossEntropyLoss", "LigerLayerNorm"):
            setattr(stand_in, name, None)
        sys.modules["liger_module"] = stand_in
    sys.path.insert(0, path)
    import model
    import optimizer

    return types.SimpleNamespace(
        Config=model.LTMConfig, Model=model.LatentThoughtModel, PosteriorOptimizer=optimizer.PosteriorOptimizer
    )


class Ours:
    """Our model, and the parts of a step."""

    def __init__(self, config: Any, tokens: Tensor, scheme: Any) -> None:
        self.model = LatentThoughtModel(config.model, VOCAB_SIZE, end_of_text=VOCAB_SIZE - 2).to(tokens.device)
        num_texts, length = tokens.shape
        ids = torch.arange(num_texts)
        weights = torch.ones(tokens.shape, device=tokens.device)
        self.batch = TokenBatch(tokens, weights, ids, torch.full((num_texts,), length))
        self.scheme = scheme
        self.rng = BatchNoise(torch.Generator(tokens.device).manual_seed(0))
        self.optimizer = WeightOptimizer(self.model, config.optimizer, 1000)
        with frozen(self.model):
            self.state = self.scheme.init(self.model, self.batch, self.rng)

    def prepare(self, options: argparse.Namespace) -> None:
        """Take the precision of the timing, and compile."""
        if options.precision == "bfloat16":
            self.model.decoder.compute_dtype = torch.bfloat16
        if options.compile:
            self.model.decoder.compile()

    def fast_step(self) -> None:
        with frozen(self.model, self.batch) as batch:
            self.scheme.step(self.model, self.state, batch, self.rng)

    def training_step(self) -> None:
        state = infer(self.scheme, self.model, self.batch, self.rng)
        guide = self.scheme.guide(self.model, state, self.batch, self.rng)
        elbo_backward(self.model, guide, self.batch, self.batch.tokens.numel())
        self.optimizer.update(0)

    def evaluation(self) -> None:
        state = infer(self.scheme, self.model, self.batch, self.rng)
        bounds.elbo(self.model, self.batch, self.scheme.distribution(state, self.rng), num_samples=1)


class Theirs:
    """The reference's model, and the parts of a step as in its own training loop."""

    def __init__(
        self,
        reference: types.SimpleNamespace,
        config: Any,
        tokens: Tensor,
        use_kernels: bool,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        shape = config.model
        self.model = reference.Model(
            reference.Config(
                dim=shape.width,
                n_layers=shape.num_layers,
                n_heads=shape.num_heads,
                n_kv_heads=shape.num_heads,
                vocab_size=vocab_size,
                multiple_of=32,
                max_seq_len=shape.length,
                n_prior_layers=0,
                n_cls_tokens=0,
                window_size=shape.window,
                use_liger=use_kernels,
                max_z_len=shape.num_layers * shape.num_slots,
            )
        ).to(tokens.device)
        self.inputs = F.pad(tokens[:, :-1], (1, 0), value=vocab_size - 1)
        self.targets = tokens
        self.context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        latent = {"max_z_len": shape.num_layers * shape.num_slots, "z_dim": shape.width}
        settings = {"num_steps": FAST_STEPS, "lr": FAST_RATE, **latent}
        with contextlib.redirect_stdout(None):
            self.posterior = reference.PosteriorOptimizer(self.model, eval_mode=False, **settings)
            self.posterior_of_test = reference.PosteriorOptimizer(self.model, eval_mode=True, **settings)
            rates = config.optimizer
            self.optimizer = self.model.configure_optimizers(
                rates.weight_decay, rates.learning_rate, (rates.beta_1, rates.beta_2), tokens.device.type
            )
        self.mean = torch.zeros(len(tokens), latent["max_z_len"], latent["z_dim"], device=tokens.device)
        self.log_variance = self.mean - 5

    def prepare(self, options: argparse.Namespace) -> None:
        """Take the precision of the timing, as the reference's own training does."""
        if options.precision == "bfloat16":
            self.context = torch.autocast(options.device, torch.bfloat16)

    def fast_step(self) -> None:
        self.model.eval()
        mean, log_variance = (value.clone().requires_grad_() for value in (self.mean, self.log_variance))
        adamw = torch.optim.AdamW([mean, log_variance], lr=FAST_RATE)
        with self.context:
            loss = self.model.elbo(self.inputs, mean, log_variance, torch.randn_like(mean), self.targets)[0]
        loss.backward()
        adamw.step()

    def training_step(self) -> None:
        z, *_ = self.posterior.step([self.inputs, self.targets, None], self.context)
        with self.context:
            self.model(self.inputs, z, self.targets)
        self.model.last_loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluation(self) -> None:
        z, *_ = self.posterior_of_test.step([self.inputs, self.targets, None], self.context)
        with self.context:
            self.model(self.inputs, z, self.targets)


@torch.no_grad()
def copy_weights(ours: LatentThoughtModel, theirs: nn.Module) -> None:
    """Copy our weights into the reference's model; every weight there is written, and none of ours is left over."""
    decoder = ours.decoder
    head_dim = decoder.config.width // decoder.config.num_heads
    # In the reference, dimensions 2 i and 2 i + 1 of a head are a rotated pair; here, i and i + K/2 are.
    pairs = torch.arange(head_dim).view(2, -1).T.flatten()
    rows = (torch.arange(decoder.config.num_heads)[:, None] * head_dim + pairs).flatten()
    written = {"tok_embeddings.weight": decoder.embedding.weight, "norm.weight": decoder.final_norm.weight}
    for number, block in enumerate(decoder.blocks):
        name = f"layers.{number}"
        query, key, value = block.self_attention.query_key_value.weight.chunk(3)
        written |= {
            f"{name}.attention.wq.weight": query[rows],
            f"{name}.attention.wk.weight": key[rows],
            f"{name}.attention.wv.weight": value,
            f"{name}.attention.wo.weight": block.self_attention.output.weight,
        }
        key, value = block.cross_attention.key_value.weight.chunk(2)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        written |= {
            f"{name}.cross_attention.wq.weight": block.cross_attention.query.weight[rows],
            f"{name}.cross_attention.wk.weight": key[rows],
            f"{name}.cross_attention.wv.weight": value,
            f"{name}.cross_attention.wo.weight": block.cross_attention.output.weight,
            f"{name}.feed_forward.w1.weight": gate,
            f"{name}.feed_forward.w2.weight": block.feed_forward.output.weight,
            f"{name}.feed_forward.w3.weight": up,
            f"{name}.attention_norm.weight": block.self_attention_norm.weight,
            f"{name}.cross_attention_norm.weight": block.cross_attention_norm.weight,
            f"{name}.ffn_norm.weight": block.feed_forward_norm.weight,
        }
    # The reference uses other names with its kernels, and for compiled modules.
    kernels = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, weight in theirs.named_parameters():
        plain = name.replace("_orig_mod.", "")
        for kernel_name, plain_name in kernels.items():
            plain = plain.replace(kernel_name, plain_name)
        weight.copy_(written.pop(plain))
    if written:
        raise SystemExit(f"the reference has no place for {', '.join(written)}")


@contextlib.contextmanager
def as_the_reference(model: LatentThoughtModel) -> Iterator[None]:
    """Within the block, our model has the reference's positions in cross-attention, and its logit of begin-of-text."""
    config = model.config
    interval = config.length // (config.num_layers * config.num_slots)
    positions = torch.arange(config.num_slots) * interval

    def cross_attention(self: CrossAttention, x_BTD: Tensor, z_BSD: Tensor) -> Tensor:
        k, v = (split_heads(x, self.num_heads) for x in self.key_value(z_BSD).chunk(2, dim=-1))
        spread = k.new_zeros(*k.shape[:2], int(positions.max()) + 1, k.shape[-1])
        spread[:, :, positions] = k
        q = rotary(split_heads(self.query(x_BTD), self.num_heads))
        return self.output(join_heads(F.scaled_dot_product_attention(q, rotary(spread)[:, :, positions], v)))

    decoder, original = model.decoder, CrossAttention.forward
    CrossAttention.forward = cross_attention
    decoder.log_probs = lambda hidden, tokens: target_log_probs(hidden, decoder.embedding.weight, tokens)
    try:
        yield
    finally:
        CrossAttention.forward = original
        del decoder.log_probs


def log_likelihoods(ours: Ours, theirs: Theirs) -> tuple[float, float]:
    """log p(x | z) of the batch under both models, at the same z [nats]."""
    z = torch.randn(len(ours.batch), *ours.model.config.latent_shape, device=ours.batch.tokens.device)
    with torch.no_grad(), as_the_reference(ours.model):
        mine = log_joint(ours.model, ours.batch, z).log_likelihood.double().sum().item()
    with torch.no_grad():
        flat = z.flatten(1, 2)
        their_elbo = theirs.model.elbo(
            theirs.inputs, flat, torch.full_like(flat, -100.0), torch.zeros_like(flat), theirs.targets, eval_mode=True
        )
    return mine, -their_elbo[4].item() * len(ours.batch)


def scheme_of(side: str, num_steps: int) -> Any:
    """One of our schemes that are compared."""
    name, settings = OURS[side]
    return SCHEMES[name](num_steps=num_steps, **settings)


def build(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The models to compare, by name."""
    config = preset(name)
    device = torch.device(options.device)
    use_kernels = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE - 2, (options.batch_size, config.model.length), device=device)
    sides: dict[str, Any] = {side: Ours(config, tokens, scheme_of(side, FAST_STEPS)) for side in OURS}
    first, *others = sides.values()
    for other in others:
        other.model, other.optimizer = first.model, first.optimizer
    sides["reference"] = Theirs(import_reference(options.reference, use_kernels), config, tokens, use_kernels)
    copy_weights(first.model, sides["reference"].model)
    return sides


def peak_memory(options: argparse.Namespace, name: str, side: str) -> float:
    """The peak memory of a separate process that runs a training step with two fast steps [MB]."""
    command = [
        sys.executable,
        __file__,
        "--reference",
        options.reference,
        "--presets",
        name,
        "--device",
        options.device,
    ]
    command += ["--batch-size", str(options.batch_size), "--precision", options.precision, "--only", side]
    command += ["--compile"] if options.compile else []
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def only(options: argparse.Namespace) -> None:
    """Run a training step of one model alone, and print the peak memory of this process [MB]."""
    config = preset(options.presets[0])
    device = torch.device(options.device)
    use_kernels = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    tokens = torch.randint(VOCAB_SIZE - 2, (options.batch_size, config.model.length), device=device)
    if options.only == "reference":
        side: Any = Theirs(import_reference(options.reference, use_kernels), config, tokens, use_kernels)
        side.posterior.kwargs["num_steps"] = 2
    else:
        side = Ours(config, tokens, scheme_of(options.only, 2))
    side.prepare(options)
    with contextlib.redirect_stdout(sys.stderr):
        side.training_step()
    print(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mb())


def resident_mb() -> float:
    """The peak memory of this process on Linux [MB]; `ru_maxrss` would include what its parent held at the fork."""
    with open("/proc/self/status") as file:
        (peak,) = (line.split()[1] for line in file if line.startswith("VmHWM"))
    return int(peak) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of a clone")
    parser.add_argument("--presets", nargs="+", default=["small"], choices=["small", "medium", "large"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="number of turns of a fast step")
    parser.add_argument("--step-rounds", type=int, default=2, help="number of turns of a training step, or 0")
    parser.add_argument("--eval-rounds", type=int, default=1, help="number of turns of an evaluation, or 0")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile our decoder")
    parser.add_argument("--without-memory", action="store_true", help="measure no peak memory, in processes of its own")
    parser.add_argument("--json", help="file to which all times are written")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        only(options)
        return
    device = torch.device(options.device)
    print(machine(device))
    records = []
    for name in options.presets:
        sides = build(options, name)
        ours = next(iter(sides.values()))
        mine, theirs = log_likelihoods(ours, sides["reference"])
        print(f"\n{name}: log p(x | z) of the same text at the same z: ours {mine:.2f}, reference {theirs:.2f} nats")
        # Kernels of a GPU may multiply with the precision of TF32.
        if abs(mine - theirs) > (1e-5 if device.type == "cpu" else 1e-3) * abs(theirs):
            raise SystemExit("the log-likelihoods differ: the two models are not the same")
        operations = operations_of(ours.fast_step)
        for side in (ours, sides["reference"]):  # all of ours are one model
            side.prepare(options)
        rate = matrix_rate(device, getattr(torch, options.precision))
        print(f"a product of 4096 x 4096 matrices in {options.precision}: {rate / 1e9:.0f} G operations a second\n")
        ratios_to = " | ".join(f"reference / {side.removeprefix('ours, ')}" for side in OURS)
        print("| | " + " | ".join(f"{side} [s]" for side in sides) + f" | {ratios_to} |")
        print("|---|" + "---|" * (len(sides) + len(OURS)))
        for what in ("fast_step", "training_step", "evaluation"):
            rounds = {"fast_step": options.rounds, "training_step": options.step_rounds}.get(what, options.eval_rounds)
            if not rounds:
                continue
            functions = {side: getattr(value, what) for side, value in sides.items()}
            seconds = seconds_in_turns(functions, rounds, device, warm_up=what == "fast_step")
            medians = {side: statistics.median(values) for side, values in seconds.items()}
            cells = [f"{medians[side]:.2f} ({min(v):.2f}-{max(v):.2f})" for side, v in seconds.items()]
            ratios = [f"{medians['reference'] / medians[side]:.2f}" for side in OURS]
            print(f"| {what.replace('_', ' ')} | {' | '.join(cells + ratios)} |", flush=True)
            records.append({"preset": name, "what": what, "seconds": seconds, "matrix_rate": rate})
            if what == "fast_step":
                share = operations / medians[next(iter(OURS))] / rate
        memory = {} if options.without_memory else {side: peak_memory(options, name, side) for side in sides}
        if memory:
            print(f"| peak memory [MB] | {' | '.join(f'{value:.0f}' for value in memory.values())} |{' |' * len(OURS)}")
        print(
            f"\na fast step of {next(iter(OURS)).removeprefix('ours, ')}: {share:.0%} of the rate of the matrix product"
        )
        records.append({"preset": name, "what": "peak_memory_mb", **memory, "share_of_matrix_rate": share})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=2)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
