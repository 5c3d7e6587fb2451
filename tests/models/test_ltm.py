"""The model is a Pyro program: its trace, its conditioning and its predictive distributions are Pyro's."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltm_pyro.inference import PRIOR, SequenceNoise, infer
from ltm_pyro.inference.base import log_joint
from ltm_pyro.inference.svi import elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, TokenBatch

VOCAB_SIZE, END, BEGIN = 6, 4, 5
CONFIG = DecoderConfig(num_layers=2, width=8, num_heads=2, hidden=12, num_slots=3, window=3, length=5)


def sharp_model(dtype=torch.float64):
    """A model with weights so large that z decides what it writes."""
    model = LatentThoughtModel(CONFIG, VOCAB_SIZE, END)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    return model.to(dtype)


def random_z(*batch_shape):
    return torch.randn(*batch_shape, *CONFIG.latent_shape, dtype=torch.float64)


def random_batch(batch_size=3, dtype=torch.float64):
    return TokenBatch(
        tokens=torch.randint(VOCAB_SIZE - 1, (batch_size, CONFIG.length)),
        weights=torch.rand(batch_size, CONFIG.length, dtype=dtype),
        sequence_ids=torch.arange(batch_size),
        num_bytes=torch.full((batch_size,), CONFIG.length),
    )


def naive_log_likelihood(model, z, tokens, weights):
    """Σ_n weight_n · log p(x_n | z, x_<n), position by position."""
    inputs = torch.cat([torch.full((len(tokens), 1), BEGIN), tokens], dim=1)
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for n in range(tokens.shape[1]):
        exponentials = model.decoder.logits(model.decoder(inputs[:, : n + 1], z)[:, -1]).exp()
        probabilities = exponentials / exponentials.sum(-1, keepdim=True)
        total = total + weights[:, n] * probabilities[torch.arange(len(tokens)), tokens[:, n]].log()
    return total


def naive_log_prior(z):
    return -0.5 * (z**2).flatten(1).sum(1) - 0.5 * math.prod(CONFIG.latent_shape) * math.log(2 * math.pi)


def first_token_probabilities(model, z):
    exponentials = model.decoder.logits(model.decoder(torch.full((len(z), 1), BEGIN), z)[:, -1]).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


@pytest.mark.parametrize("observed", [True, False])
def test_the_sites_are_z_and_tokens_under_one_plate_of_sequences(observed):
    model = sharp_model()
    batch = random_batch() if observed else None
    trace = poutine.trace(model).get_trace(batch, num_sequences=3)
    assert set(trace.stochastic_nodes) | set(trace.observation_nodes) == {"sequences", "z", "tokens"}
    assert ("tokens" in trace.observation_nodes) == observed
    for name, event_shape in (("z", CONFIG.latent_shape), ("tokens", (CONFIG.length,))):
        site = trace.nodes[name]
        assert site["fn"].batch_shape == (3,)
        assert site["fn"].event_shape == event_shape
        assert site["value"].shape == (3, *event_shape)
        (frame,) = site["cond_indep_stack"]
        assert (frame.name, frame.size, frame.dim) == ("sequences", 3, -1)
        assert site["scale"] == 1
    assert trace.nodes["tokens"]["value"].dtype == torch.int64


def test_log_prob_of_a_trace_is_the_normal_density_of_z_plus_the_log_likelihood_of_the_tokens():
    model = sharp_model()
    batch = random_batch()
    trace = poutine.trace(model).get_trace(batch)
    z = trace.nodes["z"]["value"]
    expected = naive_log_prior(z) + naive_log_likelihood(model, z, batch.tokens, batch.weights)
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum(), rtol=1e-11, atol=1e-11)
    trace.compute_log_prob()
    by_sequence = trace.nodes["z"]["log_prob"] + trace.nodes["tokens"]["log_prob"]
    torch.testing.assert_close(by_sequence, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(trace.nodes["tokens"]["value"], batch.tokens)


def test_z_is_drawn_from_the_standard_normal():
    batch = random_batch(batch_size=2_000)
    trace = poutine.trace(sharp_model()).get_trace(batch)
    z = trace.nodes["z"]["value"]
    n = z.numel()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    # Fourth moment of the normal is 3, so the variance of z² is 2.
    assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / n)


def test_conditioning_on_tokens_is_observing_them_until_end_of_text():
    model = sharp_model()
    tokens = torch.tensor([[0, 1, END, END, END], [3, 2, 1, 0, 2], [END] * 5])
    weights = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.float64)
    conditioned = pyro.condition(model, data={"tokens": tokens})
    trace = poutine.trace(conditioned).get_trace(num_sequences=3)
    site, z = trace.nodes["tokens"], trace.nodes["z"]["value"]
    assert site["is_observed"]
    assert torch.equal(site["value"], tokens)
    expected = naive_log_prior(z) + naive_log_likelihood(model, z, tokens, weights)
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum(), rtol=1e-11, atol=1e-11)


def test_the_program_returns_the_tokens():
    model = sharp_model()
    batch = random_batch()
    assert torch.equal(model(batch), batch.tokens)
    assert model(num_sequences=4).shape == (4, CONFIG.length)
    assert model().shape == (1, CONFIG.length)


def test_the_program_draws_z_and_then_tokens_one_by_one():
    model = sharp_model()
    pyro.set_rng_seed(11)
    trace = poutine.trace(model).get_trace(num_sequences=20)

    pyro.set_rng_seed(11)
    z = random_z(20)
    texts = torch.full((20, 1), BEGIN)
    ended = torch.zeros(20, dtype=torch.bool)
    for _ in range(CONFIG.length):
        logits = model.decoder.logits(model.decoder(texts, z)[:, -1])
        # By the inverse of the distribution function, of the same uniform numbers.
        uniform = torch.rand(20, 1, dtype=torch.float64)
        drawn = (logits.double().softmax(-1).cumsum(-1) <= uniform).sum(-1)
        drawn[ended] = END
        ended |= drawn == END
        texts = torch.cat([texts, drawn[:, None]], dim=1)
    assert torch.equal(trace.nodes["z"]["value"], z)
    assert torch.equal(trace.nodes["tokens"]["value"], texts[:, 1:])


@pytest.mark.parametrize("parallel", [True, False])
def test_prior_predictive_is_unconditional_generation(parallel):
    model = sharp_model()
    num_samples = 40
    drawn = Predictive(model, num_samples=num_samples, parallel=parallel)(num_sequences=3)
    assert drawn["z"].shape == (num_samples, 3, *CONFIG.latent_shape)
    tokens = drawn["tokens"]
    assert tokens.shape == (num_samples, 3, CONFIG.length)
    assert (tokens.min(), tokens.max()) == (0, VOCAB_SIZE - 2)
    after_end = (tokens == END).long().cumsum(-1) - (tokens == END).long() > 0
    assert (tokens[after_end] == END).all()
    # Neither the samples nor the sequences of one sample share their z.
    assert len(drawn["z"].flatten(0, 1).flatten(1).unique(dim=0)) == num_samples * 3


@pytest.mark.parametrize(("parallel", "num_samples"), [(True, 5_000), (False, 100)])
def test_posterior_predictive_draws_tokens_from_the_given_z(parallel, num_samples):
    model = sharp_model()
    z = random_z(30)
    probabilities = first_token_probabilities(model, z).detach()
    # The two z whose texts differ the most: drawing from the wrong z, or from the prior, shows.
    distances = torch.cdist(probabilities, probabilities)
    apart = list(divmod(distances.argmax().item(), 30))
    assert distances[*apart] > 0.1
    z, probabilities = z[apart], probabilities[apart]
    posterior_samples = {"z": z.expand(num_samples, *z.shape)}
    drawn = Predictive(model, posterior_samples, parallel=parallel)(num_sequences=2)["tokens"]
    assert drawn.shape == (num_samples, 2, CONFIG.length)
    for b in range(2):
        for token in range(VOCAB_SIZE - 1):
            probability = probabilities[b, token].item()
            frequency = (drawn[:, b, 0] == token).double().mean().item()
            standard_error = math.sqrt(probability * (1 - probability) / num_samples)
            assert abs(frequency - probability) < 5 * standard_error + 1 / num_samples


@pytest.mark.parametrize(
    ("of_decoder", "of_z"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_z_is_at_least_float32_whatever_the_decoder_computes_in(of_decoder, of_z):
    model = sharp_model(of_decoder)
    for batch in (None, random_batch(dtype=torch.float32)):
        trace = poutine.trace(model).get_trace(batch, num_sequences=3)
        assert trace.nodes["z"]["value"].dtype == of_z
        assert trace.nodes["tokens"]["value"].dtype == torch.int64
        trace.compute_log_prob()
        assert trace.nodes["z"]["log_prob"].dtype == of_z
        assert trace.nodes["tokens"]["log_prob"].dtype == of_z


def test_outer_plates_draw_one_z_for_each_particle_and_sequence():
    model = sharp_model()
    batch = random_batch()
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (4, 3, *CONFIG.latent_shape)
    looped = torch.stack([naive_log_likelihood(model, one, batch.tokens, batch.weights) for one in z])
    torch.testing.assert_close(trace.nodes["tokens"]["log_prob"], looped, rtol=1e-11, atol=1e-11)


def test_a_step_of_svi_moves_the_weights_along_the_gradient_of_the_log_likelihood():
    model = sharp_model()
    batch = random_batch()
    z = random_z(3)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    log_likelihood = naive_log_likelihood(model, z, batch.tokens, batch.weights).sum()
    gradients = dict(zip(before, torch.autograd.grad(log_likelihood, list(model.parameters())), strict=True))

    def point_guide(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            pyro.sample("z", dist.Delta(z, event_dim=3))

    step_size = 0.01
    svi = SVI(model, point_guide, pyro.optim.SGD({"lr": step_size}), Trace_ELBO())
    loss = svi.step(batch)
    assert loss == pytest.approx(-(naive_log_prior(z).sum() + log_likelihood).item(), abs=1e-10)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert gradients[name].abs().max() > 0, name
        torch.testing.assert_close(after[name].detach(), weight + step_size * gradients[name], rtol=1e-10, atol=1e-12)


def test_an_automatic_guide_of_pyro_fits_the_model():
    model = sharp_model()
    batch = random_batch()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses = [svi.step(batch) for _ in range(40)]
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name
    assert guide.median(batch)["z"].shape == (3, *CONFIG.latent_shape)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_without_slots_it_is_the_autoregressive_model():
    """z is empty and has density 1: the program's log joint is the cross-entropy, and it needs no guide but the prior.

    The probabilities of all texts of two tokens sum to one, and a step of SVI follows the gradient of cross-entropy.
    """
    config = dataclasses.replace(CONFIG, num_slots=0, length=2)
    model = LatentThoughtModel(config, VOCAB_SIZE, END)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    model = model.double()
    texts = torch.cartesian_prod(torch.arange(VOCAB_SIZE - 1), torch.arange(VOCAB_SIZE - 1))
    batch = TokenBatch(
        texts, torch.ones(texts.shape).double(), torch.arange(len(texts)), torch.zeros(len(texts)).long()
    )
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (len(texts), 2, 0, 8)
    assert trace.nodes["z"]["log_prob"].eq(0).all()
    assert trace.nodes["tokens"]["log_prob"].exp().sum().item() == pytest.approx(1)

    inputs = torch.cat([torch.full((len(texts), 1), BEGIN), texts[:, :1]], dim=1)
    hidden = model.decoder(inputs, torch.zeros(len(texts), 2, 0, 8, dtype=torch.float64))
    loss = torch.nn.functional.cross_entropy(
        model.decoder.logits(hidden).flatten(0, 1), texts.flatten(), reduction="sum"
    )
    weights = list(model.parameters())
    expected = torch.autograd.grad(loss, weights)
    rng = SequenceNoise(0)
    nelbo = elbo_backward(model, PRIOR.guide(model, infer(PRIOR, model, batch, rng), batch, rng), batch, 1.0)
    assert (nelbo.nelbo, nelbo.kl) == (pytest.approx(loss.item()), 0)
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.allclose(weight.grad, gradient)

    written = model(num_sequences=500)
    counts = torch.bincount(written[:, 0], minlength=VOCAB_SIZE - 1) / 500
    probabilities = trace.nodes["tokens"]["log_prob"].exp().view(5, 5).sum(1)
    assert (counts - probabilities).abs().max() < 5 * 0.5 / math.sqrt(500)


def log_likelihood_and_gradient(model, batch, z):
    z = z.clone().requires_grad_()
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(batch)
    trace.compute_log_prob()
    log_likelihood = trace.nodes["tokens"]["log_prob"]
    return log_likelihood.detach(), torch.autograd.grad(log_likelihood.sum(), z)[0]


def test_the_hessian_of_the_log_likelihood_is_that_of_finite_differences():
    model, batch, z = sharp_model(), random_batch(1), random_z(1)
    model.requires_grad_(False).eval()

    def gradient(flat):
        flat = flat.detach().requires_grad_()
        value = log_joint(model, batch, flat.view_as(z)).log_likelihood.sum()
        return torch.autograd.grad(value, flat)[0]

    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(
            lambda flat: log_joint(model, batch, flat.view_as(z)).log_likelihood.sum(), z.flatten()
        )
        width = 1e-5 * torch.eye(z.numel(), dtype=torch.float64)
        expected = torch.stack([(gradient(z.flatten() + d) - gradient(z.flatten() - d)) / 2e-5 for d in width])
    assert expected.abs().max() > 0.01
    assert torch.allclose(hessian, expected, atol=1e-7)


def test_kernels_of_attention_without_a_second_derivative_say_so():
    """No silent error: PyTorch's fused kernels have none, its written-out attention does."""
    model, batch, z = sharp_model(), random_batch(1), random_z(1)
    model.requires_grad_(False).eval()
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.functional.hessian(lambda z: log_joint(model, batch, z).log_likelihood.sum(), z)


def test_the_laplace_approximation_of_pyro_is_the_curvature_at_the_mode():
    model, batch = sharp_model(), random_batch(2)
    model.requires_grad_(False).eval()
    with pyro.get_param_store().scope():
        guide = AutoLaplaceApproximation(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(200):
            svi.step(batch)
        with sdpa_kernel(SDPBackend.MATH):
            posterior = guide.laplace_approximation(batch).get_posterior()
            z = guide.loc.detach()

            def neg_log_joint(flat):
                joint = log_joint(model, batch, flat.view(2, *CONFIG.latent_shape))
                return -(joint.log_likelihood + joint.log_prior).sum()

            precision = torch.autograd.functional.hessian(neg_log_joint, z)
    assert torch.allclose(posterior.precision_matrix, precision, rtol=1e-5, atol=1e-6)
    # Texts are independent given the weights: their blocks of the precision are 0.
    half = len(z) // 2
    assert posterior.precision_matrix[:half, half:].abs().max() < 1e-6


def test_a_precomputed_batch_says_the_same_bit_for_bit():
    model, batch, z = sharp_model(), random_batch(), random_z(3)
    for ours, expected in zip(
        log_likelihood_and_gradient(model, model.precompute(batch), z),
        log_likelihood_and_gradient(model, batch, z),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_a_precomputed_batch_says_the_same_of_several_draws_at_once():
    model, batch, z = sharp_model(), random_batch(), random_z(4, 3)
    with pyro.plate("draws", 4, dim=-2):
        together = log_likelihood_and_gradient(model, model.precompute(batch), z)
    apart = [log_likelihood_and_gradient(model, batch, draw) for draw in z]
    for ours, expected in zip(together, map(torch.stack, zip(*apart, strict=True)), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_of_a_precomputed_batch_the_first_layer_reads_no_tokens_again():
    """What has been computed is used: self-attention of the first layer is not run a second time."""
    model, batch = sharp_model(), random_batch()
    precomputed = model.precompute(batch)
    assert not precomputed.below_z.x_BTD.requires_grad
    calls = []
    model.decoder.blocks[0].self_attention.register_forward_hook(lambda *_: calls.append(1))
    log_likelihood_and_gradient(model, precomputed, random_z(3))
    assert calls == []
    log_likelihood_and_gradient(model, batch, random_z(3))
    assert calls == [1]


def test_what_changes_the_tokens_of_a_batch_drops_what_was_precomputed_from_them():
    model, batch = sharp_model(), random_batch()
    precomputed = model.precompute(batch)
    assert precomputed.with_weights(batch.weights).below_z is precomputed.below_z
    for changed in (precomputed[:2], precomputed.cut(2), precomputed.to("cpu")):
        assert changed.below_z is None


def test_what_a_model_without_z_precomputes_gives_the_same_hidden_states():
    config = dataclasses.replace(CONFIG, num_slots=0)
    model, batch = LatentThoughtModel(config, VOCAB_SIZE, END).double(), random_batch()
    expected = model.decoder(model.decoder.inputs(batch.tokens), torch.zeros(3, *config.latent_shape))
    below = model.precompute(batch).below_z
    assert torch.equal(
        model.decoder(model.decoder.inputs(batch.tokens), torch.zeros(3, *config.latent_shape), below), expected
    )


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize(("start", "end"), [(0, 4), (3, 9), (8, 12), (11, 12), (5, 12)])
def test_the_tokens_of_a_block_are_as_probable_as_in_the_whole_text(window, start, end):
    pyro.set_rng_seed(0)
    model = LatentThoughtModel(dataclasses.replace(CONFIG, window=window, length=12), VOCAB_SIZE, END)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    model, z = model.double(), random_z(3)
    batch = TokenBatch(
        torch.randint(VOCAB_SIZE - 1, (3, 12)), torch.rand(3, 12).double(), torch.arange(3), torch.arange(3)
    )
    positions = torch.arange(12)
    in_block = batch.with_weights(batch.weights * ((positions >= start) & (positions < end)))
    block = batch.block(start, end, model.reach)
    expected = log_joint(model, in_block, z).log_likelihood
    torch.testing.assert_close(log_joint(model, block, z).log_likelihood, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_joint(model, model.precompute(block), z).log_likelihood, expected)
    draws = torch.stack([z, -z])
    several = log_joint(model, block, draws, num_sample_dims=1).log_likelihood
    torch.testing.assert_close(several[0], expected, rtol=1e-12, atol=1e-12)
    # The block has no more than what it needs: with one input less in reach, its first token is another's.
    if start >= model.reach > 1:
        shorter = log_joint(model, batch.block(start, end, model.reach - 1), z).log_likelihood
        assert (shorter - expected).abs().max() > 1e-9
