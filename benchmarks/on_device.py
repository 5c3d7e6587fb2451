"""Do on a device what matters there, in parts of limited time, each with its line in a JSON file.

    python benchmarks/on_device.py --out FILE [--device cuda] [--parts machine parity …] [--reference PATH]
        [--corpus FOLDER] [--toy]

Every part runs in a process of its own, in the order of their weight, and its line is written when it ends: failed, out
of time or done. So a run that is cut off still tells what it has seen, and a part that crashes costs no other. What a
part has found until its end is in its line, too. The start takes up to ten seconds of each part, --compile and the
reference compile for up to a minute where nothing is cached, and other work on the machine makes all of it slow. So the
limits add up to more than the --seconds that the script takes: parts for which there is no time left have a line that
says so. --toy takes sizes that a processor can do, to try the script itself: its times say nothing of a device.

machine     versions, the device, and the rates of large products and of copies
parity      log-probabilities, attention, gradients and every scheme against float64 on the CPU
waits       places where the host waits for the device (CUDA alone)
speed …     fast and slow step of a preset at a batch size, in bfloat16: time, share of the rate, peak memory
compiled …  the same with --compile; operations are counted as written
kernels …   what the time of a compiled fast step goes into
training    30 steps of preset tiny against the CPU's losses; killed, resumed, and compared with a run that was not
processes   one process of torchrun
generation  tokens written in a second, with a graph of the step and without: the same tokens
windows     attention within a window by FlashAttention and by blocks of the band: differences and time
reference   a training step beside the published implementation's (--reference, the path of a clone)
corpus      preset small trained by objective past and without z, as many steps of each, on a corpus that
            `python -m ltm_pyro.prepare` has written (--corpus), with their figures on its held-out text
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
import windows
from speed import Step
from timing import matrix_rate, median_seconds, peak_memory, seconds_in_turns
from torch import Tensor

from ltm_pyro.config import preset
from ltm_pyro.data import token_batch
from ltm_pyro.data.prepared import MANIFEST
from ltm_pyro.evaluation.operations import count
from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.streaming import gradient_of_block
from ltm_pyro.inference.svi import predict_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, Sampling, TokenBatch, graphs
from ltm_pyro.models.attention import windowed_attention

HERE = Path(__file__).resolve()


class Result(dict[str, Any]):
    """What a part finds, written to a file whenever something is added."""

    path: Path | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if self.path is not None:
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps(self))
            partial.replace(self.path)


Part = Callable[[argparse.Namespace, Result], None]


def run_machine(options: argparse.Namespace, found: Result) -> None:
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    megabytes = 64 if options.toy else 1024
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), 3 if options.toy else 30, device)
    rates = {}
    for precision in ("float32", "bfloat16"):
        if not options.toy or precision == "float32":  # a processor may take minutes in bfloat16
            rates[precision] = matrix_rate(device, getattr(torch, precision))
    values = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "pyro": pyro.__version__,
        "device": name,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "operations_per_second": rates,
        "bytes_per_second_copied": 2 * source.nbytes / seconds,
    }
    for what, value in values.items():
        found[what] = value


PARITY = DecoderConfig(num_layers=3, width=64, num_heads=4, hidden=128, num_slots=8, window=16, length=96)


def model_and_batch(
    config: DecoderConfig, device: torch.device, dtype: torch.dtype
) -> tuple[LatentThoughtModel, TokenBatch, Tensor]:
    """A model with weights large enough for z to matter, two texts, and a z of each: the same everywhere."""
    torch.manual_seed(0)
    model = LatentThoughtModel(config, 258, 256).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    batch = token_batch(torch.randint(256, (2, config.length)))
    z = torch.randn(2, *config.latent_shape, dtype=torch.float64)
    batch = dataclasses.replace(batch, weights=batch.weights.to(dtype))
    return model.to(device, dtype), batch.to(device), z.to(device, dtype)


def relative(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference from what is expected, relative to it."""
    value, expected = (x.detach().double().cpu() for x in (value, expected))
    return ((value - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def quantities(model: LatentThoughtModel, batch: TokenBatch, z: Tensor) -> dict[str, Tensor]:
    """What a model says of texts: log-probabilities, and the gradients with respect to z and to all weights."""
    with torch.no_grad():
        found = {"log-probabilities": model.token_log_probs(batch, z)}
    found["gradient of z"] = gradient_of_block(model, batch, z)
    model.zero_grad()
    predict_backward(model, z, batch, 1.0)
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return found | {"gradient of weights": torch.cat(gradients)}


def run_parity(options: argparse.Namespace, found: Result) -> None:
    device, cpu, double = torch.device(options.device), torch.device("cpu"), torch.float64
    for thoughts in ("attended", "fast-weights"):
        config = dataclasses.replace(PARITY, thoughts=thoughts)
        model, batch, z = model_and_batch(config, cpu, double)
        expected = quantities(model, batch, z)
        for precision in ("float32", "bfloat16"):
            here, texts, thought = model_and_batch(config, device, torch.float32)
            here.decoder.compute_dtype = torch.bfloat16 if precision == "bfloat16" else None
            values = quantities(here, texts, thought)
            found[f"{thoughts}, {precision}"] = {name: relative(values[name], expected[name]) for name in expected}
        by_scheme = {}
        for name in SCHEMES:
            if name == "amortized":  # it would need an encoder
                continue
            scheme = SCHEMES[name](num_steps=4)
            here, texts, _ = model_and_batch(config, device, torch.float32)
            # The same noise for both: that of the CPU.
            states = [infer(scheme, of, on, SequenceNoise(0)) for of, on in ((here, texts), (model, batch))]
            means = [scheme.mean(state) for state in states]
            by_scheme[name] = relative(*means)
        found[f"{thoughts}, schemes after 4 steps, float32"] = by_scheme
    q, k, v = (torch.randn(2, 4, 100, 16, dtype=double, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    q, k, v = (torch.roll(x, shift, 2) for shift, x in enumerate((q, k, v)))
    expected_attention = windowed_attention(q, k, v, 16)
    for precision in ("float32", "bfloat16"):
        inputs = (x.to(device, getattr(torch, precision)) for x in (q, k, v))
        found[f"attention, {precision}"] = relative(windowed_attention(*inputs, 16), expected_attention)


def run_waits(options: argparse.Namespace, found: Result) -> None:
    if options.device != "cuda":
        found["skipped"] = "nothing waits for a device on a CPU"
        return
    for inference in ("vi", "map"):
        step = step_of(options, "tiny", 4, inference)
        step.training()  # what is done once
        for what, work in {"fast step": step.fast, "slow step": step.slow, "training step": step.training}.items():
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in caught)
            found[f"{inference}, {what}"] = dict(places.most_common())


def step_of(
    options: argparse.Namespace, name: str, batch_size: int, inference: str = "vi", is_compiled: bool = False
) -> Step:
    precision = "float32" if options.toy else "bfloat16"
    settings = argparse.Namespace(device=options.device, precision=precision, compile=is_compiled)
    return Step(preset(name, inference, "whole"), batch_size, settings)


def run_speed(
    options: argparse.Namespace, found: Result, name: str, batch_size: int, is_compiled: bool = False
) -> None:
    device = torch.device(options.device)
    precision = "float32" if options.toy else "bfloat16"
    step = step_of(options, name, batch_size, is_compiled=is_compiled)
    with peak_memory(device) as peak:
        step.fast()
        step.slow()
    as_written = step_of(options, name, batch_size) if is_compiled else step  # operations are counted as written
    rate, rounds = matrix_rate(device, getattr(torch, precision)), 1 if options.toy else 20
    found["precision"], found["operations_per_second_of_products"], found["peak_memory_mb"] = precision, rate, peak[0]
    for what in ("fast", "slow"):
        seconds = median_seconds(getattr(step, what), rounds, device)
        operations = count(getattr(as_written, what))
        found[f"{what} step"] = {
            "milliseconds": 1e3 * seconds,
            "operations": operations,
            "share": operations / seconds / rate,
        }
    config = preset(name, "vi", "whole")
    milliseconds = config.fast_steps * found["fast step"]["milliseconds"] + found["slow step"]["milliseconds"]
    found["fast_steps"], found["tokens_per_second"] = config.fast_steps, 1e3 * step.batch.tokens.numel() / milliseconds


def run_kernels(
    options: argparse.Namespace, found: Result, name: str, batch_size: int, is_compiled: bool = False
) -> None:
    from torch.profiler import ProfilerActivity, profile

    step, is_cuda = step_of(options, name, batch_size, is_compiled=is_compiled), options.device == "cuda"
    step.fast()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        step.fast()
        if is_cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    times = {event.key[:120]: getattr(event, key) / 1e3 for event in profiler.key_averages()}
    largest = sorted(times.items(), key=lambda pair: -pair[1])[:15]
    found["milliseconds"] = {name: round(value, 3) for name, value in largest}
    found["all"] = sum(times.values())


def train(options: argparse.Namespace, out: Path, device: str, *more: str) -> list[str]:
    steps = "4" if options.toy else "30"
    common = ["--steps", steps, "--log-every", "1", "--checkpoint-every", "2", "--validation-sequences", "2"]
    small = ["--model.length", "256", "--validate-every", "1000"] if options.toy else []
    return [sys.executable, "-m", "ltm_pyro.train", *common, *small, "--device", device, "--out", str(out), *more]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["nats_per_token"] if "nats_per_token" in line else line["nll_nats_per_token"] for line in lines]


def run_training(options: argparse.Namespace, found: Result) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here, cpu, resumed = (Path(folder) / name for name in ("device", "cpu", "resumed"))

        def largest_difference(run: Path) -> float:
            return max(abs(x - y) for x, y in zip(losses(run), found["losses"], strict=True))

        started = time.perf_counter()
        subprocess.run(train(options, here, options.device), check=True, stdout=subprocess.PIPE)
        found["seconds"] = time.perf_counter() - started
        found["losses"] = losses(here)
        subprocess.run(train(options, cpu, "cpu"), check=True, stdout=subprocess.PIPE)
        found["largest_difference_from_cpu"] = largest_difference(cpu)
        with subprocess.Popen(train(options, resumed, options.device), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 3/"):
                    process.send_signal(signal.SIGKILL)
                    break
        subprocess.run(train(options, resumed, options.device, "--resume"), check=True, stdout=subprocess.PIPE)
        found["largest_difference_after_kill_and_resume"] = largest_difference(resumed)


def run_processes(options: argparse.Namespace, found: Result) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = train(options, Path(folder) / "run", options.device)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        subprocess.run([sys.executable, *launcher, *command[1:]], check=True, stdout=subprocess.PIPE)
        found["losses"] = losses(Path(folder) / "run")


def run_generation(options: argparse.Namespace, found: Result) -> None:
    device = torch.device(options.device)
    name, batch_size, lengths = ("tiny", 2, (8, 32)) if options.toy else ("small", 16, (64, 512))
    step = step_of(options, name, batch_size)
    z = torch.zeros(batch_size, *step.model.config.latent_shape, device=device)
    found["texts"] = batch_size

    def write(length: int, worth_a_graph: float) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        with mock.patch.object(graphs, "WORTH_A_GRAPH", worth_a_graph):
            return step.model.generate(z, length, sampling=Sampling(), generator=generator)

    for length in lengths:
        # Two lengths: what a graph costs once, and what it saves of every token.
        ways = {
            "without a graph": functools.partial(write, length, math.inf),
            "with": functools.partial(write, length, 0),
        }
        plain, graphed = (way() for way in ways.values())
        seconds = seconds_in_turns(dict(ways), 1 if options.toy else 3, device)
        found[f"{length} tokens"] = {
            "same_tokens": (plain == graphed).double().mean().item(),
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "tokens_per_second": {
                name: batch_size * length / statistics.median(values) for name, values in seconds.items()
            },
        }


def run_reference(options: argparse.Namespace, found: Result) -> None:
    if not options.reference:
        found["skipped"] = "no --reference"
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        script = str(HERE.with_name("vs_reference.py"))
        command = [sys.executable, script, "--reference", options.reference, "--device", options.device]
        command += ["--eval-rounds", "0", "--without-memory"]
        command += [] if options.toy else ["--batch-size", "32", "--precision", "bfloat16", "--compile"]
        subprocess.run([*command, "--json", str(out)], check=True, stdout=subprocess.PIPE)
        found["times"] = json.loads(out.read_text())


def run_corpus(options: argparse.Namespace, found: Result) -> None:
    if not options.corpus:
        found["skipped"] = "no --corpus"
        return
    tokenizer = json.loads((Path(options.corpus) / MANIFEST).read_text())["tokenizer"]
    common = ["--data", options.corpus, "--tokenizer", tokenizer, "--device", options.device, "--log-every", "10"]
    common += ["--validate-every", "100000", "--checkpoint-every", "100000"]
    sizes = ["--preset", "small", "--steps", "150", "--batch-size", "64", "--validation-sequences", "64"]
    sizes += ["--optimizer.learning-rate", "2e-3", "--optimizer.warmup-steps", "30"]
    if options.toy:
        sizes = ["--preset", "tiny", "--steps", "4", "--batch-size", "4", "--model.length", "256"]
    with tempfile.TemporaryDirectory() as folder:
        for name, choice in {"past": ["--infer-from", "past"], "none": ["--inference", "none"]}.items():
            out = Path(folder) / name
            command = [sys.executable, "-m", "ltm_pyro.train", *choice, *sizes, *common, "--out", str(out)]
            subprocess.run(command, check=True, stdout=subprocess.PIPE)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if line["split"] == "train"]
            keys = ("estimator", "posterior", "fast_steps", "nats_per_token", "bits_per_byte", "num_tokens")
            found[name] = {
                "steps": steps[-1]["step"],
                "seconds": steps[-1]["seconds"],
                "tokens_per_second": steps[-1]["tokens_per_second"],
                "held_out": [{key: line.get(key) for key in keys} for line in lines if line["split"] == "report"],
            }


def run_windows(options: argparse.Namespace, found: Result) -> None:
    for name, values in windows.compare(torch.device(options.device), options.toy).items():
        found[name] = values


def of_size(part: Callable[..., None], name: str, batch_size: int, **settings: bool) -> Part:
    """A part that a toy run takes at the smallest size."""
    return lambda options, found: part(
        options, found, *(("tiny", 2) if options.toy else (name, batch_size)), **settings
    )


PARTS: dict[str, tuple[Part, int]] = {
    "machine": (run_machine, 20),
    "parity": (run_parity, 45),
    "waits": (run_waits, 20),
    "speed small 64": (of_size(run_speed, "small", 64), 35),
    "compiled small 64": (of_size(run_speed, "small", 64, is_compiled=True), 90),
    "speed large 64": (of_size(run_speed, "large", 64), 45),
    "compiled large 64": (of_size(run_speed, "large", 64, is_compiled=True), 120),
    "kernels small 64": (of_size(run_kernels, "small", 64, is_compiled=True), 40),
    "training": (run_training, 120),
    "speed small 8": (of_size(run_speed, "small", 8), 25),
    "speed large 8": (of_size(run_speed, "large", 8), 25),
    "generation": (run_generation, 60),
    "windows": (run_windows, 25),
    "processes": (run_processes, 40),
    "reference": (run_reference, 120),
    "corpus": (run_corpus, 240),
}
"""The parts, in their order, and how long each may take [seconds]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="file that lines are added to")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="time for all parts together")
    parser.add_argument("--reference", help="folder of a clone of the published implementation")
    parser.add_argument("--corpus", help="folder of a corpus that python -m ltm_pyro.prepare has written")
    parser.add_argument("--toy", action="store_true", help="the smallest sizes, and ten minutes for each part")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        found = Result()
        found.path = Path(options.out)
        with pyro.validation_enabled(False):
            PARTS[options.only][0](options, found)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    end = math.inf if options.toy else time.perf_counter() + options.seconds
    for name in options.parts:
        left = end - time.perf_counter()
        result = {"status": "no time left"} if left < 0 else result_of(name, options, left)
        line = json.dumps({"part": name, **result})
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        print(line[:400], flush=True)


def result_of(name: str, options: argparse.Namespace, at_most: float) -> dict[str, Any]:
    """What a part finds in a process of its own within so many seconds and its limit, or how it failed."""
    limit, started = min(600 if options.toy else PARTS[name][1], at_most), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(HERE), "--only", name, "--out", str(out), "--device", options.device]
        command += ["--reference", options.reference] if options.reference else []
        command += ["--corpus", str(Path(options.corpus).absolute())] if options.corpus else []
        command += ["--toy"] if options.toy else []
        # In a group of its own, so that a part that is cut off takes along what it has started.
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, errors = process.communicate(timeout=limit)
            status = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate()
            status = "out of time"
        except BaseException:  # Ctrl-C or a signal reaches this process alone
            os.killpg(process.pid, signal.SIGKILL)
            raise
        result = {"status": status, "seconds": round(time.perf_counter() - started, 1)}
        result["result"] = json.loads(out.read_text()) if out.exists() else {}
        return result if status == "done" else result | {"error": errors[-2000:]}


if __name__ == "__main__":
    main()
