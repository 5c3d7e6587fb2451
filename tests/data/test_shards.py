"""Writing shards: the same files however the work is cut, divided or stopped, and one writer at a time."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.data import get_tokenizer, shards
from ltm_pyro.data.prepared import read_index
from ltm_pyro.data.shards import Encoded, ShardWriter, encoded, without_finished
from ltm_pyro.errors import InputError
from ltm_pyro.files.lock import locked

# Some versions of Python warn of processes that are forked from one with several threads, as NumPy's is.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

BYTES = get_tokenizer("bytes")
MERGING = tiktoken.Encoding(
    "merging",
    pat_str=r"\w+|\W+",
    mergeable_ranks={bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257},
    special_tokens={"<|endoftext|>": 70_000, "<|beginoftext|>": 70_001},
)
TEXTS = st.lists(st.text(alphabet="the é\U0001f642", min_size=1, max_size=30), min_size=1, max_size=12)


def reading(texts):
    return ((text, number / len(texts)) for number, text in enumerate(texts, 1))


def write(folder, texts, encoding, shard_tokens):
    """The shards of these texts."""
    folder.mkdir()
    finished = []
    with ShardWriter(folder, "train", 0, shard_tokens, finished.append) as writer:
        for documents, _ in encoded(reading(texts), encoding, processes=1):
            writer.add(documents)
        writer.end()
    return finished


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("encoding", [BYTES, MERGING], ids=["uint16", "uint32"])
@given(texts=TEXTS, chunk=st.integers(1, 40), shard_tokens=st.integers(1, 60))
@settings(deadline=None)
def test_shards_hold_what_tiktoken_gives_and_end_where_they_are_full(encoding, texts, chunk, shard_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_CHARACTERS", chunk)
        patch.setattr(os, "fsync", lambda descriptor: None)  # a disk's time
        folder = new_folder()
        finished = write(folder, texts, encoding, shard_tokens)
    expected = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in texts]
    remaining = iter(zip(texts, expected, strict=True))
    for number, shard in enumerate(finished):
        tokens = np.fromfile(folder / f"train-{number:05d}.tokens.bin", "<u2" if encoding is BYTES else "<u4")
        index = read_index(folder / f"train-{number:05d}.index.bin", shard)
        inside = list(itertools.islice(remaining, len(index)))
        assert tokens.tolist() == list(itertools.chain.from_iterable(each for _, each in inside))
        assert index["end"].tolist() == list(itertools.accumulate(len(each) for _, each in inside))
        assert index["num_bytes"].tolist() == [len(text.encode()) for text, _ in inside]
        assert (shard.num_documents, shard.num_tokens) == (len(index), len(tokens))
        full = [end >= shard_tokens for end in index["end"].tolist()]
        assert not any(full[:-1])
        assert full[-1] or number == len(finished) - 1
    assert next(remaining, None) is None
    assert len(contents(folder)) == 2 * len(finished)


_folders = itertools.count()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def new_folder():
    return Path(f"shards-{next(_folders)}")


def test_several_processes_give_documents_in_their_order(monkeypatch):
    """Chunks take very different times: the first of them longest."""
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 2000)
    texts = ["long " * 100_000, *(f"text {number} " * (number % 50 + 1) for number in range(300))]
    several, alone = (list(encoded(reading(texts), BYTES, processes)) for processes in (3, 1))
    assert len(several) == len(alone) > 20
    for (documents, share), (expected, other_share) in zip(several, alone, strict=True):
        assert documents.tokens.tolist() == expected.tokens.tolist()
        assert documents.index.tolist() == expected.index.tolist()
        assert share == other_share


def test_reading_runs_ahead_by_a_few_chunks_only(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 1)
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield "x", number / 1000

    for processes in (1, 2):
        read.clear()
        chunks = encoded(documents(), BYTES, processes)
        for taken in range(1, 20):
            next(chunks)
            assert len(read) <= taken + 2 * processes
        chunks.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_document_that_is_not_unicode_is_refused(processes):
    with pytest.raises(InputError, match=r"not valid Unicode .* character 2"):
        list(encoded(reading(["fine", "fine too", "no\ud800"]), BYTES, processes))


def test_documents_can_be_split_anywhere():
    ((documents, _),) = encoded(reading(["a", "bcd", "ef"]), BYTES, 1)
    for count in (1, 2, 3):
        first, others = documents.split(count)
        assert (len(first), len(others)) == (count, 3 - count)
        assert [*first.tokens, *others.tokens] == documents.tokens.tolist()
        assert others.index["end"].tolist() == [end - len(first.tokens) for end in (2, 6, 9)[count:]]
    assert isinstance(first, Encoded)


def test_what_finished_shards_hold_is_read_past_and_must_be_the_same():
    texts = ["one", "two", "three", "four"]
    shard_list = write(Path("corpus"), texts, BYTES, 8)
    assert [shard.num_documents for shard in shard_list] == [2, 2]
    indices = [read_index(Path("corpus/train-00000.index.bin"), shard_list[0])]
    assert [text for text, _ in without_finished(reading(texts), indices, "changed")] == ["three", "four"]
    for other in (["one", "2", "three"], ["two", "one", "three"], ["one"], []):
        with pytest.raises(InputError, match="changed"):
            without_finished(reading(other), indices, "changed")


def test_one_process_writes_to_a_folder_and_its_lock_ends_with_it(tmp_path):
    program = """
import sys, time
from pathlib import Path
from ltm_pyro.data.shards import encoded
from ltm_pyro.files.lock import locked
from ltm_pyro.data import get_tokenizer
with locked(Path(sys.argv[1])):
    chunks = encoded(((("x" * 2**19), 0.0) for _ in range(10**6)), get_tokenizer("bytes"), 2)
    next(chunks)  # the processes that encode must not keep the lock
    print("locked", flush=True)
    time.sleep(1000)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match="another process"), locked(tmp_path):
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(number) for number in children.read_text().split()] if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(tmp_path):
        pass
    # Nobody told the processes that encode; they end because the one that started them has.
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process):
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
