"""The slow step: bit for bit that of Pyro's SVI, and what it reports, against closed forms."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from ltm_pyro.inference import BatchNoise, SequenceNoise, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.svi import OptimizerConfig, SlowLoss, WeightOptimizer, elbo_backward

SCHEMES = {
    "vi": VI(num_steps=3),
    "adamvi-reused-noise": AdamVI(num_steps=3, learning_rate=0.2, noise="reused"),
    "map": MAP(num_steps=3, learning_rate=0.2),
    "langevin": Langevin(num_steps=3, num_chains=2),
    "amortized": Amortized(),
    "amortized-refined": Amortized(num_steps=3, learning_rate=0.2),
}
WEIGHT_DECAY = 0.1


def batch_noise(seed):
    return BatchNoise(torch.Generator().manual_seed(seed))


def constant_rate(rate, max_gradient_norm=math.inf):
    """Settings without schedule and clipping."""
    return OptimizerConfig(
        learning_rate=rate,
        final_learning_rate=rate,
        warmup_steps=0,
        weight_decay=WEIGHT_DECAY,
        max_gradient_norm=max_gradient_norm,
    )


class PlainModule(nn.Module):
    """The linear-Gaussian model as a plain torch module, which tells Pyro of its weights by `pyro.module`."""

    def __init__(self, world, encoder=None):
        super().__init__()
        self.encoder = encoder
        self.inner = nn.Linear(world.loadings.shape[1], world.loadings.shape[0]).double()
        self.noise_scale = world.noise_scale

    def forward(self, batch):
        pyro.module("inner", self.inner)
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.inner.in_features).double(), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.inner(z), self.noise_scale).to_event(1), obs=batch.x)

    def encode(self, batch):
        return pyro.module("encoder", self.encoder)(batch)


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(params=["ltm", "ltm_float32", "pyro_module", "plain_module"])
def model_and_batches(request, scheme, world, learnable, linear_encoder, texts):
    """A model with weights, all of which the scheme trains, and three batches for it."""
    has_encoder = isinstance(scheme, Amortized)
    if request.param.startswith("ltm"):
        model = request.getfixturevalue("ltm_with_encoder" if has_encoder else "ltm")
        model = model.float() if request.param == "ltm_float32" else model
        return model, [texts, texts[torch.tensor([4, 0])], texts[1:4]]
    if request.param == "pyro_module":
        model = learnable(world, has_encoder)
    else:
        model = PlainModule(world, linear_encoder(*world.loadings.shape) if has_encoder else None)
    return model, [world.sample(5, seed) for seed in range(3)]


# --- the step


def test_a_slow_step_is_that_of_pyro_svi_bit_for_bit(model_and_batches, scheme):
    ours, batches = model_and_batches
    pyros = copy.deepcopy(ours)
    start = [weight.detach().clone() for weight in ours.parameters()]
    optimizer = WeightOptimizer(ours, constant_rate(0.01), num_steps=100)
    is_matrix = {name: weight.dim() > 1 for name, weight in pyros.named_parameters()}

    def adamw_settings(name):
        # Pyro puts the name of the module in front.
        (decays,) = {is_matrix[known] for known in is_matrix if name.endswith(known) or known.endswith(name)}
        return {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": WEIGHT_DECAY if decays else 0.0}

    guide = None  # that of the batch, which changes from step to step
    svi = SVI(pyros, lambda batch: guide(batch), pyro.optim.AdamW(adamw_settings), TraceMeanField_ELBO())
    for step in range(6):
        batch = batches[step % 3]
        rng = batch_noise(step)
        state = infer(scheme, ours, batch, rng)
        loss = elbo_backward(ours, scheme.guide(ours, state, batch, rng), batch, num_tokens=1.0)
        assert optimizer.update(step)

        rng = batch_noise(step)
        state = infer(scheme, pyros, batch, rng)
        guide = scheme.guide(pyros, state, batch, rng)
        assert svi.step(batch) == loss.nelbo
        for (name, weight), other in zip(ours.named_parameters(), pyros.parameters(), strict=True):
            assert weight.equal(other), (step, name)
    assert not any(weight.equal(before) for weight, before in zip(ours.parameters(), start, strict=True))


def test_two_half_batches_have_the_gradient_of_the_whole(ltm, texts):
    scheme, rng = SCHEMES["vi"], SequenceNoise(0)
    num_tokens = float(texts.weights.sum())

    def gradients(*parts):
        model = copy.deepcopy(ltm)
        losses = []
        for part in parts:
            state = infer(scheme, model, part, rng)
            losses.append(elbo_backward(model, scheme.guide(model, state, part, rng), part, num_tokens))
        loss = sum(losses, SlowLoss())
        return [weight.grad for weight in model.parameters()], loss.nelbo, loss.kl

    whole, *figures = gradients(texts)
    halves, *figures_of_halves = gradients(texts[:2], texts[2:])
    assert figures_of_halves == pytest.approx(figures, rel=1e-9)
    scale = max(gradient.abs().max() for gradient in whole)
    for gradient, other in zip(whole, halves, strict=True):
        assert torch.allclose(gradient, other, rtol=0, atol=1e-8 * float(scale))


def test_the_gradient_is_that_of_the_log_likelihood_per_token(world, learnable):
    """With z known: ∂/∂W of |x - W z|² / 2s² is -(x - W z) zᵀ / s²."""
    model, batch = learnable(world), world.sample(5)
    state = infer(SCHEMES["map"], model, batch, SequenceNoise(0))
    elbo_backward(model, SCHEMES["map"].guide(model, state, batch, SequenceNoise(0)), batch, num_tokens=30.0)
    residual = (batch.x - state.z @ world.loadings.T) / world.noise_scale**2
    assert torch.allclose(model.loadings.grad, -residual.T @ state.z / 30, rtol=1e-10)
    assert torch.allclose(model.offset.grad, -residual.sum(0) / 30, rtol=1e-10)


def test_gradients_add_to_those_that_are_there(ltm, texts):
    state = infer(SCHEMES["map"], ltm, texts, SequenceNoise(0))
    guide = SCHEMES["map"].guide(ltm, state, texts, SequenceNoise(0))
    elbo_backward(ltm, guide, texts, num_tokens=1.0)
    once = [weight.grad.clone() for weight in ltm.parameters()]
    elbo_backward(ltm, guide, texts, num_tokens=1.0)
    for weight, gradient in zip(ltm.parameters(), once, strict=True):
        assert torch.allclose(weight.grad, 2 * gradient, rtol=1e-12)


# --- what it reports


def test_the_loss_of_a_gaussian_is_that_of_the_formula_at_its_draw(world, learnable, recording):
    batch, scheme, rng = world.sample(5), SCHEMES["vi"], recording()
    state = infer(scheme, world, batch, rng)
    model = learnable(world)
    loss = elbo_backward(model, scheme.guide(model, state, batch, rng), batch, num_tokens=30.0)
    (_, noise) = rng.normals[-1]
    scale = state.log_scale.exp()
    nll = world.neg_log_likelihood(state.mean + scale * noise, batch.x).sum().item()
    rate = world.kl(state.mean, scale).sum().item()
    assert (loss.nelbo, loss.kl, loss.nll) == pytest.approx((nll + rate, rate, nll), rel=1e-10)


@pytest.mark.parametrize("name", ["map", "langevin"])
def test_the_loss_of_a_point_is_the_negative_log_joint_there(world, learnable, name):
    batch, scheme = world.sample(5), SCHEMES[name]
    rng = SequenceNoise(0)
    state = infer(scheme, world, batch, rng)
    sites = []
    guide = scheme.guide(world, state, batch, rng)

    def watched(batch):
        with pyro.poutine.trace() as trace:
            guide(batch)
        sites.append(trace.trace.nodes["z"]["value"])

    loss = elbo_backward(learnable(world), watched, batch, num_tokens=30.0)
    (z,) = sites
    nll, rate = world.neg_log_likelihood(z, batch.x).sum().item(), world.neg_log_prior(z).sum().item()
    assert (loss.nelbo, loss.kl, loss.nll) == pytest.approx((nll + rate, rate, nll), rel=1e-10)


def test_the_parts_of_a_loss_add_up_and_losses_do():
    assert SlowLoss(nelbo=10.0, kl=3.0).nll == 7.0
    added = SlowLoss(10.0, 3.0, 7, 8, 2, 1) + SlowLoss(0.5, 0.25, 100, 200, 30, 4)
    assert added == SlowLoss(10.5, 3.25, 107, 208, 32, 5)
    assert added + SlowLoss() == added


class MixtureWorld(PyroModule):
    """x = W z + noise, with z from a mixture of two Gaussians, to which no Gaussian has a KL in closed form."""

    def __init__(self, world):
        super().__init__()
        self.loadings, self.noise_scale = nn.Parameter(world.loadings.clone()), world.noise_scale

    def prior(self):
        means = torch.tensor([[-1.0] * self.loadings.shape[1], [2.0] * self.loadings.shape[1]]).double()
        components = dist.Normal(means, 0.5).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)), components)

    def forward(self, batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z @ self.loadings.T, self.noise_scale).to_event(1), obs=batch.x)


@pytest.mark.parametrize("name", ["gaussian", "point"])
def test_a_prior_without_a_kl_in_closed_form_is_scored_at_the_draw_and_the_gradient_added_once(name, world):
    """log q(z) - log p(z), and of a point -log p(z); the densities of the mixture are summed here by hand."""
    batch, model = world.sample(5), MixtureWorld(world)
    mean = torch.randn(5, 3, dtype=torch.float64)
    q = dist.Normal(mean, 0.3).to_event(1) if name == "gaussian" else dist.Delta(mean, event_dim=1)
    draws = []

    def guide(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            draws.append(pyro.sample("z", q))

    loss = elbo_backward(model, guide, batch, num_tokens=30.0)
    (z,) = draws
    squares = [((z - centre) / 0.5).square().sum(1) / 2 for centre in (-1.0, 2.0)]
    constant = 3 * math.log(0.5 * math.sqrt(2 * math.pi))
    log_p = torch.logaddexp(math.log(0.3) - squares[0], math.log(0.7) - squares[1]) - constant
    log_q = -((z - mean) / 0.3).square().sum(1) / 2 - 3 * math.log(0.3 * math.sqrt(2 * math.pi))
    kl = ((log_q if name == "gaussian" else 0) - log_p).sum().item()
    residual = (batch.x - z @ world.loadings.T) / world.noise_scale**2
    squared = (residual.square() * world.noise_scale**2).sum().item() / 2
    nll = squared + batch.x.numel() * math.log(world.noise_scale * math.sqrt(2 * math.pi))
    assert (loss.kl, loss.nll) == pytest.approx((kl, nll), rel=1e-10)
    assert torch.allclose(model.loadings.grad, -residual.T @ z / 30, rtol=1e-10)


def test_z_of_a_prefix_pays_for_the_whole_text(ltm, texts, recording):
    """Inferred from nothing, z has KL 0, and the loss is that of all tokens at a draw of the prior."""
    rng, scheme, nothing = recording(), SCHEMES["vi"], texts.prefix(torch.zeros(5))
    state = infer(scheme, ltm, nothing, rng)
    loss = elbo_backward(ltm, scheme.guide(ltm, state, nothing, rng), texts, num_tokens=41.0)
    (_, z) = rng.normals[-1]
    expected = 0.0
    for tokens, length, z_of_text in zip(texts.tokens, texts.num_bytes.tolist(), z, strict=True):
        inputs = torch.cat([torch.tensor([10]), tokens[:-1]])
        log_probs = ltm.decoder.logits(ltm.decoder(inputs[None], z_of_text[None]))[0].log_softmax(-1)
        expected -= sum(log_probs[n, tokens[n]].item() for n in range(length))
    assert loss.kl == 0
    assert loss.nelbo == pytest.approx(expected, rel=1e-10)


def test_the_slow_step_leaves_no_weights_in_pyros_store(ltm, texts):
    pyro.param("the_users_own", torch.tensor(3.0))
    state = infer(SCHEMES["vi"], ltm, texts, SequenceNoise(0))
    elbo_backward(ltm, SCHEMES["vi"].guide(ltm, state, texts, SequenceNoise(0)), texts, 1.0)
    assert list(pyro.get_param_store().keys()) == ["the_users_own"]


def test_two_models_in_one_process_do_not_share_weights(ltm, texts):
    """Their weights have the same names; in one store, the second would read the first one's."""
    other = copy.deepcopy(ltm)
    with torch.no_grad():
        other.decoder.embedding.weight.mul_(2)
    state = infer(SCHEMES["map"], ltm, texts, SequenceNoise(0))
    guide = SCHEMES["map"].guide(ltm, state, texts, SequenceNoise(0))
    losses = [elbo_backward(model, guide, texts, 1.0).nelbo for model in (ltm, other)]
    assert losses[0] != losses[1]
    assert not ltm.decoder.embedding.weight.grad.equal(other.decoder.embedding.weight.grad)


# --- the optimizer


class Weights(nn.Module):
    """A matrix and a norm."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((3, 4), 2.0))
        self.norm = nn.Parameter(torch.full((4,), 3.0))


def with_gradients(model, matrix, norm):
    model.matrix.grad = torch.full_like(model.matrix, matrix)
    model.norm.grad = torch.full_like(model.norm, norm)


def first_moments(model, optimizer):
    return [optimizer.algorithm.state[weight]["exp_avg"] for weight in model.parameters()]


@pytest.mark.parametrize(("size", "norm_after"), [(100.0, 0.5), (0.01, 0.04)])
def test_the_gradient_of_all_weights_together_is_clipped(size, norm_after):
    """Of sixteen numbers of one size, the norm is four times the size."""
    model = Weights()
    optimizer = WeightOptimizer(model, constant_rate(0.1, max_gradient_norm=0.5), num_steps=10)
    with_gradients(model, size, size)
    optimizer.update(0)
    # Adam's first moment, from 0, is a tenth of the gradient that it was given.
    gradient = 10 * torch.cat([moment.flatten() for moment in first_moments(model, optimizer)])
    assert gradient.norm().item() == pytest.approx(norm_after, rel=1e-4)
    assert torch.allclose(gradient, gradient[0])


def test_matrices_decay_and_norms_do_not():
    model = Weights()
    optimizer = WeightOptimizer(model, constant_rate(0.01), num_steps=10)
    for step in range(3):
        with_gradients(model, 0.0, 0.0)
        optimizer.update(step)
    assert torch.allclose(model.matrix, torch.tensor(2 * (1 - 0.01 * WEIGHT_DECAY) ** 3), rtol=1e-6)
    assert model.norm.equal(torch.full((4,), 3.0))


def test_every_weight_of_the_model_is_trained_and_only_norms_are_spared_the_decay(ltm):
    optimizer = WeightOptimizer(ltm, OptimizerConfig(), num_steps=10)
    decay = {id(w): group["weight_decay"] for group in optimizer.algorithm.param_groups for w in group["params"]}
    assert len(decay) == len(list(ltm.parameters()))
    for name, weight in ltm.named_parameters():
        assert decay[id(weight)] == (0 if "norm" in name else OptimizerConfig().weight_decay), name


def test_a_weight_that_is_frozen_is_not_trained(ltm, texts):
    ltm.eval()  # Pyro warns of weights without gradient in a module that is training.
    embedding = ltm.decoder.embedding.weight.requires_grad_(False)
    before = embedding.clone()
    optimizer = WeightOptimizer(ltm, constant_rate(0.1), num_steps=10)
    state = infer(SCHEMES["map"], ltm, texts, SequenceNoise(0))
    elbo_backward(ltm, SCHEMES["map"].guide(ltm, state, texts, SequenceNoise(0)), texts, 1.0)
    assert optimizer.update(0)
    assert embedding.equal(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    def steps(gradients):
        model = Weights()
        optimizer = WeightOptimizer(model, constant_rate(0.1, max_gradient_norm=1.0), num_steps=10)
        applied = []
        for matrix, norm in gradients:
            with_gradients(model, matrix, norm)
            applied.append(optimizer.update(5))
            assert model.matrix.grad is None
            assert model.norm.grad is None
        return applied, model, optimizer

    applied, model, optimizer = steps([(1.0, 2.0), (1.0, bad), (bad, 1.0), (0.5, -1.0)])
    assert applied == [True, False, False, True]
    _, expected, expected_optimizer = steps([(1.0, 2.0), (0.5, -1.0)])
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert weight.equal(other)
        ours, others = optimizer.algorithm.state[weight], expected_optimizer.algorithm.state[other]
        assert ours.keys() == others.keys()
        assert all(value.equal(others[name]) for name, value in ours.items())


def test_one_number_that_is_not_finite_is_enough():
    model = Weights()
    optimizer = WeightOptimizer(model, constant_rate(0.1), num_steps=10)
    with_gradients(model, 1.0, 1.0)
    model.matrix.grad[2, 1] = math.nan
    assert not optimizer.update(0)
    assert model.matrix.equal(torch.full((3, 4), 2.0))
    assert model.norm.equal(torch.full((4,), 3.0))


def test_gradients_that_are_not_usable_are_left_out():
    model = Weights()
    optimizer = WeightOptimizer(model, constant_rate(0.1), num_steps=10)
    with_gradients(model, 1.0, 1.0)
    assert not optimizer.update(0, is_usable=False)
    assert model.matrix.equal(torch.full((3, 4), 2.0))
    assert not optimizer.algorithm.state
    assert model.matrix.grad is None


def test_gradients_that_are_discarded_are_gone():
    model = Weights()
    optimizer = WeightOptimizer(model, constant_rate(0.1), num_steps=10)
    with_gradients(model, 1.0, 1.0)
    optimizer.discard()
    assert model.matrix.grad is None
    assert model.norm.grad is None


# --- the schedule


def schedule(num_steps=100, warmup_steps=20):
    config = OptimizerConfig(learning_rate=0.5, final_learning_rate=0.1, warmup_steps=warmup_steps)
    return WeightOptimizer(Weights(), config, num_steps)


def test_the_rate_rises_linearly_and_falls_as_a_cosine_to_the_final_rate():
    optimizer = schedule()
    rates = [optimizer.learning_rate(step) for step in range(100)]
    assert rates[:20] == pytest.approx([0.5 * (step + 1) / 20 for step in range(20)])
    # 80 steps fall: a quarter, half and all of the way.
    for step, cosine in ((39, math.sqrt(0.5)), (59, 0.0), (79, -math.sqrt(0.5)), (99, -1.0)):
        assert rates[step] == pytest.approx(0.1 + 0.4 * (1 + cosine) / 2)
    assert all(late < early for early, late in itertools.pairwise(rates[19:]))


def test_the_rate_stays_at_its_final_value_after_the_last_step():
    assert [schedule().learning_rate(step) for step in (99, 100, 1000)] == pytest.approx([0.1] * 3)


def test_the_rate_is_a_function_of_the_step_alone():
    optimizer = schedule()
    expected = [schedule().learning_rate(step) for step in range(100)]
    for step in torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist():
        for weight in optimizer.weights:
            weight.grad = torch.ones_like(weight)
        assert optimizer.update(step)
        assert optimizer.learning_rate(step) == expected[step]


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 50), (10, 50), (10, 10), (50, 0)])
def test_short_runs_have_a_positive_rate_up_to_the_highest(num_steps, warmup_steps):
    rates = [schedule(num_steps, warmup_steps).learning_rate(step) for step in range(num_steps)]
    assert all(0 < rate <= 0.5 for rate in rates)


def test_an_update_moves_the_weights_by_the_rate_of_its_step():
    """Adam's first step is the rate, in the direction of the gradient's sign."""
    for step in (0, 7, 19, 60):
        model = Weights()
        config = OptimizerConfig(learning_rate=0.5, final_learning_rate=0.1, warmup_steps=20, weight_decay=0.0)
        optimizer = WeightOptimizer(model, config, num_steps=100)
        with_gradients(model, 1.0, -1.0)
        assert optimizer.update(step)
        rate = schedule().learning_rate(step)
        assert torch.allclose(model.matrix, torch.tensor(2.0 - rate), rtol=1e-5)
        assert torch.allclose(model.norm, torch.tensor(3.0 + rate), rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", 1.5),
        ("final_learning_rate", -1.0),
        ("warmup_steps", -1),
        ("beta_1", 1.0),
        ("beta_2", -0.1),
        ("weight_decay", -0.1),
        ("max_gradient_norm", 0.0),
        ("max_gradient_norm", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        OptimizerConfig(**{setting: value})
