"""Formats of files: the documents that a file holds, and one line for whatever is wrong with it."""

import csv
import io
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import parquet

from ltm_pyro.data.corpora import load_corpus, load_texts, open_corpus
from ltm_pyro.data.corpora.formats import check_column
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


# --- every way in which text is stored


def as_arrow(kind, texts):
    if kind == "categories":
        return pa.array(texts).dictionary_encode()
    if kind == "runs":
        return pc.run_end_encode(pa.array(texts))
    if kind == "large categories":
        return pa.array(texts, pa.large_string()).dictionary_encode()
    return pa.array(texts, {"large": pa.large_string(), "view": pa.string_view(), "text": pa.string()}[kind])


@pytest.mark.parametrize("kind", ["categories", "large categories", "large", "view", "text"])
def test_every_arrow_type_that_is_text(in_a_folder_of_its_own, kind, documents):
    parquet.write_table(pa.table({"text": as_arrow(kind, [*documents, None])}), "a.parquet")
    corpus = load_corpus("a.parquet")
    assert sorted(corpus.train + corpus.validation) == sorted(documents)


@pytest.mark.parametrize("kind", ["categories", "large", "view", "runs"])
def test_every_arrow_type_that_is_text_passes_the_check_of_columns(kind):
    table = pa.table({"text": as_arrow(kind, ["one", "two"])})
    check_column(table.schema, "text", "a table")
    with pytest.raises(InputError, match="not text"):
        check_column(pa.schema({"text": pa.dictionary(pa.int8(), pa.int64())}), "text", "a table")


def test_a_column_that_stands_twice(in_a_folder_of_its_own, refusal, write):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, "a.parquet")
    assert "'text' stands 2 times in a.parquet" in refusal("a.parquet")
    assert "'text' stands 2 times" in refusal(write("a.csv", "text,id,text\na,1,b\n"))


@pytest.mark.parametrize(("extension", "delimiter"), [("csv", ","), ("tsv", "\t"), ("csv.gz", ","), ("tsv.gz", "\t")])
def test_a_column_of_a_table(write, extension, delimiter, documents):
    file = io.StringIO()
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerow(["id", "body"])
    rows.writerows((number, f'{document}"quoted", and\ttabbed') for number, document in enumerate(documents))
    corpus = load_corpus(write(f"rows.{extension}", "\ufeff" + file.getvalue()), text_column="body")
    assert sorted(corpus.train + corpus.validation) == sorted(f'{text}"quoted", and\ttabbed' for text in documents)


def test_a_long_cell_of_a_table(write):
    assert load_texts(write("a.csv", f"text\n{'x' * 2**20}\n")).documents == ["x" * 2**20]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [("text,id\none,1\ntwo\n", "row 2 (line 3) has 1 columns"), ('text\n"one\n', "unexpected end of data")],
)
def test_a_table_that_is_damaged(write, contents, expected, refusal):
    message = refusal(write("a.csv", contents))
    assert "a.csv cannot be read as CSV" in message
    assert expected in message


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(write, name, mark):
    contents = {"json": '{"text": "one"}\n', "csv": "text\none\n"}
    kind = "json" if "json" in name else "csv" if "csv" in name else ""
    assert load_texts(write(name, mark + contents.get(kind, "one"))).documents == ["one"]


@pytest.mark.parametrize("name", ["wiki.tokens.gz", "wiki.raw.gz", "wiki.md.gz", "wiki.csv.gz"])
def test_whatever_can_be_read_can_be_read_packed(write, name):
    contents = "text\none\n" if "csv" in name else "one"
    assert load_texts(f"wikitext-2={write(name, contents)}").documents == ["one"]


def test_packed_parquet(write, in_a_folder_of_its_own):
    parquet.write_table(pa.table({"text": ["one"]}), "a.parquet")
    assert load_texts(write("b.parquet.gz", Path("a.parquet").read_bytes())).documents == ["one"]


@pytest.mark.parametrize("before", ["", "\n\n", " \n\t\n", "\ufeff", "\ufeff\n"])
def test_a_json_list_behind_blank_lines(write, before):
    rows = json.dumps([{"text": "one"}, {"text": "two"}], indent=1)
    assert load_texts(write("a.json", before + rows)).documents == ["one", "two"]
    assert load_texts(write("a.jsonl", before + '{"text": "one"}\n\n{"text": "two"}')).documents == ["one", "two"]


def test_an_object_over_several_lines_is_one_row(write, refusal):
    assert load_texts(write("a.json", json.dumps({"text": "one", "id": 3}, indent=1))).documents == ["one"]
    assert "line 4, column 1" in refusal(write("b.json", '\n{\n "text": "one",\n}\n'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_text_that_is_not_unicode_is_named_by_file_and_row(write, name, refusal, in_a_folder_of_its_own):
    """Half of an emoji, in the 41st row."""
    rows = [json.dumps({"text": f"text {number}"}) for number in range(40)]
    message = refusal(write(name, "\n".join([*rows, '{"text": "half \\ud83d"}']) + "\n"))
    assert f"row 41 of {in_a_folder_of_its_own}/{name} is not valid Unicode" in message
    assert "at character 5" in message
