"""Amortised inference: what a linear encoder should learn is known where the posterior is Gaussian."""

import math

import pyro
import pytest
import torch
from pyro import poutine

from ltm_pyro.inference import PRIOR, BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import TokenBatch


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


@pytest.fixture
def model(world, learnable):
    """The world as a module, whose encoder says something of the text, though not the truth."""
    model = learnable(world, has_encoder=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def schedule(rate, num_steps):
    """Of an optimiser without decay and clipping, down to a thousandth of its rate."""
    return OptimizerConfig(rate, rate / 1000, 0, weight_decay=0.0, max_gradient_norm=math.inf), num_steps


def only_the_encoder(model):
    """The model with all else frozen; out of training, since Pyro would warn of the weights without gradient."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("encoder."))
    return model.eval()


# --- where inference starts, and goes


def test_inference_starts_where_the_encoder_says(world, model):
    batch = world.sample(5)
    state = infer(Amortized(), model, batch, SequenceNoise(0))
    encoder = model.encoder
    assert torch.allclose(state.mean, batch.x @ encoder.matrix.T + encoder.offset, rtol=1e-12)
    assert state.log_scale.equal(encoder.log_scale.expand(5, 3))
    warm = torch.randn(5, 3, dtype=torch.float64)
    started = Amortized().init(model, batch, SequenceNoise(0), warm)
    assert started.mean.equal(warm)
    assert started.log_scale.equal(state.log_scale)


def test_refinement_is_torch_adam_on_the_reparameterised_elbo_from_there(world, recording):
    batch, rng = world.sample(5), recording()
    state = infer(Amortized(20, learning_rate=0.2, epsilon=0.3), world, batch, rng)
    mean, log_scale = (torch.nn.Parameter(value.clone()) for value in world.encode(batch))
    optimizer = torch.optim.Adam([mean, log_scale], lr=0.2, eps=0.3)
    for _, noise in rng.normals:
        optimizer.zero_grad()
        scale = log_scale.exp()
        (world.neg_log_likelihood(mean + scale * noise, batch.x) + world.kl(mean, scale)).sum().backward()
        optimizer.step()
    assert len(rng.normals) == 20
    assert torch.allclose(state.mean, mean.detach(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(state.log_scale, log_scale.detach(), rtol=1e-9, atol=1e-12)


def test_refinement_beats_the_encoder_alone(world):
    """Whose proposals are half the way from the prior to the optimum; of the bound they lack, most is made good."""
    batch = world.sample(100)
    states = [infer(Amortized(num_steps), world, batch, SequenceNoise(0)) for num_steps in (0, 4, 40)]
    nelbos = [
        (world.expected_nll(state.mean, state.log_scale.exp(), batch.x) + world.kl(state.mean, state.log_scale.exp()))
        for state in states
    ]
    optimum = mean_field_nelbo(world, batch.x)
    alone, little, much = (float((nelbo - optimum).mean()) for nelbo in nelbos)
    assert 0 < much < 0.2 * alone
    assert much < little < alone


def mean_field_nelbo(world, x):
    """[B]: the least -ELBO of any diagonal Gaussian: at the mean of the posterior, with variances 1 / Λ_ii."""
    mean, scale = world.posterior_mean(x), world.precision.diagonal().rsqrt().expand(len(x), -1)
    return world.expected_nll(mean, scale, x) + world.kl(mean, scale)


def test_every_draw_uses_noise_that_no_step_has_seen(world, recording):
    batch, rng, scheme = world.sample(5), recording(), Amortized(num_steps=4)
    state = infer(scheme, world, batch, rng)
    guide = scheme.guide(world, state, batch, rng)
    for _ in range(2):
        guide()
    scheme.distribution(state, rng).rsample()
    scheme.posterior(state, 6, rng)
    numbers = torch.cat([numbers.flatten() for _, numbers in rng.normals])
    assert len(numbers) == (4 + 2 + 1 + 6) * 5 * 3
    assert len(numbers.unique()) == len(numbers)


def test_nothing_but_the_guide_of_a_slow_step_has_a_gradient(world, model):
    batch, rng, scheme = world.sample(5), SequenceNoise(0), Amortized(num_steps=2)
    start = scheme.init(model, batch, rng)
    state, info = scheme.step(model, start, batch, rng)
    q = scheme.distribution(state, rng)
    tensors = [
        *vars(start).values(),
        *vars(state).values(),
        info.objective,
        q.rsample(),
        q.mean,
        scheme.posterior(state, 2, rng).samples,
    ]
    assert not any(tensor.requires_grad for tensor in tensors)
    guide = scheme.guide(model, state, batch, rng)
    assert poutine.trace(guide).get_trace().nodes["z"]["value"].requires_grad
    only_the_encoder(model).encoder.requires_grad_(False)
    assert not poutine.trace(guide).get_trace().nodes["z"]["value"].requires_grad


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_model_without_an_encoder_is_refused(num_steps, world, ltm, texts):
    def plain(batch):
        return world(batch)

    with pytest.raises(ValueError, match=r"encode\(batch\)"):
        infer(Amortized(num_steps), plain, world.sample(2), SequenceNoise(0))
    with pytest.raises(ValueError, match="no encoder"):
        infer(Amortized(num_steps), ltm, texts, SequenceNoise(0))


@pytest.mark.parametrize("name", ["learning_rate", "epsilon"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Amortized(**{name: 0.0})


# --- the slow step


@pytest.mark.parametrize("num_steps", [0, 3])
def test_the_guide_is_the_refined_posterior_and_its_gradient_that_of_the_elbo_there(num_steps, world, model, recording):
    """With respect to mean and log scale of q, and from there to the encoder as if it had proposed them itself."""
    batch, rng, scheme = world.sample(5), recording(), Amortized(num_steps, learning_rate=0.3)
    state = infer(scheme, model, batch, rng)
    guide = scheme.guide(model, state, batch, rng)
    site = poutine.trace(guide).get_trace(batch).nodes["z"]
    assert site["fn"].mean.equal(state.mean)
    assert site["fn"].stddev.equal(state.log_scale.exp())

    loss = elbo_backward(model, guide, batch, num_tokens=30.0)
    _, noise = rng.normals[-1]
    scale = state.log_scale.exp()
    z = state.mean + scale * noise
    of_z = -(batch.x - z @ world.loadings.T) @ world.loadings / world.noise_scale**2
    of_mean = (of_z + state.mean) / 30
    of_log_scale = (of_z * noise * scale + scale.square() - 1) / 30
    expected = {"matrix": of_mean.T @ batch.x, "offset": of_mean.sum(0), "log_scale": of_log_scale.sum(0)}
    for name, gradient in expected.items():
        assert torch.allclose(getattr(model.encoder, name).grad, gradient, rtol=1e-9), name
    nll = world.neg_log_likelihood(z, batch.x).sum().item()
    assert loss.nelbo == pytest.approx(nll + world.kl(state.mean, scale).sum().item(), rel=1e-10)
    # Refined, the posterior is another than the encoder's, and so would the gradient be at that.
    assert (state.mean - model.encode(batch)[0]).abs().max() > 0.1 or num_steps == 0


def test_without_refinement_the_gradient_is_on_average_that_of_the_closed_form(world, model):
    """∂/∂φ [KL(q ‖ p) - E_q log p(x | z)], by autograd of the formula, against 50 times 1,000 draws of z."""
    batch, scheme = world.sample(1)[torch.zeros(1000, dtype=torch.int64)], Amortized()
    weights = list(model.encoder.parameters())
    gradients = []
    for seed in range(50):
        rng = BatchNoise(torch.Generator().manual_seed(seed))
        model.zero_grad()
        guide = scheme.guide(model, infer(scheme, model, batch, rng), batch, rng)
        elbo_backward(model, guide, batch, len(batch))
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    gradients = torch.stack(gradients)

    matrix, offset, log_scale = weights
    mean, scale = batch.x[:1] @ matrix.T + offset, log_scale.exp()[None]
    nelbo = world.expected_nll(mean, scale, batch.x[:1]) + world.kl(mean, scale)
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(nelbo.sum(), weights)])
    error = gradients.std(0) / math.sqrt(50)
    assert ((gradients.mean(0) - expected).abs() < 5 * error).all()
    assert (expected.abs() > 20 * error).float().mean() > 0.5


def test_what_a_linear_encoder_learns_is_the_optimum_of_mean_field(linear_gaussian, learnable):
    """Its matrix is that of the posterior's mean, Λ⁻¹ Wᵀ / s², its scale 1 / √Λ_ii, and the bound what they give."""
    world, _ = linear_gaussian.with_posterior_variances((0.1, 0.3, 0.8))
    model = only_the_encoder(learnable(world, has_encoder=True))
    scheme, num_steps = Amortized(), 800
    optimizer = WeightOptimizer(model, *schedule(0.03, num_steps))
    for step in range(num_steps):
        batch, rng = world.sample(128, seed=step + 10), BatchNoise(torch.Generator().manual_seed(step))
        guide = scheme.guide(model, infer(scheme, model, batch, rng), batch, rng)
        elbo_backward(model, guide, batch, len(batch))
        assert optimizer.update(step)
    encoder = model.encoder
    matrix = torch.linalg.solve(world.precision, world.loadings.T) / world.noise_scale**2
    assert torch.allclose(encoder.matrix, matrix, rtol=0, atol=0.02)
    assert torch.allclose(encoder.offset, torch.zeros(3, dtype=torch.float64), rtol=0, atol=0.02)
    assert torch.allclose(encoder.log_scale, -0.5 * world.precision.diagonal().log(), rtol=0, atol=0.02)
    # The test can tell the optimum from the scales of the posterior.
    assert (world.precision.inverse().diagonal() * world.precision.diagonal()).log().max() > 10 * 0.02

    batch = world.sample(100)
    state = infer(scheme, model, batch, SequenceNoise(0))
    scale = state.log_scale.exp()
    excess = world.expected_nll(state.mean, scale, batch.x) + world.kl(state.mean, scale)
    excess = excess - mean_field_nelbo(world, batch.x)
    assert excess.min() > -1e-9
    assert excess.mean() < 0.01
    # It was worth learning: the prior is nats away.
    zero = torch.zeros_like(state.mean)
    assert (world.expected_nll(zero, zero + 1, batch.x) - mean_field_nelbo(world, batch.x)).mean() > 1


def written_by(model, num_texts):
    """Texts that the model has written."""
    tokens = model(num_sequences=num_texts)
    is_end = (tokens == model.end_of_text).long()
    weights = (is_end.cumsum(-1) - is_end == 0).double()
    return TokenBatch(tokens, weights, torch.arange(num_texts), weights.sum(1).long())


def test_an_encoder_of_texts_learns_and_refinement_adds_to_it(ltm_with_encoder):
    """From texts of the model itself, whose decoder is held; the bound is that of other texts."""
    model, scheme, num_steps = ltm_with_encoder, Amortized(), 60
    with torch.no_grad():
        model.encoder.head.weight.zero_()
    held_out = written_by(model, 64)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def excess(of, over):
        """Mean and standard error over texts of the difference of two bounds, [nats]."""
        nelbos = []
        for scheme in (of, over):
            rng = SequenceNoise(0)
            q = scheme.distribution(infer(scheme, model, held_out, rng), rng)
            nelbos.append(bounds.elbo(model, held_out, q, num_samples=16).nelbo)
        difference = nelbos[0] - nelbos[1]
        return difference.mean(), difference.std() / math.sqrt(len(difference))

    assert excess(scheme, PRIOR) == (0, 0)
    only_the_encoder(model)
    optimizer = WeightOptimizer(model, *schedule(0.03, num_steps))
    for step in range(num_steps):
        batch, rng = written_by(model, 64), BatchNoise(torch.Generator().manual_seed(step))
        guide = scheme.guide(model, infer(scheme, model, batch, rng), batch, rng)
        elbo_backward(model, guide, batch, float(batch.weights.sum()))
        assert optimizer.update(step)
    for name, weight in model.named_parameters():
        assert weight.equal(before[name]) != name.startswith("encoder."), name
    # With vi's learning rate it would not: the noise of its steps here costs more than they find.
    refined = Amortized(num_steps=16, learning_rate=0.02)
    for better, worse in ((scheme, PRIOR), (refined, scheme)):
        mean, error = excess(better, worse)
        assert mean < -5 * error


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_encoder_that_is_not_finite_costs_the_step_and_nothing_else(bad, ltm_with_encoder, texts):
    model, scheme, rng = ltm_with_encoder, Amortized(num_steps=2), SequenceNoise(0)
    with torch.no_grad():
        model.encoder.head.weight[0, 0] = bad
    optimizer = WeightOptimizer(model, *schedule(0.1, 10))
    before = [weight.detach().clone() for weight in model.parameters()]
    with pyro.validation_enabled(False):
        state = infer(scheme, model, texts, rng)
        loss = elbo_backward(model, scheme.guide(model, state, texts, rng), texts, 1.0)
    assert state.num_skipped.tolist() == [2] * 5
    assert not math.isfinite(loss.nelbo)
    assert not optimizer.update(0, is_usable=math.isfinite(loss.nelbo))
    for weight, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight.nan_to_num(7.0), other.nan_to_num(7.0))
