"""The figures by name, on a Latent Thought Model whose -log p(x) is known: z has two dimensions, so it is an integral.

Then on a language of known probability, which no valid figure of a trained model may fall below.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from ltm_pyro.data import TopicLanguage, token_batch
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import ESTIMATORS, Estimate, Estimator, EstimatorSettings, Meaning, of_models
from ltm_pyro.evaluation.estimators.ais import annealing_plan
from ltm_pyro.evaluation.inferred import Inference, Inferred
from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, TokenBatch

WITH_Z = of_models(with_z=True)
VALID = [name for name, estimator in WITH_Z.items() if estimator.is_valid]
SETTINGS = EstimatorSettings(num_samples=32, block_size=2, num_temperatures=16, num_leapfrogs=2, num_chains=8)
GAUSSIAN = VI(num_steps=8)
INFERENCES = {
    "vi": Inference("vi", SCHEMES["vi"](num_steps=8), GAUSSIAN),
    "adamvi": Inference("adamvi", SCHEMES["adamvi"](num_steps=8), GAUSSIAN),
    "lowrank": Inference("lowrank", SCHEMES["lowrank"](num_steps=8, rank=2), GAUSSIAN),
    "amortized": Inference("amortized", SCHEMES["amortized"](num_steps=4), GAUSSIAN),
    "map": Inference("map", SCHEMES["map"](num_steps=8), GAUSSIAN),
    "langevin": Inference("langevin", SCHEMES["langevin"](num_steps=8, num_chains=4), GAUSSIAN),
    "mala": Inference("mala", SCHEMES["mala"](num_steps=8, num_chains=4), GAUSSIAN),
    "hmc": Inference("hmc", SCHEMES["hmc"](num_steps=4, num_chains=4, num_leapfrogs=3), GAUSSIAN),
    "underdamped": Inference("underdamped", SCHEMES["underdamped"](num_steps=8, num_chains=4), GAUSSIAN),
    "the prior": Inference.from_prior(),
}
CONFIG = DecoderConfig(num_layers=1, width=2, num_heads=1, hidden=4, num_slots=1, window=2, length=6)


def test_every_scheme_is_tested_here():
    assert INFERENCES.keys() == {*SCHEMES, "the prior"}


def sharp(config: DecoderConfig) -> LatentThoughtModel:
    """A model of five symbols in float64, with weights so large that z decides what it writes."""
    torch.manual_seed(9)
    model = LatentThoughtModel(config, vocab_size=6, end_of_text=4).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=2.2 if "cross_attention" in name else 1.5)
    return model


@pytest.fixture(scope="module")
def ltm() -> LatentThoughtModel:
    """With an encoder whose proposals are not the prior, nor far from it."""
    decoder = sharp(CONFIG).decoder
    model = LatentThoughtModel(dataclasses.replace(CONFIG, encoder_layers=1), vocab_size=6, end_of_text=4).double()
    model.decoder = decoder
    with torch.no_grad():
        for weight in model.encoder.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def written(ltm: LatentThoughtModel) -> TokenBatch:
    """Texts of the model, of different lengths."""
    torch.manual_seed(7)
    tokens = ltm(num_sequences=24)
    is_end = (tokens == ltm.end_of_text).long()
    weights = (is_end.cumsum(-1) - is_end == 0).double()
    assert len(set(weights.sum(1).tolist())) > 2
    return TokenBatch(tokens, weights, torch.arange(24), weights.sum(1).long())


@pytest.fixture(scope="module")
def exact(ltm: LatentThoughtModel, written: TokenBatch) -> torch.Tensor:
    """[B]: -log ∫ p(x | z) N(z) dz, by the trapezoidal rule on a square of ±7; it converges exponentially here."""
    axis = torch.linspace(-7, 7, 141, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    values = []
    for tokens, weights in zip(written.tokens, written.weights, strict=True):
        inputs = torch.cat([torch.tensor([ltm.decoder.begin_of_text]), tokens[:-1]]).expand(len(z), -1)
        with torch.no_grad():
            logits = ltm.decoder.logits(ltm.decoder(inputs, z.view(-1, 1, 1, 2)))
        log_probs = logits.log_softmax(-1)[:, torch.arange(6), tokens]
        values.append(-((log_probs * weights).sum(1) + log_prior).logsumexp(0) - 2 * math.log(0.1))
    return torch.stack(values)


def test_z_matters_in_that_model(ltm, written, exact):
    """Else no test below could tell a figure from another."""
    prior = ESTIMATORS["elbo"].estimate(
        Inferred(ltm, written, INFERENCES["the prior"], SequenceNoise(0)),
        dataclasses.replace(SETTINGS, num_samples=400),
    )
    assert (prior.nats - exact).mean() > 0.3


@pytest.mark.parametrize("inference", INFERENCES.values(), ids=INFERENCES)
@pytest.mark.parametrize("name", ["elbo", "iwae", "ais"])
def test_a_bound_is_not_below_the_integral(name, inference, ltm, written, exact):
    scores = ESTIMATORS[name].estimate(Inferred(ltm, written, inference, SequenceNoise(0)), SETTINGS)
    excess = scores.nats - exact
    # Its own error on these very texts. From below it will do: the large weight that lowers a figure raises its error.
    error = max(scores.variance.sum().sqrt().item() / len(excess), 1e-9)
    assert excess.mean() > -5 * error
    assert (scores.effective_sample_size is None) == (name == "elbo")
    if scores.effective_sample_size is not None:
        assert ((scores.effective_sample_size >= 1) & (scores.effective_sample_size <= scores.num_samples)).all()


@pytest.mark.parametrize("name", ["iwae", "ais"])
def test_from_the_prior_the_figures_of_weights_are_the_integral(name, ltm, written, exact):
    """From both sides. From above this holds of a q that covers the posterior, with draws enough to trust the error.

    Chains of `underdamped`, say, leave a text now and then, whose Gaussian then lies some twenty or a hundred scales of
    the prior away: no annealing of 16 temperatures comes back from there, and weights that are all too small do not
    show it in their spread.
    """
    settings = dataclasses.replace(SETTINGS, num_samples=400, num_chains=128)
    scores = ESTIMATORS[name].estimate(Inferred(ltm, written, INFERENCES["the prior"], SequenceNoise(0)), settings)
    error = scores.variance.sum().sqrt() / len(written)
    # The logarithm's own part is half the variance, to second order.
    assert -5 * error < (scores.nats - exact).mean() - scores.variance.mean() / 2 < 5 * error
    assert error < 0.03


@pytest.mark.parametrize("inference", INFERENCES.values(), ids=INFERENCES)
def test_the_prequential_code_is_no_shorter_than_the_entropy_of_the_models_own_texts(inference, ltm, written, exact):
    scores = ESTIMATORS["prequential"].estimate(Inferred(ltm, written, inference, SequenceNoise(0)), SETTINGS)
    excess = scores.nats - exact
    assert excess.mean() > -3 * excess.std() / math.sqrt(len(excess))
    assert scores.z_from == inference.name
    assert scores.num_samples == (inference.scheme.num_draws or 32)


def test_the_reused_noise_is_not_the_settings_of_a_bound(ltm, written):
    scores = ESTIMATORS["reused-noise"].estimate(Inferred(ltm, written, INFERENCES["vi"], SequenceNoise(0)), SETTINGS)
    assert not ESTIMATORS["reused-noise"].is_valid
    assert ESTIMATORS["reused-noise"].meaning.value == "NOT A BOUND"
    assert scores.variance is None
    assert "reused" in scores.z_from


def test_a_model_without_z_has_one_figure_and_it_is_exact():
    model = sharp(dataclasses.replace(CONFIG, num_slots=0))
    tokens = torch.randint(4, (5, 6))
    inputs = torch.cat([torch.full((5, 1), model.decoder.begin_of_text), tokens[:, :-1]], dim=1)
    logits = model.decoder.logits(model.decoder(inputs, torch.zeros(5, 1, 0, 2, dtype=torch.float64)))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").item()
    (figure,) = figures.score(
        model, [token_batch(tokens)], torch.arange(5), VALID, INFERENCES["vi"], SETTINGS, SequenceNoise(0)
    )
    assert figure.nats == pytest.approx(expected, rel=1e-12)
    assert (figure.estimator, figure.z_from, figure.num_samples, figure.kl) == ("exact", None, 1, 0)


def padded(batch: TokenBatch, columns: int) -> TokenBatch:
    tokens = torch.nn.functional.pad(batch.tokens, (0, columns), value=4)
    return dataclasses.replace(batch, tokens=tokens, weights=torch.nn.functional.pad(batch.weights, (0, columns)))


@pytest.mark.parametrize("inference", INFERENCES.values(), ids=INFERENCES)
def test_no_figure_depends_on_batch_size_order_or_padding(inference, ltm, written):
    written = written[:3]
    documents = torch.arange(len(written)) // 2
    order = torch.randperm(len(written), generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(SETTINGS, num_samples=6, block_size=3, num_temperatures=2, num_chains=4)
    ways = [
        [written],
        [written[i : i + 1] for i in range(len(written))],  # one by one
        [padded(written[order][:2], 5), padded(written[order][2:], 2)],
    ]
    results = [
        figures.score(ltm, batches, documents, WITH_Z, inference, settings, SequenceNoise(1)) for batches in ways
    ]
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            expected = first.record()
            assert other.record() == {
                key: pytest.approx(value, rel=1e-8, nan_ok=True) if isinstance(value, float) else value
                for key, value in expected.items()
            }


LANGUAGE = TopicLanguage.random(num_topics=4, num_states=3, vocab_size=12, seed=0)
LENGTH = 32


@pytest.fixture(scope="module")
def learned() -> LatentThoughtModel:
    """A model trained on texts with a hidden topic."""
    torch.manual_seed(0)
    shape = DecoderConfig(
        num_layers=2, width=16, num_heads=2, hidden=32, num_slots=2, window=4, length=LENGTH, encoder_layers=1
    )
    model = LatentThoughtModel(shape, LANGUAGE.vocab_size + 2, LANGUAGE.vocab_size)
    config, num_steps = OptimizerConfig(learning_rate=2e-2, final_learning_rate=1e-3, warmup_steps=20), 100
    optimizer, generator = WeightOptimizer(model, config, num_steps), torch.Generator().manual_seed(0)
    scheme = VI(num_steps=4)
    for step in range(num_steps):
        batch = token_batch(LANGUAGE.sample(32, LENGTH, generator)[0])
        rng = BatchNoise(generator)
        guide = scheme.guide(model, infer(scheme, model, batch, rng), batch, rng)
        elbo_backward(model, guide, batch, batch.tokens.numel())
        optimizer.update(step)
    return model


@pytest.mark.parametrize("inference", INFERENCES.values(), ids=INFERENCES)
def test_no_valid_figure_is_below_the_probability_of_the_language(inference, learned):
    """In expectation over texts -log p_model is at least -log p_true, and so is every bound on it and every code."""
    texts, _ = LANGUAGE.sample(32, LENGTH, torch.Generator().manual_seed(1))
    batch, truth = token_batch(texts), -LANGUAGE.log_prob(texts)
    settings = dataclasses.replace(SETTINGS, num_samples=8, block_size=16, num_temperatures=4, num_chains=4)
    inferred = Inferred(learned, batch, inference, SequenceNoise(0))
    for name in VALID:
        excess = ESTIMATORS[name].estimate(inferred, settings).nats - truth
        error = excess.std() / math.sqrt(len(excess))
        assert excess.mean() > -3 * error, name
        # It has learnt enough for the test to mean something: a uniform guess would be at 1.
        if inference.name == "vi":
            assert excess.mean() < 0.5 * (LENGTH * math.log(LANGUAGE.vocab_size) - truth.mean()), name


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_samples", 0), ("block_size", 0), ("num_temperatures", 0), ("num_leapfrogs", 0), ("num_chains", 1)],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        EstimatorSettings(**{field: value})


class Recording(SequenceNoise):
    """Notes the name of every stream that is drawn from: what for, and at which step."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.streams: list[tuple[str, tuple[int, ...]]] = []

    def normal(self, purpose, sequence_ids, steps, *args, **kwargs):
        self.streams.append((purpose, tuple(steps.tolist())))
        return super().normal(purpose, sequence_ids, steps, *args, **kwargs)

    def uniform(self, purpose, sequence_ids, steps, *args, **kwargs):
        self.streams.append((purpose, tuple(steps.tolist())))
        return super().uniform(purpose, sequence_ids, steps, *args, **kwargs)


@pytest.mark.parametrize("inference", INFERENCES.values(), ids=INFERENCES)
@pytest.mark.parametrize("name", ["elbo", "iwae", "ais"])
def test_no_random_number_serves_twice_in_a_bound(name, inference, ltm, written):
    """Not in the fit of q and in the draws that are scored, nor in the pilot and in the chains."""
    rng = Recording(0)
    settings = dataclasses.replace(SETTINGS, num_samples=4, num_temperatures=4)
    ESTIMATORS[name].estimate(Inferred(ltm, written[:2], inference, rng), settings)
    assert len(rng.streams) >= 4
    assert len(set(rng.streams)) == len(rng.streams)


@pytest.mark.parametrize("name", ["elbo", "iwae", "ais"])
def test_the_variance_of_a_figure_is_that_of_repetitions(name, ltm, written, exact):
    """Of the likeliest text, under 400 names, each with noise of its own; q is the prior, so nothing else differs.

    The relative error of a variance of 400 is √(2 / 400) = 7 % for a Gaussian, and more for a skew figure; the delta
    method of few weights is off by some 20 % here. A standard error in the place of its square would be off by three
    times.
    """
    same = written[exact.argmin().expand(400)]
    batch = dataclasses.replace(same, sequence_ids=torch.arange(400))
    settings = dataclasses.replace(SETTINGS, num_samples=64, num_temperatures=2, num_chains=64)
    scores = ESTIMATORS[name].estimate(Inferred(ltm, batch, INFERENCES["the prior"], SequenceNoise(0)), settings)
    assert scores.variance.mean() == pytest.approx(scores.nats.var().item(), rel=0.5)
    assert scores.variance.mean() < 0.1  # so that a root would be seen


def test_the_settings_reach_the_estimates(ltm, written):
    settings = EstimatorSettings(num_samples=30, block_size=3, num_temperatures=4, num_leapfrogs=3, num_chains=5)
    inferred = Inferred(ltm, written[:2], INFERENCES["vi"], SequenceNoise(0))
    scores = {name: estimator.estimate(inferred, settings) for name, estimator in WITH_Z.items()}
    assert {name: score.num_samples for name, score in scores.items()} == {
        "elbo": 30,
        "iwae": 30,
        "ais": 5,
        "prequential": 30,
        "weighted": 30,
        "smc": 5,
        "reused-noise": 1,
    }
    plan = annealing_plan(inferred, inferred.q("annealing"), settings)
    assert (len(plan.betas), plan.num_leapfrogs, plan.num_chains) == (5, 3, 5)
    assert scores["ais"].z_from == "vi, annealed"
    assert scores["iwae"].pareto_k.isfinite().all()  # 30 draws have a tail, with ArviZ 0.23 and 1.x
    assert [name for name, score in scores.items() if score.pareto_k is not None] == ["iwae"]


def test_the_figure_at_reused_noise_takes_the_steps_that_were_asked_for_and_the_settings_of_the_run(ltm, written):
    """And all other settings of the run: another learning rate gives another figure."""
    settings = AdamVI(learning_rate=0.3, noise="reused")
    inference = Inference("map", SCHEMES["map"](num_steps=3), GAUSSIAN, settings)
    scores = ESTIMATORS["reused-noise"].estimate(Inferred(ltm, written, inference, SequenceNoise(0)), SETTINGS)
    for learning_rate, is_it in ((0.3, True), (0.1, False)):
        scheme = AdamVI(num_steps=3, learning_rate=learning_rate, noise="reused")
        state = infer(scheme, ltm, written, SequenceNoise(0))
        assert scores.nats.equal(bounds.reused_noise(ltm, written, scheme, state).nelbo) is is_it


def test_a_new_figure_is_one_function_and_one_line(ltm, written, monkeypatch):
    """Its meaning, its validity and what is printed follow from what it states; here, a code of 8 bits a token."""

    def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
        nats = 8 * math.log(2) * inferred.batch.weights.sum(1).double()
        return Estimate(nats, "nothing", settings.num_samples)

    monkeypatch.setitem(ESTIMATORS, "uniform", Estimator(estimate, "every token alike", Meaning.CODE_LENGTH))
    assert "uniform" in of_models(with_z=True)
    documents = torch.arange(len(written))
    (figure,) = figures.score(ltm, [written], documents, ["uniform"], INFERENCES["vi"], SETTINGS, SequenceNoise(0))
    record = figure.record()
    assert record["nats_per_token"] == pytest.approx(8 * math.log(2))
    assert record["valid_bound"] is True
    assert record["posterior"] == "nothing"
    assert str(figure).startswith("z from nothing: 8.000 bits/byte; ")
    invalid = Estimator(estimate, "every token alike", Meaning.NOT_A_BOUND)
    monkeypatch.setitem(ESTIMATORS, "uniform", invalid)
    assert figure.record()["valid_bound"] is False
    assert "NOT A BOUND" in str(figure)


def test_every_figure_is_of_models_with_z_or_of_those_without():
    with_z, without = of_models(with_z=True), of_models(with_z=False)
    assert [*with_z, *without] == list(ESTIMATORS)
    assert list(without) == ["exact"]


SETTINGS_OF_CHAINS = dataclasses.replace(SETTINGS, num_samples=4)
CHAINS = {"num_steps": 64, "num_chains": 4, "num_kept": 32}


@pytest.mark.parametrize(
    ("scheme", "num_diverged", "num_unmixed", "sentence"),
    [
        # Steps that are too long for the prior alone, whose variance is 1.
        (SCHEMES["langevin"](**CHAINS, step_size=50.0), 24, None, "chains have diverged on 24 of 24 pieces"),
        (SCHEMES["langevin"](**CHAINS, step_size=1e-6), 0, 24, "chains have not mixed on 24 of 24 pieces"),
        (SCHEMES["mala"](num_steps=16), 0, None, "chains keep too few draws to say whether they have mixed"),
        pytest.param(SCHEMES["hmc"](num_steps=400, num_chains=4, num_kept=200), 0, 0, None, marks=pytest.mark.slow),
        (SCHEMES["vi"](), 0, 0, None),
    ],
    ids=["diverged", "not mixed", "one draw", "mixed", "no chains"],
)
def test_a_figure_says_how_the_chains_are_that_its_z_comes_from(
    scheme, num_diverged, num_unmixed, sentence, ltm, written
):
    if sentence is None:  # in the sharp model, a text has two modes between which chains hardly go
        ltm = copy.deepcopy(ltm)
        with torch.no_grad():
            for weight in ltm.parameters():
                weight.mul_(0.3)
    inference = Inference("scheme", scheme, GAUSSIAN)
    batches = [written[torch.arange(10)], written[torch.arange(10, 24)]]
    names = ["elbo"] if scheme.num_steps > 100 else ["elbo", "iwae", "prequential"]
    ids = torch.arange(24)
    scored = figures.score(ltm, batches, ids, names, inference, SETTINGS_OF_CHAINS, SequenceNoise(0))
    for figure in scored[:2]:
        assert figure.num_diverged == num_diverged
        if not num_diverged:
            assert figure.num_unmixed == num_unmixed
        assert figure.chains == sentence
        assert ("no figure" in str(figure)) == (num_diverged > 0)
        assert sentence is None or sentence in str(figure)
    for figure in scored[2:]:
        assert figure.chains is None  # its z is inferred for each block
