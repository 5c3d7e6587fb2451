"""Benchmark sets: what a document of each is, where a set is read from, and what is scored of a copy."""

import dataclasses

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus, load_texts
from ltm_pyro.data.corpora.benchmark_sets import BENCHMARK_SETS
from ltm_pyro.errors import InputError

ARTICLES = [
    *("", " = First = ", "", " It starts . ", " It goes on . "),
    *("", " = = Part = = ", "", " More of it , where ", " = x and y = ", " stands in a formula . "),
    *("", " = Second = ", "", " = = Part = = ", "", " It ends . ", ""),
]
JOINED = [
    "= First =\n\nIt starts.\nIt goes on.\n\n== Part ==\n\nMore of it, where\n= x and y =\nstands in a formula.",
    "= Second =\n\n== Part ==\n\nIt ends.",
]


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_an_article_starts_at_a_heading_of_the_first_level(name):
    benchmark = BENCHMARK_SETS[name]
    assert [article for article in benchmark.documents(ARTICLES) if article] == JOINED
    # On the hub, rows keep the ends of their lines, but blank ones are empty.
    rows = [f"{row}\n" if row.strip() else "" for row in ARTICLES]
    assert [article for article in benchmark.documents(rows) if article] == JOINED


def test_text_before_the_first_heading_is_a_document():
    documents = BENCHMARK_SETS["wikitext-2"].documents(["Cut off here .", "", " = Next = ", "", "It starts ."])
    assert documents == ["Cut off here.", "= Next =\n\nIt starts."]


def test_ptb_is_one_stream_of_sentences():
    rows = [" it rose N N ", "", " it did n't fall "]
    assert BENCHMARK_SETS["ptb"].documents(rows) == ["it rose 1 1\nit didn't fall"]


@pytest.mark.parametrize("name", ["lm1b", "lambada", "ag-news", "pubmed", "arxiv"])
def test_a_row_is_a_document(name):
    benchmark = BENCHMARK_SETS[name]
    rows = ["One .", "Two .", ""]
    assert benchmark.documents(rows) == [benchmark.detokenize(row) for row in rows]


@pytest.mark.parametrize("name", BENCHMARK_SETS)
def test_nothing_to_join(name):
    assert not any(document.strip() for document in BENCHMARK_SETS[name].documents([]))
    assert not any(document.strip() for document in BENCHMARK_SETS[name].documents(["", " \n"]))


# From the hub, and from copies


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
    texts = load_texts(name)
    [((path,), options)] = asked_for
    assert path == benchmark.path
    assert options == {
        "data_files": {benchmark.split: benchmark.files},
        "split": benchmark.split,
        "revision": benchmark.revision,
    }
    assert texts.name == f"{name}, split {benchmark.split}"
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
    texts = load_texts(f"wikitext-2={write(name, chr(10).join(ARTICLES))}")
    assert (texts.name, texts.documents) == (f"wikitext-2, all of {name}", JOINED)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_a_local_copy_of_a_benchmark_set_as_rows(write, name, json_lines):
    file = write(name, json_lines(ARTICLES))
    assert load_texts(f"wikitext-103={file}").documents == JOINED
    assert load_texts(f"ag-news={write('b.jsonl', json_lines(['a b'], 'body'))}", "body").documents == ["a b"]


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


@pytest.mark.parametrize("data", ["wikitext2=a.txt", "wikitext2="])
def test_a_copy_of_an_unknown_set(write, data, refusal):
    write("a.txt", "text")
    for load in (load_corpus, load_texts):
        assert refusal(data, load) == f"there is no benchmark set 'wikitext2', only {', '.join(BENCHMARK_SETS)}"


def test_a_benchmark_set_out_of_reach_may_be_given_as_a_copy(refusal):
    message = refusal("wikitext-2", load_texts)
    assert "wikitext-2 cannot be loaded from Salesforce/wikitext" in message
    assert "give a local copy as wikitext-2=PATH" in message


def test_a_part_of_a_benchmark_set(monkeypatch, refusal):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"article": ["a"] * 9}))
    message = refusal("arxiv", load_texts)
    assert "gives 9 rows of arxiv, which has 6436" in message
    assert "give a local copy as arxiv=PATH" in message


def test_a_copy_without_the_column_of_its_set(write, json_lines, refusal, documents):
    message = refusal(f"ptb={write('a.jsonl', json_lines(documents))}", load_texts)
    assert "no column 'sentence'" in message
    assert message.endswith("id, text")


@pytest.mark.parametrize("data", ["wiki.valid.raw", "wiki.test.tokens", "ptb=a.pdf", "lm1b=news.en.heldout-00000"])
def test_extensions_of_benchmark_sets_are_read_of_them_only(write, data, refusal):
    write(data.split("=")[-1], "text")
    assert "none of the extensions that can be read" in refusal(data, load_texts)


def test_a_copy_that_holds_a_split_in_two_variants(write, refusal):
    write("copy/valid.txt", "The <unk> .")
    write("copy/wiki.valid.raw", "The word .")
    message = refusal("wikitext-2=copy", load_texts)
    assert "valid.txt (UTF-8 text)" in message
    assert "wiki.valid.raw (raw UTF-8 text)" in message


def test_a_copy_that_is_not_text(write, refusal):
    message = refusal(f"wikitext-2={write('wiki.valid.raw', 'text'.encode('utf-16-le'))}", load_texts)
    assert "wiki.valid.raw is not raw UTF-8 text" in message
