"""The folder of a run: what was written is read back, and what was damaged is refused; the model loaded from it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import yaml

import ltm_pyro
from ltm_pyro import cli, train
from ltm_pyro.config import preset, to_dict
from ltm_pyro.data import fingerprint, get_tokenizer
from ltm_pyro.errors import InputError
from ltm_pyro.run import Run, TrainedModel, check_is_free, create_run

LENGTH = 48
SMALL = shlex.split(
    f"--model.width 16 --model.num-heads 2 --model.hidden 24 --model.num-layers 2 --model.num-slots 2 --model.window 8 "
    f"--model.length {LENGTH} --batch-size 2 --micro-batch-size 2 --fast-steps 1 --steps 1 --validation-sequences 1 "
    "--validation-samples 2 --device cpu"
)
END = 256
RESOLVED = {"corpus_sha256": "0" * 64, "device": "cpu"}
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def trained_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/python-docs-tiny-vi`, of one step."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("".join(f"Sentence number {n} says that {n} plus {n} makes {2 * n}.\n" for n in range(100)))
    assert train.main([*SMALL, "--data", str(text), "--out", str(folder / "runs/python-docs-tiny-vi")]) == 0
    return folder


@pytest.fixture
def ltm(trained_in: Path) -> TrainedModel:
    return ltm_pyro.load(trained_in / "runs/python-docs-tiny-vi")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_config_is_read_back_as_it_was_written(run):
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        data="Bücher: “eins”, 二.txt",
        out="yes",  # a word that YAML would take for true
        seed=2**32 - 1,
        adamvi=dataclasses.replace(tiny.adamvi, learning_rate=1e-05, epsilon=1 / 3),
    )
    run.write_config(config, RESOLVED)
    assert run.read_config() == (config, RESOLVED)
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


CONFIG = {**to_dict(preset("tiny")), "resolved": RESOLVED}


def text_with(**values: Any) -> bytes:
    return yaml.safe_dump(CONFIG | values).encode()


DAMAGED = {
    "empty": b"",
    "not YAML": b"steps: [3",
    "a tag that would run code": b"steps: !!python/object/apply:os.getcwd []",
    "a list": b"- steps\n- 3\n",
    "a word": b"steps",
    "not UTF-8": text_with().replace(b"python-docs", b"python\xff"),
    "a zero byte": text_with() + b"\0",
    "no setting": yaml.safe_dump({"resolved": RESOLVED}).encode(),
    "missing setting": yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "steps"}).encode(),
    "unknown setting": text_with(epochs=3),
    "unknown setting without a value": text_with(epochs={}),
    "a number as a setting's name": text_with() + b"1: 2\n",
    "steps are a word": text_with(steps="many"),
    "steps are zero": text_with(steps=0),
    "no batch size": text_with(batch_size=None),
    "width is a fraction": text_with(model=CONFIG["model"] | {"width": 16.0}),
    "unknown scheme": text_with(inference="nuts"),
    "a date that does not exist": text_with(data="DATE").replace(b"DATE", b"2026-13-45"),
    "no number after a tag": text_with(steps="MANY").replace(b"MANY", b"!!int many"),
    "resolved is missing": yaml.safe_dump(to_dict(preset("tiny"))).encode(),
    "resolved is a list": text_with(resolved=[1]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_config_is_refused_in_one_line(content, run, capsys):
    run.config_path.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda args: run.read_config() and 0, [])
    err = capsys.readouterr().err
    assert (exit.value.code, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: ")


def test_metrics_are_strict_json_a_line_each_in_which_null_stands_for_what_is_not_finite(run):
    run.append_metrics({"step": 1, "split": "train", "loss": math.nan, "rate": 0.1})
    run.append_metrics({"step": 2, "split": "train", "loss": math.inf, "rate": -math.inf})
    run.append_metrics({"step": 3, "split": "validation", "posterior": "größer\n“vi”\u2028", "bits_per_byte": None})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "split": "train", "loss": None, "rate": 0.1},
        {"step": 2, "split": "train", "loss": None, "rate": None},
        {"step": 3, "split": "validation", "posterior": "größer\n“vi”\u2028", "bits_per_byte": None},
    ]
    assert run.read_metrics() == [json.loads(line) for line in lines]


def test_a_run_without_metrics_has_no_lines(run):
    assert run.read_metrics() == []
    run.forget_metrics_after(3)
    assert run.read_metrics() == []


@pytest.mark.parametrize(
    "cut_short",
    [b'{"step": 2, "spl', b'{"step": 2, "split": "tr\xc3', b"\0\0\0\0", b'{"split": "train"}', b'{"step": null}', b"2"],
)
def test_a_line_that_a_crash_cut_short_is_dropped(cut_short, run):
    run.append_metrics({"step": 1, "split": "train"})
    with run.metrics_path.open("ab") as file:
        file.write(cut_short)
    assert run.read_metrics() == [{"step": 1, "split": "train"}]
    run.forget_metrics_after(1)
    run.append_metrics({"step": 2, "split": "train"})
    assert run.metrics_path.read_text() == '{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}\n'


def test_a_resumed_run_forgets_the_lines_of_later_steps_and_the_report(run):
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "split": "train", "loss": math.nan})
    run.append_metrics({"step": 2, "split": "validation"})
    run.append_metrics({"step": 2, "split": "report"})
    run.forget_metrics_after(2)
    assert [(record["step"], record["split"]) for record in run.read_metrics()] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
    ]


def test_folders_without_a_name_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/text-2").write_text("a file takes a number too")
    paths = [create_run(None, name).path.as_posix() for name in ("text", "text", "text", "other")]
    assert paths == ["runs/text", "runs/text-3", "runs/text-4", "runs/other"]
    assert all(Path(path, "checkpoints").is_dir() for path in paths)


def test_a_folder_in_use_is_refused_and_an_empty_or_new_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/er"):
        assert create_run(str(tmp_path / name), "unused").checkpoints.is_dir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files already: give another folder"):
        check_is_free(str(tmp_path / "notes"))
    (tmp_path / "notes/config.yaml").write_text("")
    with pytest.raises(InputError, match="holds a run already: add --resume"):
        create_run(str(tmp_path / "notes"), "unused")
    with pytest.raises(InputError, match="cannot be used"):
        check_is_free(str(tmp_path / "notes/mine.txt"))
    with pytest.raises(InputError, match="--out"):
        create_run(str(tmp_path / "notes/mine.txt/below"), "unused")


def test_where_runs_is_a_file_no_run_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    with pytest.raises(InputError, match="--out"):
        create_run(None, "text")


def test_a_batch_holds_the_bytes_of_each_text_its_end_and_padding_that_counts_nothing(ltm):
    batch = ltm.batch(["né", "", "abc"])
    end = END
    assert batch.tokens.tolist() == [[0x6E, 0xC3, 0xA9, end], [end, end, end, end], [0x61, 0x62, 0x63, end]]
    assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.num_bytes.tolist() == [3, 0, 3]
    assert batch.sequence_ids.tolist() == [0, 1, 2]


def test_the_name_of_the_end_of_text_in_a_text_is_text(ltm):
    batch = ltm.batch(["<|endoftext|>"])
    assert bytes(batch.tokens[0, :-1].tolist()) == b"<|endoftext|>"
    assert batch.num_bytes.tolist() == [13]


def test_a_text_may_fill_the_sequences_of_the_model_with_its_end_and_no_more(ltm):
    assert ltm.batch(["a" * (LENGTH - 1)]).tokens.shape == (1, LENGTH)
    with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens.*{LENGTH}"):
        ltm.batch(["short", "é" * (LENGTH // 2)])
    with pytest.raises(ValueError, match="no text"):
        ltm.batch([])


def test_decoding_stops_at_the_end_of_text_and_leaves_out_ids_that_are_no_text(ltm):
    tokens = [[0x6E, 0xC3, 0xA9, END, 0x61], [END, 0x61, 0x61, 0x61, 0x61], [0x61, END + 1, 0x62, 0x63, 0x64]]
    assert ltm.decode(torch.tensor(tokens)) == ["né", "", "abcd"]
    texts = ["Zwei Wörter", "", "二"]
    assert ltm.decode(ltm.batch(texts).tokens) == texts


def test_a_model_is_loaded_with_its_settings_and_without_a_trace_in_the_random_numbers(trained_in):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ltm = ltm_pyro.load(trained_in / "runs/python-docs-tiny-vi")
    assert torch.equal(torch.rand(4), expected)
    assert (ltm.config.steps, ltm.config.model.length) == (1, LENGTH)
    assert ltm.tokenizer.n_vocab == get_tokenizer("bytes").n_vocab == 258


def test_a_folder_that_is_no_run_is_refused(tmp_path, run):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InputError, match=r"holds no run: it has no config\.yaml"):
            ltm_pyro.load(path)
    run.write_config(preset("tiny"), {"tokenizer_sha256": fingerprint(get_tokenizer("bytes"))})
    with pytest.raises(InputError, match="holds no checkpoint"):
        ltm_pyro.load(tmp_path)
    run.write_config(preset("tiny"), {"tokenizer_sha256": "0" * 64})
    with pytest.raises(InputError, match="tokenizer bytes is not the one"):
        ltm_pyro.load(tmp_path)


def test_the_python_example_of_the_readme_runs(trained_in, monkeypatch):
    monkeypatch.chdir(trained_in)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, README.name, "exec"), names)
    state, batch, model = names["state"], names["batch"], names["ltm"].model
    assert state.mean.shape == (len(batch), *model.config.latent_shape) == (2, 2, 2, 16)
    assert state.step.tolist() == [16, 16]
    trace = pyro.poutine.trace(model).get_trace(batch)
    assert trace.nodes["z"]["value"].shape == state.mean.shape
    assert torch.equal(trace.nodes["tokens"]["value"], batch.tokens)
