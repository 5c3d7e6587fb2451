"""The command: figures of runs that `python -m ltm_pyro.train` has written, as a user gives it and reads it."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import ltm_pyro
from ltm_pyro import cli, evaluate
from ltm_pyro.data import load_corpus
from ltm_pyro.evaluation import operations
from ltm_pyro.evaluation.estimators import ESTIMATORS

FAST = shlex.split("--device cpu --num-sequences 5")
FEW = {"num_samples": "4", "block_size": "16", "num_temperatures": "3", "num_leapfrogs": "1", "num_chains": "2"}
"""Settings of figures, with which they take little time."""
FIGURES = ["elbo", "iwae", "ais", "prequential", "weighted", "reused-noise"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_run: Callable[..., None], short_fits: None) -> Path:
    """A folder with a corpus and a run of each scheme, and of none."""
    folder = tmp_path_factory.mktemp("runs")
    for scheme in ("vi", "map", "langevin", "amortized"):
        train_run(folder, scheme, "--fast-steps", "2")
    train_run(folder, "none")
    return folder


@pytest.fixture
def whole_command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in the folder of the runs."""
    monkeypatch.chdir(runs)

    def run(*args: str) -> tuple[int, str, str]:
        names = {name for name in ESTIMATORS if name in args} or {"elbo", "prequential"}
        names = names | {"ais"} if "--certify" in args else names
        used = {name for figure in names for name in ESTIMATORS[figure].uses} if with_z(args) else set()
        given = [f"--{name.replace('_', '-')}={value}" for name, value in FEW.items() if name in used]
        return run_main(evaluate.main, *FAST, *given, *args)

    return run


def with_z(args: Sequence[str]) -> bool:
    """Whether a run with z is among the arguments."""
    configs = (Path(arg, "config.yaml") for arg in args)
    return any(path.exists() and "inference: none" not in path.read_text() for path in configs)


@pytest.fixture
def command(
    whole_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The same without the operations of a figure: to count them takes longer than the figure itself."""
    monkeypatch.setattr(operations, "of_estimate", lambda *args: 1.0)
    return whole_command


def figures_of(path: str) -> list[dict]:
    return json.loads(Path(path).read_text())["figures"]


def test_every_figure_of_every_scheme_says_what_it_is(whole_command):
    status, out, err = whole_command(
        "none", "vi", "map", "langevin", "amortized", "--estimators", *FIGURES, "--json", "all.json"
    )
    assert (status, err) == (0, "")
    rows = figures_of("all.json")
    assert [(row["run"], row["estimator"]) for row in rows] == [
        ("none", "exact"),
        *((run, figure) for run in ("vi", "map", "langevin", "amortized") for figure in FIGURES),
    ]
    for row in rows:
        assert row["valid_bound"] is (row["estimator"] != "reused-noise")
        assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
        assert row["bits_per_byte"] == pytest.approx(
            row["nats_per_token"] * row["num_tokens"] / row["num_bytes"] / math.log(2)
        )
        assert (row["num_sequences"], row["num_documents"]) == (5, row["num_documents"])
        assert row["standard_error"] > 0
        is_elbo = row["estimator"] in ("elbo", "exact", "reused-noise")
        assert (row["nelbo_nats_per_token"] is not None) == is_elbo
        if is_elbo:
            assert row["nelbo_nats_per_token"] == row["nats_per_token"]
            assert row["nelbo_nats_per_token"] == pytest.approx(row["nll_nats_per_token"] + row["kl_nats_per_token"])
        assert (row["monte_carlo_standard_error"] is not None) == (row["estimator"] in ("elbo", "iwae", "ais"))
        assert (row["effective_sample_size"] is not None) == (row["estimator"] in ("iwae", "ais"))
        assert row["training_operations"] == row["training_operations_per_token"] * row["tokens_seen"]
        assert row["step"] == 3
    by_name = {(row["run"], row["estimator"]): row for row in rows}
    assert by_name["map", "prequential"]["num_samples"] == 1
    assert by_name["vi", "prequential"]["num_samples"] == 4
    assert by_name["vi", "elbo"]["training_operations_per_token"] > 2 * rows[0]["training_operations_per_token"]
    assert by_name["vi", "ais"]["test_operations_per_token"] > by_name["vi", "elbo"]["test_operations_per_token"]
    # Differences are from the first row, on the same sequences.
    assert rows[0]["difference_bits_per_byte"] is None
    for row in rows[1:]:
        assert row["difference_bits_per_byte"] == pytest.approx(row["bits_per_byte"] - rows[0]["bits_per_byte"])
        assert row["difference_standard_error"] > 0
    # What is printed: a table in Markdown, a line a figure.
    lines = [line for line in out.splitlines() if line.startswith("| ") and "nats/token" not in line]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert f"{row['nats_per_token']:.4f} ± {row['standard_error']:.4f}" in line
        assert f"{row['bits_per_byte']:.4f}" in line
        assert ("NOT A BOUND" in line) is not row["valid_bound"]


def test_figures_do_not_depend_on_the_batch_size(command):
    for size in ("1", "3", "16"):
        assert command("vi", "--estimators", "elbo", "iwae", "--batch-size", size, "--json", f"{size}.json")[0] == 0
    first, *others = (figures_of(f"{size}.json") for size in ("1", "3", "16"))
    for other in others:
        for row, same in zip(first, other, strict=True):
            assert row["nats_per_token"] == pytest.approx(same["nats_per_token"], rel=1e-5)
            assert row["standard_error"] == pytest.approx(same["standard_error"], rel=1e-3)


def test_the_text_is_what_the_run_held_out_or_what_is_given(command, runs):
    held_out = load_corpus(str(runs / "text.jsonl")).validation
    assert command("none", "--num-sequences", "0", "--json", "own.json")[0] == 0
    (own,) = figures_of("own.json")
    assert "held-out" in own["data"]

    Path("held-out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    assert command("none", "--num-sequences", "0", "--data", "held-out.jsonl", "--json", "given.json")[0] == 0
    (given,) = figures_of("given.json")
    assert given["num_documents"] == len(held_out)
    assert given["num_bytes"] == sum(map(len, held_out))
    assert given["num_tokens"] == sum(map(len, held_out)) + len(held_out)  # bytes, and every end-of-text

    # Of its own, the run leaves out the sequences that validation has seen, which come last.
    of_run = ltm_pyro.load("none").config.validation_sequences
    assert own["num_sequences"] == given["num_sequences"] - min(of_run, given["num_sequences"] // 2)
    some = ("--num-sequences", str(own["num_sequences"]), "--data", "held-out.jsonl", "--json", "some.json")
    assert command("none", *some)[0] == 0
    assert figures_of("some.json")[0]["nats_per_token"] == pytest.approx(own["nats_per_token"])

    # However the path of the run's own corpus is spelt, what was trained on is not scored.
    assert command("none", "--num-sequences", "0", "--data", "./text.jsonl", "--json", "same.json")[0] == 0
    assert figures_of("same.json")[0]["data_sha256"] == own["data_sha256"] == given["data_sha256"]

    Path("one.txt").write_text("A single text.")
    assert command("none", "--data", "one.txt", "--json", "one.json")[0] == 0
    (one,) = figures_of("one.json")
    assert (one["num_documents"], one["standard_error"], one["num_tokens"]) == (1, None, 15)

    Path("ptb.valid.txt").write_text("the dog 's tail is <unk>\nN men saw it\n")
    assert command("none", "--data", "ptb=ptb.valid.txt", "--json", "ptb.json")[0] == 0
    (ptb,) = figures_of("ptb.json")
    assert (ptb["data"], ptb["num_bytes"]) == ("ptb, all of ptb.valid.txt", len("the dog's tail is ?\n1 men saw it"))


def test_other_text_of_a_run_is_not_compared(command, runs, train_run):
    """Sequences of another length hold other text, though it comes from the same documents."""
    if not (runs / "longer").exists():
        train_run(runs, "none", "--model.length", "40", "--out", str(runs / "longer"))
    assert command("none", "longer", "--json", "two.json")[0] == 0
    assert [row["difference_bits_per_byte"] for row in figures_of("two.json")] == [None, None]


def test_a_run_that_reads_the_past_is_scored_by_the_figure_it_was_trained_for(command, runs, train_run):
    (runs / "past").mkdir()
    train_run(runs / "past", "map", "--infer-from", "past", "--block-size", "8", "--fast-steps", "1")
    assert command("map", "past/map", "--json", "default.json")[0] == 0
    names = [(row["run"], row["estimator"]) for row in figures_of("default.json")]
    assert names == [*(("map", name) for name in ("elbo", "iwae", "prequential")), ("past/map", "prequential")]


def test_text_may_be_cut_into_sequences_of_another_length(command):
    """The run was trained on 32 tokens at a time; a document has up to 171 bytes."""
    held_out = load_corpus("text.jsonl").validation
    Path("other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    args = ["map", "--estimators", "prequential", "--num-sequences", "0", "--data", "other.jsonl"]
    assert command(*args, "--json", "short.json")[0] == 0
    assert command(*args, "--length", "200", "--json", "long.json")[0] == 0
    (short,), (long,) = figures_of("short.json"), figures_of("long.json")
    assert long["num_sequences"] == long["num_documents"] == short["num_documents"] < short["num_sequences"]
    assert long["num_bytes"] == short["num_bytes"]
    places = [place["first"] for place in long["by_position"]]
    assert places == list(range(0, places[-1] + 1, 16))
    assert places[-1] > 64
    total = sum(place["nats_per_token"] * place["num_tokens"] for place in long["by_position"])
    assert total == pytest.approx(long["nats_per_token"] * long["num_tokens"])
    assert {place["first"] for place in short["by_position"]} == {0, 16}


def test_a_reader_that_goes_away_does_not_cost_the_files(command, monkeypatch):
    def gone(rows, certificates):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate.report, "print_report", gone)
    args = ("vi", "--fast-steps", "0", "1", "--estimators", "elbo", "--json", "unread.json", "--plot", "unread.png")
    assert command(*args)[0] == 1
    assert len(figures_of("unread.json")) == 2
    assert Path("unread.png").read_bytes()[:4] == b"\x89PNG"


def test_fast_steps_give_a_curve_and_a_plot(command, runs):
    for expected in ("fast-steps.png", "fast-steps-2.png"):
        status, out, _ = command(
            "vi", "none", "--fast-steps", "0", "1", "4", "--estimators", "elbo", "reused-noise", "--json", "curve.json"
        )
        assert status == 0
        assert expected in out
        assert (runs / "vi" / expected).read_bytes()[:4] == b"\x89PNG"
    rows = figures_of("curve.json")
    assert [(row["estimator"], row["fast_steps"]) for row in rows] == [
        *((figure, steps) for steps in (0, 1, 4) for figure in ("elbo", "reused-noise")),
        ("exact", 0),
    ]
    prior = rows[0]
    assert prior["kl_nats_per_token"] == 0
    assert command("vi", "--estimators", "elbo", "--plot", "point.png")[0] == 0
    assert Path("point.png").read_bytes()[:4] == b"\x89PNG"
    assert command("vi", "--fast-steps", "1", "2", "--estimators", "elbo", "--plot", "curve.png")[0] == 0
    assert Path("curve.png").read_bytes()[:4] == b"\x89PNG"
    assert not (runs / "vi" / "fast-steps-3.png").exists()


def test_inference_may_be_another_than_in_training(command):
    assert command("map", "--inference", "vi", "map", "none", "--estimators", "elbo", "--json", "x.json")[0] == 0
    assert [row["posterior"] for row in figures_of("x.json")] == ["vi", "a Gaussian around map", "the prior"]


def test_an_encoder_may_be_refined_or_left_out(command):
    """The run was trained with two steps of refinement."""
    ways = ("--inference", "amortized", "vi", "--fast-steps", "0", "16", "--estimators", "elbo", "--json", "ways.json")
    assert command("amortized", *ways)[0] == 0
    rows = figures_of("ways.json")
    expected = [(posterior, steps) for posterior in ("amortized", "vi") for steps in (0, 16)]
    assert [(row["posterior"], row["fast_steps"]) for row in rows] == expected
    kl = [row["kl_nats_per_token"] for row in rows]
    assert kl[2] == 0
    assert kl[0] > 0
    assert len(set(kl)) == 4


def test_a_run_without_an_encoder_is_named_before_another_is_scored(command):
    status, out, err = command("amortized", "map", "--inference", "amortized", "--json", "none.json")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "map has no encoder: it was trained with --inference map" in err
    assert not Path("none.json").exists()


def test_the_certificate_has_both_sides(command):
    status, out, _ = command("vi", "none", "--estimators", "elbo", "--certify", "3", "--json", "c.json")
    assert status == 0
    (certificate,) = json.loads(Path("c.json").read_text())["certificates"]  # a model without z needs none
    assert (certificate["run"], certificate["num_sequences"]) == ("vi", 3)
    gap = certificate["upper_nats_per_token"] - certificate["lower_nats_per_token"]
    assert certificate["gap_nats_per_token"] == pytest.approx(gap)
    assert f"{certificate['upper_nats_per_token']:.4f}" in out


def test_an_interrupt_loses_no_figure(command, monkeypatch):
    score, calls = evaluate.score, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(evaluate, "score", interrupted)
    status, out, err = command("none", "vi", "--json", "partial.json")
    assert (status, err) == (130, "interrupted\n")
    assert [row["run"] for row in figures_of("partial.json")] == ["none"]
    assert "| none" in out


BAD = {
    "no run": ([], "RUN"),
    "a folder that is none": (["nowhere"], "nowhere"),
    "a file": (["text.jsonl"], "text.jsonl"),
    "an unknown option": (["vi", "--nonsense"], "nonsense"),
    "an unknown figure": (["vi", "--estimators", "guess"], "guess"),
    "no figure": (["vi", "--estimators"], "estimators"),
    "an unknown scheme": (["vi", "--inference", "nuts"], "nuts"),
    "no such text": (["vi", "--data", "nowhere.txt"], "nowhere.txt"),
    "an empty text": (["vi", "--data", "empty.txt"], "empty.txt"),
    "text that is none": (["vi", "--data", "binary.txt"], "binary.txt"),
    "half a character": (["vi", "--data", "surrogate.jsonl"], "surrogate"),
    "a column that is not there": (["vi", "--data", "other.jsonl", "--text-column", "body"], "body"),
    "an unknown set": (["vi", "--data", "nonsense=text.jsonl"], "nonsense"),
    "a block longer than a sequence": (["vi", "--block-size", "33"], "32 tokens"),
    "an empty block": (["vi", "--block-size", "0"], "--block-size"),
    "a sequence of nothing": (["vi", "--length", "0"], "length"),
    "a block longer than a sequence that is shorter than in training": (
        ["vi", "--length", "12", "--block-size", "16"],
        "12 tokens",
    ),
    "no draw": (["vi", "--num-samples", "0"], "--num-samples"),
    "one chain": (["vi", "--num-chains", "1"], "--num-chains"),
    "an empty batch": (["vi", "--batch-size", "0"], "batch-size"),
    "less than no sequence": (["vi", "--num-sequences", "-1"], "num-sequences"),
    "less than no step": (["vi", "--fast-steps", "-1"], "fast-steps"),
    "a negative seed": (["vi", "--seed", "-1"], "seed"),
    "a seed that is too large": (["vi", "--seed", "4294967296"], "seed"),
    "fewer certificates than none": (["vi", "--certify", "-1"], "certify"),
    "a folder for JSON": (["vi", "--json", "vi"], "--json"),
    "JSON in no folder": (["vi", "--json", "nowhere/x.json"], "nowhere"),
    "a plot of another kind": (["vi", "--plot", "x.jpg"], "png"),
    "a setting of a figure that is not asked for": (["vi", "--estimators", "elbo", "--num-chains", "9"], "of ais, smc"),
    "a setting of a figure that is not the default": (["vi", "--num-chains", "9"], "of ais, smc"),
    "inference where there is no z": (["none", "--inference", "vi"], "--inference: there is no z"),
    "steps where there is no z": (["none", "--fast-steps", "3"], "--fast-steps: there is no z"),
    "draws where there is no z": (["none", "--num-samples", "3"], "--num-samples is a setting of elbo"),
    "a setting of a scheme that is not named": (["vi", "--mala.num-chains", "3"], "add --inference mala"),
    "a setting that is out of range": (["vi", "--inference", "hmc", "--hmc.num-leapfrogs", "0"], "--hmc.num-leapfrogs"),
}


@pytest.mark.parametrize(("args", "mentioned"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_with_status_2(args, mentioned, command):
    Path("empty.txt").write_text("")
    Path("other.jsonl").write_text('{"text": "some"}\n')
    Path("binary.txt").write_bytes(b"\x00\xff\xfe" * 40)
    Path("surrogate.jsonl").write_text('{"text": "half \\ud83d of it"}\n')
    status, out, err = command(*args)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert mentioned in err


@pytest.mark.parametrize("option", [["--task", "gsm8k"], ["--task=gsm8k"]])
def test_tasks_are_said_to_be_a_command_of_their_own(option, command):
    status, out, err = command("vi", *option)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "python -m ltm_pyro.tasks TASK RUN" in err


def test_operations_of_training_are_counted_when_they_are_first_shown_and_once_a_run(command, monkeypatch):
    count, counted = operations.of_training, []
    monkeypatch.setattr(operations, "of_training", lambda *args: (counted.append(args), count(*args))[1])
    config, _ = evaluate.parse(["vi", *FAST])
    run = evaluate.load_run("vi", config, torch.device("cpu"))
    assert not counted
    assert str(run) == str(run)
    assert len(counted) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_bad_input(command):
    status, _, err = command("vi", "--device", "cuda")
    assert (status, err.count("\n")) == (2, 1)
    assert "--device cpu" in err


def test_a_corpus_that_has_changed_is_not_scored_as_held_out(command, runs):
    shutil.copytree(runs / "none", runs / "moved", dirs_exist_ok=True)
    config = runs / "moved" / "config.yaml"
    config.write_text(config.read_text().replace("text.jsonl", "changed.jsonl"))
    (runs / "changed.jsonl").write_text((runs / "text.jsonl").read_text().replace("Sentence", "Line"))
    status, _, err = command("moved")
    assert (status, err.count("\n")) == (2, 1)
    assert "hash" in err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(evaluate.main, ["--help-all"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--estimators", "--fast-steps", "--certify", "--num-temperatures", "--block-size", "--json"):
        assert option in text
    assert "NOT a bound" in text


def test_another_seed_draws_anew_and_the_same_seed_does_not(command):
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        args = ("--estimators", "elbo", "iwae", "prequential", "--certify", "2", "--seed", seed)
        assert command("vi", *args, "--json", f"{name}.json")[0] == 0
    first, again, other = (json.loads(Path(f"{name}.json").read_text()) for name in ("first", "again", "other"))
    assert first["figures"] == again["figures"]
    assert first["certificates"] == again["certificates"]
    for row, changed in zip(first["figures"], other["figures"], strict=True):
        assert row["nats_per_token"] != changed["nats_per_token"]
        assert row["num_tokens"] == changed["num_tokens"]  # of the same texts
    assert first["certificates"][0]["upper_nats_per_token"] != other["certificates"][0]["upper_nats_per_token"]


def test_each_way_of_inference_is_scored_once(command):
    ways = ("--inference", "none", "vi", "--fast-steps", "1", "3", "1", "--estimators", "elbo", "--plot", "x.png")
    assert command("vi", *ways, "--json", "ways.json")[0] == 0
    found = [(row["posterior"], row["fast_steps"]) for row in figures_of("ways.json")]
    assert found == [("the prior", 0), ("vi", 1), ("vi", 3)]
    assert command("vi", "--estimators", "elbo", "--json", "own.json")[0] == 0
    assert [row["fast_steps"] for row in figures_of("own.json")] == [2]  # as it was trained


def test_runs_of_other_text_or_packing_are_shown_but_not_compared(command, runs, train_run):
    """Other documents of the same number and size, and the same ones cut elsewhere."""
    (runs / "likewise.jsonl").write_text((runs / "text.jsonl").read_text().replace("Sentence", "Sequence"))
    for name, data, packing in (("likewise", "likewise", "document"), ("stream", "text", "stream")):
        if not (runs / name).exists():
            data = str(runs / f"{data}.jsonl")
            train_run(runs, "none", "--data", data, "--packing", packing, "--out", str(runs / name))
    status, _, err = command("none", "likewise", "stream", "none", "--json", "apart.json")
    assert (status, err) == (0, "")
    rows = figures_of("apart.json")
    assert [row["difference_bits_per_byte"] for row in rows] == [None, None, None, 0]
    assert rows[2]["num_documents"] == rows[2]["num_sequences"]  # of a stream, each sequence stands for itself
    assert rows[2]["num_tokens"] > rows[0]["num_tokens"]  # and has no padding


def test_settings_of_a_scheme_count_where_it_is_named(command):
    args = ["vi", "--inference", "mala", "--estimators", "elbo"]
    assert command(*args, "--json", "as-trained.json")[0] == 0
    assert command(*args, "--mala.num-chains", "1", "--json", "same.json")[0] == 0
    assert command(*args, "--mala.num-chains", "3", "--json", "three.json")[0] == 0
    names = ("as-trained", "same", "three")
    as_trained, same, three = (figures_of(f"{name}.json")[0]["nats_per_token"] for name in names)
    assert as_trained == same != three


def test_json_on_standard_output_stands_there_alone(command):
    status, out, err = command("none", "--json", "-")
    assert status == 0
    assert json.loads(out)["figures"][0]["run"] == "none"
    assert "| none" in err
