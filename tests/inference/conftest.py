"""Worlds whose answers are known: the linear-Gaussian model in closed form, and a small Latent Thought Model.

Here rather than in a module to import, since pytest's import mode `importlib` puts no folder of tests on the path.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.posterior import import_arviz
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, TokenBatch


@dataclass(frozen=True)
class Observations:
    """A batch of vectors x, [B, n]."""

    x: Tensor
    sequence_ids: Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Observations(self.x[index], self.sequence_ids[index])


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(0, I_d), x | z ~ N(W z, s² I_n), as a Pyro program and, beside it, in closed form.

    None of the formulas uses Pyro or the package under test.
    """

    loadings: Tensor
    """[n, d] float64: W."""
    noise_scale: float
    """s."""

    @classmethod
    def random(cls, num_observed, num_latent, noise_scale, seed=0):
        generator = torch.Generator().manual_seed(seed)
        loadings = torch.randn(num_observed, num_latent, generator=generator, dtype=torch.float64)
        return cls(loadings / math.sqrt(num_latent), noise_scale)

    @classmethod
    def with_posterior_variances(cls, variances, noise_scale=0.5, seed=0):
        """One whose posterior has these variances along the columns of a random rotation; returns both."""
        variances = torch.tensor(variances, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(len(variances), len(variances), generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(square).Q
        return cls(noise_scale * (1 / variances - 1).sqrt().diag() @ rotation.T, noise_scale), rotation

    def __call__(self, batch):
        num_latent = self.loadings.shape[1]
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loadings.new_zeros(num_latent), 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings.T, self.noise_scale).to_event(1), obs=batch.x)

    def sample(self, num_sequences, seed=1):
        """A batch drawn from the model, its ids 0, 1, …"""
        generator = torch.Generator().manual_seed(seed)
        num_observed, num_latent = self.loadings.shape
        z = torch.randn(num_sequences, num_latent, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_sequences, num_observed, generator=generator, dtype=torch.float64)
        return Observations(z @ self.loadings.T + self.noise_scale * noise, torch.arange(num_sequences))

    def encode(self, batch):
        """Mean and log scale of an amortised q: half the way from the prior to the best of mean field."""
        log_scale = -0.25 * self.precision.diagonal().log()
        return 0.5 * self.posterior_mean(batch.x), log_scale.expand(len(batch), -1)

    @property
    def precision(self):
        """[d, d]: of the posterior, the same for every x."""
        return (
            torch.eye(self.loadings.shape[1], dtype=torch.float64)
            + self.loadings.T @ self.loadings / self.noise_scale**2
        )

    def posterior_mean(self, x):
        """[B, d]."""
        return torch.linalg.solve(self.precision, (x @ self.loadings).T / self.noise_scale**2).T

    def neg_log_evidence(self, x):
        """[B]: -log p(x), exact."""
        num_observed = self.loadings.shape[0]
        covariance = self.loadings @ self.loadings.T + self.noise_scale**2 * torch.eye(
            num_observed, dtype=torch.float64
        )
        quadratic = (x * torch.linalg.solve(covariance, x.T).T).sum(-1)
        return 0.5 * (quadratic + torch.logdet(covariance) + num_observed * math.log(2 * math.pi))

    def neg_log_likelihood(self, z, x):
        """-log p(x | z) for z of [..., d] and x of [..., n]."""
        residual = x - z @ self.loadings.T
        log_normaliser = 0.5 * self.loadings.shape[0] * math.log(2 * math.pi * self.noise_scale**2)
        return 0.5 * residual.square().sum(-1) / self.noise_scale**2 + log_normaliser

    def neg_log_prior(self, z):
        """-log p(z) for z of [..., d]."""
        return 0.5 * z.square().sum(-1) + 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def expected_nll(self, mean, scale, x):
        """[B]: -E_q log p(x | z) for q = N(mean, scale²)."""
        trace = scale.square() @ self.loadings.square().sum(0)
        return self.neg_log_likelihood(mean, x) + 0.5 * trace / self.noise_scale**2

    def nll_variance(self, mean, scale, x):
        """[B]: Var_q log p(x | z): of a + bᵀε + ½ εᵀAε with ε ~ N(0, I), it is |b|² + ½ tr A²."""
        b = scale * ((x - mean @ self.loadings.T) @ self.loadings) / self.noise_scale**2
        gram = self.loadings.T @ self.loadings / self.noise_scale**2
        a = scale[:, :, None] * gram * scale[:, None, :]
        return b.square().sum(-1) + 0.5 * a.square().sum((-1, -2))

    @staticmethod
    def kl(mean, scale):
        """[B]: KL(N(mean, scale²) ‖ N(0, I))."""
        return 0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


@dataclass(frozen=True)
class OtherPrior:
    """z of two dimensions under a mixture of Gaussians, x | z ~ N(W z, s² I): everything else is quadrature on a grid.

    None of the sums uses Pyro or the package under test. A mixture of one component is a Gaussian.
    """

    probs: Tensor
    """[K] float64: the components' probabilities."""
    means: Tensor
    """[K, 2]: the components' means."""
    scales: Tensor
    """[K, 2]: the components' standard deviations, in independent dimensions."""

    loadings = torch.tensor([[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5]], dtype=torch.float64)
    noise_scale = 0.8
    width = 0.125
    """The distance of the grid's points. For integrands no narrower than 0.2 the error of the sum is below 1e-15."""

    def prior(self):
        """p(z) for Pyro."""
        components = dist.Normal(self.means, self.scales).to_event(1)
        mixture = dist.MixtureSameFamily(dist.Categorical(self.probs), components)
        return mixture if len(self.probs) > 1 else dist.Normal(self.means[0], self.scales[0]).to_event(1)

    def __call__(self, batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z @ self.loadings.T, self.noise_scale).to_event(1), obs=batch.x)

    def encode(self, batch):
        """Mean and log scale of an amortised q, which are not the prior's."""
        mean = batch.x @ self.loadings
        return mean, torch.full_like(mean, -0.7)

    def sample(self, num_sequences, seed=1):
        """A batch drawn from the model, its ids 0, 1, …"""
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.probs, num_sequences, replacement=True, generator=generator)
        z = torch.randn(num_sequences, 2, generator=generator, dtype=torch.float64)
        z = self.means[component] + self.scales[component] * z
        noise = torch.randn(num_sequences, 3, generator=generator, dtype=torch.float64)
        return Observations(z @ self.loadings.T + self.noise_scale * noise, torch.arange(num_sequences))

    @property
    def grid(self):
        """[G, 1, 2]: points that cover all of the prior."""
        axis = torch.arange(-8, 8 + self.width, self.width, dtype=torch.float64)
        return torch.cartesian_prod(axis, axis)[:, None]

    def integral(self, values):
        """[B]: over z, of values of [G, B]."""
        return values.sum(0) * self.width**2

    def log_prior(self, z):
        """log p(z) for z of [..., 2]."""
        standard = (z[..., None, :] - self.means) / self.scales
        log_densities = -0.5 * standard.square().sum(-1) - self.scales.log().sum(-1) - math.log(2 * math.pi)
        return (log_densities + self.probs.log()).logsumexp(-1)

    def log_likelihood(self, z, x):
        """log p(x | z) for z of [..., 2] and x of [..., 3]."""
        residual = (x - z @ self.loadings.T) / self.noise_scale
        return -0.5 * residual.square().sum(-1) - 1.5 * math.log(2 * math.pi * self.noise_scale**2)

    def neg_log_evidence(self, x):
        """[B]: -log p(x)."""
        return -self.integral((self.log_prior(self.grid) + self.log_likelihood(self.grid, x)).exp()).log()

    def expected_nll(self, x):
        """-log p(x | z), averaged over the prior and over the exact posterior: two of [B]."""
        log_likelihood, prior = self.log_likelihood(self.grid, x), self.log_prior(self.grid).exp()
        posterior = prior * (log_likelihood + self.neg_log_evidence(x)).exp()
        return self.integral(-prior * log_likelihood), self.integral(-posterior * log_likelihood)


def other_prior_of(probs, means, scales):
    return OtherPrior(*(torch.tensor(values, dtype=torch.float64) for values in (probs, means, scales)))


OTHER_PRIORS = {
    "gaussian": other_prior_of([1.0], [[1.5, -0.7]], [[0.5, 1.2]]),
    "mixture": other_prior_of([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [[0.4, 0.5], [0.6, 0.4]]),
}


@dataclass(frozen=True)
class Scales:
    """A batch whose sequences differ in the scales of their posterior: N(mean, scales²) in independent dimensions."""

    mean: Tensor
    """[B, d]."""
    scales: Tensor
    """[B, d], below 1."""
    sequence_ids: Tensor

    def __len__(self):
        return len(self.scales)

    def __getitem__(self, index):
        return Scales(self.mean[index], self.scales[index], self.sequence_ids[index])


def scaled_world(batch):
    """z ~ N(0, I), and one observation of each dimension, of such a value and noise that the posterior is as stated."""
    noise_variance = batch.scales**2 / (1 - batch.scales**2)
    with pyro.plate("sequences", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(batch.mean[0]), 1).to_event(1))
        x = batch.mean * noise_variance / batch.scales**2
        pyro.sample("x", dist.Normal(z, noise_variance.sqrt()).to_event(1), obs=x)


class LinearGaussianModule(PyroModule):
    """The linear-Gaussian model with weights to learn, which the module holds itself; on demand with an encoder."""

    def __init__(self, world, has_encoder=False):
        super().__init__()
        self.loadings = nn.Parameter(world.loadings.clone())
        self.offset = nn.Parameter(torch.zeros(world.loadings.shape[0], dtype=torch.float64))
        self.noise_scale = world.noise_scale
        if has_encoder:
            self.encoder = LinearEncoder(*world.loadings.shape)

    def forward(self, batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.loadings.shape[1]).double(), 1).to_event(1))
            mean = z @ self.loadings.T + self.offset
            pyro.sample("x", dist.Normal(mean, self.noise_scale).to_event(1), obs=batch.x)

    @pyro_method
    def encode(self, batch):
        return self.encoder(batch)


class LinearEncoder(nn.Module):
    """q(z|x) = N(A x + b, σ²), at the prior before it is trained."""

    def __init__(self, num_observed, num_latent):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(num_latent, num_observed, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(num_latent, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(num_latent, dtype=torch.float64))

    def forward(self, batch):
        mean = batch.x @ self.matrix.T + self.offset
        return mean, self.log_scale.expand_as(mean)


@dataclass
class Failing:
    """A linear-Gaussian model whose likelihood has a gradient that is not finite for some sequences.

    Its value stays finite, and value and gradient of the other sequences as they were.
    """

    world: LinearGaussian
    gradient: str
    """nan or inf."""
    bad_ids: tuple[int, ...]
    bad_evaluations: tuple[int, ...] | range
    """At which evaluations of the likelihood, counted from 0."""
    num_evaluations: int = 0

    def encode(self, batch):
        return self.world.encode(batch)

    def __call__(self, batch):
        num_latent = self.world.loadings.shape[1]
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(self.world.loadings.new_zeros(num_latent), 1).to_event(1))
            likelihood = dist.Normal(z @ self.world.loadings.T, self.world.noise_scale).to_event(1)
            pyro.sample("x", likelihood, obs=batch.x)
            is_bad = torch.isin(batch.sequence_ids, torch.tensor(self.bad_ids))
            if self.num_evaluations in self.bad_evaluations:
                # The slope of a root is infinite at 0; times 0 it is not a number.
                zero = (z - z.detach()).sum(-1) * (0 if self.gradient == "nan" else 1)
                pyro.factor("failure", torch.where(is_bad, zero, 1.0).sqrt() - torch.where(is_bad, 0.0, 1.0))
        self.num_evaluations += 1


class RecordingNoise:
    """Noise that remembers what it was asked for."""

    def __init__(self, noise):
        self.noise = noise
        self.normals = []
        """(purpose, numbers) of every call of `normal`."""

    def normal(self, purpose, *args, **kwargs):
        numbers = self.noise.normal(purpose, *args, **kwargs)
        self.normals.append((purpose, numbers))
        return numbers

    def uniform(self, *args, **kwargs):
        return self.noise.uniform(*args, **kwargs)


@pytest.fixture
def linear_gaussian():
    """The class, to build one of any size."""
    return LinearGaussian


@pytest.fixture(params=OTHER_PRIORS)
def other_prior(request):
    """A model whose prior is not N(0, I), but another Gaussian or a mixture; its posterior is known by quadrature."""
    return OTHER_PRIORS[request.param]


@pytest.fixture
def mixture_prior():
    """The one whose prior is a mixture."""
    return OTHER_PRIORS["mixture"]


@pytest.fixture
def scaled():
    """A model and a batch of it whose sequences have posteriors of the given means and scales, [B, d]."""

    def build(mean, scales):
        scales = torch.as_tensor(scales, dtype=torch.float64)
        mean = torch.as_tensor(mean, dtype=torch.float64).expand_as(scales)
        return scaled_world, Scales(mean, scales, torch.arange(len(scales)))

    return build


@pytest.fixture(scope="session")
def standard_errors():
    """Monte Carlo standard errors of the means of draws [chain, draw, d], [d], by ArviZ (Vehtari et al. 2021)."""
    arviz, is_new = import_arviz()

    def of(values):
        if is_new:
            from arviz_stats.base import array_stats

            return array_stats.mcse(values, method="mean", chain_axis=0, draw_axis=1)
        return np.array([float(arviz.mcse(values[:, :, i], method="mean")) for i in range(values.shape[2])])

    return of


@pytest.fixture
def assert_mean(standard_errors):
    """Checks that draws [chain, draw, …] have an expected mean, to 5 Monte Carlo standard errors.

    Which must be small enough for the check to mean something: at most `at_most`.
    """

    def check(draws, expected, at_most):
        error = torch.as_tensor(standard_errors(draws.flatten(2).numpy()))
        assert error.max() <= at_most, f"standard errors up to {error.max():.2g}"
        deviation = (draws.mean((0, 1)) - expected).flatten() / error
        assert deviation.abs().max() < 5, f"off by {deviation.abs().max():.1f} standard errors"

    return check


@dataclass(frozen=True)
class Positions:
    """T noisy looks at z of each of B sequences, x [B, T, d], of which some count."""

    x: Tensor
    weights: Tensor
    sequence_ids: Tensor

    def __len__(self):
        return len(self.x)

    def cut(self, num_positions):
        return dataclasses.replace(self, x=self.x[:, :num_positions], weights=self.weights[:, :num_positions])

    def block(self, start, end, reach):
        return dataclasses.replace(self, x=self.x[:, start:end], weights=self.weights[:, start:end])

    def in_order(self, order):
        return dataclasses.replace(self, x=self.x[:, order], weights=self.weights[:, order])


@pytest.fixture(scope="session")
def positions():
    """The class of such a batch."""
    return Positions


@pytest.fixture
def linear_encoder():
    """The class of an encoder for a linear-Gaussian model, of one's size."""
    return LinearEncoder


@pytest.fixture
def observations():
    """The class of its batches."""
    return Observations


@pytest.fixture
def learnable():
    """A linear-Gaussian model as a module with weights, made from one as a function."""
    return LinearGaussianModule


@pytest.fixture
def failing():
    """A model that fails for some sequences: `failing(world, gradient, bad_ids, bad_evaluations)`."""

    def build(world, gradient, bad_ids, bad_evaluations=range(10_000)):
        return Failing(world, gradient, bad_ids, bad_evaluations)

    return build


@pytest.fixture
def recording():
    """Noise keyed by sequence, recorded; made from a seed."""
    return lambda seed=0: RecordingNoise(SequenceNoise(seed))


def small_ltm(encoder_layers=0, encoder_reads="text"):
    model = LatentThoughtModel(
        DecoderConfig(
            num_layers=2,
            width=8,
            num_heads=2,
            hidden=12,
            num_slots=2,
            window=4,
            length=12,
            encoder_layers=encoder_layers,
            encoder_reads=encoder_reads,
        ),
        vocab_size=11,
        end_of_text=9,
    )
    # At their initial scale the weights make the text next to independent of z, its posterior the prior, and what an
    # encoder says independent of the text.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model.double()


@pytest.fixture
def ltm():
    """A Latent Thought Model in float64 whose texts depend on z."""
    return small_ltm()


@pytest.fixture
def ltm_with_encoder():
    """The same with an encoder that tells texts apart."""
    return small_ltm(encoder_layers=1)


@pytest.fixture
def ltm_that_reads_blocks():
    """The same with an encoder that reads blocks, for any scheme that can absorb."""
    return small_ltm(encoder_layers=1, encoder_reads="block")


@pytest.fixture
def texts():
    """Five texts of different lengths, in 12 columns."""
    lengths = torch.tensor([12, 7, 1, 9, 12])
    tokens = torch.randint(10, (5, 12), generator=torch.Generator().manual_seed(3))
    weights = (torch.arange(12) < lengths[:, None]).float()
    return TokenBatch(tokens, weights, torch.tensor([31, 4, 159, 26, 5]), lengths)
