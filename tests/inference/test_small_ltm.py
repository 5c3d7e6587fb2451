"""Inference on a Latent Thought Model that is small enough for long runs, and trained so that z is needed.

Each text has a distribution over symbols of its own, which z must carry; the window sees two symbols.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from ltm_pyro.data.synthetic import UnigramLanguage, token_batch
from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.calibration import LOG_LIKELIHOOD, calibrate
from ltm_pyro.inference.nuts import nuts
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.lowrank import LowRank
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, simulate

pytestmark = pytest.mark.slow
LENGTH, LANGUAGE = 32, UnigramLanguage(12, concentration=0.2)
CONVERGED = AdamVI(num_steps=1000, learning_rate=0.03, epsilon=1e-8)
NUM_TEXTS, NUM_DRAWS, NUM_BINS = 200, 19, 20


@pytest.fixture(scope="module", autouse=True)
def without_validation():
    with pyro.validation_enabled(False):
        yield


@pytest.fixture(scope="module")
def small():
    """The trained model; z has 16 dimensions."""
    config = DecoderConfig(num_layers=1, width=8, num_heads=1, hidden=16, num_slots=2, window=2, length=LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentThoughtModel(config, vocab_size=14, end_of_text=12)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=8**-0.5)
    generator = torch.Generator().manual_seed(0)
    settings = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=20)
    optimizer = WeightOptimizer(model, settings, num_steps=300)
    scheme, rng = AdamVI(num_steps=8, learning_rate=0.2, epsilon=0.01), BatchNoise(generator)
    for step in range(300):
        batch = token_batch(LANGUAGE.sample(32, LENGTH, generator))
        state = infer(scheme, model, batch, rng)
        elbo_backward(model, scheme.guide(model, state, batch, rng), batch, 32 * LENGTH)
        assert optimizer.update(step)
    return model


@pytest.fixture(scope="module")
def texts():
    return token_batch(LANGUAGE.sample(64, LENGTH, torch.Generator().manual_seed(99)))


def test_its_posteriors_differ_from_the_prior_and_between_texts(small, texts):
    rng = SequenceNoise(0)
    scheme = dataclasses.replace(CONVERGED, num_steps=300)
    state = infer(scheme, small, texts, rng)
    estimate = bounds.elbo(small, texts, scheme.distribution(state, rng), 64)
    assert estimate.kl.mean() > 5
    # Nothing can need less than the language does; and z helps.
    exact = -LANGUAGE.log_prob(texts.tokens)
    excess = estimate.nelbo - exact
    assert excess.mean() > 5 * excess.std() / 8
    assert estimate.nelbo.mean() < 0.9 * LENGTH * math.log(12)
    assert scheme.mean(state).std(0).max() > 0.5


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means and variances of the numbers of z, [B d] each, and their Monte Carlo standard errors."""

    values: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, samples: Tensor, standard_errors: Callable[[np.ndarray], np.ndarray]) -> Moments:
        values = samples.flatten(2).double().numpy()
        numbers = np.concatenate([values, (values - values.mean((0, 1))) ** 2], axis=2)
        return cls(numbers.mean((0, 1)), standard_errors(numbers))

    @property
    def variances(self) -> np.ndarray:
        return self.values[len(self.values) // 2 :]


@pytest.fixture(scope="module")
def gold(small, texts, standard_errors):
    """By Pyro's NUTS, which shares no code with the schemes."""
    return Moments.of(
        nuts(small, texts[:2], num_chains=2, num_warmup=150, num_draws=800, seed=0).samples, standard_errors
    )


LONG_RUNS = {
    "hmc": {"num_steps": 300, "num_leapfrogs": 8},
    "mala": {"num_steps": 1200},
    "underdamped": {"num_steps": 1200, "step_size": 0.2},
    # Its own variance is larger by the factor 1 / (1 - s / 2v): one percent here.
    "langevin": {"num_steps": 1500, "step_size": 0.01},
}


@pytest.fixture(scope="module")
def long_runs(small, texts, standard_errors):
    """Moments by name, each run once."""
    done: dict[str, Moments] = {}

    def run(name: str) -> Moments:
        if name not in done:
            settings = LONG_RUNS[name]
            scheme = SCHEMES[name](num_chains=64, num_kept=settings["num_steps"] // 2, **settings)
            rng = BatchNoise(torch.Generator().manual_seed(1))
            state = infer(scheme, small, texts[:2], rng)
            done[name] = Moments.of(scheme.posterior(state, scheme.num_draws, rng).samples, standard_errors)
        return done[name]

    return run


@pytest.mark.parametrize("name", LONG_RUNS)
def test_long_runs_agree_with_nuts_in_mean_and_variance(name, long_runs, gold):
    found = long_runs(name)
    assert (np.abs(found.values - gold.values) < 5 * np.hypot(found.errors, gold.errors)).all()
    # The errors are small beside what is measured: the posterior's own scales are 0.8 to 1. The trained weights, and
    # with them how hard the posterior is to sample, differ between processors.
    assert found.errors.max() < (0.15 if name == "langevin" else 0.04)
    assert gold.errors.max() < 0.1


def test_long_runs_agree_with_each_other_more_closely(long_runs):
    hmc, mala = long_runs("hmc"), long_runs("mala")
    assert (np.abs(hmc.values - mala.values) < 5 * np.hypot(hmc.errors, mala.errors)).all()
    assert max(hmc.errors.max(), mala.errors.max()) < 0.03


def test_mean_field_underestimates_the_variances(small, texts, long_runs):
    """By a fifth on average, as the best diagonal Gaussian must where dimensions are correlated."""
    state = infer(CONVERGED, small, texts[:2], BatchNoise(torch.Generator().manual_seed(1)))
    ratio = state.log_scale.exp().square().flatten().numpy() / long_runs("hmc").variances
    assert 0.7 < ratio.mean() < 0.9
    assert (ratio < 1).mean() > 0.75


def test_correlations_tighten_the_bound_at_the_same_number_of_gradients(small, texts):
    """By at least 0.3 nats of the five or six that the posterior holds, beyond the noise of the draws."""
    rng, nelbo = SequenceNoise(0), {}
    for scheme in (VI(num_steps=128), LowRank(num_steps=96)):
        assert scheme.num_gradients == 128
        state = infer(scheme, small, texts, rng)
        estimate = bounds.elbo(small, texts, scheme.distribution(state, rng), 256)
        nelbo[type(scheme)] = estimate.nelbo.mean().item()
        error = estimate.monte_carlo_standard_error.square().sum().sqrt().item() / len(texts)
    assert nelbo[VI] - nelbo[LowRank] > 0.3 + 5 * math.sqrt(2) * error


@pytest.fixture(scope="module")
def simulated(small):
    """(z, texts) from the model itself."""
    return simulate(small, NUM_TEXTS, first_id=0, seed=0)


@pytest.mark.parametrize(
    ("name", "settings"), [("hmc", {"num_steps": 20}), ("mala", {"num_steps": 60, "vi_steps": 30})]
)
def test_exact_samplers_are_calibrated(name, settings, small, simulated):
    z, batch = simulated
    result = calibrate(small, batch, z, SCHEMES[name](num_chains=NUM_DRAWS, **settings), NUM_DRAWS, SequenceNoise(1))
    assert result.names[-1] == LOG_LIKELIHOOD
    assert result.p_value(NUM_BINS) > 0.01
    # 16 numbers of 200 texts: as if independent, the mean spread has an error of √(0.8 / 3200).
    assert result.spread[:16].mean() == pytest.approx(1, abs=5 * math.sqrt(0.8 / (16 * NUM_TEXTS)))


def test_mean_field_is_seen_to_be_too_narrow(small, simulated):
    z, batch = simulated
    result = calibrate(small, batch, z, CONVERGED, NUM_DRAWS, SequenceNoise(1))
    assert result.spread[:16].mean() > 1 + 5 * math.sqrt(0.8 / (16 * NUM_TEXTS))


def test_the_fit_to_reused_noise_is_seen_to_be_off(small, simulated):
    z, batch = simulated
    reused = AdamVI(num_steps=100, learning_rate=0.3, epsilon=1e-8, initial_scale=math.exp(-2.5), noise="reused")
    assert calibrate(small, batch, z, reused, NUM_DRAWS, SequenceNoise(1)).p_value(NUM_BINS) < 1e-3
