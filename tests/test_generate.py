"""The command: texts from runs that `python -m ltm_pyro.train` has written, as a user gives it and reads it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import Predictive
from safetensors.torch import load_file, save_file

import ltm_pyro
from ltm_pyro import cli, generate
from ltm_pyro.config import scheme_of
from ltm_pyro.data.tokenizers import END_OF_TEXT
from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise, infer
from ltm_pyro.models import Sampling
from ltm_pyro.models import generate as generate_tokens
from ltm_pyro.runs import continuation

LENGTH = 32
PROMPT = "Sentence number"
LATENT_SHAPE = (2, 2, 16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_run: Callable[..., None]) -> Path:
    """A folder with a corpus and a run of some schemes, and of none."""
    folder = tmp_path_factory.mktemp("runs")
    for scheme in ("vi", "map", "langevin"):
        train_run(folder, scheme, "--fast-steps", "2", "--steps", "1")
    for scheme in ("amortized", "none"):
        train_run(folder, scheme, "--steps", "1")
    # The weights of a step would hardly tell one z from another.
    for run in ("vi", "map", "langevin", "amortized"):
        path = max((folder / run / "checkpoints").iterdir()) / "model.safetensors"
        weights = load_file(path)
        save_file({name: weight * (20 if weight.dim() > 1 else 1) for name, weight in weights.items()}, path)
        sums = path.with_name("SHA256SUMS")
        others = [line for line in sums.read_text().splitlines() if not line.endswith(path.name)]
        sums.write_text("\n".join([*others, f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"]) + "\n")
    return folder


@pytest.fixture
def command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in the folder of the runs."""
    monkeypatch.chdir(runs)
    return functools.partial(run_main, generate.main, "--device", "cpu")


@pytest.fixture
def texts(command: Callable[..., tuple[int, str, str]]) -> Callable[..., list[dict]]:
    """The texts that the command writes, as JSON has them."""

    def run(*args: str) -> list[dict]:
        status, out, err = command(*args, "--json")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return run


@pytest.fixture
def prompts(command: object) -> str:
    """A file of three prompts, the second of which is empty."""
    Path("prompts.txt").write_text(f"{PROMPT}\n\nmakes é\n")
    return "prompts.txt"


@pytest.mark.parametrize("run", ["vi", "map", "langevin", "amortized", "none"])
def test_a_run_of_every_scheme_writes_texts(run, texts, prompts):
    for args in ((), ("--prompt", PROMPT), ("--prompt-file", prompts, "--num-samples", "2")):
        found = texts(run, *args, "--max-new-tokens", "5")
        expected = [PROMPT, "", "makes é"] if prompts in args else [PROMPT if args else ""]
        samples = 2 if prompts in args else 1
        assert [text["prompt"] for text in found] == [prompt for prompt in expected for _ in range(samples)]
        assert [text["sample"] for text in found] == list(range(samples)) * len(expected)
        for text in found:
            assert text["ended"] or text["num_tokens"] == 5
            posterior = None if run == "none" else run if text["prompt"] else "the prior"
            assert text["posterior"] == posterior
            assert text["fast_steps"] == (2 if posterior in ("vi", "map", "langevin") else 0)


def test_the_plain_output_is_the_text_with_its_prompt(command, texts, prompts):
    args = ("vi", "--prompt", PROMPT, "--max-new-tokens", "9")
    (one,) = texts(*args)
    assert command(*args) == (0, PROMPT + one["text"] + "\n", "")
    args = ("vi", "--prompt-file", prompts, "--max-new-tokens", "9")
    titles = [f"=== text {number} of 3\n" for number in (1, 2, 3)]
    expected = [f"{title}{x['prompt']}{x['text']}\n" for title, x in zip(titles, texts(*args), strict=True)]
    assert command(*args) == (0, "".join(expected), "")


def test_a_line_of_prompts_ends_at_its_line_feed_only(texts):
    Path("lines.txt").write_bytes("one\x0cpage\r\ntwo\u2028parts\n\n".encode())
    found = texts("vi", "--prompt-file", "lines.txt", "--max-new-tokens", "0")
    assert [text["prompt"] for text in found] == ["one\x0cpage", "two\u2028parts", ""]


def test_a_terminal_sees_a_text_grow(command, texts, monkeypatch):
    args = ("vi", "--prompt", "é", "--max-new-tokens", "300")
    seed = next(str(seed) for seed in range(20) if texts(*args, "--seed", str(seed))[0]["ended"])
    _, plain, _ = command(*args, "--seed", seed)
    pieces = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", **_: pieces.append(text + end))
    assert command(*args, "--seed", seed)[0] == 0
    assert "".join(pieces) == plain
    assert len(pieces) > 3


def test_what_is_written_is_what_the_model_says_given_the_inferred_thought(texts, runs):
    """By hand: z from the prompt without end-of-text, then the tokens one by one."""
    ltm = ltm_pyro.load(runs / "vi")
    (found,) = texts("vi", "--prompt", PROMPT, "--max-new-tokens", "20", "--seed", "5", "--fast-steps", "3")
    tokens = list(PROMPT.encode())
    full = ltm.batch([PROMPT])
    prefix = full.cut(len(tokens))
    assert full.tokens[0, -1] == ltm.model.end_of_text
    rng = SequenceNoise(5)
    scheme = SCHEMES["vi"](num_steps=3)
    z = scheme.posterior(infer(scheme, ltm.model, prefix, rng), 1, rng).samples[0, 0]
    generator = torch.Generator().manual_seed(5)
    written = generate_tokens(ltm.model.decoder, z, ltm.model.end_of_text, 20, [tokens], Sampling(), generator)
    assert ltm.decode(written) == [found["text"]]


def test_a_prompt_that_spells_end_of_text_is_text(texts):
    (found,) = texts("vi", "--prompt", END_OF_TEXT, "--max-new-tokens", "3")
    assert found["prompt"] == END_OF_TEXT
    assert found["num_tokens"] > 0


def test_the_seed_and_nothing_else_decides(texts):
    args = ("vi", "--num-samples", "3", "--max-new-tokens", "20")
    first, again, other = (texts(*args, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert {text["text"] for text in first}.isdisjoint(text["text"] for text in other)
    assert len({text["text"] for text in first}) == 3
    torch.manual_seed(99)
    assert texts(*args, "--seed", "1") == first


@pytest.mark.parametrize("run", ["vi", "langevin"])
def test_every_text_has_its_own_draw_of_z(run, command):
    args = ("--max-new-tokens", "0", "--prompt", PROMPT, "--num-samples", "3", "--save-thought", "z.safetensors")
    assert command(run, *args)[0] == 0
    z = load_file("z.safetensors")["z"]
    assert z.shape == (3, *LATENT_SHAPE)
    assert not any(torch.equal(z[first], z[second]) for first, second in ((0, 1), (0, 2), (1, 2)))


def test_map_has_one_z_for_all(command):
    args = ("--max-new-tokens", "0", "--prompt", PROMPT, "--num-samples", "3", "--save-thought", "z.safetensors")
    assert command("map", *args)[0] == 0
    z = load_file("z.safetensors")["z"]
    assert torch.equal(z, z[:1].expand_as(z))


def test_thoughts_do_not_depend_on_the_batch(command, prompts):
    found = []
    for size in ("1", "2", "16"):
        args = ("--prompt-file", prompts, "--num-samples", "2", "--batch-size", size, "--max-new-tokens", "0")
        assert command("vi", *args, "--save-thought", "z.safetensors")[0] == 0
        found.append(load_file("z.safetensors")["z"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prompt", ["None", " ", "- item", "é"])
def test_any_text_is_a_prompt(prompt, texts):
    assert texts("vi", f"--prompt={prompt}", "--max-new-tokens", "0")[0]["prompt"] == prompt


def test_an_empty_prompt_is_none(texts):
    args = ("map", "--max-new-tokens", "12")
    assert texts(*args) == texts(*args, "--prompt", "")
    assert texts(*args)[0]["posterior"] == "the prior"


def test_without_inference_z_comes_from_the_prior_whatever_the_prompt(command):
    found = []
    for prompt in (PROMPT, "makes"):
        args = ("--prompt", prompt, "--inference", "none", "--max-new-tokens", "0", "--save-thought", "z.safetensors")
        assert command("vi", *args)[0] == 0
        found.append(load_file("z.safetensors")["z"])
    ltm = ltm_pyro.load("vi")
    rng = SequenceNoise(0)
    state = infer(PRIOR, ltm.model, ltm.batch(["x"]), rng)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], PRIOR.posterior(state, 1, rng).samples[0, 0])


def test_inference_may_be_another_than_in_training(texts):
    args = ("--prompt", PROMPT, "--max-new-tokens", "10")
    for inference, steps in (("map", "3"), ("hmc", "1"), ("vi", "16")):
        (found,) = texts("vi", *args, "--inference", inference, "--fast-steps", steps)
        assert (found["posterior"], found["fast_steps"]) == (inference, int(steps))
    (refined,) = texts("amortized", *args, "--fast-steps", "2")
    assert (refined["posterior"], refined["fast_steps"]) == ("amortized", 2)


def test_a_saved_thought_writes_the_same_text_again(texts, prompts):
    greedy = ("--temperature", "0", "--max-new-tokens", "20")
    first = texts("vi", "--prompt-file", prompts, *greedy, "--save-thought", "z.safetensors")
    again = texts("vi", "--prompt-file", prompts, *greedy, "--thought", "z.safetensors")
    assert [text["text"] for text in again] == [text["text"] for text in first]
    assert {text["posterior"] for text in again} == {"z.safetensors"}
    # And one z with other texts.
    texts("vi", "--prompt", PROMPT, "--max-new-tokens", "0", "--save-thought", "one.safetensors")
    assert len(texts("vi", "--prompt-file", prompts, *greedy, "--thought", "one.safetensors")) == 3
    # Without prompts, every thought has its texts.
    found = texts("vi", "--thought", "z.safetensors", "--num-samples", "2", "--max-new-tokens", "4")
    assert [(text["prompt"], text["sample"]) for text in found] == [("", 0), ("", 1)] * 3


def test_rethinking_infers_z_from_prompt_and_text_so_far(texts, runs):
    """By hand: z, four tokens, z from all there is by then, four tokens more."""
    greedy = ("--temperature", "0", "--prompt", PROMPT, "--max-new-tokens", "8", "--rethink", "4")
    (found,) = texts("map", *greedy, "--save-thought", "z.safetensors")
    ltm, so_far = ltm_pyro.load(runs / "map"), list(PROMPT.encode())
    scheme = scheme_of(ltm.config)
    for _ in range(2):
        z = continuation.infer_thoughts(ltm, [so_far], scheme, 1, SequenceNoise(0))[0]
        new = generate_tokens(ltm.model.decoder, z, ltm.model.end_of_text, 4, [so_far], Sampling(temperature=0))
        so_far += new[0].tolist()
    assert ltm.model.end_of_text not in so_far  # or there would have been one inference only
    assert ltm.decode(torch.tensor([so_far[len(PROMPT) :]])) == [found["text"]]
    assert torch.equal(load_file("z.safetensors")["z"], z)


def test_no_noise_of_inference_serves_twice(command, monkeypatch):
    infer_thoughts, used = continuation.infer_thoughts, []

    def recorded(ltm, prompts, scheme, num_samples, rng, first_id):
        used.extend(range(first_id, first_id + len(prompts)))
        return infer_thoughts(ltm, prompts, scheme, num_samples, rng, first_id)

    monkeypatch.setattr(continuation, "infer_thoughts", recorded)
    Path("two.txt").write_text("one\ntwo\n")
    args = ("--prompt-file", "two.txt", "--num-samples", "3", "--batch-size", "4", "--rethink", "2")
    assert command("vi", *args, "--max-new-tokens", "6")[0] == 0
    assert len(used) > 2 + 6
    assert len(set(used)) == len(used)


def test_rethinking_without_a_prompt_begins_at_the_prior(texts):
    (found,) = texts("vi", "--rethink", "3", "--max-new-tokens", "10", "--seed", "3")
    assert (found["posterior"], found["fast_steps"]) == ("vi", 2)


def test_a_text_may_be_longer_than_the_sequences_in_training(command, texts):
    assert max(text["num_tokens"] for text in texts("vi", "--num-samples", "4")) <= LENGTH
    longest = max(text["num_tokens"] for text in texts("vi", "--num-samples", "4", "--max-new-tokens", "90"))
    assert longest > LENGTH


def test_z_of_a_longer_prompt_is_inferred_from_its_last_tokens(command):
    long, last = "Sentence number 7. " * 5, ("Sentence number 7. " * 5)[-LENGTH:]
    found = []
    for prompt, note in ((long, True), (last, False)):
        args = ("--prompt", prompt, "--max-new-tokens", "0", "--save-thought", "z.safetensors")
        status, _, err = command("vi", *args)
        assert status == 0
        assert err.startswith("note: a prompt has 95 tokens; z is inferred from its last 32") is note
        found.append(load_file("z.safetensors")["z"])
    assert torch.equal(*found)


def test_no_token_is_a_text_too(texts):
    (found,) = texts("vi", "--prompt", PROMPT, "--max-new-tokens", "0")
    assert (found["text"], found["num_tokens"], found["ended"]) == ("", 0, False)


def test_sampling_options_reach_the_sampler(texts):
    greedy = texts("vi", "--prompt", PROMPT, "--temperature", "0")
    assert texts("vi", "--prompt", PROMPT, "--top-k", "1", "--seed", "0") == greedy
    assert texts("vi", "--prompt", PROMPT, "--top-p", "1e-9", "--seed", "0") == greedy
    assert texts("vi", "--prompt", PROMPT, "--temperature", "0", "--repetition-penalty", "50") != greedy


BAD = {
    "no run": ([], "RUN"),
    "a folder that is none": (["nowhere"], "nowhere"),
    "an unknown option": (["vi", "--nonsense"], "nonsense"),
    "an unknown scheme": (["vi", "--prompt", "x", "--inference", "nuts"], "nuts"),
    "two kinds of prompt": (["vi", "--prompt", "x", "--prompt-file", "text.jsonl"], "not both"),
    "no such file of prompts": (["vi", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
    "a folder of prompts": (["vi", "--prompt-file", "vi"], "vi"),
    "no prompts": (["vi", "--prompt-file", "empty.txt"], "empty"),
    "prompts in another encoding": (["vi", "--prompt-file", "latin.txt"], "UTF-8"),
    "a prompt that is no text": (["vi", "--prompt", "caf\udce9"], "not text"),
    "no samples": (["vi", "--num-samples", "0"], "num-samples"),
    "less than no token": (["vi", "--max-new-tokens", "-1"], "max-new-tokens"),
    "less than no step": (["vi", "--prompt", "x", "--fast-steps", "-1"], "fast-steps"),
    "less than no rethinking": (["vi", "--rethink", "-1"], "rethink"),
    "an empty batch": (["vi", "--batch-size", "0"], "batch-size"),
    "a negative seed": (["vi", "--seed", "-1"], "seed"),
    "a seed that is too large": (["vi", "--seed", "4294967296"], "seed"),
    "a negative temperature": (["vi", "--temperature", "-1"], "temperature"),
    "no probability": (["vi", "--top-p", "0"], "--top-p"),
    "more than all probability": (["vi", "--top-p", "1.5"], "--top-p"),
    "fewer tokens than none": (["vi", "--top-k", "-1"], "--top-k"),
    "the most likely token of some": (["vi", "--temperature", "0", "--top-k", "5"], "temperature 0"),
    "inference from nothing": (["vi", "--inference", "map"], "--prompt"),
    "steps from nothing": (["vi", "--fast-steps", "4"], "--prompt"),
    "inference beside a thought": (["vi", "--prompt", "x", "--thought", "t", "--inference", "vi"], "--thought"),
    "steps of no inference": (["vi", "--prompt", "x", "--inference", "none", "--fast-steps", "3"], "--fast-steps"),
    "rethinking without inference": (["vi", "--inference", "none", "--rethink", "3"], "--rethink"),
    "an encoder that is not there": (["vi", "--prompt", "x", "--inference", "amortized"], "no encoder"),
    "steps that are not said": (["amortized", "--prompt", "x", "--inference", "vi"], "--fast-steps"),
    "inference without z": (["none", "--prompt", "x", "--inference", "vi"], "without z"),
    "rethinking without z": (["none", "--prompt", "x", "--rethink", "2"], "without z"),
    "a thought to save without z": (["none", "--save-thought", "z.st"], "without z"),
    "a thought without z": (["none", "--thought", "good.st"], "without z"),
    "no such thought": (["vi", "--thought", "nowhere.st"], "nowhere.st"),
    "a thought that is none": (["vi", "--thought", "text.jsonl"], "cannot be read"),
    "a thought of another name": (["vi", "--thought", "named.st"], "'z'"),
    "a thought of another shape": (["vi", "--thought", "shape.st"], "[number of texts, 2, 2, 16]"),
    "a thought of another width": (["vi", "--thought", "width.st"], "2, 2, 8]"),
    "a thought that is not finite": (["vi", "--thought", "nan.st"], "not finite"),
    "more thoughts than prompts": (["vi", "--thought", "good.st", "--prompt-file", "one.txt"], "2 thoughts"),
    "a thought to save nowhere": (["vi", "--save-thought", "nowhere/z.st"], "nowhere"),
    "a thought to save over a folder": (["vi", "--save-thought", "vi"], "--save-thought"),
}


@pytest.mark.parametrize(("args", "mentioned"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_with_status_2(args, mentioned, command):
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("x\n")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    good = torch.zeros(2, *LATENT_SHAPE)
    save_file({"z": good}, "good.st")
    save_file({"thought": good}, "named.st")
    save_file({"z": good[0]}, "shape.st")
    save_file({"z": good[..., :8].contiguous()}, "width.st")
    save_file({"z": good / 0}, "nan.st")
    status, out, err = command(*args)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert mentioned in err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(generate.main, ["--help-all"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--prompt", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--rethink", "--thought"):
        assert option in text
    assert "None" not in text


# --- through Pyro, and the documentation


@pytest.mark.parametrize("name", ["vi", "map"])
def test_posterior_predictive_texts_come_from_the_guide_of_a_scheme(name, runs):
    ltm, num_samples = ltm_pyro.load(runs / "vi"), 16 if name == "vi" else 3
    batch, rng, scheme = ltm.batch([PROMPT, "makes"]), SequenceNoise(0), SCHEMES[name](num_steps=4)
    state = infer(scheme, ltm.model, batch, rng)
    guide = scheme.guide(ltm.model, state, batch, rng)
    drawn = Predictive(ltm.model, guide=guide, num_samples=num_samples)(num_sequences=2)
    assert drawn["tokens"].shape == (num_samples, 2, LENGTH)
    assert drawn["z"].shape == (num_samples, 2, *LATENT_SHAPE)
    if name == "map":
        assert torch.equal(drawn["z"], state.z.expand_as(drawn["z"]))
        return
    q = scheme.distribution(state, rng)
    error = (drawn["z"].mean(0) - q.mean) / (q.stddev / math.sqrt(num_samples))
    assert error.abs().max() < 5
    # Each text is one of its own z, drawn from Pyro's seed.
    pyro.set_rng_seed(3)
    first = Predictive(ltm.model, {"z": drawn["z"][:4]})(num_sequences=2)["tokens"]
    pyro.set_rng_seed(3)
    assert torch.equal(Predictive(ltm.model, {"z": drawn["z"][:4]})(num_sequences=2)["tokens"], first)


def test_the_python_examples_of_the_documentation_run(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    if not Path("runs").exists():
        shutil.copytree("vi", "runs/python-docs-tiny-vi")
    document = Path(__file__).parents[1] / "docs/generation.md"
    examples = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, document.name, "exec"), names)
    assert names["tokens"].shape == (4, 40)
    assert names["prior"]["z"].shape == names["posterior"]["z"].shape == (4, 1, *LATENT_SHAPE)
    assert names["accuracies"].shape[0] == LATENT_SHAPE[0] + 1
    assert Path("reconstruction.png").exists()
