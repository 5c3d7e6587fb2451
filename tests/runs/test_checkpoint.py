"""Checkpoints: what comes back is what was written, and what was damaged is refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ltm_pyro import cli
from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.files import durable
from ltm_pyro.inference.muon import Muon
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress

needs_sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
PROGRESS = Progress(step=3, tokens_seen=1234, seconds=0.1 + 0.2, num_skipped_steps=2, skips_in_a_row=1)


def network(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3, bias=False))


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, whose weights are not in the model's order: matrices, then the others."""
    groups = [[w for w in model.parameters() if w.dim() > 1], [w for w in model.parameters() if w.dim() <= 1]]
    return torch.optim.AdamW([{"params": group, "weight_decay": 0.1} for group in groups], lr=0.01)


def take_steps(model: nn.Module, adamw: torch.optim.AdamW, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        model(torch.randn(6, 4, generator=generator)).square().sum().backward()
        adamw.step()
        adamw.zero_grad()


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    model = network()
    adamw = optimizer(model)
    take_steps(model, adamw, 3, seed=1)
    return model, adamw


@pytest.fixture
def saved(tmp_path: Path, trained: tuple[nn.Module, torch.optim.AdamW]) -> Path:
    return checkpoint.save(tmp_path, *trained, PROGRESS, num_kept=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_moments_and_progress_come_back_bit_for_bit(saved, trained):
    model, adamw = trained
    other = network()
    other_adamw = optimizer(other)
    checkpoint.load_weights(saved, other)
    assert checkpoint.load_progress(saved, other_adamw) == PROGRESS
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert adamw.state[a].keys() == other_adamw.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, other_adamw.state[b][key]) for key, value in adamw.state[a].items())


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(saved, trained):
    other = network()
    other_adamw = optimizer(other)
    checkpoint.load_weights(saved, other)
    checkpoint.load_progress(saved, other_adamw)
    take_steps(*trained, 2, seed=2)
    take_steps(other, other_adamw, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), other.parameters(), strict=True))


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    model = network()
    saved = checkpoint.save(tmp_path, model, optimizer(model), Progress(), num_kept=2)
    adamw = optimizer(model)
    assert checkpoint.load_progress(saved, adamw) == Progress()
    assert not adamw.state_dict()["state"]


def test_the_rates_and_decays_are_those_of_the_settings_and_not_of_the_checkpoint(saved):
    adamw = optimizer(network())
    adamw.param_groups[1]["lr"] = 0.5
    checkpoint.load_progress(saved, adamw)
    assert [group["lr"] for group in adamw.param_groups] == [0.01, 0.5]


def test_only_the_last_two_are_kept(tmp_path, trained):
    for step in (1, 9, 10, 100):
        path = checkpoint.save(tmp_path, *trained, Progress(step=step), num_kept=2)
        assert path == checkpoint.all_checkpoints(tmp_path)[-1]
    assert names(tmp_path) == ["step-00000010", "step-00000100"]


def test_what_a_crash_left_half_written_is_no_checkpoint_and_is_removed(tmp_path, trained):
    left_behind = tmp_path / ".step-00000002.partial"
    left_behind.mkdir()
    (left_behind / "model.safetensors").write_bytes(b"half")
    assert checkpoint.all_checkpoints(tmp_path) == []
    checkpoint.save(tmp_path, *trained, Progress(step=2), num_kept=2)
    assert names(tmp_path) == ["step-00000002"]


def test_a_crash_in_the_middle_of_writing_leaves_the_checkpoint_before_it(tmp_path, trained, monkeypatch):
    checkpoint.save(tmp_path, *trained, Progress(step=1), num_kept=2)

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(WriteError, match="No space left"):
            checkpoint.save(tmp_path, *trained, Progress(step=2), num_kept=2)
    assert names(tmp_path) == ["step-00000001"]
    checkpoint.save(tmp_path, *trained, Progress(step=2), num_kept=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_where_a_weight_is_not_finite(value, tmp_path, trained):
    model, adamw = trained
    with torch.no_grad():
        model[1].weight[1, 2] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        checkpoint.save(tmp_path / "checkpoints", model, adamw, PROGRESS, num_kept=2)
    assert names(tmp_path) == []


def test_a_checkpoint_of_the_same_step_is_not_written_again(saved, trained):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.iterdir()}
    model, adamw = trained
    with torch.no_grad():
        model[0].weight.zero_()
    assert checkpoint.save(saved.parent, model, adamw, PROGRESS, num_kept=2) == saved
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.iterdir()}


FIGURE = {
    "step": 3,
    "estimator": "elbo",
    "nats_per_token": 1.5,
    "num_samples": 4,
    "num_tokens": 100,
    "standard_error": math.nan,
}


def save_and_judge(folder: Path, trained: tuple[nn.Module, torch.optim.AdamW], step: int, **figure: object) -> None:
    """As training does where it validates."""
    record = FIGURE | figure
    if checkpoint.is_best(folder, record):
        checkpoint.mark_best(checkpoint.save(folder, *trained, Progress(step=step), num_kept=1), record)


def test_the_best_one_is_kept_as_long_as_it_is_the_best(tmp_path, trained):
    kept = []
    for step, nats in enumerate([1.5, 1.4, 1.45, 1.4, 1.41, 1.3, math.inf, math.nan, 1.35]):
        save_and_judge(tmp_path, trained, step, nats_per_token=nats)
        checkpoint.save(tmp_path, *trained, Progress(step=step), num_kept=1)
        kept.append([int(name.removeprefix("step-")) for name in names(tmp_path)])
    assert kept == [[0], [1], [1, 2], [1, 3], [1, 4], [5], [5, 6], [5, 7], [5, 8]]


def test_the_best_one_says_by_which_figure_it_is(tmp_path, trained):
    assert checkpoint.best_checkpoint(tmp_path) is None
    save_and_judge(tmp_path, trained, 3)
    best = checkpoint.best_checkpoint(tmp_path)
    assert best == tmp_path / "step-00000003"
    expected = {"best_by": "nats_per_token", "split": "validation", **FIGURE, "standard_error": None}
    assert checkpoint.read_best(best) == json.loads((best / "best.json").read_text()) == expected
    assert checkpoint.load_progress(best, optimizer(network())) == Progress(step=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_not_the_best_even_if_it_is_the_first(value, tmp_path):
    assert checkpoint.is_best(tmp_path, FIGURE)
    assert not checkpoint.is_best(tmp_path, FIGURE | {"nats_per_token": value})


@pytest.mark.parametrize(
    "changed", [{"num_tokens": 99}, {"num_samples": 8}, {"estimator": "exact"}, {"sequences": "reserved"}]
)
def test_a_figure_of_other_texts_or_draws_is_the_first_of_its_kind(changed, tmp_path, trained):
    save_and_judge(tmp_path, trained, 1)
    assert not checkpoint.is_best(tmp_path, FIGURE | {"nats_per_token": 1.6})
    assert checkpoint.is_best(tmp_path, FIGURE | {"nats_per_token": 1.6} | changed)


def test_a_best_figure_that_is_damaged_stays_until_there_is_another(tmp_path, trained):
    save_and_judge(tmp_path, trained, 1)
    (tmp_path / "step-00000001/best.json").write_bytes(b"{")
    checkpoint.save(tmp_path, *trained, Progress(step=2), num_kept=1)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    with pytest.raises(InputError, match=r"best\.json is damaged"):
        checkpoint.read_best(tmp_path / "step-00000001")
    save_and_judge(tmp_path, trained, 2)
    checkpoint.save(tmp_path, *trained, Progress(step=2), num_kept=1)
    assert names(tmp_path) == ["step-00000002"]


@needs_sha256sum
def test_the_checksums_are_those_of_sha256sum(tmp_path, trained):
    save_and_judge(tmp_path, trained, 3)
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "step-00000003",
        capture_output=True,
        text=True,
    )
    files = ("model.safetensors", "optimizer.safetensors", "progress.json", "best.json")
    assert (result.returncode, result.stdout) == (0, "".join(f"{name}: OK\n" for name in files))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_whenever_the_process_dies_the_old_or_the_new_checkpoint_is_restored(tmp_path, trained, dies_before):
    """Every one that stands can be read; and what is left behind is in nobody's way."""
    model, adamw = trained
    before, after = tmp_path / "before", tmp_path / "after"
    checkpoint.save(before, model, adamw, Progress(step=1), num_kept=1)
    old = [weight.clone() for weight in model.parameters()]
    take_steps(model, adamw, 1, seed=4)
    steps = []
    for number in itertools.count():
        shutil.rmtree(after, ignore_errors=True)
        shutil.copytree(before, after)

        def action() -> None:
            checkpoint.mark_best(checkpoint.save(after, model, adamw, Progress(step=2), num_kept=1), FIGURE)

        died = dies_before(number, action)
        other = network()
        restored, progress, errors = checkpoint.restore(after, other, optimizer(other))
        assert errors == []
        assert restored.name == f"step-{progress.step:08d}"
        expected = old if progress.step == 1 else model.parameters()
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), expected, strict=True))
        for standing in checkpoint.all_checkpoints(after):
            assert resume(standing) == 0
        steps.append(progress.step)
        durable.remove_leftovers(after)
        action()
        assert names(after) == ["step-00000002"]
        assert checkpoint.read_best(after / "step-00000002")["nats_per_token"] == FIGURE["nats_per_token"]
        if not died:
            break
    assert len(steps) > 20
    assert (steps[0], steps[-1]) == (1, 2)
    assert steps == sorted(steps)


def test_a_full_disk_leaves_the_checkpoints_before_it_and_no_half(tmp_path, trained, full_beyond):
    checkpoint.save(tmp_path, *trained, Progress(step=1), num_kept=1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()}
    for limit in (0, sizes["model.safetensors"] - 1, sizes["optimizer.safetensors"] - 1):
        with full_beyond(limit), pytest.raises(WriteError, match="cannot be written: File too large"):
            checkpoint.save(tmp_path, *trained, Progress(step=2), num_kept=1)
        assert names(tmp_path) == ["step-00000001"]
        assert resume(tmp_path / "step-00000001") == 0


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_bit(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def make_sums(saved: Path) -> None:
    """As `sha256sum *.* > SHA256SUMS` does."""
    paths = sorted(path for path in saved.iterdir() if path.suffix)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    (saved / "SHA256SUMS").write_text("".join(lines))


FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "SHA256SUMS")
HURT: dict[str, Callable[[Path], object]] = {
    **{f"bit at {position}": functools.partial(flip_bit, position=position) for position in (0.0, 0.2, 0.5, 0.8, 1.0)},
    "cut short": cut_short,
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


# A line more, which names no file, does no harm.
CASES = [(file, hurt) for file in FILES for hurt in HURT if (file, hurt) != ("SHA256SUMS", "longer")]


@pytest.mark.parametrize(("file", "hurt"), CASES)
def test_where_the_newest_is_damaged_the_one_before_it_is_restored(file, hurt, tmp_path, trained):
    model, adamw = trained
    checkpoint.save(tmp_path, model, adamw, Progress(step=1), num_kept=2)
    old = [weight.clone() for weight in model.parameters()]
    moments = [adamw.state[weight]["exp_avg"].clone() for weight in model.parameters()]
    take_steps(model, adamw, 1, seed=4)
    newest = checkpoint.save(tmp_path, model, adamw, Progress(step=2), num_kept=2)
    HURT[hurt](newest / file)
    other = network()
    other_adamw = optimizer(other)
    restored, progress, errors = checkpoint.restore(tmp_path, other, other_adamw)
    assert (restored.name, progress) == ("step-00000001", Progress(step=1))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), old, strict=True))
    assert all(
        torch.equal(other_adamw.state[w]["exp_avg"], m) for w, m in zip(other.parameters(), moments, strict=True)
    )
    assert len(errors) == 1
    assert "step-00000002" in str(errors[0])
    checkpoint.remove_after(restored)
    assert names(tmp_path) == ["step-00000001"]


def test_where_all_are_damaged_each_is_named_and_none_goes(tmp_path, trained):
    for step in (1, 2):
        checkpoint.save(tmp_path, *trained, Progress(step=step), num_kept=2)
        cut_short(tmp_path / f"step-0000000{step}" / "model.safetensors")
    model = network()
    with pytest.raises(InputError, match=r"can be read: .*step-00000002.*; .*step-00000001"):
        checkpoint.restore(tmp_path, model, optimizer(model))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@needs_sha256sum
def test_checksums_can_be_made_for_a_checkpoint_that_is_older_than_they_are(saved):
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"has no SHA256SUMS: .* sha256sum \*\.\* > SHA256SUMS"):
        resume(saved)
    subprocess.run("sha256sum *.* > SHA256SUMS", shell=True, cwd=saved, check=True)
    assert resume(saved) == 0


class CodeInPickle:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("write", [lambda what, path: path.write_bytes(pickle.dumps(what)), torch.save])
@pytest.mark.parametrize("file", FILES[:3])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(file, write, saved, tmp_path):
    """With a checksum that fits, as whoever puts it there would give it."""
    trap = tmp_path / "code has run"
    write(CodeInPickle(trap), saved / file)
    make_sums(saved)
    with pytest.raises(InputError, match=f"{file} cannot be read"):
        resume(saved)
    assert not trap.exists()
    with (saved / file).open("rb") as opened:
        torch.load(opened, weights_only=False) if write is torch.save else pickle.load(opened)
    assert trap.exists()  # so it would have


def change_moments(saved: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    moments = load_file(saved / "optimizer.safetensors")
    change(moments)
    save_file(moments, saved / "optimizer.safetensors")


def write_header(saved: Path, header: dict[str, object]) -> None:
    content = json.dumps(header).encode()
    (saved / "optimizer.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)


def change_progress(saved: Path, **values: object) -> None:
    (saved / "progress.json").write_text(json.dumps(dataclasses.asdict(PROGRESS) | values))


def moments_of_a_wider_model(saved: Path) -> None:
    other = network(width=7)
    adamw = optimizer(other)
    take_steps(other, adamw, 1, seed=3)
    (path,) = saved.parent.glob("step-*")
    wider = checkpoint.save(saved.parent / "other", other, adamw, PROGRESS, num_kept=2)
    (wider / "optimizer.safetensors").replace(path / "optimizer.safetensors")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda saved: cut_short(saved / "model.safetensors"),
    "empty weights": lambda saved: (saved / "model.safetensors").write_bytes(b""),
    "no weights": lambda saved: (saved / "model.safetensors").unlink(),
    "weights are not safetensors": lambda saved: (saved / "model.safetensors").write_text("weights " * 20),
    "moments cut short": lambda saved: cut_short(saved / "optimizer.safetensors"),
    "no moments": lambda saved: (saved / "optimizer.safetensors").unlink(),
    "moments of another model": moments_of_a_wider_model,
    "moments of one more weight": lambda saved: change_moments(
        saved, lambda moments: moments.update({"3.exp_avg": torch.zeros(5)})
    ),
    "a moment without a number": lambda saved: change_moments(
        saved, lambda moments: moments.update(exp_avg=torch.zeros(5))
    ),
    "a moment that AdamW lacks": lambda saved: change_moments(
        saved, lambda moments: moments.update({"0.momentum": torch.zeros(5, 4)})
    ),
    "a moment is missing": lambda saved: change_moments(saved, lambda moments: moments.pop("0.exp_avg_sq")),
    "the moments of a weight are missing": lambda saved: change_moments(
        saved, lambda moments: [moments.pop(f"2.{key}") for key in ("step", "exp_avg", "exp_avg_sq")]
    ),
    "a moment is a single number": lambda saved: change_moments(
        saved, lambda moments: moments.update({"0.exp_avg": torch.tensor(0.0)})
    ),
    "the step of a moment is a matrix": lambda saved: change_moments(
        saved, lambda moments: moments.update({"0.step": torch.zeros(5, 4)})
    ),
    "a moment of a type that torch lacks": lambda saved: write_header(
        saved, {"0.step": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "a moment of a size that torch lacks": lambda saved: write_header(
        saved, {"0.step": {"dtype": "F32", "shape": [0, 2**63 - 1, 4], "data_offsets": [0, 0]}}
    ),
    "a moment with a number beyond all weights": lambda saved: change_moments(
        saved, lambda moments: moments.update({"9" * 5000 + ".exp_avg": torch.zeros(5)})
    ),
    "no progress": lambda saved: (saved / "progress.json").unlink(),
    "progress is empty": lambda saved: (saved / "progress.json").write_text(""),
    "progress says nothing": lambda saved: (saved / "progress.json").write_text("{}"),
    "progress is a list": lambda saved: (saved / "progress.json").write_text("[3, 4]"),
    "progress is not JSON": lambda saved: (saved / "progress.json").write_text("step: 3"),
    "progress is not UTF-8": lambda saved: (saved / "progress.json").write_bytes(b'{"step": "\xff"}'),
    "progress says one thing more": lambda saved: change_progress(saved, epoch=1),
    "step is text": lambda saved: change_progress(saved, step="3"),
    "step is a fraction": lambda saved: change_progress(saved, step=3.0),
    "step is true": lambda saved: change_progress(saved, step=True),
    "seconds are null": lambda saved: change_progress(saved, seconds=None),
    "seconds are infinite": lambda saved: change_progress(saved, seconds=math.inf),
    "seconds are not a number": lambda saved: change_progress(saved, seconds=math.nan),
    "step is negative": lambda saved: change_progress(saved, step=-1),
    "progress is deep": lambda saved: (saved / "progress.json").write_text("[" * 100_000),
}


def resume(saved: Path) -> int:
    model = network()
    adamw = optimizer(model)
    checkpoint.load_weights(saved, model)
    checkpoint.load_progress(saved, adamw)
    return 0


@pytest.mark.parametrize("has_new_sums", [False, True])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_in_one_line_that_says_which(damage, has_new_sums, saved, capsys):
    """By its checksums, and by what it says where these fit."""
    assert resume(saved) == 0
    damage(saved)
    if has_new_sums:
        make_sums(saved)
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda args: resume(saved), [])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert saved.name in err


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = network()
    return checkpoint.save(tmp_path_factory.mktemp("fuzz"), model, optimizer(model), PROGRESS, num_kept=1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*dataclasses.asdict(PROGRESS), *FIGURE]) | st.text(max_size=5)
JSON_TEXTS = st.dictionaries(NAMES, JSON_VALUES).map(json.dumps) | JSON_VALUES.map(json.dumps) | st.text()


@settings(deadline=None)
@given(content=JSON_TEXTS.map(str.encode) | st.binary(), file=st.sampled_from(["progress.json", "best.json"]))
def test_whatever_is_in_its_json_it_is_read_or_refused(content, file, saved_once):
    read = {"progress.json": checkpoint.read_progress, "best.json": checkpoint.read_best}[file]
    (saved_once / file).write_bytes(content)
    make_sums(saved_once)
    with contextlib.suppress(InputError):
        read(saved_once)


@settings(deadline=None)
@given(content=st.text().map(str.encode) | st.binary())
def test_whatever_is_in_its_checksums_it_is_refused(content, saved_once):
    """No text that is drawn holds the checksum of a file."""
    (saved_once / "SHA256SUMS").write_bytes(content)
    with pytest.raises(InputError, match="SHA256SUMS"):
        checkpoint.read_progress(saved_once)


@settings(deadline=None)
@given(header=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: json.dumps({text: text}).encode()))
def test_whatever_is_in_its_tensors_they_are_refused(header, saved_once):
    (saved_once / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    make_sums(saved_once)
    with pytest.raises(InputError, match=r"model\.safetensors|do not fit this model"):
        checkpoint.load_weights(saved_once, network())


def test_the_weights_of_another_model_are_refused(saved):
    with pytest.raises(InputError, match="do not fit this model"):
        checkpoint.load_weights(saved, network(width=6))
    deeper = network().append(nn.Linear(3, 3))
    with pytest.raises(InputError, match="do not fit this model"):
        checkpoint.load_weights(saved, deeper)


def test_muon_goes_on_bit_for_bit_from_its_own_moments_alone(tmp_path, saved):
    def muon_of(model):
        matrices = [weight for weight in model.parameters() if weight.dim() == 2]
        others = [weight for weight in model.parameters() if weight.dim() != 2]
        return Muon([{"params": others}, {"params": matrices, "num_maps": 1}], lr=0.01)

    model, other = network(), network()
    muon, other_muon = muon_of(model), muon_of(other)
    take_steps(model, muon, 3, seed=1)
    path = checkpoint.save(tmp_path / "muon", model, muon, PROGRESS, num_kept=2)
    checkpoint.load_weights(path, other)
    checkpoint.load_progress(path, other_muon)
    for each, own in ((model, muon), (other, other_muon)):
        take_steps(each, own, 2, seed=2)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for wrong, algorithm in ((path, optimizer(other)), (saved, other_muon)):
        with pytest.raises(InputError, match="do not fit this model"):
            checkpoint.load_progress(wrong, algorithm)
