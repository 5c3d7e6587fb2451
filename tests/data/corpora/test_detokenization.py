"""Benchmark sets: their rows become the English that they were before words were taken apart."""

import pytest

from ltm_pyro.data.corpora.benchmark_sets import BENCHMARK_SETS

# Words joined


@pytest.mark.parametrize(
    ("row", "english"),
    [
        ("the dogs ' tails were n't cut", "the dogs' tails weren't cut"),
        ("she ca n't say what they 're worth but we 'll see", "she can't say what they're worth but we'll see"),
        ("he 's sure i 'd know it 's as i 've said and i 'm not", "he's sure i'd know it's as i've said and i'm not"),
        ("the buyer is one of the farmers '", "the buyer is one of the farmers'"),
        ("it paid $ N million for N N of the shares in N", "it paid $1 million for 1 1 of the shares in 1"),
        ("N N N N N and # N of N-year notes", "1 1 1 1 1 and #1 of 1-year notes"),
        ("a <unk> and\\/or an aide", "a ? and/or an aide"),
        ("no number in london", "no number in london"),
        ("  a row between spaces \n", "a row between spaces"),
    ],
)
def test_ptb(row, english):
    assert BENCHMARK_SETS["ptb"].detokenize(row) == english


# Written as the Moses tokenizer takes English apart.
NEWS = [
    ("The dogs , he said , were loud ; so was I .", "The dogs, he said, were loud; so was I."),
    ("Who ? Me ! ( Yes , you ( both ) . )", "Who? Me! (Yes, you (both).)"),
    ("It [ the well-known one ] ended so : { a , b } .", "It [the well-known one] ended so: {a, b}."),
    ("The so-called well-read man .", "The so-called well-read man."),
    ('" I came , " he said , " and saw . " ( " Really ? " )', '"I came," he said, "and saw." ("Really?")'),
    ('He asked : " Is the " half ?', 'He asked: "Is the" half?'),
    ('" This has no end , he said .', '"This has no end, he said.'),
    ('This had no beginning . "', 'This had no beginning."'),
    ("I don 't know , I 'm sure he 'll say it 's O 'Neil 's .", "I don't know, I'm sure he'll say it's O'Neil's."),
    ('The " Album " \'s sales', 'The "Album"\'s sales'),
    ("The dogs ' tails and the cats ' ears are the owners ' .", "The dogs' tails and the cats' ears are the owners'."),
    ("It is ' good ' , as ' the Owners ' say .", "It is 'good', as 'the Owners' say."),
    (
        "They call it ' the dog 's tail ' ; others ( ' us ' ) do not .",
        "They call it 'the dog's tail'; others ('us') do not.",
    ),
    ("\" They said ' no ' , \" he wrote .", "\"They said 'no',\" he wrote."),
    ("From the ' 80s on , in ' 91 , the Knights ' 46 wins", "From the '80s on, in '91, the Knights' 46 wins"),
    ("At 18 : 05 the vote was 3 : 2 : no more .", "At 18:05 the vote was 3:2: no more."),
    ("Give ' em the ring , ' tis theirs .", "Give 'em the ring, 'tis theirs."),
    ("Acme Inc. ' s plan", "Acme Inc.'s plan"),
    ("Each paid $ 5 or £ 4 .", "Each paid $5 or £4."),
    (" Spaces at the ends . ", "Spaces at the ends."),
    ("A row .\n", "A row."),
    ("", ""),
]


@pytest.mark.parametrize(("row", "english"), NEWS)
@pytest.mark.parametrize("name", ["lm1b", "wikitext-2", "wikitext-103", "pubmed", "arxiv"])
def test_words_as_moses_takes_them_apart(name, row, english):
    assert BENCHMARK_SETS[name].detokenize(row) == english


@pytest.mark.parametrize(
    ("row", "english"),
    [
        (" = Mont Blanc = \n", "= Mont Blanc ="),
        (" = = Height and weather = = ", "== Height and weather =="),
        (" = = = = Notes = = = = ", "==== Notes ===="),
        ("A red @-@ tipped , 4 @,@ 808 @.@ 72 m peak .", "A red-tipped, 4,808.72 m peak."),
        ("At 45 ° 49 N it is 5 ° C , not 7 ° as below .", "At 45°49 N it is 5°C, not 7° as below."),
        ("Go N or S on and / or off the road", "Go N or S on and / or off the road"),
        ("The <unk> 's peak , <unk> .", "The <unk>'s peak, <unk>."),
    ],
)
def test_wikitext(row, english):
    assert BENCHMARK_SETS["wikitext-2"].detokenize(row) == english
    assert BENCHMARK_SETS["wikitext-103"].detokenize(row) == english


@pytest.mark.parametrize("name", ["lm1b", "pubmed", "arxiv"])
def test_slashes_and_addresses(name):
    row = "See http : / / www.example.org / news / 1 and https : / / example.org and / or ask ."
    english = "See http://www.example.org/news/1 and https://example.org and/or ask."
    assert BENCHMARK_SETS[name].detokenize(row) == english


@pytest.mark.parametrize("name", ["pubmed", "arxiv"])
def test_papers_keep_their_paragraphs_and_placeholders(name):
    row = 'in @xcite ( see fig . 1 ) , \n we find @xmath0 : 2 @.@ 5 ° c of " heat .\n \n the end " .\n'
    paper = 'in @xcite (see fig. 1),\nwe find @xmath0: 2.5°c of " heat.\n\nthe end ".'
    assert BENCHMARK_SETS[name].detokenize(row) == paper


def test_lambada():
    row = " “ I know , ” she said.\n\n“She’s right,” said Don \n"
    assert BENCHMARK_SETS["lambada"].detokenize(row) == '\n" I know , " she said.\n\n"She’s right," said Don'


def test_ag_news_is_left_as_it_is():
    row = " Stocks fell ( again ) , Reuters - says \\$5 isn 't #39;much' "
    assert BENCHMARK_SETS["ag-news"].detokenize(row) == row
