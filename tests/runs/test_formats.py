"""What an earlier version of this package has written is read by the one of now, and gives the same figures.

`data/` was written by version 0.1.0, before its config files had a version, by these commands:

    python -m ltm_pyro.train --data text.jsonl --inference vi …
    python -m ltm_pyro.train --data text.jsonl --inference none --model.num-slots 0 …
    python -m ltm_pyro.pretrained vi --out exported
    python -m ltm_pyro.prepare text.jsonl --tokenizer bytes --out prepared
    python -m ltm_pyro.generate, as below

The figures and the resumed training were written at commit f257172, which had those of version 0.1.0, by

    python -m ltm_pyro.evaluate and train --resume, as below

Numbers are compared to 1e-5: another processor, or another version of torch, adds up in another order.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ltm_pyro
from ltm_pyro import evaluate, export, generate, prepare, train

FILES = Path(__file__).parent / "data"
SAMPLED = ("--num-sequences", "4", "--num-samples", "8")
# What differs between two runs of the same code, says where it ran, or is what training and a figure cost today.
# Standard errors over documents were those of another formula.
CHANGED = (
    *("seconds", "tokens_per_second", "seconds_per_sequence"),
    *("test_operations_per_token", "training_operations_per_token", "training_operations"),
    *("standard_error", "difference_standard_error"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which name each other by relative paths: the working folder of the test."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def assert_same(value: Any, before: Any, where: str = "") -> None:
    """Everything that was there is there still, and the same; numbers to 1e-5."""
    if isinstance(before, dict):
        assert before.keys() - set(CHANGED) <= value.keys(), where
        for name in before.keys() - set(CHANGED):
            assert_same(value[name], before[name], f"{where}.{name}")
    elif isinstance(before, list):
        assert len(value) == len(before), where
        for number, (part, part_before) in enumerate(zip(value, before, strict=True)):
            assert_same(part, part_before, f"{where}[{number}]")
    elif isinstance(before, float):
        assert value == pytest.approx(before, rel=1e-5, abs=1e-9), where
    else:
        assert value == before, where


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("evaluate", ("vi", "none", "exported", "--estimators", "elbo", "iwae", "prequential")),
        ("evaluate-prepared", ("vi", "--data", "prepared")),
    ],
)
def test_runs_exported_models_and_prepared_corpora_have_the_figures_that_they_had(name, args, folder):
    """By `adamvi`, whose steps are those of then; the steps of `vi` are not."""
    before = json.loads(Path(f"{name}.json").read_text())
    assert evaluate.main([*args, "--inference", "adamvi", *SAMPLED, "--json", "now.json"]) == 0
    now = json.loads(Path("now.json").read_text())
    assert_same(now["figures"], before["figures"])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("generate", ("--prompt", "Sentence number", "--num-samples", "2", "--save-thought", "now.safetensors")),
        ("generate-thoughts", ("--thought", "thoughts.safetensors")),
    ],
)
def test_texts_that_are_written_with_given_thoughts_or_from_a_prompt_are_those_of_before(name, args, folder, capsys):
    assert generate.main(["vi", *args, "--json", "--max-new-tokens", "20"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        json.loads(line) for line in Path(f"{name}.json").read_text().splitlines()
    ]
    if name == "generate":
        now, before = (load_file(path)["z"] for path in ("now.safetensors", "thoughts.safetensors"))
        torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-6)


def test_training_goes_on_where_the_earlier_version_would_have_gone(folder):
    """Weights, moments, learning rate, noise and the order of the data, all as they were."""
    assert train.main(["--out", "none", "--resume", "--steps", "33"]) == 0
    now, before = (
        [json.loads(line) for line in Path(path).read_text().splitlines()]
        for path in ("none/metrics.jsonl", "resumed-none.jsonl")
    )
    assert_same(now, before)
    assert before[-1]["step"] == 33


def test_the_best_checkpoint_and_the_exported_model_load(folder):
    best = ltm_pyro.load("vi", which="best")
    assert best.progress.step == 20
    run, exported = ltm_pyro.load("vi"), ltm_pyro.from_pretrained("exported")
    assert (run.progress, run.config.schemes) == (exported.progress, exported.config.schemes)
    assert run.config.schemes["vi"].learning_rate == 0.6
    for name, weight in run.model.state_dict().items():
        assert weight.equal(exported.model.state_dict()[name])
        assert not (name == "decoder.embedding.weight" and weight.equal(best.model.state_dict()[name]))


def test_what_is_written_now_is_what_was_written_then(folder):
    """The exported model and the prepared corpus, byte for byte but for the version and the date in the settings."""
    assert export.main(["vi", "--out", "exported-now"]) == 0
    assert prepare.main(["text.jsonl", "--tokenizer", "bytes", "--out", "prepared-now"]) == 0
    for name in ("model.safetensors", "progress.json"):
        assert (folder / "exported-now" / name).read_bytes() == (folder / "exported" / name).read_bytes()
    names = sorted(path.name for path in (folder / "prepared").iterdir())
    assert "manifest.json" in names
    for name in names:
        assert (folder / "prepared-now" / name).read_bytes() == (folder / "prepared" / name).read_bytes()
