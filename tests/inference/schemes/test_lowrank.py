"""The structured Gaussian: its density and KL against the full covariance written out, its optimum in closed form."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal, kl_divergence

from ltm_pyro.inference import BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.lowrank import LowRank, LowRankNormal, _shrunk
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import TokenBatch

B, EVENT, D, RANK = 3, (2, 1, 3), 6, 2


def covariance_of(q):
    """σ (I + V (diag(a²) - I) Vᵀ) σ, [B, d, d]."""
    stretched = q.directions @ torch.diag_embed(q.stretch.square() - 1) @ q.directions.mT
    scale = q.scale.flatten(1)
    return scale[:, :, None] * (torch.eye(scale.shape[1], dtype=scale.dtype) + stretched) * scale[:, None, :]


@pytest.fixture
def q() -> LowRankNormal:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw(outer: torch.Size) -> torch.Tensor:
        return normal(*outer, B, *EVENT)

    directions = torch.linalg.qr(normal(B, D, RANK)).Q
    stretch = torch.tensor([0.3, 2.5], dtype=torch.float64).expand(B, RANK)
    return LowRankNormal(normal(B, *EVENT), normal(B, *EVENT).exp(), directions, stretch, len(EVENT), draw)


def written_out(q: LowRankNormal) -> MultivariateNormal:
    return MultivariateNormal(q.mean.flatten(1), covariance_of(q))


def test_density_variance_and_kl_are_those_of_the_covariance_written_out(q):
    full = written_out(q)
    value = torch.randn(5, B, *EVENT, dtype=torch.float64)
    assert (q.batch_shape, q.event_shape) == ((B,), EVENT)
    assert torch.allclose(q.log_prob(value), full.log_prob(value.flatten(2)))
    assert torch.allclose(q.variance.flatten(1), full.variance)
    prior_mean, prior_scale = torch.randn(EVENT, dtype=torch.float64), torch.rand(EVENT, dtype=torch.float64) + 0.5
    prior = Independent(Normal(prior_mean, prior_scale).expand((B, *EVENT)), 3)
    expected = kl_divergence(full, MultivariateNormal(prior_mean.flatten(), torch.diag(prior_scale.flatten().square())))
    assert torch.allclose(kl_divergence(q, prior), expected)


def test_another_prior_with_independent_dimensions_is_not_taken_for_a_gaussian(q):
    prior = Independent(Laplace(torch.zeros(B, *EVENT).double(), 1.0), 3)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, prior)


def test_draws_have_that_mean_and_covariance(q):
    """20,000 draws: an entry of the covariance has a standard error of at most √2 of the largest variance / √20,000."""
    draws = q.rsample((20_000,)).flatten(2)
    full = written_out(q)
    largest = full.variance.max().item()
    assert (draws.mean(0) - full.mean).abs().max() < 5 * math.sqrt(largest / 20_000)
    centred = draws - draws.mean(0)
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / len(draws)
    assert (covariance - full.covariance_matrix).abs().max() < 5 * math.sqrt(2 / 20_000) * largest


def test_outer_plates_expand_it(q):
    outer = q.expand((4, B))
    assert outer.batch_shape == (4, B)
    assert outer.rsample().shape == (4, B, *EVENT)
    value = torch.randn(4, B, *EVENT, dtype=torch.float64)
    assert torch.allclose(outer.log_prob(value), q.log_prob(value))


def test_a_full_rank_has_the_posteriors_covariance_whatever_the_scales_are(linear_gaussian):
    """On a linear-Gaussian world a difference of gradients is the curvature itself, after any number of steps."""
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.5, 0.05, 0.3])
    batch, rng = world.sample(20), SequenceNoise(0)
    for num_steps in (12, 30):
        scheme = LowRank(num_steps)
        q = scheme.distribution(infer(scheme, world, batch, rng), rng)
        assert torch.allclose(covariance_of(q), world.precision.inverse().expand(20, 4, 4), atol=1e-9)


def test_a_full_rank_reaches_the_posterior_where_a_diagonal_cannot(linear_gaussian):
    """Its bound is exact then, but for what the mean is off."""
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.5, 0.05])
    batch, rng = world.sample(20), SequenceNoise(0)
    exact = world.neg_log_evidence(batch.x)
    excess = {}
    for scheme in (VI(num_steps=300), LowRank(num_steps=300)):
        state = infer(scheme, world, batch, rng)
        estimate = bounds.elbo(world, batch, scheme.distribution(state, rng), 400)
        excess[type(scheme)] = (estimate.nelbo - exact).mean().item()
        error = estimate.monte_carlo_standard_error.square().sum().sqrt().item() / 20
        assert excess[type(scheme)] > -5 * error
    # Of the best diagonal Gaussian: KL(q ‖ posterior) = ½ Σ log Λ_ii - ½ log |Λ|.
    precision = world.precision
    best = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert best > 0.3
    assert excess[VI] > 0.9 * best
    assert excess[LowRank] < 0.1 * best


def test_two_products_find_the_one_direction_of_many_that_is_correlated(linear_gaussian):
    """The posterior's precision is I + 4 u uᵀ: any start and one product span a plane that u lies in."""
    num_dims = 12
    u = torch.where(torch.arange(num_dims) % 3 == 0, -1.0, 1.0).double()
    world = linear_gaussian(2 * u[None, :], 1.0)
    batch, rng, scheme = world.sample(10), SequenceNoise(0), LowRank(6)
    state = scheme.init(world, batch, rng)
    state = dataclasses.replace(
        state, step=state.step + scheme.diagonal.num_steps, log_scale=torch.full_like(state.log_scale, math.log(0.4))
    )
    for _ in range(scheme.num_products):
        state, _ = scheme.step(world, state, batch, rng)
    assert state.directions.shape == (10, num_dims, 2)
    q = scheme.distribution(state, rng)
    narrow = q.directions[torch.arange(10), :, q.stretch.argmin(1)]
    assert torch.allclose((narrow @ u).abs(), u.norm().expand(10))
    along = torch.einsum("i,bij,j->b", u, covariance_of(q), u) / u.square().sum()
    assert torch.allclose(along, torch.full_like(along, 1 / (1 + 4 * u.square().sum())))


def test_more_products_than_directions_are_averaged(scaled):
    """A likelihood with noise in its curvature, as far as a step can see: the error falls with the steps."""

    def rough(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=torch.float64), 1).to_event(1))
            pyro.factor("likelihood", -(z.sum(-1).square() + 2 * (3 * z.sum(-1)).cos()))

    _, batch = scaled(0.0, torch.full((200, 4), 0.5))
    spread = {}
    for num_steps in (30, 300):
        scheme = LowRank(num_steps, rank=2)
        state = infer(scheme, rough, batch, BatchNoise(torch.Generator().manual_seed(0)))
        spread[num_steps] = torch.linalg.eigvalsh(covariance_of(scheme.distribution(state, SequenceNoise(0)))).std(0)
    assert spread[300].sum() < 0.8 * spread[30].sum()


def test_the_share_of_noise_in_products_is_known_from_their_asymmetry():
    """Each column from a symmetric random matrix of its own, around a known one: shrunk as is best on average."""
    generator = torch.Generator().manual_seed(0)
    num_copies, r, size = 4000, 6, 0.4
    known = torch.diag(torch.tensor([3.0, 1.5, 1.0, 1.0, 0.8, 0.5])).double()
    noise = torch.randn(num_copies, r, r, r, generator=generator, dtype=torch.float64)
    noise = size * (noise + noise.mT) / math.sqrt(2)  # off the diagonal of variance size², on it twice that
    columns = torch.stack([noise[:, j, :, j] for j in range(r)], dim=-1)
    shrunk = _shrunk(known + columns, torch.ones(num_copies, r, dtype=torch.bool))
    signal = (known - torch.eye(r)).square().sum()
    of_noise = size**2 * (r * (r - 1) / 2 + 2 * r)
    share = ((shrunk - torch.eye(r)) * (known - torch.eye(r))).sum((1, 2)) / signal
    assert share.mean().item() == pytest.approx((signal / (signal + of_noise)).item(), abs=0.03)


def test_products_without_noise_and_directions_without_products_are_left_alone():
    curvature = torch.tensor([[[3.0, 0.5, 7.0], [0.5, 0.7, 7.0], [7.0, 7.0, 7.0]]])
    shrunk = _shrunk(curvature, torch.tensor([[True, True, False]]))
    assert torch.allclose(shrunk, torch.tensor([[[3.0, 0.5, 0.0], [0.5, 0.7, 0.0], [0.0, 0.0, 1.0]]]))


@pytest.mark.parametrize("num_steps", [9, 24])
def test_correlations_do_little_harm_where_the_posterior_is_far_from_a_gaussian(ltm, num_steps):
    """Of a model with large weights, as the bound of either Gaussian says at 256 draws of its own."""
    generator = torch.Generator().manual_seed(3)
    tokens, ids = torch.randint(10, (24, 12), generator=generator), torch.arange(24)
    batch = TokenBatch(tokens, torch.ones(24, 12), ids, torch.full((24,), 12))
    scheme = LowRank(num_steps)
    state = infer(scheme, ltm, batch, SequenceNoise(0))
    diagonal = dataclasses.replace(state, products=torch.zeros_like(state.products))
    nelbo = [
        bounds.elbo(ltm, batch, scheme.distribution(each, SequenceNoise(1)), 256).nelbo for each in (state, diagonal)
    ]
    harm = nelbo[0] - nelbo[1]
    assert harm.mean() < 0.02
    assert (harm > 0.1).double().mean() < 0.1
    assert harm.max() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_stiff", [0, 1, 3])
@pytest.mark.parametrize("num_dims", [1, 5, 64])
def test_directions_are_orthonormal_where_products_span_less_than_is_asked_for(dtype, num_stiff, num_dims):
    """All curvature lies in few dimensions, so that new products add nothing but rounding errors."""

    def model(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(num_dims, dtype=dtype), 1).to_event(1))
            pyro.factor("likelihood", -2 * z[..., :num_stiff].sum(-1).square())

    ids = torch.arange(16)
    batch, scheme = TokenBatch(ids[:, None], torch.ones(16, 1), ids, ids), LowRank(24)
    q = scheme.distribution(infer(scheme, model, batch, SequenceNoise(0)), SequenceNoise(0))
    gram = q.directions.mT @ q.directions
    lengths = gram.diagonal(dim1=1, dim2=2)
    tolerance = 20 * torch.finfo(dtype).eps
    assert (gram - torch.diag_embed(lengths)).abs().max() < tolerance
    assert torch.minimum((lengths - 1).abs(), lengths).max() < tolerance
    assert bounds.elbo(model, batch, q, 4).kl.min() > -1e-4


def test_no_direction_is_wider_than_the_prior(scaled):
    """Also where the likelihood would have it so: its curvature is negative along z_1 + z_2."""

    def repelled(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1).to_event(1))
            pyro.factor("likelihood", 0.4 * z.prod(-1))

    _, batch = scaled(0.0, [[0.5, 0.5]])
    scheme, rng = LowRank(30), SequenceNoise(0)
    q = scheme.distribution(infer(scheme, repelled, batch, rng), rng)
    narrow, wide = torch.linalg.eigvalsh(covariance_of(q))[0]
    assert narrow.item() == pytest.approx(1 / 1.4, abs=0.02)
    assert wide.item() == pytest.approx(1, abs=0.02)


def test_a_product_that_is_not_finite_leaves_its_direction_as_it_was(linear_gaussian, failing):
    world = linear_gaussian.random(num_observed=6, num_latent=4, noise_scale=0.7)
    batch, rng, scheme = world.sample(3), SequenceNoise(0), LowRank(12)
    # Eight steps of vi, which evaluate the program twice, then four products, which do once.
    state = infer(scheme, failing(world, "nan", bad_ids=(1,), bad_evaluations=(17,)), batch, rng)
    assert state.num_skipped.tolist() == [0, 1, 0]
    stretch = scheme.distribution(state, rng).stretch
    # Neither that direction has a product nor the one that was to follow from it; the last one starts anew.
    assert ((stretch - 1).abs() < 1e-12).sum(1).tolist() == [0, 2, 0]


@pytest.mark.parametrize("num_steps", [2, 5])
def test_the_objective_of_a_step_is_an_unbiased_estimate_of_the_negative_elbo(linear_gaussian, num_steps):
    """That of the diagonal Gaussian, of the next step of `vi` and of the next product."""
    world = linear_gaussian.random(num_observed=4, num_latent=3, noise_scale=0.7)
    batch = world.sample(1)
    scheme = LowRank(num_steps, rank=2)
    state = infer(scheme, world, batch, SequenceNoise(0))
    # Far from the optimum, where it matters how much noise there is along a direction.
    state = dataclasses.replace(state, log_scale=state.log_scale + 0.5)
    copies = 4000
    many = type(batch)(batch.x.expand(copies, -1), torch.arange(copies))
    states = {name: value.expand(copies, *value.shape[1:]) for name, value in vars(state).items()}
    repeated = type(state)(**{**states, "sequence_ids": many.sequence_ids})
    objective = scheme.step(world, repeated, many, SequenceNoise(1))[1].objective
    scale = state.log_scale.exp()
    expected = (world.expected_nll(state.mean, scale, batch.x) + world.kl(state.mean, scale)).item()
    assert abs(objective.mean() - expected) < 5 * objective.std() / math.sqrt(copies)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("learning_rate", 0.0), ("learning_rate", 2.0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(LowRank(), **{name: value})


def test_directions_do_not_have_the_signs_of_eigenvectors_which_a_library_chooses(linear_gaussian, monkeypatch):
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.5, 0.05, 0.3])
    scheme, rng, batch = LowRank(rank=3, num_steps=12), SequenceNoise(0), world.sample(4)
    state = infer(scheme, world, batch, rng)
    directions = scheme.distribution(state, rng).directions
    eigh = torch.linalg.eigh

    def of_another_library(matrix):
        eigenvalues, vectors = eigh(matrix)
        return eigenvalues, vectors * torch.tensor([-1.0, 1.0, -1.0])

    monkeypatch.setattr(torch.linalg, "eigh", of_another_library)
    torch.testing.assert_close(scheme.distribution(state, rng).directions, directions)
