"""The folder of a run: what was written is read back, and what was damaged is refused; the model loaded from it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import ltm_pyro
from ltm_pyro import cli, train
from ltm_pyro.config import preset, to_dict
from ltm_pyro.data import fingerprint, get_tokenizer
from ltm_pyro.errors import InputError
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.migrations import VERSION
from ltm_pyro.runs.run import Run, check_is_free, create_run
from ltm_pyro.runs.trained import TrainedModel

LENGTH = 48
MORE = f"--model.length {LENGTH} --fast-steps 1 --steps 1 --validation-sequences 1"
END = 256
RESOLVED = {"corpus_sha256": "0" * 64, "device": "cpu"}
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def trained_in(
    tiny_options: list[str], write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the run `runs/python-docs-tiny-vi`, of one step."""
    folder = tmp_path_factory.mktemp("trained")
    paths = ["--data", str(write_text(folder / "text.txt")), "--out", str(folder / "runs/python-docs-tiny-vi")]
    assert train.main([*tiny_options, *shlex.split(MORE), *paths]) == 0
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
        schemes={**tiny.schemes, "adamvi": AdamVI(learning_rate=1e-05, epsilon=1 / 3)},
    )
    run.write_config(config, RESOLVED)
    assert run.read_config() == (config, RESOLVED)
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


CONFIG = {"version": VERSION, **to_dict(preset("tiny")), "resolved": RESOLVED}


YAML = [
    *(
        "steps: ",
        "resolved: ",
        "[",
        "{",
        "}",
        "]",
        "- ",
        "\n",
        "  ",
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!set ",
        "'",
        '"',
        "!",
    ),
    *(
        "0x",
        "1:1",
        "2026-13-45",
        "=",
        "? ",
        "---",
        "...",
        "%YAML",
        "|",
        ">",
        "#",
        "\t",
        ": ",
        ",",
        "~",
        ".",
        "e+",
        "0b_",
    ),
    *("0001-01-01 00:00:00 +23:00", "\0", "\x85", "1" * 50, ":59" * 200, "!!float ", "!!timestamp ", "!!bool "),
]
YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
DOTTED = [f"{name}.{key}" for name, values in CONFIG.items() if isinstance(values, dict) for key in values]
NAMES = st.sampled_from([*CONFIG, *DOTTED]) | st.text(max_size=5) | st.integers()


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def changed(changes: dict[Any, Any], dropped: set[str]) -> bytes:
    return yaml.safe_dump({k: v for k, v in CONFIG.items() if k not in dropped} | changes, sort_keys=False).encode()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("fuzzed"))


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
    "deep lists": b"steps: " + b"[" * 100_000,
    "deep mappings": b"{a: " * 100_000,
    "deep blocks": "\n".join(" " * depth + "a:" for depth in range(3000)).encode(),
    "a value that holds itself": text_with() + b"more: &more {more: *more}\n",
    "ten to the tenth values": b"".join(
        b"%c: &%c {%s}\n" % (name, name, b", ".join(b"%d: *%c" % (n, name - 1) for n in range(10)) if number else b"")
        for number, name in enumerate(b"abcdefghijk")
    ),
    "true that is neither yes nor no": text_with(compile="WHAT").replace(b"WHAT", b"!!bool what"),
    "a time before all times": text_with(data="TIME").replace(b"TIME", b"0001-01-01 00:00:00 +23:00"),
    "a number beyond all numbers, in base 60": text_with(data="SUM").replace(b"SUM", b"1" + b":59" * 300 + b".0"),
    "a seed too long to print": text_with().replace(b"seed: 0", b"seed: 0x" + b"f" * 6000),
    "a setting under a dotted name": yaml.safe_dump(
        CONFIG | {"model": {k: v for k, v in CONFIG["model"].items() if k != "width"}, "model.width": 16}
    ).encode(),
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


@settings(deadline=None)
@given(
    content=st.lists(st.sampled_from(YAML) | st.text(max_size=4), max_size=12).map("".join).map(encoded)
    | st.builds(
        changed, st.dictionaries(NAMES, YAML_VALUES, max_size=3), st.sets(st.sampled_from([*CONFIG]), max_size=2)
    )
)
def test_whatever_is_in_a_config_it_is_read_or_refused(content, fuzzed):
    fuzzed.config_path.write_bytes(content)
    with contextlib.suppress(InputError):
        fuzzed.read_config()


def test_a_config_that_would_run_code_is_refused_and_does_not(run, tmp_path):
    trap = tmp_path / "code has run"
    text = f"steps: !!python/object/apply:os.mkdir [{json.dumps(str(trap))}]\nresolved: {{}}\n"
    run.config_path.write_text(text)
    with pytest.raises(InputError, match="line 1 has deep nesting"):
        run.read_config()
    assert not trap.exists()
    yaml.unsafe_load(text)
    assert trap.exists()  # so it would have


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


@pytest.mark.parametrize("damage", [b"\0\0\0\0", b"", b'{"step": 2, "spl', b"[" * 100_000, pickle.dumps({"step": 2})])
def test_a_damaged_line_before_the_last_is_refused_and_not_left_out(damage, run):
    whole = b'{"step": 1, "split": "train"}\n'
    run.metrics_path.write_bytes(whole + damage.replace(b"\n", b"") + b"\n" + whole)
    for read in (run.read_metrics, lambda: run.forget_metrics_after(0)):
        with pytest.raises(InputError, match=r"line 2 of .*metrics\.jsonl is not the record of a step"):
            read()
    assert run.metrics_path.read_bytes().count(whole) == 2


def test_metrics_that_cannot_be_read_are_refused(run):
    run.metrics_path.mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read"):
        run.read_metrics()


def test_lines_that_are_kept_are_kept_byte_for_byte(run):
    kept = b'{ "step":1,  "loss":1e999, "text":"\xc3\xa4\xe2\x80\xa8", "sum":0.10 }\n'
    run.metrics_path.write_bytes(kept + b'{"step": 2}\n')
    run.forget_metrics_after(1)
    assert run.metrics_path.read_bytes() == kept


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
RECORDS = st.dictionaries(st.sampled_from(["step", "split"]) | st.text(max_size=5), JSON_VALUES, max_size=4)
LINES = RECORDS.map(json.dumps).map(str.encode) | st.binary(max_size=9) | st.text(max_size=9).map(encoded)


@settings(deadline=None)
@given(content=st.lists(LINES, max_size=4).map(b"\n".join))
def test_whatever_is_in_the_metrics_they_are_read_or_refused(content, fuzzed):
    fuzzed.metrics_path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert all(type(record["step"]) is int for record in fuzzed.read_metrics())
        fuzzed.forget_metrics_after(1)
        assert all(record["step"] <= 1 for record in fuzzed.read_metrics())


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_run_that_is_killed_while_it_goes_back_to_an_older_checkpoint_goes_back_again(tmp_path, dies_before):
    """The newest is damaged; lines of later steps and what a crash left half written are there too."""
    start = Run(tmp_path / "start")
    model = torch.nn.Linear(2, 3)
    adamw = torch.optim.AdamW(model.parameters())
    for step in (1, 2, 3):
        checkpoint.save(start.checkpoints, model, adamw, Progress(step=step), num_kept=3)
        start.append_metrics({"step": step})
    (start.checkpoints / "step-00000003/model.safetensors").write_bytes(b"")
    (start.checkpoints / ".step-00000004.partial").mkdir()
    (start.checkpoints / ".step-00000004.partial/model.safetensors").write_bytes(b"half")
    (start.path / ".config.yaml.partial").write_bytes(b"half")
    for number in itertools.count():
        run = Run(tmp_path / str(number))
        shutil.copytree(start.path, run.path)
        died = dies_before(number, lambda run=run: run.restore(model, adamw))
        progress, damage = run.restore(model, adamw)
        assert progress == Progress(step=2)
        # Once the damaged one is gone there is nothing to be said of it.
        assert damage is None or "step-00000003/model.safetensors is damaged" in damage
        assert [record["step"] for record in run.read_metrics()] == [1, 2]
        assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-00000001", "step-00000002"]
        assert [path.name for path in sorted(run.path.iterdir())] == ["checkpoints", "metrics.jsonl"]
        if not died:
            break
    assert number > 15


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


def test_of_two_that_begin_a_run_in_one_folder_at_once_the_second_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ltm_pyro.runs.run.check_is_free", lambda *args, **options: None)  # it was, for both
    create_run(str(tmp_path / "run"), "unused")
    with pytest.raises(InputError, match="another process has just begun a run there"):
        create_run(str(tmp_path / "run"), "unused")


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
        with pytest.raises(InputError, match=r"there is no run .*nothing|holds no run: it has no config\.yaml"):
            ltm_pyro.load(path)
    run.write_config(preset("tiny"), {"tokenizer_sha256": fingerprint(get_tokenizer("bytes"))})
    with pytest.raises(InputError, match="holds no checkpoint"):
        ltm_pyro.load(tmp_path)
    run.write_config(preset("tiny"), {"tokenizer_sha256": "0" * 64})
    with pytest.raises(InputError, match="tokenizer bytes is not the one"):
        ltm_pyro.load(tmp_path)


def test_a_run_that_was_never_validated_has_no_best_checkpoint(trained_in):
    with pytest.raises(InputError, match="holds no checkpoint that was validated"):
        ltm_pyro.load(trained_in / "runs/python-docs-tiny-vi", which="best")


def test_the_python_example_of_the_readme_runs(trained_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/python-docs-tiny-map").symlink_to(trained_in / "runs/python-docs-tiny-vi")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, README.name, "exec"), names)
    state, batch, model = names["state"], names["batch"], names["ltm"].model
    assert state.mean.shape == (len(batch), *model.config.latent_shape) == names["thoughts"].mean.shape
    assert state.step.tolist() == [16, 16]
    trace = pyro.poutine.trace(model).get_trace(batch)
    assert trace.nodes["z"]["value"].shape == state.mean.shape
    assert torch.equal(trace.nodes["tokens"]["value"], batch.tokens)
    printed = capsys.readouterr().out
    assert printed.startswith("It was a dark")
    assert str(names["score"]) in printed
    assert printed.count("TokenScore(") == 5
    assert len(names["score"].tokens) == len("The king was old, and he had no son.") + 1
    assert ltm_pyro.from_pretrained("my-model").config.data == str(trained_in / "text.txt")
