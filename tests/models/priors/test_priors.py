"""The prior's door: a prior is one file and one line of PRIORS. A mixture of two normals goes through it."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import ltm_pyro
from ltm_pyro import train
from ltm_pyro.inference.base import log_joint
from ltm_pyro.models import PRIORS, DecoderConfig, LatentThoughtModel, Prior, Sampling, TokenBatch, simulate

VOCAB_SIZE, END = 6, 4
CONFIG = DecoderConfig(num_layers=2, width=8, num_heads=2, hidden=12, num_slots=3, window=3, length=5)
GREEDY = Sampling(temperature=0)


class Mixture(Prior):
    """Two normals of scale 0.5 around learned means, the second twice as likely as the first."""

    summary = "two normals with learned means"

    def __init__(self, latent_shape):
        super().__init__(latent_shape)
        self.means = torch.nn.Parameter(torch.stack([torch.full(latent_shape, -2.0), torch.full(latent_shape, 2.0)]))

    def distribution(self, like):
        weights = dist.Categorical(torch.tensor([1.0, 2.0]).to(like))
        return dist.MixtureSameFamily(weights, dist.Normal(self.means.to(like), 0.5).to_event(3))


@pytest.fixture
def mixture_model(monkeypatch):
    """A model in float64 with weights so large that z decides what it writes, under the mixture."""
    monkeypatch.setitem(PRIORS, "mixture", Mixture)
    model = LatentThoughtModel(dataclasses.replace(CONFIG, prior="mixture"), VOCAB_SIZE, END)
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    return model.double()


def random_batch():
    tokens = torch.randint(VOCAB_SIZE - 1, (3, CONFIG.length))
    return TokenBatch(tokens, torch.ones(tokens.shape).double(), torch.arange(3), torch.full((3,), 5))


def mixture_log_density(z, means):
    """log Σ_k w_k N(z; m_k, 0.5² I), written out."""
    size = math.prod(CONFIG.latent_shape)
    terms = [
        math.log(weight)
        - ((z - mean) ** 2 / (2 * 0.25)).flatten(-3).sum(-1)
        - size * 0.5 * math.log(2 * math.pi * 0.25)
        for weight, mean in zip((1 / 3, 2 / 3), means, strict=True)
    ]
    return torch.stack(terms).logsumexp(0)


@pytest.mark.parametrize("name", PRIORS)
def test_a_registered_prior_has_a_line_of_help_and_a_z_of_the_models_shape(name):
    prior = PRIORS[name](CONFIG.latent_shape)
    assert prior.summary
    distribution = prior.distribution(like=torch.zeros((), dtype=torch.float64))
    assert (distribution.batch_shape, distribution.event_shape) == ((), CONFIG.latent_shape)
    z = distribution.expand((4,)).sample()
    assert (z.shape, z.dtype) == ((4, *CONFIG.latent_shape), torch.float64)
    assert distribution.log_prob(z).shape == (4,)
    # The map applies to each z by itself, however many dimensions stand before [L, S, D].
    assert torch.equal(prior.thoughts(z.view(2, 2, *CONFIG.latent_shape)).flatten(0, 1), prior.thoughts(z))
    assert torch.equal(torch.stack([prior.thoughts(one) for one in z]), prior.thoughts(z))


def test_the_default_prior_is_the_standard_normal_of_the_paper():
    assert DecoderConfig().prior == "standard"
    z = torch.randn(5, *CONFIG.latent_shape, dtype=torch.float64)
    prior = LatentThoughtModel(CONFIG, VOCAB_SIZE, END).prior
    log_normal = -0.5 * (z**2 + math.log(2 * math.pi)).flatten(1).sum(1)
    torch.testing.assert_close(prior.distribution(like=z).log_prob(z), log_normal)
    assert prior.thoughts(z) is z


def test_the_log_joint_scores_z_by_the_mixture(mixture_model):
    batch, z = random_batch(), torch.randn(2, 3, *CONFIG.latent_shape, dtype=torch.float64)
    joint = log_joint(mixture_model, batch, z, num_sample_dims=1)
    torch.testing.assert_close(joint.log_prior, mixture_log_density(z, mixture_model.prior.means))
    standard = LatentThoughtModel(CONFIG, VOCAB_SIZE, END).double()
    standard.decoder.load_state_dict(mixture_model.decoder.state_dict())
    torch.testing.assert_close(joint.log_likelihood, log_joint(standard, batch, z, num_sample_dims=1).log_likelihood)


def test_z_of_simulated_texts_is_drawn_from_the_mixture(mixture_model):
    num_texts = 300
    z, batch = simulate(mixture_model, num_texts, 0, seed=1)
    center = z.flatten(1).mean(1)
    # A mean over all numbers of z is normal around -2 or 2, with a standard error of 0.5 / √48: none lies between.
    assert (center.abs() - 2).abs().max() < 6 * 0.5 / math.sqrt(z[0].numel())
    share = (center > 0).double().mean().item()
    assert abs(share - 2 / 3) < 5 * math.sqrt(2 / 9 / num_texts)
    assert batch.tokens.shape == (num_texts, CONFIG.length)


def test_a_step_of_svi_moves_decoder_and_mixture(mixture_model):
    """The means move along the gradient of log p(z), the decoder along that of log p(x | z)."""
    batch, step_size = random_batch(), 0.01
    z = torch.randn(3, *CONFIG.latent_shape, dtype=torch.float64)
    before = {name: weight.detach().clone() for name, weight in mixture_model.named_parameters()}
    means = before["prior.means"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture_log_density(z, means).sum(), means)

    def guide(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            pyro.sample("z", dist.Delta(z, event_dim=3))

    SVI(mixture_model, guide, pyro.optim.SGD({"lr": step_size}), Trace_ELBO()).step(batch)
    after = dict(mixture_model.named_parameters())
    torch.testing.assert_close(after["prior.means"], before["prior.means"] + step_size * gradient)
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())


def test_a_text_from_a_z_is_the_one_that_its_thought_vectors_give_whatever_the_prior(mixture_model, monkeypatch):
    """A map that turns z around: what is written from z is what a model with the standard prior writes from -z."""
    z = torch.randn(8, *CONFIG.latent_shape, dtype=torch.float64)
    plain = mixture_model.generate(z, 7, sampling=GREEDY)
    turned = mixture_model.generate(-z, 7, sampling=GREEDY)
    assert not torch.equal(plain, turned)
    monkeypatch.setattr(Mixture, "thoughts", lambda self, z: -z)
    assert torch.equal(mixture_model.generate(z, 7, sampling=GREEDY), turned)
    assert torch.equal(torch.stack(list(mixture_model.stream(z, 7, sampling=GREEDY)), 1), turned[:, :7])
    conditioned = poutine.trace(pyro.condition(mixture_model, data={"z": z})).get_trace(num_sequences=8)
    assert torch.equal(conditioned.nodes["tokens"]["fn"].u, -z)


def test_an_encoder_proposes_relative_to_the_mean_and_scale_of_the_prior(monkeypatch):
    """Untrained it proposes the prior's moments; of the mixture they are known in closed form."""
    monkeypatch.setitem(PRIORS, "mixture", Mixture)
    config = dataclasses.replace(CONFIG, prior="mixture", encoder_layers=1)
    model, batch = LatentThoughtModel(config, VOCAB_SIZE, END).double(), random_batch()
    mean, log_scale = model.encode(batch)
    # E z = (-2 + 2 · 2) / 3, and Var z = 0.5² + E m² - (E m)² = 0.25 + 4 - 4/9.
    expected = torch.full((3, *CONFIG.latent_shape), 2 / 3, dtype=torch.float64)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(log_scale, torch.full_like(expected, 0.5 * math.log(0.25 + 4 - 4 / 9)))
    torch.nn.init.normal_(model.encoder.head.weight)
    proposed = model.encoder(model.decoder.embedding(batch.tokens), batch.weights)
    mean, log_scale = model.encode(batch)
    torch.testing.assert_close((mean - 2 / 3) / math.sqrt(0.25 + 4 - 4 / 9), proposed[0])
    torch.testing.assert_close(log_scale - 0.5 * math.log(0.25 + 4 - 4 / 9), proposed[1])


def test_the_help_of_training_has_a_line_for_each_prior(run_main):
    status, out, _ = run_main(train.main, "--help-all")
    assert status == 0
    help_text = " ".join(out.replace("│", " ").split())
    assert f"--model.prior {{{','.join(PRIORS)}}}" in help_text
    assert all(f"{name}: {prior.summary}" in help_text for name, prior in PRIORS.items())


def test_a_run_with_a_learned_prior_trains_it_and_loads_with_it(train_run, tmp_path):
    train_run(tmp_path, "vi", "--model.prior", "affine")
    ltm = ltm_pyro.load(tmp_path / "vi")
    assert ltm.config.model.prior == "affine"
    start = PRIORS["affine"](ltm.config.model.latent_shape).state_dict()
    for name, weight in ltm.model.prior.state_dict().items():
        assert not torch.equal(weight, start[name]), name
