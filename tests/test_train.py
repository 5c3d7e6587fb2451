from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ltm_pyro
from ltm_pyro import cli, config, evaluate, prepare, train
from ltm_pyro.config import preset
from ltm_pyro.evaluation import figures
from ltm_pyro.inference import SCHEMES, svi
from ltm_pyro.inference.objectives import OBJECTIVES, prefix
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import LatentThoughtModel
from ltm_pyro.runs.run import Run
from ltm_pyro.runs.trained import compute_dtype
from ltm_pyro.training import loop
from ltm_pyro.training.progress import ProgressDisplay

FEW = "--estimators elbo --num-samples 2"
MORE = "--micro-batch-size 2 --fast-steps 2 --log-every 1 --validation-sequences 4 --validation-samples 4"


@pytest.fixture(scope="module")
def small(tiny_options: list[str], short_fits: None) -> list[str]:
    """Options of a tiny model, in two micro-batches a step."""
    return [*tiny_options, *shlex.split(MORE)]


@pytest.fixture
def text(tmp_path: Path, write_text: Callable[[Path], Path]) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def command(
    small: list[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process and in an empty folder: (exit status, standard output, standard error)."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args: str, data: str | None = str(text)) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.run(train.main, [*small, *(["--data", data] if data else []), *args])
        return exit.value.code, *capsys.readouterr()

    return run


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def test_a_run_in_bfloat16_computes_in_it_wherever_it_is_read(command):
    status, _, _ = command("--precision", "bfloat16", "--steps", "2", "--out", "run")
    assert status == 0
    assert {weight.dtype for weight in final_weights(Path("run")).values()} == {torch.float32}
    assert ltm_pyro.load("run").model.decoder.compute_dtype == torch.bfloat16
    assert all(record["valid_bound"] for record in records(Path("run")))
    assert command("--out", "run", "--resume", "--precision", "float32", data=None)[0] == 2


def test_a_gpu_whose_memory_is_full_is_told_of_in_one_line_and_fewer_sequences_go_on(command, monkeypatch):
    steps = loop.slow_step

    def full(training, stop):
        if training.progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd much more.")
        return steps(training, stop)

    monkeypatch.setattr(loop, "slow_step", full)
    options = ("--steps", "4", "--batch-size", "4", "--checkpoint-every", "100", "--out", "run")
    status, _, err = command(*options)
    assert (status, err.count("\n")) == (1, 1)
    assert "full with 2 sequences at a time" in err
    assert "--out run --resume --micro-batch-size 1 (CUDA out of memory. Tried to allocate 2.00 GiB.)" in err
    assert Run(Path("run")).newest_checkpoint().name.endswith("2")
    monkeypatch.setattr(loop, "slow_step", steps)
    assert command("--out", "run", "--resume", "--micro-batch-size", "1", data=None)[0] == 0
    assert records(Path("run"))[-1]["step"] == 4


def test_a_gpu_computes_in_bfloat16_unless_it_is_told_otherwise(monkeypatch):
    """The choice alone; this machine may have no GPU."""
    cuda, cpu, half = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    for has_it, chosen in ((True, half), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it, **_: has_it)
        assert [compute_dtype(name, cuda) for name in ("auto", "float32", "bfloat16")] == [chosen, None, half]
        assert [compute_dtype(name, cpu) for name in ("auto", "float32", "bfloat16")] == [None, None, half]


def test_report_and_evaluate_score_nothing_that_a_checkpoint_was_chosen_by(command, monkeypatch):
    """Of the same corpus, whether it is named or not, and as a path that is spelt in another way."""
    seen, score = [], figures.score

    def recording(model, batches, *args):
        batches = list(batches)
        seen.append({number for batch in batches for number in batch.sequence_ids.tolist()})
        return score(model, batches, *args)

    monkeypatch.setattr(figures, "score", recording)
    assert command("--steps", "4", "--validate-every", "2", "--out", "run")[0] == 0
    validated, *reports = seen
    assert validated
    assert all(report and not report & validated for report in reports)
    data = ltm_pyro.load("run").config.data
    for own in ((), ("--data", data), ("--data", f"{Path(data).parent}/../{Path(data).parent.name}/{Path(data).name}")):
        seen.clear()
        with pytest.raises(SystemExit) as exit:
            cli.run(evaluate.main, ["run", "--device", "cpu", "--num-sequences", "0", *shlex.split(FEW), *own])
        assert exit.value.code == 0
        (scored,) = seen
        assert scored
        assert not scored & validated
    seen.clear()
    other = Path(data).with_name("other.txt")
    other.write_text(Path(data).read_text() + "One sentence more.\n")
    with pytest.raises(SystemExit):
        cli.run(
            evaluate.main, ["run", "--device", "cpu", "--num-sequences", "0", "--data", str(other), *shlex.split(FEW)]
        )
    assert seen[0] > validated


@pytest.mark.parametrize(
    ("values", "explained"),
    [((3.0, 2.5, 2.0), []), ((3.0, 3.5, 2.0), [(1, 1)]), ((2.0, 3.0, 2.5), [(1, 1), (2, 1)])],
)
def test_a_rise_of_the_held_out_figure_is_explained(command, monkeypatch, values, explained):
    """Figures of so many nats a token after steps 1, 2 and 3."""
    held_out, left = loop.held_out, list(values)

    def scored(*args):
        figure = held_out(*args)
        nats = left.pop(0) if left else 2.0
        parts = {key: dataclasses.replace(part, nats=nats * part.num_tokens) for key, part in figure.documents.items()}
        return dataclasses.replace(figure, documents=parts)

    monkeypatch.setattr(loop, "held_out", scored)
    status, out, _ = command("--steps", "4", "--validate-every", "1")
    assert status == 0
    lines = out.splitlines()
    shown = [number for number, line in enumerate(lines) if "held-out text, " in line]
    found = {number: line for number, line in enumerate(lines) if "it was lower after step" in line}
    assert list(found) == [shown[number] + 1 for number, _ in explained]
    for (_, step), line in zip(explained, found.values(), strict=True):
        assert f"lower after step {step}:" in line


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_trains_and_writes_a_run(scheme, command):
    status, out, _ = command(f"--inference={scheme}", "--steps", "6", "--validate-every", "3")
    assert status == 0
    run = Path("runs") / f"text-tiny-{scheme}"
    assert (run / "config.yaml").is_file()
    steps = [record for record in records(run) if record["split"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, 7))
    nullable = {"nelbo_nats_per_token", "kl_nats_per_token", "bits_per_byte", "perplexity"}
    has_density = SCHEMES[scheme].has_density
    for record in steps:
        assert record["tokens_seen"] > 0
        assert math.isfinite(record["nll_nats_per_token"])
        assert {"learning_rate", "fast_steps", "tokens_per_second", "seconds"} <= record.keys()
        assert all((record[key] is None) == (not has_density) for key in nullable)
        assert record["valid_bound"] == has_density
        assert ("neg_log_joint_nats_per_token" in record) == (not has_density)
    own = scheme if has_density else f"a Gaussian around {scheme}"
    (validated,) = [record for record in records(run) if record["split"] == "validation"]
    assert (validated["step"], validated["posterior"]) == (3, own)
    report = [record for record in records(run) if record["split"] == "report"]
    assert [record["posterior"] for record in report] == list(dict.fromkeys([own, "vi", "the prior"]))
    held_out = [validated, *report]
    for record in held_out:
        assert record["valid_bound"]
        assert record["estimator"] == "elbo"
        parts = record["nll_nats_per_token"] + record["kl_nats_per_token"]
        assert record["nelbo_nats_per_token"] == pytest.approx(parts)
        assert record["perplexity"] == pytest.approx(math.exp(record["nelbo_nats_per_token"]))
        assert record["fast_steps"] == (0 if record["posterior"] == "the prior" else 2)
    assert held_out[-1]["kl_nats_per_token"] == 0
    assert "the prior" in out
    assert ltm_pyro.load(run).config.inference == scheme


def test_without_data_the_embedded_corpus_is_trained_on(command):
    status, out, _ = command("--steps", "2", data=None)
    assert status == 0
    run = Path("runs/python-docs-tiny-vi")
    assert [record["step"] for record in records(run) if record["split"] == "train"] == [1, 2]
    assert "held-out text of python-docs" in out
    assert ltm_pyro.load(run).config.data == "python-docs"


def test_the_baseline_without_z_trains_by_the_same_command_and_its_figures_are_exact(command):
    no_z = ["--inference=none", "--model.num-slots", "0", "--fast-steps", "0"]
    status, out, _ = command(*no_z, "--steps", "4", "--validate-every", "2")
    assert status == 0
    run = Path("runs/text-tiny-none")
    assert {record["estimator"] for record in records(run)} == {"exact"}
    assert all(record["valid_bound"] for record in records(run))
    assert all(record["kl_nats_per_token"] == 0 for record in records(run))
    (report,) = [record for record in records(run) if record["split"] == "report"]
    assert (report["posterior"], report["num_samples"], report["fast_steps"]) == (None, 1, 0)
    assert "no z" in out
    assert "the prior" not in out
    assert not any("cross_attention" in name for name in final_weights(run))
    assert ltm_pyro.load(run).config.model.num_slots == 0


def test_an_encoder_is_trained_saved_and_compared_with_vi_that_takes_steps(command):
    """Trained without refinement; the four steps of VI are the preset's own."""
    status, _, _ = command("--inference=amortized", "--fast-steps", "0", "--steps", "3", "--out", "run")
    assert status == 0
    run = Path("run")
    report = [record for record in records(run) if record["split"] == "report"]
    assert [(record["posterior"], record["fast_steps"]) for record in report] == [
        ("amortized", 0),
        ("vi", 4),
        ("the prior", 0),
    ]
    weights, loaded = final_weights(run), ltm_pyro.load(run)
    assert loaded.config.model.encoder_layers == 2
    # At the start the head is zero, and the prior is what it proposes.
    assert (weights["encoder.head.weight"] != 0).any()
    for name, weight in loaded.model.encoder.state_dict().items():
        assert weight.equal(weights[f"encoder.{name}"]), name


@pytest.mark.parametrize("fast_steps", ["0", "2"])
def test_an_encoder_sees_no_more_of_a_text_than_inference_does(fast_steps, command, monkeypatch):
    """Neither where inference starts nor in the guide, each of which asks it once for every micro-batch."""
    encode, random_prefix = LatentThoughtModel.encode, prefix.random_prefix
    wholes, prefixes, seen = [], [], []

    def recorded_prefix(batch, rng):
        wholes.append(batch.weights)
        prefixes.append(random_prefix(batch, rng))
        return prefixes[-1]

    def recorded_encode(self, batch):
        seen.append(batch.weights)
        return encode(self, batch)

    monkeypatch.setattr(prefix, "random_prefix", recorded_prefix)
    monkeypatch.setattr(LatentThoughtModel, "encode", recorded_encode)
    monkeypatch.setattr(train, "report", lambda *args: None)
    args = ("--inference=amortized", "--fast-steps", fast_steps, "--infer-from", "prefix", "--steps", "3")
    assert command(*args)[0] == 0
    assert len(prefixes) == 3 * 2
    expected = [evidence.weights for evidence in prefixes for _ in range(2)]
    assert len(seen) == len(expected)
    assert all(weights.equal(evidence) for weights, evidence in zip(seen, expected, strict=True))
    assert sum(map(torch.sum, wholes)) > sum(evidence.weights.sum() for evidence in prefixes)


def test_an_encoder_that_is_not_finite_costs_the_step(command, monkeypatch):
    encode, calls = LatentThoughtModel.encode, []

    def failing_encode(self, batch):
        calls.append(batch)
        mean, log_scale = encode(self, batch)
        # Of two micro-batches a step and two calls each, in the second step.
        return (mean * math.nan if 4 < len(calls) <= 8 else mean), log_scale

    monkeypatch.setattr(LatentThoughtModel, "encode", failing_encode)
    assert command("--inference=amortized", "--fast-steps", "0", "--steps", "4", "--out", "run")[0] == 0
    counts = [record["num_skipped_steps"] for record in records(Path("run")) if record["split"] == "train"]
    assert counts == [0, 1, 1, 1]
    assert all(weight.isfinite().all() for weight in final_weights(Path("run")).values())


def test_the_same_command_twice_numbers_its_folders_and_gives_the_same_weights(command):
    for _ in range(2):
        assert command("--steps", "2")[0] == 0
    first, second = Path("runs/text-tiny-vi"), Path("runs/text-tiny-vi-2")
    other = final_weights(second)
    assert all(torch.equal(weight, other[name]) for name, weight in final_weights(first).items())


def signal_in(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGTERM when the training command calls its function of this name for this time."""
    (module,) = (module for module in (loop, prefix) if hasattr(module, name))
    function, calls = getattr(module, name), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(module, name, interrupted)


@pytest.fixture(scope="module")
def whole_run(
    small: list[str], write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[str], Path]]:
    """Arguments, and the folder of a run with them that nothing happened to; one run for each scheme."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text.txt")

    @functools.cache
    def run(scheme: str) -> tuple[list[str], Path]:
        objective = ["past", "--block-size", "9"] if scheme == "map" else ["prefix"]
        args = ["--inference", scheme, "--steps", "7", "--infer-from", *objective, "--validate-every", "3"]
        data = ["--data", str(folder / "text.txt")]
        assert train.main([*small, *data, *args, "--out", str(folder / scheme)]) == 0
        return args, folder / scheme

    return run


@pytest.mark.parametrize(
    ("scheme", "name", "call", "step"),
    [
        ("vi", "slow_step", 4, 3),  # and a validation is due at 3
        ("map", "slow_step", 5, 4),
        ("langevin", "random_prefix", 9, 4),  # between the two micro-batches of step 5, which is taken again
        ("amortized", "slow_step", 4, 3),
        ("vi", "held_out", 1, 3),
        ("vi", "held_out", 3, 7),  # in the closing report
        ("vi", "train_record", 3, 3),
        ("vi", "save", 1, 0),
    ],
)
def test_a_run_that_was_stopped_anywhere_and_resumed_ends_bit_for_bit_as_one_that_was_not(
    scheme, name, call, step, command, whole_run, monkeypatch
):
    args, whole_folder = whole_run(scheme)
    with monkeypatch.context() as patch:
        signal_in(name, call, patch)
        status, out, _ = command(*args, "--out", "the parts")
    assert status == 128 + signal.SIGTERM
    assert f"the parts/checkpoints/step-{step:08d}" in out
    assert "--out 'the parts' --resume" in out
    # What a crash leaves behind: lines of steps that will be taken again, one of them cut short.
    with open("the parts/metrics.jsonl", "a") as file:
        file.write('{"step": 8, "split": "train"}\n{"step": 6, "spl')
    assert command(*args, "--out", "the parts", "--resume")[0] == 0
    assert command(*args, "--out", "the parts", "--resume")[0] == 0  # a finished run only writes its report again

    whole, parts = final_weights(whole_folder), final_weights(Path("the parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    timing = {"seconds", "tokens_per_second"}
    without_timing = [
        [{key: value for key, value in record.items() if key not in timing} for record in records(run)]
        for run in (whole_folder, Path("the parts"))
    ]
    assert without_timing[0] == without_timing[1]


@pytest.mark.parametrize(
    ("of_processor", "warns"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        (None, False),
    ],
)
def test_bfloat16_without_instructions_for_it_is_warned_of(command, monkeypatch, of_processor, warns):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if of_processor is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: of_processor, raising=False)
    status, _, err = command("--steps", "1", "--precision", "bfloat16")
    assert status == 0
    assert err.count("no instructions for bfloat16") == warns
    assert command("--steps", "1", "--precision", "float32")[2] == ""


def test_a_run_that_has_all_its_steps_says_so_when_it_is_resumed(command):
    status, out, _ = command("--steps", "2", "--fast-steps", "1", "--out", "run")
    assert status == 0
    assert "with 1 fast step;" in out
    assert "Below is the loss of single steps" in out
    status, out, _ = command("--steps", "2", "--fast-steps", "1", "--out", "run", "--resume")
    assert status == 0
    assert "All 2 steps are taken already; --resume --steps N takes more, to N in all." in out
    assert "Below is the loss" not in out


def test_the_time_left_is_by_all_steps(capsys):
    """And not by the last ones, which may have been slow because of something else."""
    display = ProgressDisplay(0, 100, has_bar=False)
    record = {"bits_per_byte": 1.0, "nelbo_nats_per_token": 1.0, "tokens_per_second": 1.0}
    for _ in range(9):
        display.step(None, 1.0)
    display.step({**record, "step": 10}, 11.0)
    assert capsys.readouterr().out.endswith("3 min 00 s left\n")  # 90 steps of 20 s / 10


def test_resume_may_take_more_steps_and_goes_on_from_the_last(command):
    assert command("--steps", "2", "--out", "run")[0] == 0
    assert command("--steps", "4", "--out", "run", "--resume")[0] == 0
    assert [r["step"] for r in records(Path("run")) if r["split"] == "train"] == [1, 2, 3, 4]


def test_gradients_accumulate_to_those_of_the_whole_batch(small, text, tmp_path, monkeypatch):
    """Without noise (MAP), micro-batches of 1, 2 and 4 sequences end at the same weights but for rounding."""
    weights = []
    for size in ("1", "2", "4"):
        run = tmp_path / size
        args = [*small, "--data", str(text), "--inference", "map", "--steps", "1", "--micro-batch-size", size]
        assert train.main([*args, "--out", str(run), "--optimizer.warmup-steps", "1"]) == 0
        weights.append(final_weights(run))
    for name, weight in weights[0].items():
        # One step of AdamW moves a weight by at most the learning rate, 2e-3; by rounding it should not move at all.
        for other in weights[1:]:
            assert (weight - other[name]).abs().max() < 2e-5


BAD_INPUT = {
    "unknown scheme": (["--inference", "nuts"], "nuts"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "unknown option": (["--widht", "3"], "--widht"),
    "unknown tokenizer": (["--tokenizer", "gpt17"], "gpt17"),
    "missing file": (["--data", "missing.txt"], "missing.txt"),
    "empty file": (["--data", "empty.txt"], "empty.txt"),
    "not text": (["--data", "binary.txt"], "binary.txt"),
    "too short": (["--data", "short.txt"], "tokens"),
    "zero steps": (["--steps", "0"], "--steps"),
    "negative steps": (["--steps", "-3"], "--steps"),
    "no number": (["--steps", "many"], "--steps"),
    "negative fast steps": (["--fast-steps", "-1"], "--fast-steps"),
    "zero batch": (["--batch-size", "0"], "--batch-size"),
    "zero width": (["--model.width", "0"], "width"),
    "slots of a model without z": (["--inference", "none"], "num-slots"),
    "a model with z that has no slots": (["--model.num-slots", "0"], "num-slots"),
    "thinking without z": (["--inference", "none", "--model.num-slots", "0"], "fast-steps"),
    "amortised without an encoder": (["--inference", "amortized", "--model.encoder-layers", "0"], "encoder-layers"),
    "an encoder that is not trained": (["--inference", "vi", "--model.encoder-layers", "1"], "encoder-layers"),
    "amortised without z": (["--inference", "amortized", "--model.num-slots", "0"], "num-slots"),
    "negative encoder": (["--inference", "amortized", "--model.encoder-layers", "-1"], "--model.encoder-layers"),
    "negative slots": (["--model.num-slots", "-1"], "--model.num-slots"),
    "width and heads": (["--model.num-heads", "3"], "width"),
    "zero window": (["--model.window", "0"], "window"),
    "seed too large": (["--seed", "4294967296"], "--seed"),
    "huge learning rate": (["--optimizer.learning-rate", "1e40"], "--optimizer.learning-rate"),
    "name too long": (["--data", "x" * 300], "x"),
    "no such home": (["--data", "~nobody-of-that-name/x"], "nobody"),
    "negative learning rate": (["--optimizer.learning-rate", "-1"], "--optimizer.learning-rate"),
    "not a learning rate": (["--vi.learning-rate", "nan"], "--vi.learning-rate"),
    "zero chains": (["--inference", "langevin", "--langevin.num-chains", "0"], "--langevin.num-chains"),
    "zero leapfrogs": (["--inference", "hmc", "--hmc.num-leapfrogs", "0"], "--hmc.num-leapfrogs"),
    "negative friction": (["--inference", "underdamped", "--underdamped.friction", "-1"], "--underdamped.friction"),
    "negative VI steps": (["--inference", "mala", "--mala.vi-steps", "-1"], "--mala.vi-steps"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "blocks of nothing": (["--infer-from", "past", "--block-size", "0"], "--block-size"),
    "the past by an encoder of texts": (
        ["--inference", "amortized", "--infer-from", "past", "--model.encoder-reads", "text"],
        "--model.encoder-reads",
    ),
    "an encoder of blocks without any": (["--model.encoder-reads", "block"], "--model.encoder-reads"),
    "the past without z": (["--inference", "none", "--model.num-slots", "0", "--infer-from", "past"], "--infer-from"),
    "thoughts without z": (
        ["--inference", "none", "--model.num-slots", "0", "--model.thoughts", "fast-weights"],
        "--model.thoughts",
    ),
    "more fast weights than units": (
        ["--model.thoughts", "fast-weights", "--model.num-slots", "99"],
        "--model.num-slots",
    ),
    "blocks that do not move z": (["--inference", "map", "--map.block-step", "0"], "--map.block-step"),
    "resume without folder": (["--resume"], "--out"),
    "resume of nothing": (["--resume", "--out", "nothing"], "nothing"),
    "folder in use": (["--out", "used"], "used"),
    "out is a file": (["--out", "empty.txt"], "empty.txt"),
}


@pytest.mark.parametrize(("args", "mentioned"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing_behind(args, mentioned, command):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(bytes(range(256)) * 20)
    Path("short.txt").write_text("A word.")
    Path("used").mkdir()
    Path("used/notes").write_text("mine")
    before = sorted(Path(".").rglob("*"))
    status, _, err = command(*args)
    assert status == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert mentioned in err
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none_is_bad_input(command):
    status, _, err = command("--device", "cuda")
    assert (status, len(err.splitlines())) == (2, 1)


def test_a_folder_that_holds_a_run_is_not_written_to_without_resume(command):
    assert command("--steps", "1", "--out", "run")[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    status, _, err = command("--steps", "1", "--out", "run")
    assert status == 2
    assert "--resume" in err
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_resume_under_other_settings_is_bad_input(command):
    assert command("--steps", "1", "--out", "run")[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    others = {
        "--model.width": "32",
        "--inference": "map",
        "--preset": "small",
        "--seed": "3",
        "--vi.stride": "2",
        "--block-size": "7",
    }
    for option, value in others.items():
        status, _, err = command("--out", "run", "--resume", option, value)
        assert (status, len(err.splitlines())) == (2, 1)
        assert option in err
        assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_a_resumed_run_is_locked_before_its_settings_are_read(command, monkeypatch):
    assert command("--steps", "2", "--out", "run")[0] == 0

    @contextlib.contextmanager
    def locked_after_another_process_took_more_steps(folder: Path) -> Iterator[None]:
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("\nsteps: 2\n", "\nsteps: 3\n"))
        yield

    monkeypatch.setattr(train, "locked", locked_after_another_process_took_more_steps)
    assert command("--out", "run", "--resume")[0] == 0
    assert "\nsteps: 3\n" in Path("run/config.yaml").read_text()
    assert records(Path("run"))[-1]["step"] == 3


def test_resume_without_a_checkpoint_or_on_another_text_is_bad_input(command, text):
    assert command("--steps", "1", "--out", "run")[0] == 0
    text.write_text(text.read_text() + "One sentence more.\n")
    status, _, err = command("--out", "run", "--resume")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "corpus" in err
    Path("run/checkpoints").rename("elsewhere")
    status, _, err = command("--out", "run", "--resume")
    assert status == 2
    assert "no checkpoint" in err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file", "set", "prepared"])
def test_a_run_goes_on_and_is_scored_wherever_its_corpus_lies(command, kind, text, monkeypatch, tmp_path, run_main):
    """The hash says what the corpus is, and not the path, which is relative or leads nowhere any more."""
    Path("texts").mkdir()
    text.rename("texts/train.txt")
    Path("texts/validation.txt").write_text("This is held out. " * 20)
    data = {"file": "texts/train.txt", "folder": "texts", "set": "lm1b=texts", "prepared": "prepared"}[kind]
    if kind == "prepared":
        assert run_main(prepare.main, "texts", "--out", "prepared")[0] == 0
    assert command("--steps", "1", "--out", "run", data=data)[0] == 0
    Path("else/where").mkdir(parents=True)
    monkeypatch.chdir("else/where")
    run = "../../run"
    status, out, _ = command("--steps", "2", "--out", run, "--resume", data=None)
    assert status == 0
    assert "continuing after step 1" in out
    of_run = score(run_main, run)
    # Where it lies now, it is still what the run was trained on, and only what is held out of it is scored.
    prefix, path = ("lm1b=", "texts") if kind == "set" else ("", data)
    Path(f"../../{path}").rename(f"moved{Path(path).suffix}")
    moved = f"{prefix}moved{Path(path).suffix}"
    assert score(run_main, run, "--data", moved) == of_run
    status, _, err = command("--steps", "3", "--out", run, "--resume", data=None)
    assert (status, len(err.splitlines())) == (2, 1)
    assert command("--steps", "3", "--out", run, "--resume", data=moved)[0] == 0
    assert score(run_main, run)["num_sequences"] == of_run["num_sequences"]


def score(run_main, run: str, *options: str) -> dict:
    """What `evaluate` says was scored."""
    assert run_main(evaluate.main, run, *options, "--json", "figures.json")[0] == 0
    figure = json.loads(Path("figures.json").read_text())["figures"][0]
    return {key: figure[key] for key in ("data_sha256", "num_sequences", "num_tokens")}


def test_fewer_steps_than_were_taken_are_refused(command):
    assert command("--steps", "3", "--out", "run")[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    status, _, err = command("--steps", "1", "--out", "run", "--resume")
    assert (status, err) == (2, "error: --steps 1: run has taken 3 steps already; give no fewer\n")
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def poison(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the gradient of the slow steps with these numbers not a number."""
    update, calls = svi.WeightOptimizer.update, []

    def poisoned_update(self: svi.WeightOptimizer, step: int, is_usable: bool = True) -> bool:
        calls.append(step)
        if len(calls) in steps:
            self.weights[0].grad[0, 0] = math.nan
        return update(self, step, is_usable)

    monkeypatch.setattr(svi.WeightOptimizer, "update", poisoned_update)


def test_a_step_that_is_not_finite_is_skipped_and_counted(command, monkeypatch):
    poison({2, 3}, monkeypatch)
    assert command("--steps", "5", "--out", "run")[0] == 0
    counts = [record["num_skipped_steps"] for record in records(Path("run")) if record["split"] == "train"]
    assert counts == [0, 1, 2, 2, 2]
    assert all(weight.isfinite().all() for weight in final_weights(Path("run")).values())


def test_several_such_steps_in_a_row_stop_the_run_at_the_last_good_checkpoint(command, monkeypatch):
    poison(set(range(4, 100)), monkeypatch)
    status, _, err = command("--steps", "50", "--checkpoint-every", "2", "--out", "run")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "not finite" in err
    assert "step-00000002" in err  # step 4 was the first to be skipped, and is not saved
    named = Path(err.split("last good checkpoint is ")[1].strip())
    assert all(weight.isfinite().all() for weight in load_file(named / "model.safetensors").values())
    assert ltm_pyro.load("run").config.steps == 50


def test_single_fast_steps_that_are_not_finite_do_not_cost_the_slow_step(command, monkeypatch):
    """One fast step of every sequence fails, the others hold."""
    step, calls = VI.step, []

    def failing_step(self, model, state, batch, rng):
        new, info = step(self, model, state, batch, rng)
        if int(state.step[0]) == 1:
            calls.append(1)
            new = dataclasses.replace(new, mean=torch.full_like(new.mean, math.nan))
        return new, info

    monkeypatch.setattr(VI, "step", failing_step)
    assert command("--steps", "3", "--fast-steps", "4", "--out", "run")[0] == 0
    steps = [record for record in records(Path("run")) if record["split"] == "train"]
    assert [record["num_skipped_fast_steps"] for record in steps] == [4, 4, 4]
    assert steps[-1]["num_skipped_steps"] == 0


def test_inference_that_is_never_finite_stops_the_run_too(command):
    status, _, err = command("--inference", "langevin", "--langevin.step-size", "1e38", "--steps", "50", "--out", "run")
    assert status == 1
    assert "not finite" in err


def test_a_reader_that_goes_away_does_not_cost_the_run(small, text, tmp_path):
    args = [sys.executable, "-u", "-m", "ltm_pyro.train", *small, "--data", str(text), "--steps", "100000"]
    process = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 1
    checkpoints = sorted(path.name for path in (tmp_path / "runs/text-tiny-vi/checkpoints").iterdir())
    assert checkpoints[-1] > "step-00000002"
    assert ltm_pyro.load(tmp_path / "runs/text-tiny-vi").config.steps == 100_000


def test_what_defaults_depend_on_may_be_written_with_underscores():
    for objective in ("whole", "past"):
        dashes, underscores = (
            train.parse(["--preset", "small", f"--infer{sign}from={objective}", f"--model.hidden={1000}"])
            for sign in ("-", "_")
        )
        assert dashes == underscores
        assert dashes.model.num_slots == (1000 if objective == "past" else 8)


def test_help_explains_every_option(command, capsys):
    status, out, _ = command("--help-all")
    assert status == 0
    shown = "".join(out.replace("│", "").split())
    default = config.preset("tiny", "vi", "whole")
    for name in config.flat(config.to_dict(default)):
        is_of_another = name.partition(".")[0] in {*SCHEMES, *OBJECTIVES} - {"vi"}
        assert (config.option_of(name) in shown) != is_of_another
    for name in [*SCHEMES, "none", *OBJECTIVES]:
        assert f"{name}:" in shown
    assert "--past" not in shown
    assert "schemes" not in shown
    assert "objectives" not in shown
    assert "num-steps" not in shown


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_saves_a_checkpoint_and_says_where(number, small, text, tmp_path):
    args = [sys.executable, "-u", "-m", "ltm_pyro.train", *small, "--data", str(text), "--steps", "100000"]
    process = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ""
    saved = out.split("saved ")[1].split(";")[0]
    assert ltm_pyro.load(tmp_path / "runs/text-tiny-vi").config.steps == 100_000
    assert (tmp_path / saved / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_first_command_learns_to_half_of_the_entropy_of_single_bytes_and_thinking_helps(tmp_path):
    args = [sys.executable, "-m", "ltm_pyro.train"]
    result = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, check=True)
    run = tmp_path / "runs/python-docs-tiny-map"
    entropy = float(result.stdout.split("single bytes: ")[1].split()[0])
    thinking, without = (record for record in records(run) if record["split"] == "report")
    assert (thinking["fast_steps"], without["fast_steps"]) == (1, 0)
    assert thinking["valid_bound"]
    assert thinking["bits_per_byte"] <= 0.5 * entropy
    assert thinking["bits_per_byte"] < without["bits_per_byte"] - 0.03
    gain = float(result.stdout.split("thinking changes the code length by ")[1].split()[0])
    assert gain == pytest.approx(thinking["bits_per_byte"] - without["bits_per_byte"], abs=1e-4)


def test_a_run_starts_from_the_settings_of_another_or_a_part_of_them(command):
    assert command("--steps", "1", "--out", "run")[0] == 0
    before, _ = Run(Path("run")).read_config()
    again = train.parse(["--config", "run/config.yaml"])
    assert dataclasses.replace(again, out=before.out, config=None) == before
    Path("part.yaml").write_text("inference: vi\ninfer_from: whole\nsteps: 7\nmodel: {width: 16}\nvi: {stride: 2}\n")
    config = train.parse(["--config", "part.yaml", "--seed", "3", "--steps", "9"])
    assert (config.inference, config.infer_from, config.model.width, config.seed) == ("vi", "whole", 16, 3)
    assert config.steps == 9  # options come above the file
    assert config.schemes["vi"].stride == 2
    assert config.model.num_layers == preset("tiny", "vi", "whole").model.num_layers


@pytest.mark.parametrize(
    ("contents", "mentioned"),
    [
        (None, "there is no such file"),
        ("stepz: 3", "unknown [stepz]"),
        ("steps: many", "steps is 'many'"),
        ("model: 3", "cannot be read"),
        ("- 3", "holds no settings"),
        ("[", "cannot be read"),
        ("model: {width: 7}", "width 7"),
    ],
)
def test_a_file_that_holds_no_settings_is_bad_input(contents, mentioned, command):
    if contents is not None:
        Path("x.yaml").write_text(contents + "\n")
    status, out, err = command("--config", "x.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "x.yaml" in err
    assert mentioned in err


@pytest.mark.parametrize(
    ("args", "mentioned"),
    [
        (["--inference", "vi", "--vi.stride", "100000"], "--vi.stride 100000 leaves no position"),
        (["--optimizer.final-learning-rate", "0.5"], "--optimizer.final-learning-rate 0.5 is above the highest"),
        (["--optimizer.learning-rate", "1e-6"], "is above the highest"),
    ],
)
def test_settings_that_make_no_sense_beside_others_are_refused(args, mentioned, run_main):
    status, out, err = run_main(train.main, *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert mentioned in err


def test_a_resumed_run_takes_no_other_settings(command):
    assert command("--steps", "1", "--out", "run")[0] == 0
    assert command("--out", "run", "--resume", "--config", "run/config.yaml")[0] == 2


@pytest.mark.slow
def test_every_command_reads_the_checkpoint_that_is_asked_for(command, run_main):
    assert command("--steps", "4", "--checkpoint-every", "2", "--num-checkpoints", "3", "--out", "run")[0] == 0
    figures_of = {}
    for which in ("newest", "4", "2", "0"):
        assert run_main(evaluate.main, "run", "--which", which, "--json", "x.json")[0] == 0
        figures_of[which] = json.loads(Path("x.json").read_text())["figures"][0]
    assert [figures_of[which]["step"] for which in figures_of] == [4, 4, 2, 0]
    nats = [figure["nats_per_token"] for figure in figures_of.values()]
    assert nats[0] == nats[1]
    assert len(set(nats)) == 3
    for which, mentioned in (("3", "of 0, 2, 4"), ("bset", "newest, best or the number of a step"), ("-1", "which")):
        status, out, err = run_main(evaluate.main, "run", f"--which={which}")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert mentioned in err


def test_a_short_training_has_a_short_report(command, monkeypatch):
    scored, score = [], figures.score

    def recording(model, batches, *args):
        scored.append(list(batches))
        return score(model, scored[-1], *args)

    monkeypatch.setattr(figures, "score", recording)
    assert command("--steps", "1", "--validation-sequences", "2", "--out", "run")[0] == 0
    assert {sum(map(len, batches)) for batches in scored} == {2}


def test_the_baseline_that_is_proposed_is_the_same_training_without_z(command):
    options = ["--steps", "2", "--seed", "3", "--inference", "map", "--infer-from", "past", "--block-size", "8"]
    _, out, _ = command(*options, "--fast-steps", "1", "--out", "run")
    (proposed,) = (line for line in out.splitlines() if "--inference none" in line)
    args = shlex.split(proposed.partition(" (a baseline")[0].partition("ltm_pyro.train")[2])
    config, _ = Run(Path("run")).read_config()
    baseline = train.parse(args)
    assert baseline.model.num_slots == 0
    for name in ("data", "steps", "seed", "batch_size", "optimizer"):
        assert getattr(baseline, name) == getattr(config, name)
    for name in ("width", "length", "window", "num_layers"):
        assert getattr(baseline.model, name) == getattr(config.model, name)
    # As from its settings, of which those of z are another scheme's.
    assert train.parse(["--config", "run/config.yaml", "--inference", "none"]).model == baseline.model


def test_a_baseline_has_the_flags_of_the_run():
    config = train.parse(["--compile", "--tensorboard", "--steps", "3", "--micro-batch-size", "2"])
    args = shlex.split(" ".join(train.baseline_of(config)).partition("ltm_pyro.train")[2])
    baseline = train.parse(args)
    for name in ("compile", "tensorboard", "steps", "micro_batch_size"):
        assert getattr(baseline, name) == getattr(config, name)
