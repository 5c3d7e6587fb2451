"""Corpora: what each source gives, what is held out, what is scored, and one line for whatever is wrong."""

import dataclasses
import gzip
import io
import json
import logging
import random
from pathlib import Path

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus, load_texts, open_corpus
from ltm_pyro.data.corpora.base import CutOff
from ltm_pyro.data.corpora.benchmark_sets import BENCHMARK_SETS
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


def refusal(data, load=load_corpus, **arguments):
    """The message with which a corpus is refused, always one line."""
    with pytest.raises(InputError) as error:
        load(data, **arguments)
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


def test_documents_are_read_one_after_the_other(write):
    """What is wrong behind them has not been read yet."""
    reading = iter(open_corpus(write("rows.jsonl", json_lines(DOCUMENTS) + '{"text": "no brace"\n')).train)
    assert [next(reading)[0] for _ in DOCUMENTS] == DOCUMENTS
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be read as JSON: line 61, column"):
        next(reading)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "folder"])
def test_reading_tells_how_far_it_has_come_and_starts_anew_when_asked_again(write, name):
    if name == "folder":
        for number, text in enumerate(DOCUMENTS):
            write(f"folder/{number:02d}.txt", text)
    elif name == "rows.parquet":
        datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(name)
    else:
        write(
            name, json.dumps([{"text": text} for text in DOCUMENTS]) if name == "rows.json" else json_lines(DOCUMENTS)
        )
    split = open_corpus(name).train
    for _ in range(2):
        documents, shares = zip(*split, strict=True)
        assert list(documents) == DOCUMENTS
        assert list(shares) == sorted(shares)
        assert shares[0] > 0
        assert shares[-1] == 1
    if name != "rows.jsonl.gz":  # which is unpacked in larger pieces
        assert len(set(shares)) == len(DOCUMENTS)


def test_a_json_list_of_texts(write):
    corpus = load_corpus(write("rows.json", json.dumps(DOCUMENTS)))
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)


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


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads a repository of the hub, and that is found there as `group/name`."""
    folder, load_dataset = tmp_path / "repository", datasets.load_dataset
    folder.mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *more, **options: load_dataset(str(folder), **options))
    return folder


def describe(repository, split, num_rows):
    """Have the description of the repository say how many rows a split has."""
    splits = {"dataset_info": {"splits": [{"name": split, "num_bytes": 1, "num_examples": num_rows}]}}
    (repository / "README.md").write_text(f"---\n{json.dumps(splits)}\n---\n")


def test_what_is_streamed_is_what_is_downloaded_and_nothing_of_it_is_kept(repository, tmp_path):
    for number in range(3):
        texts = [None, "", *DOCUMENTS[20 * number : 20 * number + 20]]
        datasets.Dataset.from_dict({"text": texts}).to_parquet(repository / f"train-{number}.parquet")
    datasets.Dataset.from_dict({"text": ["held out"]}).to_parquet(repository / "validation.parquet")
    source = open_corpus("group/name:config", streaming=True)
    assert source.name == "group-name-config"
    for _ in range(2):  # every time anew
        assert (source.train.documents(), source.validation.documents()) == (DOCUMENTS, ["held out"])
    assert not [path for path in tmp_path.rglob("*.arrow") if path.is_file()]
    stored = open_corpus("group/name:config")
    assert (stored.train.documents(), stored.validation.documents()) == (DOCUMENTS, ["held out"])
    assert [path for path in tmp_path.rglob("*.arrow") if path.is_file()]


@pytest.mark.parametrize(("said", "known"), [(None, 0), (60, 60), (40, 40)])
def test_how_far_a_stream_has_come_is_known_as_far_as_its_description_holds(said, known, repository):
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(repository / "train.parquet")
    if said:
        describe(repository, "train", said)
    train = open_corpus("name", streaming=True).train
    assert train.size == said
    shares = [share for _, share in train]
    assert shares == [number / said for number in range(1, known + 1)] + [None] * (60 - known)


def test_a_stream_without_the_column_lists_those_there_are(repository):
    datasets.Dataset.from_dict({"id": [1], "body": ["x"]}).to_parquet(repository / "train.parquet")
    train = open_corpus("name", streaming=True).train
    with pytest.raises(InputError, match=r"name has no column 'text'; .*: id, body$"):
        next(iter(train))


def test_a_stream_that_breaks_off_says_so_in_one_line(monkeypatch, capfd, caplog):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)

    def rows(shard):
        yield {"text": "first"}
        logging.getLogger("datasets").error("many lines")
        raise ConnectionError("the network\nis gone")

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shard": [0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": stream})
    with pytest.raises(CutOff) as error:
        list(open_corpus("name", streaming=True).train)
    assert str(error.value) == "name cannot be read any further: the network is gone"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("data", ["python-docs", "rows.jsonl", "folder", "ptb=rows.jsonl", "ptb"])
def test_only_the_hub_is_streamed(write, data):
    write("rows.jsonl", json_lines(DOCUMENTS))
    write("folder/a.txt", "text")
    message = refusal(data, open_corpus, streaming=True)
    assert message == f"--streaming is for data sets of the Hugging Face hub, and {data} is none: leave it out"


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


# What is scored


def test_of_python_docs_what_is_held_out_is_scored(monkeypatch):
    monkeypatch.setattr("ltm_pyro.data.corpora.python_docs.read_python_docs", lambda: DOCUMENTS)
    texts, corpus = load_texts("python-docs"), load_corpus("python-docs")
    assert texts.name == "python-docs"
    assert texts.documents == corpus.validation
    assert texts.sha256 != corpus.sha256


def test_all_of_a_file_is_scored(write):
    documents = ["one", "", "two", " \n", *DOCUMENTS]
    texts = load_texts(write("rows.jsonl", json_lines(documents, "body")), text_column="body")
    assert (texts.name, texts.documents) == ("rows", ["one", "two", *DOCUMENTS])
    assert load_texts(write("one.txt", "All of it.\r\n")).documents == ["All of it.\n"]


@pytest.mark.parametrize("splits", [("test", "valid", "train"), ("dev", "train"), ("train",)])
def test_of_a_folder_one_split_is_scored(write, splits):
    for split in splits:
        write(f"data/{split}-0.jsonl", json_lines([split]))
        write(f"data/{split}-1.jsonl", json_lines([split, split]))
    texts = load_texts("data")
    assert (texts.name, texts.documents) == ("data", [splits[0]] * 3)


def test_all_of_a_folder_without_splits_is_scored(write):
    write("data/a.txt", "one")
    write("data/b/c.txt", "two")
    assert load_texts("data").documents == ["one", "two"]


@pytest.mark.parametrize("splits", [("test", "validation", "train"), ("val", "train"), ("test",)])
def test_of_a_data_set_of_the_hub_one_split_is_scored(monkeypatch, splits):
    columns = {split: datasets.Dataset.from_dict({"body": ["", f"text of {split}"]}) for split in splits}
    asked_for = []

    def load_dataset(*arguments):
        asked_for.append(arguments)
        return datasets.DatasetDict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = load_texts("group/name:config", text_column="body")
    assert asked_for == [("group/name", "config")]
    assert (texts.name, texts.documents) == ("group-name-config", [f"text of {splits[0]}"])


def test_the_hash_is_of_the_documents_and_their_order(write):
    hashes = []
    for documents in (["a", "b"], ["a", "", "b"], ["b", "a"], ["ab"], ["a"]):
        hashes.append(load_texts(write("rows.jsonl", json_lines(documents))).sha256)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


# Benchmark sets

WIKITEXT = [
    " ",
    " = First = ",
    " ",
    " It is well @-@ known , he said . ",
    " ",
    " = Second = ",
    " ",
    " It is not . ",
    "",
]
ARTICLES = ["= First =\n\nIt is well-known, he said.", "= Second =\n\nIt is not."]


@pytest.mark.parametrize("name", BENCHMARK_SETS)
def test_a_benchmark_set_is_read_from_the_hub(monkeypatch, name):
    benchmark = dataclasses.replace(BENCHMARK_SETS[name], num_rows=3)
    monkeypatch.setitem(BENCHMARK_SETS, name, benchmark)
    rows = ["One .", "Two .", "Three ."]
    asked_for = []

    def load_dataset(*arguments, **options):
        asked_for.append((arguments, options))
        return datasets.Dataset.from_dict({"label": rows, benchmark.column: rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = load_texts(name, text_column="label")
    [((path,), options)] = asked_for
    assert path == benchmark.path
    assert options == {
        "data_files": {benchmark.split: benchmark.files},
        "split": benchmark.split,
        "revision": benchmark.revision,
    }
    assert texts.name == name
    assert texts.documents == benchmark.documents(rows)


def test_the_files_of_a_benchmark_set_are_found_as_the_hub_lays_them_out(tmp_path):
    """`datasets` reads a folder as it reads a repository."""
    layouts = {
        "ptb": "penn_treebank/validation/0000",
        "wikitext-2": "wikitext-2-raw-v1/validation-00000-of-00001",
        "wikitext-103": "wikitext-103-raw-v1/validation-00000-of-00001",
        "lm1b": "plain_text/test/0000",
        "lambada": "default/test/0000",
        "ag-news": "data/test-00000-of-00001",
        "pubmed": "pubmed/validation/0000",
        "arxiv": "arxiv/partial-validation/0000",
    }
    repository = tmp_path / "repository"
    for name, layout in layouts.items():
        for file in (layout, layout.replace("validation", "train").replace("test", "train")):
            (repository / file).parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict({"text": [f"{name}: {file}"]}).to_parquet(repository / f"{file}.parquet")
    for name, layout in layouts.items():
        benchmark = BENCHMARK_SETS[name]
        rows = datasets.load_dataset(
            str(repository), data_files={benchmark.split: benchmark.files}, split=benchmark.split
        )
        assert rows["text"][:] == [f"{name}: {layout}"]


@pytest.mark.parametrize(
    "name", ["wiki.valid.raw", "wiki.test.tokens", "wiki.txt", "wiki.txt.gz", "WIKI.RAW", "a=b.txt", "[odd]*.raw"]
)
def test_a_local_copy_of_a_benchmark_set_as_text(write, name):
    texts = load_texts(f"wikitext-2={write(name, chr(10).join(WIKITEXT))}")
    assert (texts.name, texts.documents) == ("wikitext-2", ARTICLES)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_a_local_copy_of_a_benchmark_set_as_rows(write, name):
    file = write(name, json_lines(WIKITEXT))
    assert load_texts(f"wikitext-103={file}", text_column="other").documents == ARTICLES


def test_a_local_copy_of_a_benchmark_set_as_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"article": ["In @xcite , it\nis so .", "Not so ."]}).to_parquet(file)
    assert load_texts(f"arxiv={file}").documents == ["In @xcite, it\nis so.", "Not so."]


def test_only_a_line_end_ends_a_row(write):
    lines = "One\u2028sentence .\r\nTwo\x0bof\x85them .\n"
    assert load_texts(f"lm1b={write('lm1b.txt', lines)}").documents == ["One\u2028sentence.", "Two\x0bof\x85them."]


@pytest.mark.parametrize(
    ("name", "splits", "scored"),
    [
        ("wikitext-2", ("train", "valid", "test"), "valid"),
        ("wikitext-2", ("train", "test"), "test"),
        ("wikitext-2", ("train",), "train"),
        ("lm1b", ("train", "valid", "test"), "test"),
        ("lm1b", ("train", "valid"), "valid"),
    ],
)
@pytest.mark.parametrize("file_name", ["wiki.{}.raw", "ptb.{}.txt", "{}.txt", "{}/a.txt"])
def test_of_a_folder_the_split_that_the_set_scores(write, name, splits, scored, file_name):
    for split in splits:
        write("copy/" + file_name.format(split), f"Of {split} .")
    assert load_texts(f"{name}=copy").documents == [f"Of {scored}."]


def test_names_go_before_files_and_files_before_the_hub(write, monkeypatch):
    def load_dataset(path, **_):
        return datasets.Dataset.from_dict({"text": [path] * 7600})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write("ag-news/a.txt", "a folder")
    write("lambda=1/a.txt", "another")
    assert set(load_texts("ag-news").documents) == {"fancyzhx/ag_news"}
    assert load_texts("./ag-news").documents == ["a folder"]
    assert load_texts("ag-news=ag-news").documents == ["a folder"]
    assert load_texts("lambda=1").documents == ["another"]


# What is refused


@pytest.mark.parametrize("data", ["missing.txt", "folder/missing.jsonl.gz", "./missing", "a/b/c", "/missing", ""])
def test_a_missing_path(data):
    assert f"there is no file or folder {data!r}" in refusal(data)


@pytest.mark.parametrize("data", ["no-such-name", "nobody/no-such-name", "no-such-name:config", "LM1B"])
def test_a_name_that_is_nowhere(data):
    known = ", ".join(["python-docs", *BENCHMARK_SETS, "an existing file or folder"])
    for load in (load_corpus, load_texts):
        message = refusal(data, load)
        assert f"{data!r} is neither {known}, nor a Hugging Face data set that can be loaded: " in message


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


def test_a_column_is_looked_for_in_the_first_rows_and_not_in_all_of_a_large_file(write):
    late = json_lines(["x"] * 1000, "body") + "malformed\n"
    assert refusal(write("a.jsonl", late)).endswith("id, body")
    early = '{"note": 1}\n' * 999 + json_lines(DOCUMENTS)
    assert len(load_corpus(write("b.jsonl", early)).train) == 57


@pytest.mark.parametrize("rows", ["3\n", "null\n", '{"text": "fine"}\n[1]\n'])
def test_rows_that_have_no_columns(write, rows):
    assert "not an object with a column of text" in refusal(write("a.jsonl", rows))


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


def test_a_data_set_with_nothing_to_score(monkeypatch):
    only_train = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": DOCUMENTS}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: only_train)
    assert "no split 'test' or 'validation' to score, only train" in refusal("name", load_texts)


@pytest.mark.parametrize("data", ["a.jsonl", "lm1b=a.jsonl", "wikitext-2=a.jsonl", "ptb=b.txt", "ptb=folder"])
def test_nothing_to_score(write, data):
    write("a.jsonl", json_lines(["", "  \n"]))
    write("b.txt", " \n\n")
    write("folder/test.jsonl", json_lines([" "], "sentence"))
    write("folder/train.jsonl", json_lines(DOCUMENTS, "sentence"))
    assert refusal(data, load_texts) == f"{data} holds no text to score"


@pytest.mark.parametrize("data", ["missing.txt", "./missing", "a/b/c", "", "ptb=", "ptb=missing", "lm1b=no/such.raw"])
def test_a_missing_path_to_score(data):
    assert f"there is no file or folder {data.split('=')[-1]!r}" in refusal(data, load_texts)


@pytest.mark.parametrize("data", ["wikitext2=a.txt", "wikitext2="])
def test_a_copy_of_an_unknown_set(write, data):
    write("a.txt", "text")
    for load in (load_corpus, load_texts):
        assert refusal(data, load) == f"there is no benchmark set 'wikitext2', only {', '.join(BENCHMARK_SETS)}"


def test_a_benchmark_set_out_of_reach_may_be_given_as_a_copy():
    message = refusal("wikitext-2", load_texts)
    assert "wikitext-2 cannot be loaded from Salesforce/wikitext" in message
    assert "give a local copy as wikitext-2=PATH" in message


def test_a_part_of_a_benchmark_set(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"article": ["a"] * 9}))
    message = refusal("arxiv", load_texts)
    assert "gives 9 rows of arxiv, which has 6436" in message
    assert "give a local copy as arxiv=PATH" in message


def test_a_copy_without_the_column_of_its_set(write):
    message = refusal(f"ptb={write('a.jsonl', json_lines(DOCUMENTS))}", load_texts)
    assert "no column 'sentence'" in message
    assert message.endswith("id, text")


@pytest.mark.parametrize("data", ["wiki.valid.raw", "wiki.test.tokens", "ptb=a.csv", "lm1b=news.en.heldout-00000"])
def test_extensions_of_benchmark_sets_are_read_of_them_only(write, data):
    write(data.split("=")[-1], "text")
    assert "none of the extensions that can be read" in refusal(data, load_texts)


def test_a_copy_that_holds_a_split_in_two_variants(write):
    write("copy/valid.txt", "The <unk> .")
    write("copy/wiki.valid.raw", "The word .")
    message = refusal("wikitext-2=copy", load_texts)
    assert "valid.txt (UTF-8 text)" in message
    assert "wiki.valid.raw (raw UTF-8 text)" in message


def test_a_copy_that_is_not_text(write):
    message = refusal(f"wikitext-2={write('wiki.valid.raw', 'text'.encode('utf-16-le'))}", load_texts)
    assert "wiki.valid.raw is not raw UTF-8 text" in message


def test_a_copy_of_a_benchmark_set_is_a_corpus_too(tmp_path):
    """Articles, not lines; words joined; the split of each file by its name."""
    articles = {
        "train": " \n = One = \n \n A comma , and \n more . \n \n = Two = \n \n It is two @-@ fold . \n",
        "valid": " \n = Three = \n \n The end . \n",
    }
    for split, text in articles.items():
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    corpus = load_corpus(f"wikitext-2={tmp_path}")
    assert corpus.name == "wikitext-2"
    assert corpus.train == ["= One =\n\nA comma, and\nmore.", "= Two =\n\nIt is two-fold."]
    assert corpus.validation == ["= Three =\n\nThe end."]


def test_a_benchmark_set_of_the_hub_is_not_for_training():
    with pytest.raises(InputError, match="wikitext-2=PATH"):
        load_corpus("wikitext-2")
    with pytest.raises(InputError, match="no file or folder"):
        load_corpus("wikitext-2=nowhere")
