"""The folder to give away: the same model, read by the same commands, with a card that says what it is."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pytest
import torch
import yaml

import ltm_pyro
from ltm_pyro import cli, export, train
from ltm_pyro.config import preset
from ltm_pyro.data import fingerprint
from ltm_pyro.errors import InputError
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.pretrained import model_card

MORE = "--fast-steps 1 --steps 3 --validate-every 2 --validation-sequences 1"


@pytest.fixture(scope="module")
def run(tiny_options: list[str], write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, validated after the second, on a text whose name needs care in a table."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "a|b.txt")
    assert train.main([*tiny_options, *shlex.split(MORE), "--data", str(text), "--out", str(folder / "run")]) == 0
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
        assert f"| steps | {step} slow steps of 4 sequences" in card
        assert "| inference of z | vi, 1 fast steps |" in card
        table = [line.split(" | ") for line in card.splitlines() if line.startswith("| held-out text")]
        expected = [r for r in records if r["split"] == split]
        assert [(row[1], row[2], row[4].split(" ±")[0], row[-1]) for row in table] == [
            (r["estimator"], r["posterior"], f"{r['nats_per_token']:.4f}", "yes |") for r in expected
        ]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            preset("tiny", "map", "past"),
            "It adds a latent z to its weights, which is inferred from the text before",
        ),
        (preset("small", "vi", "whole"), "Its layers attend to a latent z, which is inferred from the whole text."),
        (preset("tiny", "none"), "This one has no latent z"),
    ],
)
def test_the_card_says_what_z_is(config, sentence):
    assert sentence in model_card("model", config, {}, Progress(), [])


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


def test_what_is_loaded_from_it_is_what_was_saved(run, tmp_path):
    ltm_pyro.save_pretrained(run, tmp_path / "model", "best")
    saved, loaded = ltm_pyro.load(run, which="best"), ltm_pyro.from_pretrained(tmp_path / "model")
    assert loaded.config == dataclasses.replace(saved.config, out=None)
    assert fingerprint(loaded.tokenizer) == fingerprint(saved.tokenizer)
    assert loaded.model.state_dict().keys() == saved.model.state_dict().keys()
    assert all(torch.equal(w, saved.model.state_dict()[name]) for name, w in loaded.model.state_dict().items())
    log_likelihoods = []
    for ltm in (saved, loaded):
        with pyro.poutine.seed(rng_seed=0):  # for z
            trace = pyro.poutine.trace(ltm.model).get_trace(ltm.batch(["One sentence.", "Another one."]))
        trace.compute_log_prob()
        log_likelihoods.append(trace.nodes["tokens"]["log_prob"])
    assert log_likelihoods[0].shape == (2,)
    assert torch.equal(*log_likelihoods)


@pytest.mark.parametrize("folder", ["run", "empty", "missing"])
def test_a_folder_that_holds_no_such_model_is_refused_in_one_line(folder, run, tmp_path):
    (tmp_path / "empty").mkdir()
    path = run if folder == "run" else tmp_path / folder
    with pytest.raises(InputError) as error:
        ltm_pyro.from_pretrained(path)
    assert str(error.value) == (
        f"{path} holds no model of save_pretrained: it has no model.safetensors; ltm_pyro.load reads runs"
    )


def test_a_folder_with_damaged_weights_is_refused(run, tmp_path):
    ltm_pyro.save_pretrained(run, tmp_path / "model")
    damaged = tmp_path / "model/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    with pytest.raises(InputError, match="is damaged"):
        ltm_pyro.from_pretrained(tmp_path / "model")


# The command


def test_the_command_writes_the_same_folder_and_says_how_to_load_it(run, tmp_path, capsys):
    for which in ("newest", "best"):
        out = tmp_path / which / "it's"
        ltm_pyro.save_pretrained(run, tmp_path / f"by-hand/{which}/it's", which)
        assert export.main([str(run), "--out", str(out), "--which", which]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{out}: weights, settings and model card of {run}; ")
        ltm = eval(line.split("; ")[1].removesuffix(" loads the model"))
        assert isinstance(ltm, ltm_pyro.TrainedModel)
        written = {path.name: path.read_bytes() for path in out.iterdir()}
        assert written == {path.name: path.read_bytes() for path in (tmp_path / f"by-hand/{which}/it's").iterdir()}
    assert (
        weights(tmp_path / "newest/it's")["decoder.embedding.weight"]
        .ne(weights(tmp_path / "best/it's")["decoder.embedding.weight"])
        .any()
    )


def test_the_command_says_nothing_else_as_a_process(run, tmp_path):
    """Python warns of a command that its package has imported already."""
    command = [sys.executable, "-m", "ltm_pyro.export", str(run), "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


BAD_INPUT = {
    "nothing": ([], "give RUN"),
    "no folder": (["RUN"], "give --out FOLDER"),
    "no run": (["missing", "--out", "new"], "there is no run missing"),
    "a folder that exists": (["RUN", "--out", "."], "exists already"),
    "unknown option": (["RUN", "--out", "new", "--wich", "best"], "--wich"),
    "unknown checkpoint": (["RUN", "--out", "new", "--which", "worst"], "worst"),
}


@pytest.mark.parametrize(("args", "mentioned"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing_behind(
    args, mentioned, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.run(export.main, [str(run) if arg == "RUN" else arg for arg in args])
    err = capsys.readouterr().err
    assert (exit.value.code, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: ")
    assert mentioned in err
    assert not list(tmp_path.iterdir())


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(export.main, ["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for option in ("RUN", "--out", "--which"):
        assert option in out
