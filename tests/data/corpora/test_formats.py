"""Formats of files: the documents that a file holds, and one line for whatever is wrong with it."""

import json
import logging
from pathlib import Path

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus, open_corpus
from ltm_pyro.errors import InputError


@pytest.mark.parametrize("name", ["some.text.txt", "some.text.txt.gz", "some.text.TXT"])
def test_a_text_file_is_one_document(write, name):
    corpus = load_corpus(write(name, "é" * 50 + "x" * 50))
    assert corpus.name == "some.text"
    assert (corpus.train, corpus.validation) == (["é" * 50 + "x" * 45], ["x" * 5])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "[odd] name*?.jsonl"])
def test_rows_are_documents(write, name, json_lines, documents):
    corpus = load_corpus(write(name, json_lines(documents, "body")), text_column="body")
    assert corpus.name == name.split(".")[0]
    assert sorted(corpus.train + corpus.validation) == sorted(documents)


def test_a_json_list_of_rows(write, documents):
    corpus = load_corpus(write("rows.json", json.dumps([{"text": text} for text in documents], indent=1)))
    assert sorted(corpus.train + corpus.validation) == sorted(documents)


def test_a_json_list_of_texts(write, documents):
    corpus = load_corpus(write("rows.json", json.dumps(documents)))
    assert sorted(corpus.train + corpus.validation) == sorted(documents)


def test_parquet(tmp_path, documents):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"id": range(60), "text": documents}).to_parquet(file)
    corpus = load_corpus(str(file))
    assert sorted(corpus.train + corpus.validation) == sorted(documents)


def test_rows_may_have_other_columns_late_in_a_large_file(write, json_lines):
    # 12 MB: more than `datasets` infers columns from.
    documents = ["x" * 200_000 + str(index) for index in range(60)]
    corpus = load_corpus(write("rows.jsonl", json_lines(documents) + '{"text": "last", "note": 1}\n'))
    assert sorted(corpus.train + corpus.validation) == sorted([*documents, "last"])


def test_documents_are_read_one_after_the_other(write, json_lines, documents):
    """What is wrong behind them has not been read yet."""
    reading = iter(open_corpus(write("rows.jsonl", json_lines(documents) + '{"text": "no brace"\n')).train)
    assert [next(reading)[0] for _ in documents] == documents
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be read as JSON: line 61, column"):
        next(reading)


def test_blank_and_missing_documents_are_dropped(write, json_lines, documents):
    blank = '{"text": ""}\n{"text": " \\n\\t"}\n{"text": null}\n{"id": 3}\n'
    corpus = load_corpus(write("rows.jsonl", blank + json_lines(documents)))
    assert sorted(corpus.train + corpus.validation) == sorted(documents)


def test_reading_says_nothing_and_leaves_nothing_behind(
    write, tmp_path, monkeypatch, capfd, caplog, recwarn, json_lines, documents
):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    file = write("rows.jsonl", json_lines(documents))
    load_corpus(file)
    with pytest.raises(InputError):
        load_corpus(write("bad.jsonl", '{"text": \n'))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.jsonl", "here", "rows.jsonl"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json"])
def test_an_empty_file(write, name, refusal):
    assert "holds no text" in refusal(write(name, ""))


@pytest.mark.parametrize(("name", "contents"), [("a.txt", " \n\t\n"), ("a.jsonl", '{"text": ""}\n{"text": "  "}\n')])
def test_a_file_without_a_visible_character(write, name, contents, json_lines, refusal):
    assert "holds no text" in refusal(write(name, contents))


@pytest.mark.parametrize("contents", [b"caf\xe9", b"\x89PNG\r\n\x1a\n", "text".encode("utf-16-le")])
def test_what_is_not_text(write, contents, refusal):
    message = refusal(write("a.txt", contents))
    assert "a.txt" in message
    assert "UTF-8" in message


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_what_is_not_of_the_format_of_its_name(write, name, refusal):
    assert f"{name} cannot be read as" in refusal(write(name, b"\x89PNG\r\n\x1a\n"))


def test_a_file_that_is_not_packed_though_its_name_says_so(write, refusal):
    Path(write("a.txt", "text")).rename("a.txt.gz")
    assert "a.txt.gz cannot be read" in refusal("a.txt.gz")


def test_a_missing_column_lists_those_there_are(write, json_lines, refusal, documents):
    assert refusal(write("a.jsonl", json_lines(documents, "body"))).endswith("id, body")


def test_a_column_is_looked_for_in_the_first_rows_and_not_in_all_of_a_large_file(write, json_lines, refusal, documents):
    late = json_lines(["x"] * 1000, "body") + "malformed\n"
    assert refusal(write("a.jsonl", late)).endswith("id, body")
    early = '{"note": 1}\n' * 999 + json_lines(documents)
    assert len(load_corpus(write("b.jsonl", early)).train) == 57


@pytest.mark.parametrize("rows", ["3\n", "null\n", '{"text": "fine"}\n[1]\n'])
def test_rows_that_have_no_columns(write, rows, refusal):
    assert "not an object with a column of text" in refusal(write("a.jsonl", rows))


@pytest.mark.parametrize("rows", ['{"text": 1}\n', '{"text": "a"}\n{"text": 2}\n', '{"text": ["a"]}\n'])
def test_a_column_that_is_not_text(write, rows, refusal):
    assert "not text" in refusal(write("a.jsonl", rows))
