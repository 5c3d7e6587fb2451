"""Files and folders: which files are read, in which order, to which split they belong, and what is refused."""

import json

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus, load_texts, open_corpus


def test_a_folder_is_read_in_the_order_of_its_names(write):
    for index in (2, 0, 1):
        write(f"books/{index}.txt", f"{index}" * 20)
    write("books/.hidden.csv", "not read")
    corpus = load_corpus("books")
    assert corpus.name == "books"
    assert corpus.train == ["0" * 19, "1" * 19, "2" * 19]
    assert corpus.validation == ["0", "1", "2"]


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_folder_may_bring_its_own_validation(write, validation, json_lines):
    write("data/train-00-of-02.jsonl.gz", json_lines(["one"]))
    write("data/train-01-of-02.jsonl", json_lines(["two"]))
    write("data/test.jsonl", json_lines(["never"]))
    write(f"data/{validation}.jsonl", json_lines(["held out"]))
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one", "two"], ["held out"])


def test_splits_may_be_folders(write):
    write("data/train/test.txt", "one")
    write("data/valid/a.txt", "held out")
    write("data/test/b.txt", "never")
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one"], ["held out"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "folder"])
def test_reading_tells_how_far_it_has_come_and_starts_anew_when_asked_again(write, name, json_lines, documents):
    if name == "folder":
        for number, text in enumerate(documents):
            write(f"folder/{number:02d}.txt", text)
    elif name == "rows.parquet":
        datasets.Dataset.from_dict({"text": documents}).to_parquet(name)
    else:
        write(
            name, json.dumps([{"text": text} for text in documents]) if name == "rows.json" else json_lines(documents)
        )
    split = open_corpus(name).train
    for _ in range(2):
        texts, shares = zip(*split, strict=True)
        assert list(texts) == documents
        assert list(shares) == sorted(shares)
        assert shares[0] > 0
        assert shares[-1] == 1
    if name != "rows.jsonl.gz":  # which is unpacked in larger pieces
        assert len(set(shares)) == len(documents)


def test_all_of_a_file_is_scored(write, json_lines, documents):
    rows = ["one", "", "two", " \n", *documents]
    texts = load_texts(write("rows.jsonl", json_lines(rows, "body")), text_column="body")
    assert (texts.name, texts.documents) == ("rows, all of rows.jsonl", ["one", "two", *documents])
    assert load_texts(write("one.txt", "All of it.\r\n")).documents == ["All of it.\n"]


@pytest.mark.parametrize("splits", [("test", "valid", "train"), ("dev", "train"), ("train",)])
def test_of_a_folder_one_split_is_scored(write, splits, json_lines):
    for split in splits:
        write(f"data/{split}-0.jsonl", json_lines([split]))
        write(f"data/{split}-1.jsonl", json_lines([split, split]))
    texts = load_texts("data")
    scored = "validation" if splits[0] in ("valid", "dev") else splits[0]
    assert (texts.name, texts.documents) == (f"data, split {scored}", [splits[0]] * 3)


def test_all_of_a_folder_without_splits_is_scored(write):
    write("data/a.txt", "one")
    write("data/b/c.txt", "two")
    assert load_texts("data").documents == ["one", "two"]


def test_an_empty_folder(write, refusal):
    write("data/.hidden", "x")
    assert "holds no files" in refusal("data")


def test_a_folder_of_several_formats(write, json_lines, refusal):
    write("data/a.txt", "text")
    write("data/b.jsonl", json_lines(["text"]))
    message = refusal("data")
    assert "a.txt" in message
    assert "b.jsonl" in message


def test_an_extension_that_cannot_be_read(write, refusal):
    message = refusal(write("a.pdf", "text"))
    assert "a.pdf" in message
    assert ".jsonl" in message


def test_a_malformed_line_names_the_file_that_holds_it(write, json_lines, refusal, documents):
    write("data/a.jsonl", json_lines(documents))
    write("data/b.jsonl", '{"text": "fine"}\n{"text": "no brace"\n')
    assert "b.jsonl cannot be read as JSON" in refusal("data")
