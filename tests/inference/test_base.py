"""The log joint, the weights and the guard: what every scheme stands on, against closed forms."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.inference import SequenceNoise, infer, log_joint
from ltm_pyro.inference.base import exact_kl, frozen, is_independent_normal, keep_finite, kl, latent_prior, moments
from ltm_pyro.inference.guides import normal
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.map import MAP, MAPState

# --- log_joint


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 4)])
def test_log_joint_is_that_of_the_closed_form(world, sample_shape):
    batch = world.sample(5)
    z = torch.randn(*sample_shape, 5, 3, dtype=torch.float64)
    joint = log_joint(world, batch, z, num_sample_dims=len(sample_shape))
    assert joint.log_likelihood.shape == joint.log_prior.shape == (*sample_shape, 5)
    assert torch.allclose(joint.log_likelihood, -world.neg_log_likelihood(z, batch.x), rtol=1e-12)
    assert torch.allclose(joint.log_prior, -world.neg_log_prior(z), rtol=1e-12)
    assert joint.prior.batch_shape == (*sample_shape, 5)
    assert joint.prior.event_shape == (3,)


@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 4)])
def test_log_joint_of_texts_is_the_sum_over_their_weighted_positions(ltm, texts, sample_shape):
    z = torch.randn(*sample_shape, 5, 2, 2, 8, dtype=torch.float64)
    joint = log_joint(ltm, texts, z, num_sample_dims=len(sample_shape))
    expected = torch.zeros(*sample_shape, 5, dtype=torch.float64)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in z.shape[:-3]]).view(-1, z.dim() - 3).tolist():
        tokens = texts.tokens[index[-1]]
        inputs = torch.cat([torch.tensor([10]), tokens[:-1]])
        log_probs = ltm.decoder.logits(ltm.decoder(inputs[None], z[tuple(index)][None]))[0].log_softmax(-1)
        for n in range(int(texts.num_bytes[index[-1]])):
            expected[tuple(index)] += log_probs[n, tokens[n]].detach()
    assert torch.allclose(joint.log_likelihood, expected, rtol=1e-10)
    log_prior = -0.5 * z.square().sum((-1, -2, -3)) - 0.5 * 32 * math.log(2 * math.pi)
    assert torch.allclose(joint.log_prior, log_prior, rtol=1e-12)


def test_log_joint_takes_all_that_is_observed(world):
    """Two observations of the same z, one of them a bare factor, count both."""

    def twice(batch):
        world(batch)
        with pyro.plate("again", len(batch), dim=-1):
            pyro.factor("bonus", torch.arange(5.0, dtype=torch.float64))

    batch = world.sample(5)
    z = torch.randn(5, 3, dtype=torch.float64)
    expected = -world.neg_log_likelihood(z, batch.x) + torch.arange(5.0)
    assert torch.allclose(log_joint(twice, batch, z).log_likelihood, expected, rtol=1e-12)


def z_of(batch, name="z", plate="sequences", dim=-1, event_dims=1):
    with pyro.plate(plate, len(batch), dim=dim):
        return pyro.sample(name, dist.Normal(torch.zeros(3, dtype=torch.float64), 1).to_event(event_dims))


def a_model_with_observations_under_an_inner_plate(batch):
    with pyro.plate("sequences", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1).to_event(1))
        with pyro.plate("features", 6, dim=-2):
            pyro.sample("x", dist.Normal(z.sum(-1), 1), obs=batch.x.T)


def a_model_with_an_observation_outside_the_plate(batch):
    z = z_of(batch)
    pyro.sample("x", dist.Normal(z.sum(), 1), obs=batch.x.sum())


@pytest.mark.parametrize(
    "model", [a_model_with_observations_under_an_inner_plate, a_model_with_an_observation_outside_the_plate]
)
def test_observations_that_are_not_one_density_a_sequence_are_refused(world, model):
    """They would be broadcast over the sequences or over the observations, and be counted more than once."""
    batch = world.sample(5)
    with pytest.raises(ValueError, match="x"):
        log_joint(model, batch, torch.randn(5, 3, dtype=torch.float64))


def test_a_second_latent_site_is_refused(world):
    def model(batch):
        world(batch)
        with pyro.plate("others", len(batch), dim=-1):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match='"w"'):
        log_joint(model, world.sample(5), torch.randn(5, 3, dtype=torch.float64))


# --- latent_prior


def test_the_prior_is_read_without_running_the_rest_of_the_program():
    def model(batch):
        z_of(batch)
        raise AssertionError("the likelihood was run")

    prior = latent_prior(model, torch.zeros(5))
    assert (prior.batch_shape, prior.event_shape) == ((5,), (3,))
    assert prior.mean.equal(torch.zeros(5, 3, dtype=torch.float64))
    assert prior.stddev.equal(torch.ones(5, 3, dtype=torch.float64))


def without_latent(batch):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(()))


def with_another_latent_first(batch):
    z_of(batch, name="w")
    z_of(batch)


def under_another_plate(batch):
    z_of(batch, plate="documents")


def at_another_dim(batch):
    z_of(batch, dim=-2)


def without_plate(batch):
    pyro.sample("z", dist.Normal(torch.zeros(len(batch), 3), 1).to_event(2))


def under_two_plates(batch):
    with pyro.plate("outer", 2, dim=-2):
        z_of(batch)


def under_a_plate_that_scales(batch):
    """As Pyro's own idiom for minibatches of global latents: it multiplies a local latent's density by N / B."""
    with pyro.plate("sequences", 100, subsample=torch.arange(len(batch)), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1).to_event(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without_latent, 'no latent site "z"'),
        (with_another_latent_first, '"w"'),
        (under_another_plate, "documents"),
        (at_another_dim, "-2"),
        (without_plate, "plate"),
        (under_two_plates, "outer"),
        (under_a_plate_that_scales, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_program_of_another_form_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        latent_prior(model, torch.zeros(5))


# --- divergences and moments


def test_the_kl_of_gaussians_is_exact_at_any_draw(world):
    mean, scale = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1
    q, prior = normal(mean, scale), latent_prior(world, world.sample(4))
    for z in torch.randn(2, 4, 3, dtype=torch.float64):
        assert torch.allclose(kl(q, prior, z), world.kl(mean, scale))


def test_the_kl_to_another_prior_is_estimated_at_the_draw(mixture_prior):
    """Its mean over draws is the integral, and its gradient that of the reparametrised estimate."""
    batch = mixture_prior.sample(1)
    prior, q = latent_prior(mixture_prior, batch), dist.Normal(torch.tensor([[0.5, -0.2]]).double(), 0.4).to_event(1)
    assert exact_kl(q, prior) is None
    log_q = q.log_prob(mixture_prior.grid)
    expected = mixture_prior.integral(log_q.exp() * (log_q - mixture_prior.log_prior(mixture_prior.grid)))
    values = torch.stack([kl(q, prior, q.rsample()) for _ in range(1000)])
    assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(1000)
    assert values.std() < 3


def test_a_gaussian_in_disguise_is_not_taken_for_one(world):
    assert is_independent_normal(latent_prior(world, world.sample(2)))
    assert not is_independent_normal(dist.Laplace(torch.zeros(2, 3), 1.0).to_event(1))
    assert not is_independent_normal(dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))


def test_moments_that_do_not_exist_are_refused():
    of_no_variance = dist.StudentT(torch.full((2, 3), 1.5)).to_event(1)
    for prior in (dist.Cauchy(torch.zeros(2, 3), 1.0).to_event(1), of_no_variance):
        with pytest.raises(ValueError, match="no mean and standard deviation"):
            moments(prior)


# --- the weights, while z is inferred


def test_inference_is_its_first_state_and_then_its_steps(world):
    scheme, batch, rng = AdamVI(num_steps=3, learning_rate=0.3), world.sample(5), SequenceNoise(0)
    state = scheme.init(world, batch, rng)
    for _ in range(3):
        state, _ = scheme.step(world, state, batch, rng)
    inferred = infer(scheme, world, batch, rng)
    for name, value in vars(state).items():
        assert value.equal(getattr(inferred, name)), name
    assert inferred.step.tolist() == [3] * 5


def test_weights_that_the_user_has_frozen_stay_frozen(ltm, texts):
    ltm.decoder.embedding.weight.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in ltm.named_parameters()}
    infer(MAP(num_steps=1), ltm, texts, SequenceNoise(0))
    assert {name: weight.requires_grad for name, weight in ltm.named_parameters()} == before


@pytest.mark.parametrize("training", [True, False])
def test_every_module_is_as_it_was_after_inference(ltm, texts, training):
    ltm.train(training)
    ltm.decoder.blocks[0].eval()
    before = {name: module.training for name, module in ltm.named_modules()}
    infer(MAP(num_steps=1), ltm, texts, SequenceNoise(0))
    assert {name: module.training for name, module in ltm.named_modules()} == before


def test_weights_and_modules_are_as_they_were_after_an_error(ltm):
    def fail_inside():
        with frozen(ltm):
            assert not any(weight.requires_grad for weight in ltm.parameters())
            raise KeyError("a fault of the model")

    with pytest.raises(KeyError):
        fail_inside()
    assert all(weight.requires_grad for weight in ltm.parameters())
    assert all(module.training for module in ltm.modules())


def test_an_error_inside_inference_leaves_the_weights_as_they_were(ltm, texts):
    broken = dataclasses.replace(texts, tokens=texts.tokens + 100)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        infer(MAP(num_steps=1), ltm, broken, SequenceNoise(0))
    assert all(weight.requires_grad for weight in ltm.parameters())
    assert all(module.training for module in ltm.modules())
    assert len(pyro.get_param_store()) == 0


def test_a_plain_function_is_run_as_it_is(world):
    """It has no weights to freeze and nothing to precompute, and reads its parameters from Pyro's global store."""
    pyro.param("of the function", torch.ones(()))
    batch = world.sample(2)
    with frozen(world, batch) as same:
        assert same is batch
        assert list(pyro.get_param_store()) == ["of the function"]


def test_the_batch_of_a_frozen_model_is_what_the_model_precomputes(ltm, texts):
    with frozen(ltm, texts) as batch:
        assert batch.below_z is not None
        assert batch.tokens is texts.tokens
        assert not any(weight.requires_grad for weight in ltm.parameters())
    assert texts.below_z is None
    with frozen(ltm) as nothing:
        assert nothing is None


def test_inference_reads_the_weights_of_the_model_it_is_given(linear_gaussian, learnable):
    """Two modules whose weights have the same names: in Pyro's global store the second would find the first one's."""
    batch = linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7).sample(5)
    for seed in (1, 2):
        world = linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7, seed=seed)
        module = learnable(world)
        state = infer(MAP(1000, learning_rate=0.5), module, batch, SequenceNoise(0))
        assert torch.allclose(state.z, world.posterior_mean(batch.x), atol=1e-6)
        assert len(pyro.get_param_store()) == 0
        assert all(weight.requires_grad for weight in module.parameters())


# --- the finite guard


@pytest.mark.parametrize("gradient", ["nan", "inf"])
def test_a_sequence_keeps_its_last_finite_state_while_its_steps_fail(failing, recording, world, gradient):
    """Its steps 3, 4 and 5 of 8 fail: steps 6 and 7 go on from step 2, with noise of their own."""
    scheme, batch, rng = Langevin(num_steps=8, step_size=0.01), world.sample(4), recording()
    model = failing(world, gradient, bad_ids=(1, 3), bad_evaluations=(3, 4, 5))
    state = infer(scheme, model, batch, rng)
    assert state.num_skipped.tolist() == [0, 3, 0, 3]
    assert state.step.tolist() == [8] * 4
    healthy = infer(scheme, world, batch, SequenceNoise(0))
    assert state.z[[0, 2]].equal(healthy.z[[0, 2]])
    first, *noises = [numbers.transpose(0, 1) for _, numbers in rng.normals]
    z = first
    for step in (0, 1, 2, 6, 7):
        drift = -(z - world.posterior_mean(batch.x)[:, None]) @ world.precision
        z = z + 0.01 * drift + math.sqrt(0.02) * noises[step]
    assert torch.allclose(state.z[[1, 3]], z[[1, 3]], rtol=1e-12)


def state_of(*rows, skipped=0):
    """A state of MAP, each row a sequence's point, its moments 1 and 2 more, and the first of them its squares."""
    z = torch.tensor(rows, dtype=torch.float64)
    count = torch.full((len(rows),), skipped)
    return MAPState(torch.arange(len(rows)), count + 5, count, z, z + 1, z + 2, z[:, 0].clone())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["z", "first_moment", "second_moment", "mean_squares"])
def test_one_number_that_is_not_finite_keeps_the_whole_sequence(value, field):
    old, proposed = state_of([1.0, 2.0], [3.0, 4.0], skipped=2), state_of([5.0, 6.0], [7.0, 8.0], skipped=2)
    getattr(proposed, field)[1, ...].view(-1)[0] = value
    kept = keep_finite(old, proposed)
    assert kept.z.tolist() == [[5, 6], [3, 4]]
    assert kept.first_moment.tolist() == [[6, 7], [4, 5]]
    assert kept.second_moment.tolist() == [[7, 8], [5, 6]]
    assert kept.num_skipped.tolist() == [2, 3]
    assert kept.step.equal(proposed.step)


def test_a_finite_state_is_taken_as_it_is():
    old, proposed = state_of([1.0, 2.0], [3.0, 4.0]), state_of([5.0, 6.0], [7.0, 8.0])
    kept = keep_finite(old, proposed)
    assert kept.z.equal(proposed.z)
    assert kept.num_skipped.tolist() == [0, 0]


# --- states


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=str)
def test_an_index_selects_sequences_from_every_field(index):
    state = state_of([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])
    selected = state[index]
    assert type(selected) is MAPState
    assert len(selected) == 2
    for name, value in vars(state).items():
        assert getattr(selected, name).equal(value[index]), name


def test_a_state_cannot_be_written_into():
    with pytest.raises(dataclasses.FrozenInstanceError):
        state_of([1.0, 2.0]).z = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("scheme", "setting"),
    [
        (MAP, "learning_rate"),
        (MAP, "epsilon"),
        (AdamVI, "learning_rate"),
        (AdamVI, "epsilon"),
        (AdamVI, "initial_scale"),
        (Langevin, "step_size"),
        (Langevin, "num_chains"),
        (Langevin, "num_kept"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_settings_that_must_be_positive_are_checked(scheme, setting, value):
    with pytest.raises(ValueError, match=setting):
        scheme(**{setting: value})
