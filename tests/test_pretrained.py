"""The folder to give away: the same model, read by the same commands, with a card that says what it is."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import ltm_pyro
from ltm_pyro import cli, train
from ltm_pyro.errors import InputError

SMALL = shlex.split(
    "--model.width 16 --model.num-heads 2 --model.hidden 24 --model.num-layers 2 --model.num-slots 2 --model.window 8 "
    "--model.length 48 --batch-size 2 --micro-batch-size 2 --fast-steps 1 --steps 3 --validate-every 2 "
    "--validation-sequences 1 --validation-samples 2 --device cpu"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, validated after the second, on a text whose name needs care in a table."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "a|b.txt"
    text.write_text("".join(f"Sentence number {n} says that {n} plus {n} makes {2 * n}.\n" for n in range(100)))
    assert train.main([*SMALL, "--data", str(text), "--out", str(folder / "run")]) == 0
    return folder / "run"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return ltm_pyro.load(path).model.state_dict()


@pytest.mark.parametrize("which", ["newest", "best"])
def test_the_model_is_the_one_of_the_run_wherever_the_folder_is(which, run, tmp_path):
    ltm_pyro.save_pretrained(run, tmp_path / "deep/er/model", which)
    moved = shutil.move(tmp_path / "deep/er/model", tmp_path / "moved")
    expected = ltm_pyro.load(run, which=which)
    loaded = ltm_pyro.load(moved)
    assert all(torch.equal(w, expected.model.state_dict()[name]) for name, w in loaded.model.state_dict().items())
    assert loaded.batch(["a text"]).tokens.equal(expected.batch(["a text"]).tokens)
    assert sorted(path.name for path in moved.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.yaml",
        "model.safetensors",
        "progress.json",
    ]
    assert str(run) not in (moved / "config.yaml").read_text()


def test_the_card_says_data_steps_scheme_and_figures_with_their_estimator(run, tmp_path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for which, split, step in (("newest", "report", 3), ("best", "validation", 2)):
        ltm_pyro.save_pretrained(run, tmp_path / which, which)
        card = (tmp_path / which / "README.md").read_text()
        header, body = card.removeprefix("---\n").split("---\n", 1)
        assert yaml.safe_load(header)["library_name"] == "ltm_pyro"
        assert body.lstrip().startswith(f"# {which}\n")
        assert r"a\|b.txt (SHA-256 " in card
        assert f"| steps | {step} slow steps of 2 sequences" in card
        assert "| inference of z | vi, 1 fast steps |" in card
        table = [line.split(" | ") for line in card.splitlines() if line.startswith("| held-out text")]
        expected = [r for r in records if r["split"] == split]
        assert [(row[1], row[2], row[4].split(" ±")[0], row[-1]) for row in table] == [
            (r["estimator"], r["posterior"], f"{r['nats_per_token']:.4f}", "yes |") for r in expected
        ]


def test_a_folder_that_exists_is_refused_and_left_alone(run, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for path in (tmp_path, tmp_path / "notes"):
        with pytest.raises(InputError, match="exists already: give a new folder"):
            ltm_pyro.save_pretrained(run, path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_damaged_checkpoint_is_not_given_away(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for path in copy.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is damaged"):
        ltm_pyro.save_pretrained(copy, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_training_does_not_go_on_from_it(run, tmp_path, capsys):
    """It has no moments."""
    ltm_pyro.save_pretrained(run, tmp_path / "model")
    with pytest.raises(SystemExit) as exit:
        cli.run(train.main, ["--out", str(tmp_path / "model"), "--resume"])
    err = capsys.readouterr().err
    assert (exit.value.code, len(err.splitlines())) == (2, 1)
    assert "no checkpoint" in err
    assert weights(tmp_path / "model").keys() == weights(run).keys()
