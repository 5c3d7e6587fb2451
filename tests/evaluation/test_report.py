"""What is shown of figures: every cell of the table, the JSON file and the plot, against figures made by hand."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch

from ltm_pyro.config import preset
from ltm_pyro.data import PACKING, TokenizedTexts, get_tokenizer, tokenize
from ltm_pyro.evaluation import report
from ltm_pyro.evaluation.estimators import Estimate
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.plots.fast_steps import fast_steps_plot
from ltm_pyro.evaluation.report import Row, ScoredRun
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.trained import TrainedModel


@functools.cache
def scored(name: str) -> ScoredRun:
    """A run of 450 steps and 1,000 tokens, as if each token had cost 2 million operations."""
    config, tokenizer = preset("tiny"), get_tokenizer("bytes")
    model = LatentThoughtModel(config.model, tokenizer.n_vocab, end_of_text=256)
    trained = TrainedModel(model, tokenizer, config, Path(name), {}, Progress(step=450, tokens_seen=1000))
    texts = TokenizedTexts("a text", tokenize(["four", "sixsix"], tokenizer), "0" * 64)
    run = ScoredRun(trained, texts, PACKING["document"](texts.documents, tokenizer, config.model.length))
    vars(run)["training_operations_per_token"] = 2e6
    return run


def row(
    estimator: str,
    nats: list[float],
    *,
    run: str = "runs/a",
    steps: int = 4,
    z_from: str | None = "vi",
    pairing: tuple[object, ...] = ("text",),
    **parts: list[float],
) -> Row:
    """A figure of two documents, of 2 and 3 tokens and 4 and 6 bytes; lists in nats."""
    figure = Figure(estimator, steps)
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in parts.items()}
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    weights = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    batch = TokenBatch(tokens, weights, torch.arange(2), torch.tensor([4, 6]))
    figure.add(Estimate(torch.tensor(nats, dtype=torch.float64), z_from, 32, **tensors), batch, torch.arange(2))
    return Row(scored(run), figure, "vi", 1234.0, pairing, num_words=2)


EXACT = row("exact", [5.0, 6.0], z_from=None, run="runs/ar", kl=[0.0, 0.0])
ELBO = row("elbo", [6.0, 9.0], kl=[1.0, 1.5], variance=[0.03, 0.01])
IWAE = row("iwae", [5.5, 8.0], variance=[0.2, 0.2], effective_sample_size=[3.0, 5.0], pareto_k=[0.31, 0.53])


def printed(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The lines of the table, by column."""
    report.print_report(rows, [])
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names, _, *cells = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(names, line, strict=True)) for line in cells]


def test_every_cell_by_hand(capsys):
    exact, elbo, iwae = printed([EXACT, ELBO, IWAE], capsys)
    bit = math.log(2)
    assert elbo == {
        "run": "runs/a",
        "figure": "elbo",
        "z from": "vi",
        "T": "4",
        "meaning": "upper bound",
        "nats/token": "3.0000 ± 0.0000",
        "bits/byte": f"{15 / 10 / bit:.4f} ± 0.0000",
        # 1 and 3 nats of 4 and 6 bytes: 0.4 a byte, and 3 / 6 or 1 / 4 without one of them.
        "Δ bits/byte": f"+{4 / 10 / bit:.4f} ± {math.sqrt((0.1**2 + 0.15**2) / 2) / bit:.4f}",
        "perplexity": f"{math.exp(3):.2f}",
        "word perplexity": "1808",  # exp(15 / 2)
        "rate": f"{2.5 / 5 / bit:.3f}",
        "distortion": f"{12.5 / 5 / bit:.3f}",
        "MC error": f"{math.sqrt(0.04) / 5:.4f}",
        "ESS": "",
        "k̂": "",
        "op/token": "1.23 k",
    }
    assert (iwae["ESS"], iwae["k̂"], iwae["rate"], iwae["distortion"]) == ("4.0 of 32", "0.42 (50% high)", "", "")
    # 13.5 nats of 10 bytes; 8 of 6 or 5.5 of 4 without one of the documents.
    error = math.sqrt(((8 / 6 - 1.35) ** 2 + (5.5 / 4 - 1.35) ** 2) / 2) / bit
    assert iwae["bits/byte"] == f"{1.35 / bit:.4f} ± {error:.4f}"
    assert (exact["z from"], exact["T"], exact["rate"], exact["Δ bits/byte"]) == ("", "", "", "")


def test_a_figure_that_is_not_finite_says_so_and_nothing_else_breaks(capsys):
    bad = row("elbo", [math.nan, 9.0], kl=[1.0, 1.0], variance=[math.nan, 0.1])
    _, good, line = printed([EXACT, ELBO, bad], capsys)
    assert (good["meaning"], line["meaning"]) == ("upper bound", "not finite")
    assert (line["nats/token"], line["bits/byte"], line["Δ bits/byte"], line["perplexity"]) == ("", "", "", "")
    certificate = {"upper_nats_per_token": math.inf, "gap_standard_error": None}
    contents = json.loads(report.figures_json({}, [EXACT, bad], [certificate]))
    assert contents["figures"][1]["nats_per_token"] is None
    assert contents["figures"][1]["valid_bound"] is False
    assert contents["certificates"] == [{"upper_nats_per_token": None, "gap_standard_error": None}]


def test_chains_that_have_diverged_have_no_figures_and_others_a_sentence(capsys, tmp_path):
    diverged, unmixed = (row("elbo", [6.0, 9e15], z_from=f"a Gaussian around {name}", kl=[1.0, 1.5]) for name in "ab")
    diverged.figure.num_diverged, unmixed.figure.num_unmixed = 1, 2
    first, second = printed([diverged, unmixed], capsys)
    assert {name: cell for name, cell in first.items() if cell} == {
        "run": "runs/a",
        "figure": "elbo",
        "z from": "a Gaussian around a",
        "T": "4",
        "meaning": "DIVERGED",
        "op/token": "1.23 k",
    }
    assert second["meaning"] == "upper bound"
    assert second["nats/token"]
    assert "Δ bits/byte" not in second  # from what has diverged there is no difference
    report.print_report([diverged, unmixed, ELBO], [])
    out = capsys.readouterr().out
    assert "a Gaussian around a, T = 4: chains have diverged on 1 of 2 pieces." in out
    assert "a Gaussian around b, T = 4: chains have not mixed on 2 of 2 pieces." in out
    assert out.count("chains have") == 2
    (tmp_path / "out.json").write_bytes(report.figures_json({}, [diverged, unmixed], []))
    records = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [record["difference_bits_per_byte"] for record in records] == [None, None]
    assert [record["nats_per_token"] for record in records] == [None, pytest.approx((6 + 9e15) / 5)]
    assert [(record["num_diverged"], record["num_unmixed"]) for record in records] == [(1, 0), (0, 2)]


def test_only_figures_of_the_same_sequences_are_compared(capsys):
    other = row("elbo", [6.0, 9.0], pairing=("another text",))
    cells = printed([EXACT, ELBO, other], capsys)
    assert [bool(line["Δ bits/byte"]) for line in cells] == [False, True, False]
    assert other.reference([EXACT, ELBO, other]) is None


def test_a_difference_is_from_the_same_figure_of_the_first_run():
    """And not from another kind of figure, which would compare a code with a bound."""
    rows = [
        row("elbo", [6.0, 9.0]),
        row("prequential", [5.0, 8.0]),
        row("elbo", [5.5, 9.0], steps=16),
        row("elbo", [6.5, 9.0], run="runs/b"),
        row("prequential", [5.0, 8.5], run="runs/b"),
        row("iwae", [5.0, 8.5], run="runs/b"),
    ]
    written = json.loads(report.figures_json({}, rows, []))["figures"]
    assert [line["difference_from"] for line in written] == [None, None, 0, 0, 1, None]
    bits = [line["difference_bits_per_byte"] for line in written]
    half = 0.5 / 10 / math.log(2)  # half a nat in ten bytes
    assert bits == [None, None, pytest.approx(-half), pytest.approx(half), pytest.approx(half), None]


def test_on_a_terminal_that_is_too_narrow_every_figure_is_a_paragraph(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for width, is_table in ((60, False), (300, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        report.print_report([EXACT, ELBO, IWAE], [])
        text = capsys.readouterr().out
        assert ("───" in text) is is_table
        assert " ".join(text.split()).count("upper bound") == 2
        assert "…" not in text


def test_a_table_that_is_wider_than_there_is_room_is_paragraphs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    report.print_report([EXACT, ELBO], [])
    out = capsys.readouterr().out
    assert "| runs/a" not in out
    assert "runs/a, elbo, vi, upper bound" in out
    paragraphs = out[out.index("runs/a, elbo") :]
    assert max(map(len, paragraphs.splitlines())) <= 60
    for columns in ("", "many", "0", "500"):  # none, or no number: as in a file
        monkeypatch.setenv("COLUMNS", columns)
        report.print_report([EXACT, ELBO], [])
        assert "| runs/a " in capsys.readouterr().out


def test_what_columns_mean_is_said_of_those_that_are_there(capsys):
    report.print_report([EXACT], [])
    out = capsys.readouterr().out
    assert "\nbits/byte: " in out
    assert "\nk̂: " not in out
    assert "\nΔ bits/byte: " not in out
    report.print_report([EXACT, IWAE], [])
    out = capsys.readouterr().out
    assert "\nk̂: " in out
    assert "\nΔ bits/byte: " in out


def test_a_perplexity_of_long_words_has_a_number_as_far_as_there_is_one(capsys):
    """As of text without white space: exp(1,200 / 2) fits into a float, exp(1,500 / 2) does not."""
    large, too_large = printed([row("elbo", [600.0, 600.0]), row("elbo", [700.0, 800.0])], capsys)
    assert large["word perplexity"] == "3.773e+260"
    assert too_large.get("word perplexity", "") == ""


def test_a_name_in_brackets_is_no_markup(capsys):
    report.print_report([row("elbo", [6.0, 9.0], run="runs/[bold]a")], [])
    assert "| runs/[bold]a |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (999.4, "999"),
        (999.6, "1 k"),
        (1234, "1.23 k"),
        (99_999, "100 k"),
        (3.86e12, "3.86 T"),
        (1e21, "1 Z"),
    ],
)
def test_counts_have_three_digits_and_a_unit(value, text):
    assert report.in_units(value) == text


def test_the_certificate_names_both_sides(capsys):
    values = {"lower": 1.25, "upper": 1.5, "elbo": 1.75, "gap": 0.25, "elbo_excess": 0.5}
    certificate = {f"{name}_nats_per_token": value for name, value in values.items()}
    certificate |= {"gap_standard_error": 0.125, "elbo_excess_standard_error": None}
    certificate |= {"run": "a", "inference": "vi", "fast_steps": 4, "num_sequences": 3, "num_tokens": 1200}
    report.print_report([ELBO], [certificate])
    text = capsys.readouterr().out
    assert "bounded by 1.2500 from below and by 1.5000 nats/token from above" in text
    assert "gap 0.2500 ± 0.1250" in text
    assert "the ELBO, 1.7500, is 0.5000 above the lower bound" in text


def test_the_plot_has_the_valid_figures_alone_with_the_errors_of_the_table():
    rows = [
        EXACT,
        *(row("elbo", [9.0 - t, 9.0], steps=t, kl=[0.0, 0.0], variance=[0.03, 0.01]) for t in (0, 1, 4)),
        *(row("reused-noise", [1.0, 1.0], steps=t, kl=[0.0, 0.0]) for t in (0, 1, 4)),
        row("iwae", [math.nan, 1.0], steps=4),
    ]
    canvas = fast_steps_plot(rows)
    labels = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert sorted(labels) == ["runs/a: elbo, vi", "runs/ar: exact, no z"]
    axes, of_differences = canvas.axes
    (curve,) = axes.containers
    assert list(curve[0].get_xdata()) == pytest.approx([0, 1, 4], abs=0.2)
    assert curve[0].get_ydata() == pytest.approx([(18 - t) / 10 / math.log(2) for t in (0, 1, 4)])
    for one, segment in zip((rows[1], rows[2], rows[3]), curve[2][0].get_segments(), strict=True):
        low, high = segment[:, 1]
        assert (high - low) / 2 == pytest.approx(one.figure.record()["bits_per_byte_standard_error"])
    (differences,) = of_differences.containers
    for one, value, segment in zip(
        rows[1:4], differences[0].get_ydata(), differences[2][0].get_segments(), strict=True
    ):
        record = one.record(rows)
        low, high = segment[:, 1]
        assert (value, (high - low) / 2) == pytest.approx(
            (record["difference_bits_per_byte"], record["difference_standard_error"])
        )


def test_figures_of_chains_that_have_not_mixed_are_drawn_apart():
    rows = [row("elbo", [9.0 - t, 9.0], steps=t, kl=[0.0, 0.0]) for t in (0, 4)]
    badly = [row("iwae", [90.0 - t, 90.0], steps=t) for t in (0, 4)]
    diverged = row("iwae", [5.0, 5.0], steps=2)
    badly[1].figure.num_unmixed = 1
    diverged.figure.num_diverged = 1
    canvas = fast_steps_plot([*rows, *badly, diverged])
    drawn = {
        axes: [list(curve[0].get_ydata()) for curve in axes.containers]
        for axes in canvas.axes
        if axes.get_ylabel() == "bits per byte"
    }
    of_well, of_badly = drawn.values()
    assert of_well == [pytest.approx([(18 - t) / 10 / math.log(2) for t in (0, 4)])]
    assert of_badly == [pytest.approx([(180 - t) / 10 / math.log(2) for t in (0, 4)])]
    assert ["not mixed" in axes.get_title(loc="left") for axes in drawn] == [False, True]
