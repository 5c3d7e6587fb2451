"""What `ltm_pyro.load` returns: it writes, infers and scores as the commands do, and refuses what makes no sense."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import arviz
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ltm_pyro
from ltm_pyro import LTM, evaluate, generate
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation.estimators import Meaning
from ltm_pyro.evaluation.model import NUM_CHAINS
from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.base import log_joint
from ltm_pyro.inference.posterior import import_arviz
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.models import TokenSequence

TEXT = "Sentence number 7 says so."
TEXTS = [TEXT, "7 é 7", ""]
LENGTH = 32
BLOCK = 8
_, IS_NEW = import_arviz()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_run: Callable[..., None]) -> Path:
    """A folder with runs whose z matters: of whole texts (vi), of the past (map), and without z (none)."""
    folder = tmp_path_factory.mktemp("runs")
    train_run(folder, "vi", "--fast-steps", "2", "--steps", "1")
    past = ("--infer-from", "past", "--block-size", str(BLOCK), "--fast-steps", "1", "--steps", "1")
    train_run(folder, "map", *past)
    train_run(folder, "none", "--steps", "1")
    for run in ("vi", "map"):
        path = max((folder / run / "checkpoints").iterdir()) / "model.safetensors"
        weights = load_file(path)
        factors = {name: 20 if weight.dim() > 1 else 1 for name, weight in weights.items()}
        factors["prior.log_scale"] = 0  # thoughts as long as z
        save_file({name: weight * factors[name] for name, weight in weights.items()}, path)
        sums = path.with_name("SHA256SUMS")
        others = [line for line in sums.read_text().splitlines() if not line.endswith(path.name)]
        sums.write_text("\n".join([*others, f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"]) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(runs: Path) -> dict[str, LTM]:
    return {name: ltm_pyro.load(runs / name) for name in ("vi", "map", "none")}


# --- generate


def test_the_defaults_are_those_of_the_command():
    ours = {name: each.default for name, each in inspect.signature(LTM.generate).parameters.items() if name != "self"}
    command = generate.GenerateConfig()
    theirs = {**vars(command), **vars(command.sampling), "num_samples": None}
    assert ours == {name: theirs[name] for name in ours}
    assert inspect.signature(LTM.score).parameters["seed"].default == evaluate.EvaluateConfig().seed


@pytest.mark.parametrize("run", ["vi", "map", "none"])
@pytest.mark.parametrize("prompt", ["", TEXT])
def test_it_writes_what_the_command_prints(run, prompt, runs, models, run_main):
    settings = {"temperature": 0.7, "top_k": 40, "max_new_tokens": 12, "seed": 5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    if run != "none":
        settings |= {"rethink": 5, "fast_steps": 3, "inference": "map"}
        options += ["--rethink=5", "--fast-steps=3", "--inference=map"]
    status, out, _ = run_main(generate.main, str(runs / run), f"--prompt={prompt}", *options)
    assert (status, out) == (0, models[run].generate(prompt, **settings) + "\n")


def test_several_texts_are_a_list_and_those_of_the_command(runs, models, run_main):
    args = (f"--prompt={TEXT}", "--num-samples=18", "--max-new-tokens=6", "--json")  # more than it writes together
    _, out, _ = run_main(generate.main, str(runs / "vi"), *args)
    expected = [TEXT + json.loads(line)["text"] for line in out.splitlines()]
    assert models["vi"].generate(TEXT, num_samples=18, max_new_tokens=6) == expected
    assert len(set(expected)) > 1
    assert models["vi"].generate(TEXT, num_samples=1, max_new_tokens=6) == [models["vi"].generate(TEXT, None, 6)]


# --- score


def evaluated(run: str, runs: Path, tmp_path: Path, run_main: Callable[..., tuple[int, str, str]], *args: str) -> dict:
    """The figure that `evaluate` gives of TEXT."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    paths = ("--data", str(tmp_path / "text.jsonl"), "--json", str(tmp_path / "figures.json"))
    status, _, err = run_main(evaluate.main, str(runs / run), *paths, "--num-sequences", "0", *args)
    assert (status, err) == (0, "")
    return json.loads((tmp_path / "figures.json").read_text())["figures"][0]


@pytest.mark.parametrize(
    ("run", "figure", "meaning"),
    [
        ("map", "prequential", Meaning.CODE_LENGTH),
        ("none", "exact", Meaning.EXACT),
        ("vi", "elbo", Meaning.UPPER_BOUND),
    ],
)
def test_a_score_is_the_figure_of_evaluate(run, figure, meaning, runs, models, tmp_path, run_main):
    found, score = evaluated(run, runs, tmp_path, run_main), models[run].score(TEXT)
    assert (score.figure, score.meaning) == (figure, meaning) == (found["estimator"], meaning)
    assert (
        (score.num_tokens, score.num_bytes) == (found["num_tokens"], found["num_bytes"]) == (len(TEXT) + 1, len(TEXT))
    )
    assert score.nats == pytest.approx(found["nats_per_token"] * found["num_tokens"], rel=1e-6)
    assert score.bits_per_byte == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert score.z_from == found["posterior"]
    assert str(score).startswith(f"{figure} ({meaning.value}): {score.nats:.2f} nats")
    if figure == "elbo":
        assert score.tokens is None
        return
    assert [token.string for token in score.tokens] == [*TEXT, "<|endoftext|>"]
    assert sum(token.nats for token in score.tokens) == pytest.approx(score.nats, rel=1e-9)


def test_other_inference_and_other_steps_are_those_of_evaluate(runs, models, tmp_path, run_main):
    """By vi each block has many draws, so that its tokens are predicted by a mixture."""
    found = evaluated("map", runs, tmp_path, run_main, "--inference", "vi", "--fast-steps", "2", "--seed", "3")
    score = models["map"].score(TEXT, inference="vi", fast_steps=2, seed=3)
    assert score.nats == pytest.approx(found["nats_per_token"] * found["num_tokens"], rel=1e-6)
    assert (score.z_from, found["num_samples"]) == ("vi", 64)
    assert sum(token.nats for token in score.tokens) == pytest.approx(score.nats, rel=1e-9)
    assert min(token.nats for token in score.tokens) > 0  # each is -log of a probability


def test_a_token_costs_what_its_block_says_given_the_tokens_before_it(models):
    """By hand: z after the whole blocks before it, and one pass of the decoder over all of the text."""
    ltm = models["map"]
    batch = ltm.batch([TEXT])
    stream, expected = Stream(ltm.config.schemes["map"].__class__(1), ltm.model, batch, SequenceNoise(0)), []
    for start in range(0, len(TEXT) + 1, BLOCK):
        u = ltm.model.prior.thoughts(stream.draw())
        likelihood = TokenSequence(ltm.model.decoder, u, ltm.model.end_of_text, batch.tokens.shape[1])
        expected += (-likelihood.token_log_probs(batch.tokens)[0, start : start + BLOCK]).tolist()
        stream.read(BLOCK)
    found = [token.nats for token in ltm.score(TEXT).tokens]
    assert found == pytest.approx(expected, rel=1e-4)
    without = [token.nats for token in ltm.score(TEXT, fast_steps=0).tokens]
    assert without[:BLOCK] == pytest.approx(found[:BLOCK], rel=1e-6)
    assert max(abs(a - b) for a, b in zip(without[BLOCK:], found[BLOCK:], strict=True)) > 0.01


@pytest.mark.parametrize("run", ["vi", "map", "none"])
def test_a_score_does_not_depend_on_the_texts_beside_it(run, models):
    together = models[run].score([*TEXTS, *[TEXT] * 15])  # more than are scored at once
    assert [score.text for score in together] == [*TEXTS, *[TEXT] * 15]
    assert together[0].nats == pytest.approx(models[run].score(TEXT).nats, rel=1e-5)
    assert [score.num_bytes for score in together[:3]] == [len(TEXT), 6, 0]
    assert together[2].bits_per_byte is None
    assert "bits/byte" not in str(together[2])
    if run == "vi":
        # Each text has noise of its own, also where the same one stands there again.
        assert len({score.nats for score in together if score.text == TEXT}) == 16
        assert abs(together[0].nats - together[16].nats) > 1e-4
    else:
        assert [token.string for token in together[1].tokens] == ["7", " ", "\\xc3", "\\xa9", " ", "7", "<|endoftext|>"]
        assert [token.string for token in together[2].tokens] == ["<|endoftext|>"]


def test_a_long_text_is_scored_where_that_means_something(models):
    for run in ("map", "none"):
        assert len(models[run].score(TEXT * 5).tokens) == 5 * len(TEXT) + 1
    with pytest.raises(ValueError, match="131 tokens with its end-of-text, but the model's sequences have 32"):
        models["vi"].score(TEXT * 5)


def test_a_figure_that_is_no_number_is_not_given(runs):
    ltm = ltm_pyro.load(runs / "none")
    with torch.no_grad():
        ltm.model.decoder.embedding.weight.fill_(math.nan)
    with pytest.raises(ltm_pyro.errors.RunError, match="not a finite number"):
        ltm.score(TEXT)


# --- infer


def test_z_is_inferred_from_a_whole_text_at_once(models):
    ltm, rng = models["vi"], SequenceNoise(3)
    thoughts = ltm.infer(TEXTS, fast_steps=4, seed=3)
    batch, scheme = ltm.batch(TEXTS), SCHEMES["vi"](num_steps=4)
    state = infer(scheme, ltm.model, batch, rng)
    assert torch.equal(thoughts.mean, state.mean)
    assert torch.equal(thoughts.draws, scheme.posterior(state, 64, rng).samples)
    alone = ltm.infer(TEXT, fast_steps=4, seed=3)
    torch.testing.assert_close(alone.draws, thoughts.draws[:, :, :1], rtol=1e-3, atol=1e-3)


def test_z_is_read_block_by_block_as_in_training(models):
    ltm, texts = models["map"], [TEXT * 3, "short"]  # the first is longer than the model's sequences
    thoughts = ltm.infer(texts, num_samples=2)
    for number, text in enumerate(texts):
        row = [*text.encode(), 256]
        stream = Stream(SCHEMES["map"](num_steps=1), ltm.model, ltm.token_batch([row], number), SequenceNoise(0))
        for _ in range(math.ceil(len(row) / BLOCK)):
            stream.read(BLOCK)
        assert torch.equal(thoughts.mean[number], stream.state.z[0])
        assert torch.equal(thoughts.draws[0, :, number], stream.state.z.expand(2, -1, -1, -1))
    assert thoughts.draws.shape == (1, 2, 2, *ltm.model.config.latent_shape)


def test_a_scheme_that_is_named_infers_z_at_once_also_there(models):
    ltm = models["map"]
    thoughts, scheme = ltm.infer([TEXT], inference="vi"), SCHEMES["vi"]()
    assert scheme.num_steps == thoughts.scheme.num_steps == 16  # and not the run's one step of a block
    assert torch.equal(thoughts.mean, infer(scheme, ltm.model, ltm.batch([TEXT]), SequenceNoise(0)).mean)
    with pytest.raises(ValueError, match="the model's sequences have 32"):
        ltm.infer(TEXT * 3, inference="vi")


def test_chains_are_four_and_keep_their_second_half(models):
    thoughts = models["vi"].infer(TEXT, inference="hmc", fast_steps=12)
    assert thoughts.draws.shape[:3] == (NUM_CHAINS, 6, 1)
    assert len(thoughts.draws.flatten(0, 1).flatten(1).unique(dim=0)) > 6
    assert models["vi"].infer(TEXT, inference="langevin", fast_steps=0).draws.shape[:2] == (NUM_CHAINS, 1)


def test_the_log_likelihood_is_that_of_each_token_of_each_text(models):
    ltm = models["vi"]
    thoughts = ltm.infer(TEXTS, fast_steps=4, num_samples=5)
    data = thoughts.to_arviz()
    found = data["log_likelihood"]["tokens"]
    assert found.dims == ("chain", "draw", "token")
    sizes = [len(text.encode()) + 1 for text in TEXTS]
    assert found.coords["token_sequence"].values.tolist() == [n for n, size in enumerate(sizes) for _ in range(size)]
    assert found.coords["token_position"].values.tolist() == [n for size in sizes for n in range(size)]
    assert "".join(found.coords["token_string"].values[: len(TEXT)]) == TEXT
    assert data["observed_data"]["tokens"].values.tolist() == [n for text in TEXTS for n in [*text.encode(), 256]]
    batch = ltm.batch(TEXTS)
    by_text = np.stack([part.sum(-1) for part in np.split(found.values, np.cumsum(sizes)[:-1], axis=-1)], -1)
    joint = log_joint(ltm.model, batch, thoughts.draws, num_sample_dims=2)
    assert np.allclose(by_text, joint.log_likelihood.detach(), rtol=1e-5)
    one = TokenSequence(ltm.model.decoder, thoughts.draws[0, 3, 1:2], 256, 7).token_log_probs(batch.tokens[1:2, :7])
    assert np.allclose(found.values[0, 3, sizes[0] : sizes[0] + 7], one.detach()[0], rtol=1e-4, atol=1e-5)
    assert data["posterior"]["text"].values.tolist() == TEXTS


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning", "ignore:For one or more:UserWarning")
def test_loo_and_waic_are_those_of_the_tokens(models):
    data = models["vi"].infer(TEXTS[:2], fast_steps=8).to_arviz()
    log_p = data["log_likelihood"]["tokens"].values[0]  # [draw, token]
    lppd = np.logaddexp.reduce(log_p, 0) - np.log(len(log_p))
    if not IS_NEW:  # ArviZ 1.x has no WAIC any more
        waic = arviz.waic(data)
        assert waic["elpd_waic"] == pytest.approx((lppd - log_p.var(0)).sum(), rel=1e-6)
        log_weights = arviz.psislw(-log_p.T)[0]
        loo = arviz.loo(data)
        expected = np.logaddexp.reduce(log_weights + log_p.T, 1).sum()
        assert loo["elpd_loo"] == pytest.approx(expected, rel=1e-6)
    loo = arviz.loo(data)
    elpd = loo.elpd if IS_NEW else loo["elpd_loo"]
    # Without smoothing, it is the harmonic mean of each token's probability.
    plain = -(np.logaddexp.reduce(-log_p, 0) - np.log(len(log_p))).sum()
    assert elpd == pytest.approx(plain, rel=0.02)
    assert elpd < lppd.sum()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_a_point_has_the_log_likelihood_there(models):
    data = models["map"].infer(TEXT).to_arviz()
    log_p = data["log_likelihood"]["tokens"].values
    assert log_p.shape == (1, 64, len(TEXT) + 1)
    loo = arviz.loo(data)
    assert (loo.elpd if IS_NEW else loo["elpd_loo"]) == pytest.approx(log_p[0, 0].sum(), rel=1e-6)


def test_it_can_be_written_to_a_file(models, tmp_path):
    data = models["vi"].infer(TEXTS, num_samples=2).to_arviz()
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    read = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert np.array_equal(read["log_likelihood"]["tokens"].values, data["log_likelihood"]["tokens"].values)


# --- what makes no sense


def posterior_of(ltm: LTM, num_samples: int) -> object:
    scheme, rng = SCHEMES["vi"](num_steps=1), SequenceNoise(0)
    return scheme.posterior(infer(scheme, ltm.model, ltm.batch([TEXT]), rng), num_samples, rng)


BAD: dict[str, tuple[str, Callable[[LTM], object], str]] = {
    "no such checkpoint": (
        "vi",
        lambda ltm: ltm_pyro.load(ltm.path, which="bset"),
        "newest, best or the number of a step, not 'bset'",
    ),
    "to export it": ("vi", lambda ltm: ltm_pyro.save_pretrained(ltm.path, "new", which="bset"), "not 'bset'"),
    "no such device": ("vi", lambda ltm: ltm_pyro.load(ltm.path, device="cuda:99"), "no device 'cuda:99' here"),
    "a device of no kind": ("vi", lambda ltm: ltm_pyro.load(ltm.path, device="gpu"), "no device 'gpu' here"),
    "a device without numbers": ("vi", lambda ltm: ltm_pyro.load(ltm.path, device="meta"), "no device 'meta' here"),
    "a text as a batch": ("vi", lambda ltm: ltm.batch(TEXT), "list of strings, not str"),
    "one text as a batch": ("vi", lambda ltm: ltm.batch(TEXT.encode()), "must be a string, not int"),
    "nothing as a batch": ("vi", lambda ltm: ltm.batch(None), "not NoneType"),
    "numbers as texts": ("vi", lambda ltm: ltm.score([1]), "must be a string, not int"),
    "no text": ("vi", lambda ltm: ltm.batch([]), "there is no text"),
    "no rows": ("vi", lambda ltm: ltm.token_batch([]), "the batch is empty"),
    "nothing to infer from": ("vi", lambda ltm: ltm.infer([]), "there is no text"),
    "nothing to read": ("map", lambda ltm: ltm.infer([]), "there is no text"),
    "nothing to score": ("map", lambda ltm: ltm.score([]), "there is no text"),
    "nothing to bound": ("vi", lambda ltm: ltm.score([]), "there is no text"),
    "half a character": ("vi", lambda ltm: ltm.score("caf\udce9"), "is not text"),
    "a prompt of half a character": ("vi", lambda ltm: ltm.generate("caf\udce9"), "is not text"),
    "prompts": ("vi", lambda ltm: ltm.generate([TEXT]), "must be a string, not list"),
    "fewer steps than none": ("vi", lambda ltm: ltm.infer(TEXT, fast_steps=-1), "fast_steps must be a whole number"),
    "fewer steps of a prompt": ("vi", lambda ltm: ltm.generate(TEXT, fast_steps=-1), "fast_steps must be"),
    "fewer steps of a score": ("map", lambda ltm: ltm.score(TEXT, fast_steps=-1), "fast_steps must be"),
    "half a step": ("vi", lambda ltm: ltm.infer(TEXT, fast_steps=0.5), "fast_steps must be a whole number"),
    "an unknown scheme": ("vi", lambda ltm: ltm.infer(TEXT, inference="nuts"), f"from {', '.join(SCHEMES)}, none"),
    "an unknown scheme of a prompt": ("map", lambda ltm: ltm.generate(TEXT, inference=""), "unknown scheme ''"),
    "an unknown scheme of a score": ("map", lambda ltm: ltm.score(TEXT, inference="VI"), "unknown scheme 'VI'"),
    "an encoder that is not there": ("vi", lambda ltm: ltm.infer(TEXT, inference="amortized"), "no encoder"),
    "no draw": ("vi", lambda ltm: ltm.infer(TEXT, num_samples=0), "num_samples must be a whole number"),
    "a negative seed": ("vi", lambda ltm: ltm.infer(TEXT, seed=-1), "seed must be a whole number"),
    "a large seed": ("map", lambda ltm: ltm.score(TEXT, seed=2**64), "seed must be below"),
    "a seed of a prompt": ("vi", lambda ltm: ltm.generate(TEXT, seed=-1), "seed must be a whole number"),
    "a large seed of a prompt": ("vi", lambda ltm: ltm.generate(TEXT, seed=2**64), "seed must be below"),
    "no sample": ("vi", lambda ltm: ltm.generate(TEXT, num_samples=0), "num_samples must be a whole number"),
    "fewer tokens than none": ("vi", lambda ltm: ltm.generate(TEXT, max_new_tokens=-1), "max_new_tokens must be"),
    "less rethinking than none": ("vi", lambda ltm: ltm.generate(TEXT, rethink=-1), "rethink must be"),
    "a temperature in words": ("vi", lambda ltm: ltm.generate(TEXT, temperature="hot"), "temperature must be a number"),
    "half a token": ("vi", lambda ltm: ltm.generate(TEXT, top_k=2.5), "top_k must be a whole number"),
    "steps from nothing": ("vi", lambda ltm: ltm.generate(fast_steps=3), "there is no prompt"),
    "steps of no inference": ("vi", lambda ltm: ltm.generate(TEXT, inference="none", fast_steps=3), "infers nothing"),
    "z of none": ("none", lambda ltm: ltm.infer(TEXT), "without z"),
    "a prompt's z of none": ("none", lambda ltm: ltm.generate(TEXT, inference="vi"), "without z"),
    "steps of no z": ("none", lambda ltm: ltm.score(TEXT, fast_steps=3), "without z"),
    "rethinking of none": ("none", lambda ltm: ltm.generate(TEXT, rethink=3), "without z"),
    "schemes": ("map", lambda ltm: ltm.infer(TEXT, inference=["vi"]), "unknown scheme ['vi']"),
    "fewer texts than one": ("vi", lambda ltm: ltm.model(num_sequences=-1), "number of texts must be"),
    "an empty batch of a program": (
        "vi",
        lambda ltm: ltm.model(ltm.batch([TEXT])[:0]),
        "the number of texts must be",
    ),
    "no draw of a posterior": ("vi", lambda ltm: posterior_of(ltm, 0), "at least one draw"),
    "inference of an empty batch": (
        "vi",
        lambda ltm: infer(SCHEMES["vi"](), ltm.model, ltm.batch([TEXT])[:0], SequenceNoise(0)),
        "the batch is empty",
    ),
    "tokens of the model": (
        "vi",
        lambda ltm: ltm.model.generate(torch.zeros(1, *ltm.model.config.latent_shape), -1),
        "max_new_tokens must be",
    ),
}


@pytest.mark.parametrize(("run", "call", "mentioned"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused_in_one_line(run, call, mentioned, models):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - what it says is looked at
        call(models[run])
    message = str(raised.value)
    assert mentioned in message
    assert "\n" not in message
    assert len(message) < 250


def test_settings_that_do_not_fit_the_weights_are_one_short_line(runs, tmp_path):
    ltm_pyro.save_pretrained(runs / "vi", tmp_path / "model")
    path = tmp_path / "model/config.yaml"
    path.write_text(
        path.read_text().replace("  hidden: 24", "  hidden: 48").replace("  num_layers: 2", "  num_layers: 3")
    )
    with pytest.raises(
        InputError, match=r"do not fit this model.* is .* in the file and .* in the model \(and \d+"
    ) as it:
        ltm_pyro.load(tmp_path / "model")
    assert "\n" not in str(it.value)
    assert len(str(it.value)) < 300 + len(str(tmp_path))


def test_an_exported_model_has_the_same_methods(runs, tmp_path, models):
    ltm_pyro.save_pretrained(runs / "map", tmp_path / "model")
    exported = ltm_pyro.from_pretrained(tmp_path / "model")
    assert exported.score(TEXT) == models["map"].score(TEXT)


def test_what_is_shown_at_a_prompt_is_a_line(models):
    """Of objects that hold thousands of numbers."""
    ltm = models["vi"]
    batch = ltm.batch([TEXT])
    thoughts = ltm.infer([TEXT], inference="vi", fast_steps=1)
    states = [infer(SCHEMES[name](num_steps=1), ltm.model, batch, SequenceNoise(0)) for name in ("vi", "mala", "map")]
    for shown in (ltm, batch, thoughts, thoughts.posterior, *states):
        assert len(repr(shown)) < 400
        assert "\n" not in repr(shown)
        assert type(shown).__name__ in repr(shown)
    assert f"{ltm.num_weights:,} weights" in repr(ltm)
