"""The affine prior: u = m + s z with z ~ N(0, I), where m and s are learned.

The oracles: the model with the standard prior, `pyro.infer.SVI` and the chain rule, and closed forms of a world in
which the text is a linear-Gaussian function of u.
"""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.base import log_joint
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, Sampling, TokenBatch, TokenSequence, simulate
from ltm_pyro.models.priors.affine import Affine

VOCAB_SIZE, END = 6, 4
CONFIG = DecoderConfig(num_layers=2, width=8, num_heads=2, hidden=12, num_slots=3, window=3, length=5, prior="affine")
STANDARD = dataclasses.replace(CONFIG, prior="standard")
GREEDY = Sampling(temperature=0)


def sharp_model(config=CONFIG, dtype=torch.float64):
    """A model with weights so large that z decides what it writes; its prior is as it was made."""
    pyro.set_rng_seed(3)
    model = LatentThoughtModel(config, VOCAB_SIZE, END)
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    return model.to(dtype)


def moved_model(dtype=torch.float64):
    """A model whose prior is far from the standard one."""
    model = sharp_model()
    torch.nn.init.normal_(model.prior.mean)
    torch.nn.init.normal_(model.prior.scale)
    return model.to(dtype)


def mapped(model, z):
    """m + s z, written out with one number at a time."""
    mean, scale = model.prior.mean.detach(), model.prior.scale.detach()
    u = torch.empty_like(z)
    for index in torch.cartesian_prod(*map(torch.arange, CONFIG.latent_shape)).tolist():
        u[..., *index] = mean[*index].item() + scale[*index].item() * z[..., *index]
    return u


def random_z(*batch_shape, dtype=torch.float64):
    return torch.randn(*batch_shape, *CONFIG.latent_shape, dtype=dtype)


def random_batch(dtype=torch.float64):
    tokens = torch.randint(VOCAB_SIZE - 1, (3, CONFIG.length))
    return TokenBatch(tokens, torch.ones(3, CONFIG.length, dtype=dtype), torch.arange(3), torch.full((3,), 5))


def test_at_its_start_every_figure_is_that_of_the_standard_prior_bit_for_bit():
    model, standard, batch = sharp_model(), sharp_model(STANDARD), random_batch()
    scheme, rng = SCHEMES["vi"](num_steps=3), SequenceNoise(0)
    figures = []
    for each in (model, standard):
        state = infer(scheme, each, batch, rng)
        joint = log_joint(each, batch, scheme.posterior(state, 4, rng).samples[0], num_sample_dims=1)
        elbo_backward(each, scheme.guide(each, state, batch, rng), batch, 1.0)
        z, texts = simulate(each, 5, 0, seed=2)
        figures.append([state.mean, state.log_scale, joint.log_likelihood, joint.log_prior, z, texts.tokens])
        figures[-1] += [each.generate(z, 8, sampling=GREEDY), *(weight.grad for weight in each.decoder.parameters())]
    assert all(torch.equal(*pair) for pair in zip(*figures, strict=True))


def test_the_names_of_the_standard_priors_weights_stay_and_the_affine_one_adds_two():
    with torch.device("meta"):
        names, standard = (set(LatentThoughtModel(each, 6, 4).state_dict()) for each in (CONFIG, STANDARD))
    assert names - standard == {"prior.mean", "prior.scale"}
    assert all(name.startswith("decoder.") for name in standard)


def test_a_state_dict_brings_mean_and_scale_along():
    model, other = moved_model(), sharp_model()
    other.load_state_dict(model.state_dict())
    batch, z = random_batch(), random_z(3)
    scores = [poutine.trace(pyro.condition(each, data={"z": z})).get_trace(batch) for each in (model, other)]
    assert scores[0].log_prob_sum().item() == scores[1].log_prob_sum().item()
    with pytest.raises(RuntimeError, match=r"prior\.mean"):
        sharp_model(STANDARD).load_state_dict(model.state_dict())


def test_z_stays_standard_normal_and_the_layers_attend_to_the_mapped_z():
    model, batch, z = moved_model(), random_batch(), random_z(4, 3)
    with pyro.plate("draws", 4, dim=-2):
        trace = poutine.trace(pyro.condition(model, data={"z": z})).get_trace(batch)
    trace.compute_log_prob()
    log_normal = -0.5 * (z**2 + math.log(2 * math.pi)).flatten(2).sum(2)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], log_normal)
    texts = TokenSequence(model.decoder, mapped(model, z), END, CONFIG.length, batch.weights)
    torch.testing.assert_close(trace.nodes["tokens"]["log_prob"], texts.log_prob(batch.tokens))


def test_generation_from_a_z_is_that_of_the_mapped_thought_vectors_by_teacher_forcing():
    """Each token that is written is the most likely one, by the program, after those before it."""
    model, length = moved_model(), 9
    z = random_z(6)
    written = model.generate(z, length, sampling=GREEDY)
    assert torch.equal(torch.stack(list(model.stream(z, length, sampling=GREEDY)), 1), written[:, :length])
    hidden = model.decoder(model.decoder.inputs(written), mapped(model, z))
    best, is_end = model.decoder.logits(hidden).argmax(-1), (written == END).long()
    is_text = is_end.cumsum(1) - is_end == 0
    assert torch.equal(best[is_text], written[is_text])
    # Were z not mapped, or mapped twice, other texts would come out.
    for unmapped in (z, mapped(model, mapped(model, z))):
        other = model.decoder.logits(model.decoder(model.decoder.inputs(written), unmapped)).argmax(-1)
        assert not torch.equal(other[is_text], written[is_text])


def test_the_program_writes_from_the_mapped_thought_vectors():
    """Prior predictive texts have the frequencies that teacher forcing at the mapped z gives them."""
    model, num_draws = moved_model(), 4000
    z = random_z(2)
    probabilities = model.decoder.logits(model.decoder(torch.full((2, 1), VOCAB_SIZE - 1), mapped(model, z)))
    probabilities = probabilities[:, 0].softmax(-1).detach()
    conditioned = pyro.condition(model, data={"z": z.repeat_interleave(num_draws, 0)})
    first = conditioned(num_sequences=2 * num_draws).view(2, num_draws, -1)[..., 0]
    counts = torch.nn.functional.one_hot(first, VOCAB_SIZE - 1).sum(1)
    errors = (num_draws * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - num_draws * probabilities).abs() < 5 * errors + 1).all()


def test_a_slow_step_moves_mean_and_scale_as_svi_of_pyro_does():
    """d/dm = Σ_b g_b and d/ds = Σ_b z_b g_b, where g_b is the gradient of log p(x_b | u_b) with respect to u_b."""
    model, batch, z = moved_model(), random_batch(), random_z(3)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    u = mapped(model, z).requires_grad_()
    log_likelihood = TokenSequence(model.decoder, u, END, CONFIG.length, batch.weights).log_prob(batch.tokens).sum()
    (gradient,) = torch.autograd.grad(log_likelihood, u)

    def guide(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            pyro.sample("z", dist.Delta(z, event_dim=3))

    elbo_backward(model, guide, batch, 1.0)
    step_size = 0.01
    slow = {name: weight - step_size * weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    SVI(model, guide, pyro.optim.SGD({"lr": step_size}), Trace_ELBO()).step(batch)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(slow[name], weight, rtol=1e-11, atol=1e-13)
    expected = {"prior.mean": gradient.sum(0), "prior.scale": (z * gradient).sum(0)}
    for name, slope in expected.items():
        assert slope.abs().min() > 0
        torch.testing.assert_close(slow[name], before[name] + step_size * slope, rtol=1e-10, atol=1e-12)


def test_parameters_of_the_prior_do_not_decay_whatever_their_shape():
    model = moved_model()
    model.prior.matrix = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = WeightOptimizer(model, OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    assert optimizer.update(0)
    for name, weight in model.named_parameters():
        decays = "norm" not in name and not name.startswith("prior")
        assert torch.equal(weight, before[name]) != decays, name


class LinearGaussianWorld(torch.nn.Module):
    """x_b ~ N(W u_b, r²) for u = m + s z: what the affine prior says of texts, were the decoder linear."""

    def __init__(self):
        super().__init__()
        self.prior = Affine((1, 1, 2)).double()
        self.loadings = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.7, 0.1]], dtype=torch.float64)
        self.noise_scale = 0.5
        self.prior.mean.data = torch.tensor([[[0.4, -1.0]]], dtype=torch.float64)
        self.prior.scale.data = torch.tensor([[[2.0, -0.3]]], dtype=torch.float64)

    def forward(self, batch):
        pyro.module("prior", self.prior)
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", self.prior.distribution(like=self.loadings))
            mean = self.prior.thoughts(z).flatten(-3) @ self.loadings.T
            pyro.sample("x", dist.Normal(mean, self.noise_scale).to_event(1), obs=batch.x)


@dataclasses.dataclass
class Observed:
    x: torch.Tensor
    sequence_ids: torch.Tensor

    def __len__(self):
        return len(self.x)


def test_evidence_of_a_linear_gaussian_world_is_that_of_a_normal_with_the_learned_mean_and_scale():
    """log p(x) = log N(x; W m, W diag(s²) Wᵀ + r² I), by importance sampling with the exact posterior of z as q."""
    world = LinearGaussianWorld()
    x = torch.randn(4, 3, dtype=torch.float64)
    mean, scale, loadings = world.prior.mean.flatten(), world.prior.scale.flatten(), world.loadings
    variance = world.noise_scale**2
    covariance = loadings @ torch.diag(scale**2) @ loadings.T + variance * torch.eye(3)
    expected = dist.MultivariateNormal(loadings @ mean, covariance).log_prob(x)
    # The posterior of z, whose likelihood is that of a regression with the loadings W diag(s) and the offset W m.
    slopes = loadings * scale
    precision = torch.eye(2) + slopes.T @ slopes / variance
    center = (x - loadings @ mean) @ slopes @ precision.inverse() / variance
    q = dist.MultivariateNormal(center, precision_matrix=precision)
    z = q.sample()
    trace = poutine.trace(pyro.condition(world, data={"z": z.view(4, 1, 1, 2)})).get_trace(Observed(x, torch.arange(4)))
    trace.compute_log_prob()
    evidence = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"] - q.log_prob(z)
    torch.testing.assert_close(evidence, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thought_vectors_are_at_least_float32_as_z_is(dtype):
    model = moved_model(dtype)
    trace = poutine.trace(model).get_trace(num_sequences=2)
    z, u = trace.nodes["z"]["value"], trace.nodes["tokens"]["fn"].u
    assert z.dtype == u.dtype == torch.float32
    torch.testing.assert_close(u, mapped(model, z), rtol=1e-6, atol=1e-6)
    assert model.generate(z, 4).shape == (2, 4)


def test_a_decoder_that_computes_in_bfloat16_leaves_mean_and_scale_and_their_gradients_in_float32():
    model, batch = moved_model(torch.float32), random_batch(torch.float32)
    model.decoder.compute_dtype = torch.bfloat16
    poutine.trace(model).get_trace(batch).log_prob_sum().backward()
    for weight in model.prior.parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert weight.grad.abs().min() > 0
