"""Prepared corpora: what is read is what was written, damage is told in one line, and nothing else gets through."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import mmap
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltm_pyro import prepare
from ltm_pyro.data import get_tokenizer, load_corpus, load_tokenized_corpus, load_tokenized_texts, prepared
from ltm_pyro.data.prepared import INDEX, held_out_by_hash, open_prepared, read_index, read_manifest, verify
from ltm_pyro.errors import InputError

BYTES = get_tokenizer("bytes")
DOCUMENTS = [f"Document number {number}: é{'x' * (number % 7)}." for number in range(60)]
FILES = [f"train-0000{number}.{kind}.bin" for number in (0, 1) for kind in ("tokens", "index")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.jsonl`, and `corpus`, in which it lies prepared in two shards."""
    folder = tmp_path_factory.mktemp("made")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (folder / "rows.jsonl").write_text(rows)
    half = sum(len(text.encode()) + 1 for text in DOCUMENTS[:31])
    options = ["--out", str(folder / "corpus"), "--processes", "1", "--shard-tokens", str(half)]
    assert prepare.main([str(folder / "rows.jsonl"), *options]) == 0
    return folder


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    """A copy of the prepared corpus, to be damaged."""
    return Path(shutil.copytree(made / "corpus", tmp_path / "corpus"))


def texts(documents: Any) -> list[str]:
    """What documents say, without their end-of-text."""
    stops = np.cumsum(documents.sizes)
    return [
        BYTES.decode(documents.read(stop - size, stop)[:-1].tolist())
        for size, stop in zip(documents.sizes.tolist(), stops.tolist(), strict=True)
    ]


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read


def test_the_files_are_what_the_docs_say_they_are(made):
    """Read with NumPy alone."""
    corpus = made / "corpus"
    assert sorted(path.name for path in corpus.iterdir()) == sorted([".lock", "manifest.json", *FILES])
    tokens = np.concatenate([np.fromfile(corpus / name, "<u2") for name in FILES[::2]])
    expected = [token for text in DOCUMENTS for token in [*text.encode(), 256]]
    assert tokens.tolist() == expected
    index = [np.fromfile(corpus / name, "<u8").reshape(-1, 3) for name in FILES[1::2]]
    assert [len(rows) for rows in index] == [31, 29]
    sizes = np.concatenate([np.diff(rows[:, 0], prepend=np.uint64(0)) for rows in index])
    assert sizes.tolist() == [len(text.encode()) + 1 for text in DOCUMENTS]
    assert np.concatenate(index)[:, 1].tolist() == [len(text.encode()) for text in DOCUMENTS]
    first_eight = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in DOCUMENTS]
    assert [f"{number:016x}" for number in np.concatenate(index)[:, 2]] == first_eight
    manifest = json.loads((corpus / "manifest.json").read_text())
    for number, shard in enumerate(manifest["train"]):
        for kind in ("tokens", "index"):
            contents = (corpus / f"train-0000{number}.{kind}.bin").read_bytes()
            stored = {"num_bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
            assert shard[kind] == stored


def test_a_prepared_corpus_is_the_corpus_it_was_prepared_from(made):
    """The same documents, in the same order, with the same ones held out; by another path through the code."""
    found = load_tokenized_corpus(str(made / "corpus"), "text", BYTES)
    expected = load_corpus(str(made / "rows.jsonl"))
    assert found.name == expected.name == "rows"
    assert texts(found.train) == expected.train
    assert texts(found.validation.documents) == expected.validation
    assert load_tokenized_texts(str(made / "corpus"), "text", BYTES).sha256 == found.validation.sha256


def test_tokens_are_mapped_and_cannot_be_written_to(made):
    arrays = open_prepared(made / "corpus", BYTES).train.arrays
    assert sum(map(len, arrays)) == sum(len(text.encode()) + 1 for text in DOCUMENTS)
    for array in arrays:
        assert not array.flags.writeable
        owner: Any = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner, mmap.mmap)


def test_documents_are_held_out_by_hash_whatever_their_order_and_equal_ones_together():
    hashes = np.array([hash for hash in range(1000, 1100) for _ in range(2)], dtype=np.uint64)
    shuffled = np.random.default_rng(0).permutation(hashes)
    assert sorted(shuffled[held_out_by_hash(shuffled)].tolist()) == hashes[:10].tolist()
    largest = np.array([2**64 - 1] * 3, dtype=np.uint64)
    assert not held_out_by_hash(largest).any()


def test_the_hash_of_a_corpus_is_of_its_tokens_and_not_of_where_they_came_from(made):
    manifest = read_manifest(made / "corpus")
    assert dataclasses.replace(manifest, source="elsewhere", name="other").sha256 == manifest.sha256
    others = [
        dataclasses.replace(manifest, held_out="source"),
        dataclasses.replace(manifest, tokenizer_sha256="0" * 64),
        dataclasses.replace(manifest, train=manifest.train[:1]),
        dataclasses.replace(manifest, train=manifest.train[:1], validation=manifest.train[1:]),
        dataclasses.replace(manifest, train=manifest.train[::-1]),
    ]
    assert len({manifest.sha256, *(other.sha256 for other in others)}) == 1 + len(others)


# What is refused


def flip(path: Path, at: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[at] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(corpus, name):
    (corpus / name).unlink()
    for read in (open_prepared, lambda folder, _: verify(folder)):
        assert f"{corpus / name} is missing" in refusal(lambda read=read: read(corpus, BYTES))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["shorter", "longer", "empty"])
def test_a_file_of_another_size(corpus, name, damage):
    contents = (corpus / name).read_bytes()
    (corpus / name).write_bytes({"shorter": contents[:-1], "longer": contents + b"x", "empty": b""}[damage])
    for read in (open_prepared, lambda folder, _: verify(folder)):
        message = refusal(lambda read=read: read(corpus, BYTES))
        assert f"{corpus / name} is damaged" in message
        assert f"the manifest says {len(contents):,}" in message


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(corpus, name):
    """Of the tokens it is found when all of them are read, as `--verify` does."""
    flip(corpus / name, 5)
    assert f"{corpus / name} is damaged: its SHA-256" in refusal(lambda: verify(corpus))
    if "index" in name:
        assert f"{corpus / name} is damaged: its SHA-256" in refusal(lambda: open_prepared(corpus, BYTES))
    else:
        open_prepared(corpus, BYTES)


def small_encoding(name: str = "bytes", **changed: Any) -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    specials = {"<|endoftext|>": 256, "<|beginoftext|>": 257}
    return tiktoken.Encoding(name, **{"pat_str": ".", "mergeable_ranks": ranks, "special_tokens": specials, **changed})


def test_another_tokenizer_is_told_by_both_names(corpus):
    merged = {bytes([byte]): byte for byte in range(256)} | {b"th": 258}
    other = small_encoding("gpt2+beginoftext", mergeable_ranks=merged)
    message = refusal(lambda: open_prepared(corpus, other))
    assert "prepared with the tokenizer bytes" in message
    assert "the run uses gpt2" in message
    assert "--tokenizer bytes" in message


def test_a_tokenizer_of_the_same_name_with_another_vocabulary_is_another(corpus):
    assert "the run uses bytes" in refusal(lambda: open_prepared(corpus, small_encoding()))


def test_a_corpus_that_is_not_finished(corpus):
    (corpus / "manifest.json").rename(corpus / "unfinished.json")
    assert "not finished: give the command that prepares it again" in refusal(
        lambda: load_tokenized_corpus(str(corpus), "text", BYTES)
    )


def test_a_folder_that_is_no_prepared_corpus(tmp_path):
    assert "holds no prepared corpus" in refusal(lambda: verify(tmp_path))


def rewrite(corpus: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((corpus / "manifest.json").read_text())
    change(values)
    (corpus / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [1], 10**30])
def test_an_unknown_version(corpus, version):
    rewrite(corpus, lambda values: values.update(version=version))
    assert "but this program reads version 1: prepare the corpus again" in refusal(lambda: open_prepared(corpus, BYTES))


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"\xff", b"[]", b"3", b'"manifest"', b"{}", b"\0", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_what_is_no_manifest(corpus, contents):
    (corpus / "manifest.json").write_bytes(contents)
    assert f"{corpus / 'manifest.json'}" in refusal(lambda: open_prepared(corpus, BYTES))


@pytest.mark.parametrize(
    "key", ["name", "tokenizer_sha256", "dtype", "held_out", "train", "validation", "shard_tokens"]
)
def test_a_manifest_that_lacks_a_key(corpus, key):
    rewrite(corpus, lambda values: values.pop(key))
    assert f"it lacks {key}" in refusal(lambda: open_prepared(corpus, BYTES))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(extra=1), "unknown key 'extra'"),
        (lambda v: v.update(name="a/b"), "'a/b' is not a name"),
        (lambda v: v.update(name=""), "'' is not a name"),
        (lambda v: v.update(name="a\nb"), "not a line of text"),
        (lambda v: v.update(name=3), "3 is not a line of text"),
        (lambda v: v.update(dtype="float16"), "float16"),
        (lambda v: v.update(dtype="uint32"), "size of a shard"),
        (lambda v: v.update(held_out="chance"), "chance"),
        (lambda v: v.update(held_out="source"), "no documents"),
        (lambda v: v.update(train=[]), "no documents"),
        (lambda v: v.update(train={}), "{} is not a list"),
        (lambda v: v.update(vocab_size=259), "tokenizer"),
        (lambda v: v["train"].append(3), "3 is not an object with"),
        (lambda v: v["train"].pop(0), "damaged"),
        (lambda v: v["train"].append(v["train"][0]), "train-00002.index.bin is missing"),
        (lambda v: v["train"][0].pop("tokens"), "it lacks tokens"),
        (lambda v: v["train"][0].update(num_tokens=-1), "-1 is not a count"),
        (lambda v: v["train"][0].update(num_tokens=2**63), "is not a count"),
        (lambda v: v["train"][0].update(num_tokens=1.5), "1.5 is not a count"),
        (lambda v: v["train"][0].update(num_tokens=1), "size of a shard"),
        (lambda v: v["train"][0].update(num_documents=0), "size of an index"),
        (lambda v: v["train"][0].update(num_bytes=0), "its documents are not those of the shard"),
        (lambda v: v["train"][0]["tokens"].update(num_bytes=True), "True is not a count"),
        (lambda v: v["train"][0]["index"].update(sha256="0" * 64), "its SHA-256"),
    ],
)
def test_a_manifest_that_says_what_cannot_be(corpus, change, said):
    rewrite(corpus, change)
    assert said in refusal(lambda: open_prepared(corpus, BYTES))


# Whatever may stand in the files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opens_or_is_refused(corpus: Path) -> None:
    try:
        found = open_prepared(corpus, BYTES)
    except InputError:
        return
    assert found.train.num_tokens == len(found.train.read(0, found.train.num_tokens))


@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
@FUZZ
def test_any_manifest_is_read_or_refused(corpus, contents):
    (corpus / "manifest.json").write_bytes(contents)
    opens_or_is_refused(corpus)


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """The keys that lead to each value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(further for key, item in inside for further in paths(item, (*path, key)))]


@given(st.data())
@FUZZ
def test_any_value_anywhere_in_a_manifest_is_read_or_refused(made, corpus, data):
    values = json.loads((made / "corpus/manifest.json").read_text())
    *path, last = data.draw(st.sampled_from(paths(values)[1:]))
    inside = values
    for key in path:
        inside = inside[key]
    inside[last] = data.draw(JSON | st.sampled_from(["uint32", "source", "ends", 0, 1, 2**62, copy.deepcopy(inside)]))
    (corpus / "manifest.json").write_text(json.dumps(values))
    opens_or_is_refused(corpus)


@given(st.data())
@FUZZ
def test_any_index_is_read_or_refused_even_where_its_hash_is_that_of_the_manifest(made, corpus, data):
    index = np.fromfile(made / "corpus/train-00000.index.bin", INDEX)
    numbers = st.integers(0, 2**64 - 1) | st.integers(0, len(DOCUMENTS) * 30)
    for _ in range(data.draw(st.integers(1, 3))):
        index[data.draw(st.sampled_from(INDEX.names))][data.draw(st.integers(0, len(index) - 1))] = data.draw(numbers)
    contents = index.tobytes()[: data.draw(st.sampled_from([index.nbytes, index.nbytes - INDEX.itemsize, 5]))]
    (corpus / "train-00000.index.bin").write_bytes(contents)
    stored = prepared.StoredFile(len(contents), hashlib.sha256(contents).hexdigest())
    manifest = read_manifest(made / "corpus")
    shard = dataclasses.replace(manifest.train[0], num_documents=len(contents) // INDEX.itemsize, index=stored)
    try:
        read = read_index(corpus / "train-00000.index.bin", shard)
    except InputError:
        pass
    else:
        assert read["end"].tolist() == sorted(set(read["end"].tolist()))
        assert read["end"][-1] == shard.num_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # a disk's time
        manifest.with_shards("train", (shard, *manifest.train[1:])).write(corpus / "manifest.json")
    opens_or_is_refused(corpus)


def test_random_bytes_in_any_file_are_refused_by_verification(made, corpus):
    rng = random.Random(0)
    for name in FILES:
        contents = (made / "corpus" / name).read_bytes()
        (corpus / name).write_bytes(rng.randbytes(len(contents)))
        assert "SHA-256" in refusal(lambda: verify(corpus))
        (corpus / name).write_bytes(contents)
    assert verify(corpus) == read_manifest(made / "corpus")


@pytest.mark.parametrize("num_parts", [1, 2, 3, 20])
def test_processes_check_every_file_once_between_them(corpus, monkeypatch, num_parts):
    checked = []
    monkeypatch.setattr(prepared, "check_file", lambda path, stored: checked.append(path.name))
    for part in range(num_parts):
        verify(corpus, part, num_parts)
    assert sorted(checked) == sorted(read_manifest(corpus).stored())
