"""The command: what it writes, whatever stops it and however often, and that runs read it like any other corpus."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import ANY

import datasets
import pyarrow
import pytest
import tiktoken
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from ltm_pyro import compare, config, evaluate, prepare, train
from ltm_pyro.data import get_tokenizer, load_corpus, preparation, prepared, shards
from ltm_pyro.data.corpora import hub
from ltm_pyro.data.prepared import read_manifest
from ltm_pyro.errors import InputError
from ltm_pyro.training import loop

# Some versions of Python warn of processes that are forked from one with several threads, as NumPy's is.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

DOCUMENTS = [f"Document {number} says that {number} plus {number} makes {2 * number}. " * 3 for number in range(80)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds rows.jsonl, every process of the test has small chunks, and nothing waits for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 700)
    write_rows("rows.jsonl", DOCUMENTS)


def write_rows(name: str, documents: list[str]) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(run_main: Command) -> Command:
    """Runs the command in one process, unless it is told otherwise: (exit status, standard output, standard error)."""

    def run(*args: str) -> tuple[int, str, str]:
        alone = [] if "--processes" in args or "--verify" in args else ["--processes", "1"]
        return run_main(prepare.main, *args, *alone)

    return run


@pytest.fixture
def training(tiny_options: list[str]) -> list[str]:
    """Options of a short training run, but for its data, steps and folder."""
    more = "--micro-batch-size 2 --fast-steps 1 --validation-sequences 2"
    return [*tiny_options, *shlex.split(more)]


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# What is written


def test_the_folder_is_the_same_for_any_number_of_processes_and_says_what_it_holds(command):
    num_bytes = sum(len(text) for text in DOCUMENTS)
    for processes in ("1", "2", "3"):
        status, out, err = command("rows.jsonl", "--out", processes, "--shard-tokens", "2000", "--processes", processes)
        assert (status, err) == (0, "")
        assert f"{processes}: 80 documents, {num_bytes + 80:,} tokens of bytes" in out
        assert f"{num_bytes:,} bytes of text, in 5 shards" in out
        assert f"--data {processes} --tokenizer bytes" in out
    assert contents("1") == contents("2") == contents("3")
    assert set(contents("1")) >= {".lock", "manifest.json", "train-00004.tokens.bin", "train-00004.index.bin"}


def test_a_finished_folder_is_left_alone(command):
    assert command("rows.jsonl", "--out", "corpus")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("corpus").iterdir() if path.name != ".lock"}
    status, out, _ = command("rows.jsonl", "--out", "corpus")
    assert status == 0
    assert "was finished already" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def sides(folder: str) -> tuple[list[str], list[str]]:
    """Training and validation texts of a prepared corpus."""
    corpus = prepared.open_prepared(Path(folder), get_tokenizer("bytes"))
    read = []
    for documents in (corpus.train, corpus.validation.documents):
        joined = bytes(token % 256 for token in documents.read(0, documents.num_tokens).tolist())
        stops = list(itertools.accumulate(documents.sizes.tolist(), initial=0))
        read.append([joined[start : stop - 1].decode() for start, stop in itertools.pairwise(stops)])
    return read[0], read[1]


SOURCES = {
    "rows": ("rows.jsonl", "hashes"),
    "rows out of order, and blank": ("shuffled.jsonl", "hashes"),
    "a folder": ("folder", "hashes"),
    "a split of its own": ("splits", "source"),
    "few documents": ("few.jsonl", "ends"),
    "one text": ("one.txt", "ends"),
    "Parquet": ("rows.parquet", "hashes"),
}


@pytest.mark.parametrize(("source", "held_out"), SOURCES.values(), ids=SOURCES.keys())
def test_documents_and_what_is_held_out_are_those_of_the_corpus_itself(source, held_out, command):
    write_rows("shuffled.jsonl", ["", *DOCUMENTS[::-1], " \n", DOCUMENTS[3]])
    Path("folder").mkdir()
    for number, text in enumerate(DOCUMENTS[:30]):
        Path(f"folder/{number:02d}.txt").write_text(text)
    write_rows("splits/train-0.jsonl", DOCUMENTS[:10])
    write_rows("splits/train-1.jsonl", DOCUMENTS[10:20])
    write_rows("splits/valid.jsonl", DOCUMENTS[20:24])
    write_rows("few.jsonl", DOCUMENTS[:19] * 2)
    Path("one.txt").write_text("Ein Fuß.\n" * 50)
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet("rows.parquet")
    assert command(source, "--out", "corpus", "--shard-tokens", "1500")[0] == 0
    expected = load_corpus(source)
    assert sides("corpus") == (expected.train, expected.validation)
    manifest = read_manifest(Path("corpus"))
    assert (manifest.name, manifest.held_out, manifest.source) == (expected.name, held_out, source)


def test_a_data_set_of_the_hub(command, monkeypatch):
    splits = {"train": DOCUMENTS[:40], "validation": DOCUMENTS[40:45], "test": ["never"]}
    columns = {split: datasets.Dataset.from_dict({"body": ["", *texts]}) for split, texts in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(columns))
    assert command("group/name:config", "--text-column", "body", "--out", "corpus")[0] == 0
    assert sides("corpus") == (DOCUMENTS[:40], DOCUMENTS[40:45])
    assert read_manifest(Path("corpus")).name == "group-name-config"


# A data set of the hub that is read as it is downloaded


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads as it reads a repository of the hub; `group/name` is found there."""
    folder, load_dataset = tmp_path / "repository", datasets.load_dataset
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *more, **options: load_dataset(str(folder), **options))
    return folder


def write_rows_of(repository: Path, split: str, documents: list[str]) -> None:
    parquet.write_table(pyarrow.table({"text": ["", *documents]}), repository / f"{split}.parquet")


@pytest.mark.parametrize("held_out", ["hashes", "source", "ends"])
def test_what_is_streamed_gives_the_same_files_and_leaves_no_copy(held_out, repository, command):
    write_rows_of(repository, "train-0", DOCUMENTS[:12])
    if held_out != "ends":
        write_rows_of(repository, "train-1", DOCUMENTS[12:])
    if held_out == "source":
        write_rows_of(repository, "validation", ["held out", "too"])
    args = ("group/name", "--shard-tokens", "2000")
    assert command(*args, "--out", "streamed", "--streaming") == (0, ANY, "")
    assert not list(Path("cache").rglob("*.arrow"))
    assert command(*args, "--out", "stored")[0] == 0
    assert list(Path("cache").rglob("*.arrow"))
    assert read_manifest(Path("streamed")).held_out == held_out
    assert contents("streamed") == contents("stored")


def streams(rows: Callable[..., Iterator[dict]]) -> Callable[..., dict[str, datasets.IterableDataset]]:
    """A `load_dataset` whose only split is what a generator gives."""
    return lambda *_, **__: {"train": datasets.IterableDataset.from_generator(rows, gen_kwargs={"shard": [0]})}


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("broken_at", [3, 50])
def test_where_a_stream_breaks_off_finished_shards_are_kept_and_the_same_command_goes_on(
    broken_at, processes, command, monkeypatch
):
    starts = []

    def rows(shard: list[int]) -> Iterator[dict]:
        starts.append(0)
        for number, text in enumerate(DOCUMENTS):
            if len(starts) == 1 and number == broken_at:
                raise ConnectionError("the network\nis gone")
            yield {"text": text}

    monkeypatch.setattr(datasets, "load_dataset", streams(rows))
    monkeypatch.setattr(hub, "BATCH_ROWS", 10)
    args = ("name", "--streaming", "--shard-tokens", "1500", "--processes", processes)
    status, _, err = command(*args, "--out", "parts")
    kept = "; finished shards are kept in parts; the same command continues" if broken_at == 50 else ""
    assert (status, err) == (2, f"error: name, split train cannot be read to its end: the network is gone{kept}\n")
    assert (finished_shards("parts") >= 1) == (broken_at == 50)
    assert command(*args, "--out", "parts") == (0, ANY, "")
    assert len(starts) == 2  # once for each command
    assert command(*args, "--out", "whole")[0] == 0
    assert contents("parts") == contents("whole")


def test_progress_of_a_stream_that_does_not_say_how_long_it_is_has_no_share_and_no_time_left(
    repository, command, monkeypatch
):
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", 0)
    write_rows_of(repository, "train", DOCUMENTS)
    _, out, _ = command("name", "--streaming", "--out", "corpus")
    lines = out.splitlines()[3:-2]  # behind the splits, and before what is there in the end
    counts = [int(re.fullmatch(r"([\d,]+) tokens: [\d,]+ tokens/s", line)[1].replace(",", "")) for line in lines]
    assert len(counts) > 5
    assert counts == sorted(counts)
    assert counts[-1] == read_manifest(Path("corpus")).train[0].num_tokens
    assert "%" not in out
    assert " left" not in out


def test_progress_of_a_stream_that_does_not_say_how_long_it_is_is_no_bar(repository, command, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_rows_of(repository, "train", DOCUMENTS)
    status, _, err = command("name", "--streaming", "--out", "corpus")
    assert status == 0
    assert "tokens/s [" in err
    assert "%|" not in err


@pytest.mark.parametrize("said", [81, 40])
def test_progress_of_a_stream_has_a_share_until_there_are_more_rows_than_it_says(
    said, repository, command, monkeypatch
):
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", 0)
    write_rows_of(repository, "train", DOCUMENTS)
    splits = {"dataset_info": {"splits": [{"name": "train", "num_bytes": 1, "num_examples": said}]}}
    (repository / "README.md").write_text(f"---\n{json.dumps(splits)}\n---\n")
    _, out, _ = command("name", "--streaming", "--out", "corpus")
    lines = out.splitlines()[3:-2]  # behind the splits, and before what is there in the end
    with_share = [float(line.split("%")[0]) for line in lines if line.endswith(" left")]
    assert lines[: len(with_share)] == [line for line in lines if line.endswith(" left")]
    assert with_share == sorted(with_share)
    assert len(with_share) == len(lines) if said == 81 else 3 < len(with_share) < len(lines) - 3
    assert with_share[-1] == 100 if said == 81 else with_share[-1] <= 100


# What stops it


@pytest.mark.parametrize("source", ["rows.jsonl", "splits"])
@pytest.mark.parametrize(("module", "name"), [(os, "fsync"), (os, "replace")])
def test_after_a_crash_at_any_write_the_same_command_ends_with_the_same_files(
    module, name, source, command, monkeypatch
):
    write_rows("splits/train.jsonl", DOCUMENTS[:20])
    write_rows("splits/valid.jsonl", DOCUMENTS[20:24])
    args = (source, "--shard-tokens", "5000" if source == "rows.jsonl" else "2000")
    assert command(*args, "--out", "whole")[0] == 0
    whole = contents("whole")
    write, crashes = getattr(module, name), 0
    for moment in itertools.count():
        calls = itertools.count()

        def crash(*args: object, calls: itertools.count = calls, moment: int = moment) -> object:
            if next(calls) == moment:
                raise OSError(5, "Input/output error")
            return write(*args)

        out = f"parts-{moment}"
        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash)
            status, _, err = command(*args, "--out", out)
        if status == 0:
            break
        crashes += 1
        assert (status, len(err.splitlines())) == (1, 1)
        assert command(*args, "--out", out)[0] == 0
        assert contents(out) == whole
    assert crashes >= 5
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("number", "shards_before"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 6), (signal.SIGTERM, 2), (signal.SIGINT, 3)],
)
def test_a_command_that_was_stopped_by_a_signal_goes_on_and_ends_with_the_same_files(number, shards_before, command):
    write_rows("rows.jsonl", [f"{text} {count}" * 20 for count in range(4) for text in DOCUMENTS])
    args = ("rows.jsonl", "--shard-tokens", "80000", "--processes", "2")
    assert command(*args, "--out", "whole")[0] == 0
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, *args, "--out", "parts"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while (found := finished_shards("parts")) < shards_before:
        assert process.poll() is None
        time.sleep(0.002)
    # A terminal, and what ends a session, signal all processes; a kill may leave those that encode to themselves.
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert err == ""
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}: finished shards are kept in parts; the same command continues" in out
    finished = {Path(f"parts/train-{shard:05d}.{kind}.bin") for shard in range(found) for kind in ("tokens", "index")}
    written = {path: path.stat().st_mtime_ns for path in finished}
    assert "manifest.json" not in contents("parts")
    assert command(*args, "--out", "parts")[0] == 0
    assert contents("parts") == contents("whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == written


# Like the command, but reading takes a while, so that it can be stopped on the way.
SLOW_COMMAND = """
import sys, time
from ltm_pyro import cli, prepare
from ltm_pyro.data import preparation, shards
until = preparation.until
def slowly(stop, documents):
    for document in until(stop, documents):
        time.sleep(0.001)
        yield document
preparation.until = slowly
shards.CHUNK_CHARACTERS = 20_000
cli.run(prepare.main, sys.argv[1:])
"""


def finished_shards(folder: str) -> int:
    try:
        return len(read_manifest(Path(folder), "unfinished.json").train)
    except InputError:  # not begun yet
        return -1


def test_a_damaged_shard_is_prepared_again(command, monkeypatch):
    args = ("rows.jsonl", "--shard-tokens", "3000")
    assert command(*args, "--out", "whole")[0] == 0
    assert command(*args, "--out", "parts")[0] == 0
    Path("parts/manifest.json").rename("parts/unfinished.json")
    Path("parts/train-00001.index.bin").write_bytes(b"damaged")
    status, out, err = command(*args, "--out", "parts")
    assert status == 0
    assert err == "parts/train-00001.index.bin is damaged: it and the shards after it are prepared again\n"
    assert "in 1 shards, are finished" in out
    assert contents("parts") == contents("whole")


@pytest.mark.parametrize("change", ["first", "shorter", "longer"])
def test_a_source_that_has_changed_in_the_meantime_is_refused(change, command):
    args = ("rows.jsonl", "--shard-tokens", "3000")
    assert command(*args, "--out", "corpus")[0] == 0
    Path("corpus/manifest.json").rename("corpus/unfinished.json")
    changed = {"first": ["New.", *DOCUMENTS[1:]], "shorter": DOCUMENTS[:-1], "longer": [*DOCUMENTS, "New."]}
    write_rows("rows.jsonl", changed[change])
    status, _, err = command(*args, "--out", "corpus")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "rows.jsonl has changed since the preparation in corpus began" in err


def test_two_commands_do_not_write_to_one_folder(command):
    Path("corpus").mkdir()
    program = "import fcntl, time; f = open('corpus/.lock', 'w'); fcntl.lockf(f, 2); print(); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-uc", program], stdout=subprocess.PIPE)
    other.stdout.readline()
    status, _, err = command("rows.jsonl", "--out", "corpus")
    assert (status, err) == (
        2,
        "error: corpus is in use: another process is preparing a corpus in it; wait for it or stop it first\n",
    )
    assert list(contents("corpus")) == [".lock"]
    other.kill()
    other.communicate()
    assert command("rows.jsonl", "--out", "corpus")[0] == 0


def test_where_processes_are_killed_finished_shards_are_kept(command, monkeypatch):
    until = preparation.until

    def killing(stop: object, documents: object) -> object:
        for number, document in enumerate(until(stop, documents)):
            if number == 60:
                for process in multiprocessing.active_children():
                    process.kill()
            yield document

    args = ("rows.jsonl", "--out", "corpus", "--shard-tokens", "3000", "--processes", "2")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "until", killing)
        status, _, err = command(*args)
    assert (status, len(err.splitlines())) == (1, 1)
    assert "an encoding process was killed" in err
    assert finished_shards("corpus") >= 1
    assert command(*args)[0] == 0
    assert sides("corpus")[0] == load_corpus("rows.jsonl").train


BAD_INPUT = {
    "nothing": ([], "SOURCE"),
    "no folder": (["rows.jsonl"], "--out"),
    "unknown option": (["rows.jsonl", "--out", "new", "--widht", "3"], "--widht"),
    "two sources": (["rows.jsonl", "other", "--out", "new"], "other"),
    "missing file": (["missing.txt", "--out", "new"], "missing.txt"),
    "unknown tokenizer": (["rows.jsonl", "--tokenizer", "gpt17", "--out", "new"], "gpt17"),
    "no processes": (["rows.jsonl", "--out", "new", "--processes", "0"], "--processes"),
    "empty shards": (["rows.jsonl", "--out", "new", "--shard-tokens", "0"], "--shard-tokens"),
    "not a number": (["rows.jsonl", "--out", "new", "--shard-tokens", "many"], "many"),
    "no column": (["rows.jsonl", "--out", "new", "--text-column", "body"], "body"),
    "not JSON": (["broken.jsonl", "--out", "new"], "broken.jsonl"),
    "no text": (["empty.txt", "--out", "new"], "no text"),
    "nothing to validate on": (["letter.txt", "--out", "new"], "validate"),
    "a folder in use": (["rows.jsonl", "--out", "used"], "used holds files already"),
    "a file": (["rows.jsonl", "--out", "empty.txt"], "empty.txt"),
    "below a file": (["rows.jsonl", "--out", "empty.txt/new"], "empty.txt/new"),
    "a name too long": (["rows.jsonl", "--out", "x" * 300], "cannot be used"),
    "another source": (["other.jsonl", "--out", "done"], "source rows.jsonl, but this command has other.jsonl"),
    "other shards": (["rows.jsonl", "--out", "done", "--shard-tokens", "5"], "shard tokens"),
    "a stream of a file": (["rows.jsonl", "--streaming", "--out", "new"], "--streaming"),
    "verification of nothing": (["--verify", "--out", "used"], "used holds no prepared corpus"),
    "verification of another source": (["other.jsonl", "--verify", "--out", "done"], "other.jsonl"),
}


@pytest.mark.parametrize(("args", "mentioned"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing_behind(args, mentioned, command):
    Path("broken.jsonl").write_text('{"text": "no brace"\n')
    Path("empty.txt").write_text("")
    Path("letter.txt").write_text("x")
    write_rows("other.jsonl", DOCUMENTS)
    Path("used").mkdir()
    Path("used/notes").write_text("mine")
    if "done" in args:
        assert command("rows.jsonl", "--out", "done")[0] == 0
    before = sorted(Path(".").rglob("*"))
    status, _, err = command(*args)
    assert status == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert mentioned in err
    assert sorted(Path(".").rglob("*")) == before


def other_encoding() -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    specials = {"<|endoftext|>": 257, "<|beginoftext|>": 258}
    return tiktoken.Encoding("other+beginoftext", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=specials)


def test_what_was_begun_with_another_tokenizer_is_refused(command, monkeypatch):
    assert command("rows.jsonl", "--out", "corpus")[0] == 0
    monkeypatch.setattr(preparation, "get_tokenizer", lambda name: other_encoding())
    status, _, err = command("rows.jsonl", "--out", "corpus", "--tokenizer", "other")
    assert (status, len(err.splitlines())) == (2, 1)
    assert (
        "the preparation in corpus began with tokenizer bytes, but this command has other: give another folder" in err
    )


def test_help_explains_every_option(command):
    status, out, _ = command("--help")
    assert status == 0
    options = "SOURCE --out --tokenizer --text-column --streaming --processes --shard-tokens --verify"
    for option in options.split():
        assert option in out


def test_progress_is_a_line_with_rate_and_time_left_where_there_is_no_terminal(command, monkeypatch):
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", 0)
    _, out, _ = command("rows.jsonl", "--out", "corpus")
    lines = [line for line in out.splitlines() if line.endswith(" left")]
    shares = [float(re.fullmatch(r"([\d.]+)%: [\d,]+ tokens/s, .* left", line)[1]) for line in lines]
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_progress_is_a_bar_on_a_terminal(command, monkeypatch):
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = command("rows.jsonl", "--out", "corpus")
    assert status == 0
    assert "%|" in err
    assert " left" not in out


def test_verification_reads_every_file(command):
    assert command("rows.jsonl", "--out", "corpus", "--shard-tokens", "3000")[0] == 0
    status, out, _ = command("--verify", "--out", "corpus")
    assert status == 0
    assert "all files match their SHA-256" in out
    damaged = Path("corpus/train-00001.tokens.bin")
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    status, _, err = command("--verify", "--out", "corpus")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{damaged} is damaged" in err


# Runs that read it


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(sorted((Path(run) / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def metrics(run: str) -> list[dict]:
    timing = ("seconds", "tokens_per_second")
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timing} for line in lines]


@pytest.mark.parametrize("packing", ["document", "stream"])
def test_a_run_on_a_prepared_corpus_is_bit_for_bit_the_run_on_its_source(packing, command, run_main, training):
    assert command("rows.jsonl", "--out", "corpus", "--shard-tokens", "2000")[0] == 0
    args = [*training, "--packing", packing, "--steps", "4", "--log-every", "1", "--validate-every", "2"]
    outputs = []
    for data in ("rows.jsonl", "corpus"):
        status, out, _ = run_main(train.main, *args, "--data", data, "--out", f"run-{data}")
        assert status == 0
        lines = [line for line in out.splitlines() if "bits/byte" in line]
        outputs.append([re.sub(r"[\d,]+ tokens/s, .* left", "", line) for line in lines])
    assert metrics("run-corpus") == metrics("run-rows.jsonl")
    assert outputs[0] == outputs[1]
    expected = weights("run-rows.jsonl")
    assert all(weight.equal(expected[name]) for name, weight in weights("run-corpus").items())


def test_a_run_on_a_prepared_corpus_is_resumed_scored_and_compared(command, run_main, training, monkeypatch):
    assert command("rows.jsonl", "--out", "corpus")[0] == 0
    run = (*training, "--data", "corpus", "--steps", "3", "--out")
    assert run_main(train.main, *run, "whole")[0] == 0
    slow_step, calls = loop.slow_step, itertools.count(1)

    def stopped(*args: object) -> object:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return slow_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "slow_step", stopped)
        assert run_main(train.main, *run, "parts")[0] == 128 + signal.SIGTERM
    assert run_main(train.main, "--resume", "--out", "parts")[0] == 0
    expected = weights("whole")
    assert all(weight.equal(expected[name]) for name, weight in weights("parts").items())

    few = ("--num-samples", "2", "--fast-steps", "1")
    args = ("whole", "--num-sequences", "1", "--estimators", "elbo", *few, "--json")
    assert run_main(evaluate.main, *args, "own.json")[0] == 0
    assert run_main(evaluate.main, *args, "given.json", "--data", "./corpus")[0] == 0
    assert run_main(evaluate.main, *args, "source.json", "--data", "held-out.jsonl")[0] == 2
    write_rows("held-out.jsonl", load_corpus("rows.jsonl").validation)
    assert run_main(evaluate.main, *args, "source.json", "--data", "held-out.jsonl")[0] == 0
    own, given, source = (
        json.loads(Path(f"{name}.json").read_text())["figures"][0] for name in ("own", "given", "source")
    )
    assert own["data"] == "rows, held-out part"
    assert own["nats_per_token"] == given["nats_per_token"] == pytest.approx(source["nats_per_token"])
    assert own["num_bytes"] == source["num_bytes"]
    few = ("--inference", "vi", "--gradients", "4", "--num-sequences", "2", "--num-samples", "2")
    assert run_main(compare.main, "whole", *few)[0] == 0


def test_a_run_is_refused_where_the_corpus_has_changed_is_damaged_or_has_another_tokenizer(
    command, run_main, training, monkeypatch
):
    assert command("rows.jsonl", "--out", "corpus", "--shard-tokens", "3000")[0] == 0
    args = (*training, "--data", "corpus", "--steps", "1")
    assert run_main(train.main, *args, "--out", "run")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "get_tokenizer", lambda name: other_encoding())
        status, _, err = run_main(train.main, *args)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "corpus was prepared with the tokenizer bytes" in err
    assert "the run uses other" in err

    write_rows("rows.jsonl", DOCUMENTS[::-1])
    assert command("rows.jsonl", "--out", "other", "--shard-tokens", "3000")[0] == 0
    Path("corpus").rename("before")
    Path("other").rename("corpus")
    for again, main in (
        (("--resume", "--out", "run"), train.main),
        (("run",), evaluate.main),
        (("run",), compare.main),
    ):
        status, _, err = run_main(main, *again)
        assert (status, len(err.splitlines())) == (2, 1)
        assert "hash has changed" in err

    tokens = Path("corpus/train-00001.tokens.bin")
    contents = tokens.read_bytes()
    tokens.write_bytes(contents[:-2] + bytes([contents[-2] ^ 1]) + contents[-1:])  # a token is another one
    for again in ((*args, "--out", "damaged"), ("--resume", "--out", "run")):
        status, _, err = run_main(train.main, *again)
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"{tokens} is damaged: its SHA-256" in err
    assert not Path("damaged").exists()
    tokens.unlink()
    status, _, err = run_main(train.main, *args, "--out", "missing")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{tokens} is missing" in err
    assert not Path("missing").exists()


def test_settings_say_that_a_prepared_folder_is_data(run_main):
    _, out, _ = run_main(train.main, "--help")
    assert "ltm_pyro.prepare" in out
    assert config.preset("tiny").tokenizer == prepare.PrepareConfig().tokenizer
