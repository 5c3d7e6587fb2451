"""Corpora: what each source gives, what is held out, and one line for whatever is wrong."""

import gzip
import io
import json
import logging
import random
from pathlib import Path

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus
from ltm_pyro.errors import InputError

DOCUMENTS = [f"Document number {index}.\nIt has two lines, é.\n" for index in range(60)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Relative paths lie in a fresh folder, the caches of `datasets` in another, and there is no network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "here"


@pytest.fixture
def write(in_a_folder_of_its_own):
    def write(name, contents):
        file = in_a_folder_of_its_own / name
        file.parent.mkdir(parents=True, exist_ok=True)
        contents = contents if isinstance(contents, bytes) else contents.encode()
        file.write_bytes(gzip.compress(contents) if name.endswith(".gz") else contents)
        return str(file)

    return write


def json_lines(documents, column="text"):
    return "".join(json.dumps({"id": index, column: text}) + "\n" for index, text in enumerate(documents))


def refusal(data, **arguments):
    """The message with which a corpus is refused, always one line."""
    with pytest.raises(InputError) as error:
        load_corpus(data, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read


def test_python_docs_by_its_name():
    corpus = load_corpus("python-docs")
    assert corpus.name == "python-docs"
    assert not set(corpus.train) & set(corpus.validation)
    held_out, learned = (sum(map(len, texts)) for texts in (corpus.validation, corpus.train))
    assert 0.02 < held_out / (held_out + learned) < 0.1


@pytest.mark.parametrize("name", ["some.text.txt", "some.text.txt.gz", "some.text.TXT"])
def test_a_text_file_is_one_document(write, name):
    corpus = load_corpus(write(name, "é" * 50 + "x" * 50))
    assert corpus.name == "some.text"
    assert (corpus.train, corpus.validation) == (["é" * 50 + "x" * 45], ["x" * 5])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "[odd] name*?.jsonl"])
def test_rows_are_documents(write, name):
    corpus = load_corpus(write(name, json_lines(DOCUMENTS, "body")), text_column="body")
    assert corpus.name == name.split(".")[0]
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)


def test_a_json_list_of_rows(write):
    corpus = load_corpus(write("rows.json", json.dumps([{"text": text} for text in DOCUMENTS], indent=1)))
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)


def test_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"id": range(60), "text": DOCUMENTS}).to_parquet(file)
    corpus = load_corpus(str(file))
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)


def test_rows_may_have_other_columns_late_in_a_large_file(write):
    # 12 MB: more than `datasets` infers columns from.
    documents = ["x" * 200_000 + str(index) for index in range(60)]
    corpus = load_corpus(write("rows.jsonl", json_lines(documents) + '{"text": "last", "note": 1}\n'))
    assert sorted(corpus.train + corpus.validation) == sorted([*documents, "last"])


def test_blank_and_missing_documents_are_dropped(write):
    blank = '{"text": ""}\n{"text": " \\n\\t"}\n{"text": null}\n{"id": 3}\n'
    corpus = load_corpus(write("rows.jsonl", blank + json_lines(DOCUMENTS)))
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)


def test_a_folder_is_read_in_the_order_of_its_names(write):
    for index in (2, 0, 1):
        write(f"books/{index}.txt", f"{index}" * 20)
    write("books/.hidden.csv", "not read")
    corpus = load_corpus("books")
    assert corpus.name == "books"
    assert corpus.train == ["0" * 19, "1" * 19, "2" * 19]
    assert corpus.validation == ["0", "1", "2"]


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_folder_may_bring_its_own_validation(write, validation):
    write("data/train-00-of-02.jsonl.gz", json_lines(["one"]))
    write("data/train-01-of-02.jsonl", json_lines(["two"]))
    write("data/test.jsonl", json_lines(["never"]))
    write("data/validate_me.jsonl", json_lines(["three"]))
    write(f"data/{validation}.jsonl", json_lines(["held out"]))
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one", "two", "three"], ["held out"])


def test_splits_may_be_folders(write):
    write("data/train/test.txt", "one")
    write("data/valid/a.txt", "held out")
    write("data/test/b.txt", "never")
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one"], ["held out"])


@pytest.mark.parametrize("splits", [("validation", "valid", "test"), ("val", "dev", "test"), ("test",)])
def test_a_data_set_of_the_hub(monkeypatch, splits):
    columns = {split: datasets.Dataset.from_dict({"text": ["", f"text of {split}"]}) for split in splits}
    columns["train"] = datasets.Dataset.from_dict({"text": DOCUMENTS})
    asked_for = []

    def load_dataset(*arguments):
        asked_for.append(arguments)
        return datasets.DatasetDict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("group/name:config")
    assert asked_for == [("group/name", "config")]
    assert corpus.name == "group-name-config"
    if splits == ("test",):
        assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)
    else:
        assert (corpus.train, corpus.validation) == (DOCUMENTS, [f"text of {splits[0]}"])


def test_reading_says_nothing_and_leaves_nothing_behind(write, tmp_path, monkeypatch, capfd, caplog, recwarn):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    file = write("rows.jsonl", json_lines(DOCUMENTS))
    load_corpus(file)
    with pytest.raises(InputError):
        load_corpus(write("bad.jsonl", '{"text": \n'))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.jsonl", "here", "rows.jsonl"]


def test_no_progress_bar_where_nobody_looks(monkeypatch):
    disabled = []

    def load_dataset(*_):
        disabled.append(datasets.are_progress_bars_disabled())
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": DOCUMENTS}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    before = datasets.are_progress_bars_disabled()
    load_corpus("name")
    assert disabled == [True]
    assert datasets.are_progress_bars_disabled() == before


# What is held out


def test_one_document_in_twenty_is_held_out_whatever_their_order(write):
    first = load_corpus(write("first.jsonl", json_lines(DOCUMENTS)))
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    second = load_corpus(write("second.jsonl", json_lines(shuffled)))
    assert len(first.validation) == 3
    assert set(first.validation) == set(second.validation)


def test_equal_documents_fall_on_one_side(write):
    corpus = load_corpus(write("rows.jsonl", json_lines(DOCUMENTS * 3)))
    assert len(corpus.validation) == 9
    assert not set(corpus.train) & set(corpus.validation)


@pytest.mark.parametrize(("num_distinct", "by_document"), [(19, False), (20, True)])
def test_of_few_distinct_documents_the_ends_are_held_out(write, num_distinct, by_document):
    documents = DOCUMENTS[:num_distinct] * 2
    corpus = load_corpus(write("rows.jsonl", json_lines(documents)))
    assert len(corpus.validation) == (2 if by_document else len(documents))
    if not by_document:
        assert [head + tail for head, tail in zip(corpus.train, corpus.validation, strict=True)] == documents


def test_the_hash_is_of_the_texts_their_order_and_their_side(write):
    def sha256(train, validation):
        write("data/train.jsonl", json_lines(train))
        write("data/valid.jsonl", json_lines(validation))
        return load_corpus("data").sha256

    assert sha256(["a", "b"], ["c"]) == sha256(["a", "", "b"], ["c"])
    sides = [(["a", "b"], ["c"]), (["b", "a"], ["c"]), (["a"], ["b", "c"]), (["ab"], ["c"]), (["a", "b"], ["d"])]
    assert len({sha256(*side) for side in sides}) == len(sides)


# What is refused


@pytest.mark.parametrize("data", ["missing.txt", "folder/missing.jsonl.gz", "./missing", "a/b/c", "/missing", ""])
def test_a_missing_path(data):
    assert f"there is no file or folder {data!r}" in refusal(data)


@pytest.mark.parametrize("data", ["no-such-name", "nobody/no-such-name", "no-such-name:config"])
def test_a_name_that_is_nowhere(data):
    message = refusal(data)
    assert f"{data!r} is neither python-docs, an existing file or folder, nor a Hugging Face dataset" in message


def test_a_data_set_without_training_texts(monkeypatch):
    only_test = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": DOCUMENTS}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: only_test)
    assert "no split 'train'" in refusal("name")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json"])
def test_an_empty_file(write, name):
    assert "holds no text" in refusal(write(name, ""))


@pytest.mark.parametrize(("name", "contents"), [("a.txt", " \n\t\n"), ("a.jsonl", json_lines(["", "  "]))])
def test_a_file_without_a_visible_character(write, name, contents):
    assert "holds no text" in refusal(write(name, contents))


def test_text_too_short_to_hold_any_out(write):
    assert "validate" in refusal(write("a.txt", "x"))


@pytest.mark.parametrize("contents", [b"caf\xe9", b"\x89PNG\r\n\x1a\n", "text".encode("utf-16-le")])
def test_what_is_not_text(write, contents):
    message = refusal(write("a.txt", contents))
    assert "a.txt" in message
    assert "UTF-8" in message


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_what_is_not_of_the_format_of_its_name(write, name):
    assert f"{name} cannot be read as" in refusal(write(name, b"\x89PNG\r\n\x1a\n"))


def test_a_file_that_is_not_packed_though_its_name_says_so(write):
    Path(write("a.txt", "text")).rename("a.txt.gz")
    assert "a.txt.gz cannot be read" in refusal("a.txt.gz")


def test_a_malformed_line_names_the_file_that_holds_it(write):
    write("data/a.jsonl", json_lines(DOCUMENTS))
    write("data/b.jsonl", '{"text": "fine"}\n{"text": "no brace"\n')
    assert "b.jsonl cannot be read as JSON" in refusal("data")


def test_a_missing_column_lists_those_there_are(write):
    assert refusal(write("a.jsonl", json_lines(DOCUMENTS, "body"))).endswith("id, body")


@pytest.mark.parametrize("rows", ['{"text": 1}\n', '{"text": "a"}\n{"text": 2}\n', '{"text": ["a"]}\n'])
def test_a_column_that_is_not_text(write, rows):
    assert "not text" in refusal(write("a.jsonl", rows))


def test_an_extension_that_cannot_be_read(write):
    message = refusal(write("a.csv", "text"))
    assert "a.csv" in message
    assert ".jsonl" in message


def test_an_empty_folder(write):
    write("data/.hidden", "x")
    assert "holds no files" in refusal("data")


def test_a_folder_of_several_formats(write):
    write("data/a.txt", "text")
    write("data/b.jsonl", json_lines(["text"]))
    message = refusal("data")
    assert "a.txt" in message
    assert "b.jsonl" in message
