"""Programs whose z is not a vector of real numbers: single numbers, positive ones, intervals and simplices.

The posteriors are those of conjugate pairs, whose densities and evidence are written out here with the functions of
SciPy and torch alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import special
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise, bounds, infer, log_joint, unconstrained
from ltm_pyro.inference.ais import forward_ais, pilot, reverse_ais
from ltm_pyro.inference.base import BlockEvidence, latent_prior, moments
from ltm_pyro.inference.calibration import calibrate
from ltm_pyro.inference.diagnostics import mixing
from ltm_pyro.inference.export import evaluate_draws, to_arviz
from ltm_pyro.inference.nuts import nuts


@dataclass(frozen=True)
class Conjugate:
    """A Pyro program of a plain tensor, and what is known of it in closed form."""

    program: Callable[[Tensor], None]
    x: Tensor
    """[B] or [B, n]: the batch."""
    log_evidence: Tensor
    """[B]: log p(x)."""
    mean: Tensor
    """[B, *event_shape]: E[z | x]."""
    variance: Tensor
    """[B, *event_shape]: Var[z | x]."""


def gamma_poisson() -> Conjugate:
    """z ~ Gamma(2, 1), a single number; x | z ~ Poisson(z). The posterior is Gamma(2 + x, 2)."""
    a, b = 2.0, 1.0

    def program(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.tensor(a).double(), b))
            pyro.sample("x", dist.Poisson(z), obs=x)

    x = torch.tensor([0.0, 1, 4, 9]).double()
    evidence = torch.lgamma(a + x) - math.lgamma(a) + a * math.log(b) - (a + x) * math.log(b + 1) - torch.lgamma(x + 1)
    return Conjugate(program, x, evidence, (a + x) / (b + 1), (a + x) / (b + 1) ** 2)


def beta_bernoulli() -> Conjugate:
    """z of two independent Beta(1.5, 1) numbers; x | z: 10 coins for each."""
    a, b, n = 1.5, 1.0, 10

    def program(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z", dist.Beta(torch.full((2,), a).double(), b).to_event(1))
            pyro.sample("x", dist.Bernoulli(z.unsqueeze(-1)).to_event(2), obs=x)

    heads = torch.tensor([[3, 7], [10, 1], [5, 5]]).double()
    x = (torch.arange(n) < heads[..., None]).double()
    posterior_a, posterior_b = a + heads, b + n - heads
    total = posterior_a + posterior_b
    evidence = (torch.from_numpy(special.betaln(posterior_a.numpy(), posterior_b.numpy())) - special.betaln(a, b)).sum(
        1
    )
    variance = posterior_a * posterior_b / total.square() / (total + 1)
    return Conjugate(program, x, evidence, posterior_a / total, variance)


def dirichlet_multinomial() -> Conjugate:
    """z on the simplex of three numbers; x | z: counts of 20 throws."""
    concentration, n = torch.tensor([1.0, 2.0, 3.0]).double(), 20

    def program(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Multinomial(n, probs=z), obs=x)

    x = torch.tensor([[2.0, 8, 10], [20, 0, 0], [6, 7, 7]]).double()
    after = concentration + x
    total = after.sum(1, keepdim=True)

    def log_beta(values: Tensor) -> Tensor:
        return torch.lgamma(values).sum(-1) - torch.lgamma(values.sum(-1))

    ways = math.lgamma(n + 1) - torch.lgamma(x + 1).sum(1)
    share = after / total
    return Conjugate(
        program, x, ways + log_beta(after) - log_beta(concentration), share, share * (1 - share) / (total + 1)
    )


def lognormal() -> Conjugate:
    """log z ~ N(0.5, 1), log x | z ~ N(log z, 0.5²), each number of two: Gaussian in the logarithms."""
    loc, scale, noise = 0.5, 1.0, 0.5

    def program(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(torch.full((2,), loc).double(), scale).to_event(1))
            pyro.sample("x", dist.LogNormal(z.log(), noise).to_event(1), obs=x)

    x = torch.tensor([[0.3, 2.0], [5.0, 1.0], [1.7, 0.01]]).double()
    spread = scale**2 + noise**2
    of_log = -0.5 * ((x.log() - loc).square() / spread + math.log(2 * math.pi * spread))
    variance = 1 / (1 / scale**2 + 1 / noise**2)
    mean = variance * (loc / scale**2 + x.log() / noise**2)
    expected = (mean + variance / 2).exp()
    return Conjugate(program, x, (of_log - x.log()).sum(1), expected, math.expm1(variance) * expected.square())


def uniform_binomial() -> Conjugate:
    """z uniform from 0 to a limit that differs by sequence; x of 8 trials that succeed with z / limit. p(x) = 1/9."""
    limits, n = torch.tensor([1.0, 10.0, 0.1, 3.0]).double(), 8

    def program(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            limit = limits[: len(x)]
            z = pyro.sample("z", dist.Uniform(0, limit))
            pyro.sample("x", dist.Binomial(n, z / limit), obs=x)

    x = torch.tensor([0.0, 8, 4, 6]).double()
    share = (1 + x) / (n + 2)
    variance = share * (1 - share) / (n + 3) * limits.square()
    return Conjugate(program, x, torch.full_like(x, -math.log(9)), share * limits, variance)


ZOO = {
    make.__name__: make for make in (gamma_poisson, beta_bernoulli, dirichlet_multinomial, lognormal, uniform_binomial)
}
SAMPLERS = {
    "langevin": {"step_size": 0.15, "num_steps": 1000, "num_kept": 900},
    "underdamped": {"step_size": 0.3, "num_steps": 800, "num_kept": 700},
    "mala": {"num_steps": 800, "num_kept": 400},
    "hmc": {"num_steps": 200, "num_kept": 100},
}


@pytest.fixture(params=ZOO)
def world(request):
    return ZOO[request.param]()


@pytest.fixture
def gamma_world():
    return gamma_poisson()


@pytest.mark.parametrize(
    "name", [name if name == "mala" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_chains_draw_from_the_posterior_of_a_constrained_z(world, name, standard_errors):
    program = unconstrained(world.program)
    scheme = SCHEMES[name](num_chains=4, vi_steps=16, **SAMPLERS[name])
    state = infer(scheme, program, world.x, SequenceNoise(0))
    draws = program.constrained(world.x, scheme.posterior(state, scheme.num_draws, SequenceNoise(0)))
    assert draws.samples.shape == (4, scheme.num_kept, *world.mean.shape)
    errors = torch.from_numpy(standard_errors(draws.samples.flatten(2).numpy())).view_as(world.mean)
    # Five standard errors, and what the steps of fixed size are off by: a part of the posterior's scale.
    bias = {"langevin": 0.15, "underdamped": 0.05}.get(name, 0) * world.variance.sqrt()
    assert ((draws.mean - world.mean).abs() < 5 * errors + bias).all()
    squares = (draws.samples - world.mean).square()
    errors = torch.from_numpy(standard_errors(squares.flatten(2).numpy())).view_as(world.mean)
    allowed = 5 * errors + 2 * bias * world.variance.sqrt() + 0.1 * world.variance
    assert ((squares.mean((0, 1)) - world.variance).abs() < allowed).all()


@pytest.mark.parametrize("name", ["vi", "lowrank"])
def test_bounds_are_valid_and_importance_weights_find_the_evidence_of_a_constrained_z(world, name):
    program, rng = unconstrained(world.program), SequenceNoise(1)
    scheme = SCHEMES[name](num_steps=64)
    state = infer(scheme, program, world.x, rng)
    bound = bounds.elbo(program, world.x, scheme.distribution(state, rng, "elbo"), 200)
    assert (bound.nelbo > -world.log_evidence - 4 * bound.monte_carlo_standard_error).all()
    # A Gaussian in u is close to the posterior: the gap is its KL divergence from it.
    assert (bound.nelbo < -world.log_evidence + 0.3 + 4 * bound.monte_carlo_standard_error).all()
    weights = bounds.iwae(program, world.x, scheme.distribution(state, rng, "iwae"), 600)
    assert ((weights.nats + world.log_evidence).abs() < 5 * weights.monte_carlo_standard_error + 0.02).all()


def test_the_prior_as_the_posterior_of_a_constrained_z_finds_the_evidence_too(world):
    """In u as in z: the volume of the map is in both densities."""
    program, rng = unconstrained(world.program), SequenceNoise(2)
    q = PRIOR.distribution(infer(PRIOR, program, world.x, rng), rng)
    weights = bounds.iwae(program, world.x, q, 300)
    assert ((weights.nats + world.log_evidence).abs() < 5 * weights.monte_carlo_standard_error).all()


def test_annealing_encloses_the_evidence_of_a_constrained_z(gamma_world):
    """The draws of the posterior that the backward side needs are those of the conjugate Gamma(2 + x, 2)."""
    program, x, rng = unconstrained(gamma_world.program), gamma_world.x, SequenceNoise(3)
    scheme = SCHEMES["vi"](num_steps=32)
    q = scheme.distribution(infer(scheme, program, x, rng), rng, "ais")
    plan = pilot(program, x, q, rng, num_temperatures=10, num_chains=64)
    forward = forward_ais(program, x, q, plan, rng)
    assert torch.allclose(forward.nats, -gamma_world.log_evidence, atol=0.03)
    # The mean of 1/w is one over draws of the posterior too: of many copies of one text.
    many = x[2:3].repeat(400)
    q = scheme.distribution(infer(scheme, program, many, rng), rng, "ais")
    plan = pilot(program, many, q, rng, num_temperatures=10, num_chains=2)
    z = torch.from_numpy(np.random.default_rng(0).gamma(2 + many.numpy(), 0.5))
    inverse = (-reverse_ais(program, many, q, plan, z.log(), rng).log_weights).flatten()
    assert inverse.logsumexp(0).item() - math.log(800) == pytest.approx(-gamma_world.log_evidence[2].item(), abs=0.05)


def test_the_mode_is_that_of_the_density_in_the_unconstrained_number(gamma_world):
    """p(u | x) of u = log z is z^(2 + x) e^(-2 z): its mode is at z = (2 + x) / 2, where that of z has 1 + x."""
    program, x = unconstrained(gamma_world.program), gamma_world.x
    scheme = SCHEMES["map"](num_steps=400)
    state = infer(scheme, program, x, SequenceNoise(0))
    assert torch.allclose(program.transform(x)(scheme.mean(state)), (2 + x) / 2, rtol=1e-3)


def test_pyros_own_sampler_draws_from_the_same_posterior(gamma_world):
    """NUTS unconstrains z by itself, and finds what is stated in closed form with the program as it is."""
    x = gamma_world.x[1:3]
    draws = nuts(gamma_world.program, x, num_chains=2, num_warmup=60, num_draws=120, seed=0).samples
    assert torch.allclose(draws.mean((0, 1)), gamma_world.mean[1:3], rtol=0.2)


PRIORS = {
    "gamma": (dist.Gamma(3.0, 2.0), lambda u: 3 * u - 2 * math.exp(u) + 3 * math.log(2) - math.lgamma(3)),
    "gamma, steep": (dist.Gamma(0.1, 1.0), lambda u: 0.1 * u - math.exp(u) - math.lgamma(0.1)),
    "beta": (
        dist.Beta(2.0, 0.5),
        lambda u: 2 * special.log_expit(u) + 0.5 * special.log_expit(-u) - special.betaln(2, 0.5),
    ),
    "lognormal": (
        dist.LogNormal(-80.0, 0.01),
        lambda u: -0.5 * ((u + 80) / 0.01) ** 2 - math.log(0.01 * math.sqrt(2 * math.pi)),
    ),
    "half-Cauchy": (dist.HalfCauchy(1.0), lambda u: math.log(2 / math.pi) + u - math.log1p(math.exp(2 * u))),
    "interval": (dist.Uniform(-3.0, 5.0), lambda u: special.log_expit(u) + special.log_expit(-u)),
}
MOMENTS = {
    "gamma": (special.digamma(3) - math.log(2), special.polygamma(1, 3)),
    "gamma, steep": (special.digamma(0.1), special.polygamma(1, 0.1)),
    "beta": (special.digamma(2) - special.digamma(0.5), special.polygamma(1, 2) + special.polygamma(1, 0.5)),
    "lognormal": (-80.0, 1e-4),
    # u is distributed as the logarithm of a ratio of two Gaussians: a hyperbolic secant of variance π²/4.
    "half-Cauchy": (0.0, math.pi**2 / 4),
    "interval": (0.0, math.pi**2 / 3),
}


def of_prior(prior, num_sequences=2):
    def program(batch: Tensor) -> None:
        with pyro.plate("sequences", len(batch), dim=-1):
            pyro.sample("z", prior)

    return unconstrained(program), torch.zeros(num_sequences)


@pytest.mark.parametrize("name", PRIORS)
def test_the_density_of_u_is_that_of_z_times_the_volume_of_the_map(name):
    prior, expected = PRIORS[name]
    program, batch = of_prior(prior)
    centre, width = MOMENTS[name][0], math.sqrt(MOMENTS[name][1])
    u = centre + width * torch.tensor([-1.5, 0.4])
    found = log_joint(program, batch, u).log_prior
    assert found.tolist() == pytest.approx([expected(value) for value in u.tolist()], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("u", [-800.0, 800.0, math.nan])
def test_where_z_is_rounded_to_the_end_of_its_support_there_is_no_density_and_no_error(u):
    """exp(-800) is 0, which the program would refuse as the mean of a logarithm."""
    world = lognormal()
    program = unconstrained(world.program)
    z = torch.tensor([[0.5, u], [0.5, 0.5], [0.1, 0.2]]).double().requires_grad_()
    joint = log_joint(program, world.x, z)
    assert joint.log_prior[0] == -math.inf
    assert joint.log_prior[1:].isfinite().all()
    (gradient,) = torch.autograd.grad((joint.log_prior + joint.log_likelihood).sum(), z)
    assert gradient.isfinite().all()
    assert gradient[1:].all()


@pytest.mark.parametrize("name", MOMENTS)
def test_the_moments_of_u_are_those_of_the_closed_form(name):
    program, batch = of_prior(PRIORS[name][0])
    mean, scale = moments(latent_prior(program, batch))
    expected_mean, expected_variance = MOMENTS[name]
    # The grid ends at six standard deviations, where the tail of a steep one has not ended.
    tolerance = 0.03 if name == "gamma, steep" else 1e-2
    assert mean.tolist() == pytest.approx([expected_mean] * 2, abs=tolerance * math.sqrt(expected_variance))
    assert scale.tolist() == pytest.approx([math.sqrt(expected_variance)] * 2, rel=tolerance)


def test_the_moments_of_sticks_are_those_of_many_draws():
    program, batch = of_prior(dist.Dirichlet(torch.tensor([0.5, 2.0, 3.0, 1.0]).double()))
    prior = latent_prior(program, batch)
    torch.manual_seed(0)
    draws = prior.sample((100_000,))
    assert torch.allclose(draws.mean(0), prior.mean, atol=0.03)
    assert torch.allclose(draws.var(0), prior.variance, rtol=0.03)


def test_what_is_inferred_of_a_sequence_does_not_depend_on_its_batch(gamma_world):
    program, x = unconstrained(gamma_world.program), gamma_world.x
    scheme = SCHEMES["vi"](num_steps=16)
    together, alone = (infer(scheme, program, batch, SequenceNoise(0)) for batch in (x, x[:1]))
    assert torch.allclose(together.mean[:1], alone.mean, rtol=1e-12)
    assert torch.allclose(together.log_scale[:1], alone.log_scale, rtol=1e-12)


@pytest.mark.parametrize("name", ["vi", "map", "hmc"])
def test_a_program_on_the_real_numbers_stays_as_it_is(linear_gaussian, name):
    world = linear_gaussian.random(num_observed=4, num_latent=3, noise_scale=0.5)
    batch = world.sample(3)
    scheme = SCHEMES[name]()
    state, same = (infer(scheme, program, batch, SequenceNoise(0)) for program in (world, unconstrained(world)))
    for field, value in vars(state).items():
        assert torch.equal(value, getattr(same, field)), field
    draws = scheme.posterior(state, 1, SequenceNoise(0))
    assert torch.equal(unconstrained(world).constrained(batch, draws).samples, draws.samples)


def test_a_module_keeps_its_methods_and_its_weights_stay_frozen(ltm_with_encoder, texts):
    program = unconstrained(ltm_with_encoder)
    scheme = SCHEMES["amortized"](num_steps=2)
    state, same = (infer(scheme, model, texts, SequenceNoise(0)) for model in (ltm_with_encoder, program))
    assert torch.equal(state.mean, same.mean)
    assert all(weight.requires_grad and weight.grad is None for weight in ltm_with_encoder.parameters())
    assert program.reach == ltm_with_encoder.reach
    with pytest.raises(AttributeError, match="nonsense"):
        program.nonsense  # noqa: B018 - the attribute is looked up


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "amortized"])
def test_a_constrained_z_is_refused_with_the_way_out(gamma_world, name):
    with pytest.raises(ValueError, match=r"constrained \(GreaterThanEq.*unconstrained\(model\)"):
        infer(SCHEMES[name](), gamma_world.program, gamma_world.x, SequenceNoise(0))


@pytest.mark.parametrize("name", ["vi", "mala"])
@pytest.mark.parametrize("wrap", [unconstrained, lambda model: model], ids=["wrapped", "as it is"])
def test_a_discrete_z_is_refused(name, wrap):
    def program(batch: Tensor) -> None:
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    with pytest.raises(ValueError, match='site "z" is discrete'):
        infer(SCHEMES[name](), wrap(program), torch.zeros(3), SequenceNoise(0))


class Peculiar(dist.Normal):
    """A distribution on a set to which torch knows no bijection."""

    support = constraints.symmetric


def test_a_support_without_a_bijection_is_refused():
    program, batch = of_prior(Peculiar(0.0, 1.0))
    with pytest.raises(ValueError, match="no bijection from the real numbers is known"):
        infer(SCHEMES["vi"](), program, batch, SequenceNoise(0))


def test_moments_that_cannot_be_summed_are_refused_and_chains_need_none():
    """Dimensions of z that depend on each other, other than on a simplex."""
    components = dist.LogNormal(torch.zeros(2, 3), 1.0).to_event(1)
    program, batch = of_prior(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
    with pytest.raises(ValueError, match="no mean and standard deviation"):
        infer(SCHEMES["vi"](), program, batch, SequenceNoise(0))
    state = infer(SCHEMES["hmc"](num_steps=4), program, batch, SequenceNoise(0))
    assert state.z.isfinite().all()


@dataclass(frozen=True)
class Named:
    """Numbers whose sequences have names."""

    x: Tensor
    sequence_ids: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Named:
        return Named(self.x[index], self.sequence_ids[index])


def gaussian(event_dim: int) -> Callable[[Tensor], None]:
    """z ~ N(0, 1), x | z ~ N(z, 0.5²): a single number, or a vector of one."""

    def program(batch: Tensor | Named) -> None:
        x = batch if isinstance(batch, Tensor) else batch.x
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros([1] * event_dim).double(), 1).to_event(event_dim))
            pyro.sample("x", dist.Normal(z if event_dim == 0 else z[..., 0], 0.5), obs=x)

    return program


NUMBERS = torch.tensor([0.3, -1.2, 2.0]).double()
SHORT = {"num_steps": 12}
OF_CHAINS = {"num_steps": 12, "num_chains": 3, "num_kept": 5, "vi_steps": 6, "vi_rank": 1}


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "amortized"])
def test_a_single_number_is_inferred_as_a_vector_of_one(name):
    """The same noise and the same formulas: the same numbers."""
    scheme = SCHEMES[name](**(OF_CHAINS if SCHEMES[name].has_chains else SHORT))
    state, of_vector = (infer(scheme, gaussian(dims), NUMBERS, SequenceNoise(0)) for dims in (0, 1))
    for field, value in vars(state).items():
        other = getattr(of_vector, field)
        assert torch.allclose(value, other.reshape(value.shape), rtol=1e-12, atol=1e-12), field
    draws, others = (scheme.posterior(of, scheme.num_draws or 6, SequenceNoise(0)).samples for of in (state, of_vector))
    assert draws.shape == others.shape[:3]
    assert torch.allclose(draws, others[..., 0], rtol=1e-12, atol=1e-12)
    assert scheme.mean(state).shape == NUMBERS.shape


def test_everything_else_takes_a_single_number_too(standard_errors):
    """The posterior of z is N(0.8 x, 0.2), and x ~ N(0, 1.25)."""
    program, rng = gaussian(0), SequenceNoise(0)
    scheme = SCHEMES["lowrank"](num_steps=48)
    state = infer(scheme, program, NUMBERS, rng)
    q = scheme.distribution(state, rng, "ais")
    evidence = 0.5 * (NUMBERS.square() / 1.25 + math.log(2 * math.pi * 1.25))
    plan = pilot(program, NUMBERS, q, rng, num_temperatures=5)
    assert torch.allclose(forward_ais(program, NUMBERS, q, plan, rng).nats, evidence, atol=0.05)
    bound = bounds.elbo(program, NUMBERS, q, 500)
    assert ((bound.nelbo - evidence).abs() < 0.02 + 4 * bound.monte_carlo_standard_error).all()
    chains = SCHEMES["hmc"](num_steps=400, num_chains=4, num_kept=200)
    posterior = chains.posterior(infer(chains, program, NUMBERS, rng), 800, rng)
    errors = standard_errors(posterior.samples.numpy())
    assert ((posterior.mean - 0.8 * NUMBERS).abs().numpy() < 5 * errors).all()
    assert mixing(posterior).largest_r_hat.max() < 1.05
    data = to_arviz(posterior, evaluate_draws(posterior, program, NUMBERS))
    assert data["posterior"]["z"].dims == ("chain", "draw", "sequence")
    z = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = z + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = calibrate(program, x, z, SCHEMES["vi"](num_steps=48), 19, rng)
    assert exact.names == ("z", "log p(x | z)")
    assert exact.p_value(10) > 0.001


@pytest.mark.parametrize("name", ["vi", "map"])
def test_a_block_is_absorbed_into_a_single_number_as_into_a_vector_of_one(name):
    scheme, found = SCHEMES[name](), []
    for dims in (0, 1):
        program, shape = gaussian(dims), (3, *[1] * dims)
        state = scheme.init(program, NUMBERS, SequenceNoise(0))
        z, gradient = torch.tensor([0.4, 0.1, -1.0]).double(), torch.tensor([1.5, -0.2, 0.7]).double()
        evidence = BlockEvidence(z.view(shape), gradient.view(shape), 1.0, True)
        found.append(scheme.mean(scheme.absorb(state, evidence, latent_prior(program, NUMBERS))).flatten())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.zeros(3).double())


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "amortized"])
def test_the_sequences_of_a_plain_tensor_are_numbered(name):
    scheme = SCHEMES[name](**(OF_CHAINS if SCHEMES[name].has_chains else SHORT))
    if name == "adamvi":
        scheme = dataclasses.replace(scheme, noise="reused")
    named = Named(NUMBERS, torch.arange(3))
    plain, with_ids, others = (
        infer(scheme, gaussian(0), batch, SequenceNoise(0))
        for batch in (NUMBERS, named, dataclasses.replace(named, sequence_ids=torch.tensor([7, 8, 9])))
    )
    assert plain.sequence_ids.tolist() == [0, 1, 2]
    assert torch.equal(scheme.mean(plain), scheme.mean(with_ids))
    if name != "map":  # which has no noise
        assert not torch.equal(scheme.mean(plain), scheme.mean(others))


def test_an_automatic_guide_of_pyro_fits_the_unconstrained_program_as_well(gamma_world):
    """It is an ordinary Pyro program: the ELBO of a Gaussian in u by Pyro's SVI is a bound on the closed form."""
    program = unconstrained(gamma_world.program)
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        guide = AutoNormal(program)
        svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO(num_particles=8))
        for _ in range(100):
            svi.step(gamma_world.x)
        losses = torch.tensor([svi.evaluate_loss(gamma_world.x) for _ in range(100)])
    evidence = -gamma_world.log_evidence.sum()
    error = losses.std() / 10
    assert evidence - 4 * error < losses.mean() < evidence + 0.4
