"""What every scheme of SCHEMES keeps to, including those that are still to be written."""

import copy
import ctypes
import dataclasses
import gc
import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from safetensors.torch import load_file, save_file

from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, State, StepInfo, infer
from ltm_pyro.inference.svi import elbo_backward
from ltm_pyro.models import TokenBatch

NUM_STEPS = 5
CHAINS = [name for name, scheme in SCHEMES.items() if scheme.has_chains]
VARIANTS = {
    **{name: (name, {}) for name in SCHEMES},
    "adamvi-fast": ("adamvi", {"learning_rate": 0.3, "epsilon": 1e-8, "initial_scale": 0.3}),
    "adamvi-reused-noise": ("adamvi", {"noise": "reused"}),
    "map-adam": ("map", {"learning_rate": 0.3, "epsilon": 1e-8}),
    **{f"{name}-chains": (name, {"num_chains": 2, "num_kept": 3}) for name in CHAINS},
    **{f"{name}-scaled": (name, {"num_chains": 2, "num_kept": 2, "vi_steps": 3}) for name in CHAINS},
    **{f"{name}-stretched": (name, {"num_chains": 2, "vi_steps": 6, "vi_rank": 2}) for name in CHAINS},
}
"""Every scheme as it comes, and with other settings."""


@pytest.fixture(params=VARIANTS)
def scheme(request):
    name, settings = VARIANTS[request.param]
    return SCHEMES[name](num_steps=NUM_STEPS, **settings)


@pytest.fixture
def ltm(ltm_with_encoder):
    return ltm_with_encoder


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


def num_draws(scheme):
    """A number of draws that the scheme can give."""
    return scheme.num_chains * scheme.num_kept if scheme.has_chains else 1


def fields_equal(state, other):
    """Whether two states are the same bit for bit."""
    return type(state) is type(other) and all(
        value.equal(getattr(other, name)) and value.dtype == getattr(other, name).dtype
        for name, value in vars(state).items()
    )


def assert_close(state, other, tolerance=1e-6):
    for name, value in vars(state).items():
        difference = (value - getattr(other, name)).abs()
        assert difference.numel() == 0 or difference.max() <= tolerance * (1 + value.abs().max()), name


# --- the settings

ABSURD = {int: (-3, 2.5, "16", True, None, math.nan), float: ("hot", None, True, math.nan, -1.0)}
"""Values that no setting of a type may have. (A float that may be 0 or below has to say so here, when there is one.)"""


@pytest.mark.parametrize("name", SCHEMES)
def test_no_setting_can_be_absurd(name):
    settings = dataclasses.fields(SCHEMES[name])
    assert "num_steps" in [setting.name for setting in settings]
    for setting in settings:
        kind = type(setting.default)
        for value in ABSURD.get(kind, ("nonsense",)):
            with pytest.raises(ValueError, match=setting.name):
                SCHEMES[name](**{setting.name: value})


def test_a_scheme_that_checks_nothing_is_checked_where_it_runs(ltm, texts):
    class Unchecked(SCHEMES["vi"]):
        def __post_init__(self):
            """No check."""

    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 0, not -3"):
        infer(Unchecked(num_steps=-3), ltm, texts, SequenceNoise(0))


def test_there_is_nothing_to_infer_of_no_text(scheme, ltm, texts):
    with pytest.raises(ValueError, match="the batch is empty"):
        infer(scheme, ltm, texts[:0], SequenceNoise(0))


# --- the state is a value


def test_a_state_is_a_value_whose_every_field_has_a_row_for_each_sequence(scheme, ltm, texts):
    state = infer(scheme, ltm, texts, SequenceNoise(0))
    assert isinstance(state, State)
    assert dataclasses.is_dataclass(state)
    assert type(state).__dataclass_params__.frozen
    assert len(state) == 5
    for name, value in vars(state).items():
        assert len(value) == 5, name
        assert not value.requires_grad, name
        assert value.grad_fn is None, name
    assert state.sequence_ids.equal(texts.sequence_ids)
    assert state.step.tolist() == [NUM_STEPS] * 5
    assert state.num_skipped.tolist() == [0] * 5


def test_a_step_makes_a_new_state_and_leaves_its_input_as_it_was(scheme, ltm, texts):
    rng = SequenceNoise(0)
    state = scheme.init(ltm, texts, rng)
    # Some fields of the first state may share their numbers: writing into one would change the others.
    before, batch_before = copy.deepcopy(state), copy.deepcopy(texts)
    for _ in range(2):
        new, info = scheme.step(ltm, state, texts, rng)
        assert fields_equal(state, before)
        assert not fields_equal(new, before)
        assert new.step.tolist() == [1] * 5
    assert isinstance(info, StepInfo)
    assert info.objective.shape == (5,)
    assert not info.objective.requires_grad
    assert texts.tokens.equal(batch_before.tokens)
    assert texts.weights.equal(batch_before.weights)


def test_rows_of_a_state_are_the_state_of_those_sequences(scheme, world):
    rng, batch = SequenceNoise(0), world.sample(6)
    whole = infer(scheme, world, batch, rng)
    for index in (torch.tensor([4, 0]), slice(2, 5), torch.arange(6) % 2 == 0):
        assert_close(infer(scheme, world, batch[index], rng), whole[index], tolerance=1e-12)
        again = scheme.posterior(whole[index], num_draws(scheme), rng).samples
        assert again.equal(scheme.posterior(whole, num_draws(scheme), rng).samples[:, :, index])


def test_states_at_different_steps_can_be_joined(scheme, world):
    """Each sequence goes on from its own step, as it would alone: also those that are due for another kind of step."""
    scheme = dataclasses.replace(scheme, num_steps=9)
    batch, rng, steps = world.sample(6), SequenceNoise(0), (7, 0, 6, 5, 8, 6)
    on_the_way = [scheme.init(world, batch, rng)]
    for _ in range(max(steps)):
        on_the_way.append(scheme.step(world, on_the_way[-1], batch, rng)[0])
    alone = [on_the_way[step][row : row + 1] for row, step in enumerate(steps)]
    joined = type(alone[0]).join(alone)
    assert joined.step.tolist() == list(steps)
    stepped, info = scheme.step(world, joined, batch, rng)
    for row, state in enumerate(alone):
        one = slice(row, row + 1)
        expected, expected_info = scheme.step(world, state, batch[one], rng)
        assert_close(stepped[one], expected, tolerance=1e-12)
        assert torch.allclose(info.objective[one], expected_info.objective, rtol=1e-12)
        assert torch.allclose(scheme.mean(joined)[one], scheme.mean(state), rtol=1e-12)
        num_draws = scheme.num_chains if scheme.has_chains else 2
        draws = scheme.posterior(joined, num_draws, rng).samples[:, :, one]
        assert torch.allclose(draws, scheme.posterior(state, num_draws, rng).samples, rtol=1e-12)
        z = [
            poutine.trace(scheme.guide(world, there, texts, rng)).get_trace(texts).nodes["z"]["value"]
            for there, texts in ((joined, batch), (state, batch[one]))
        ]
        assert torch.allclose(z[0][one], z[1], rtol=1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, NUM_STEPS])
def test_a_state_can_be_stored_and_read_again(scheme, ltm, texts, tmp_path, num_steps):
    rng = SequenceNoise(0)
    state = infer(dataclasses.replace(scheme, num_steps=num_steps), ltm, texts, rng)
    save_file(vars(state), tmp_path / "state.safetensors")
    again = type(state)(**load_file(tmp_path / "state.safetensors"))
    assert fields_equal(state, again)
    # Inference goes on from there as from the state itself.
    assert fields_equal(scheme.step(ltm, state, texts, rng)[0], scheme.step(ltm, again, texts, rng)[0])


def test_the_same_noise_gives_the_same_state(scheme, ltm, texts):
    def states(rngs):
        return [infer(scheme, ltm, texts, rng) for rng in rngs]

    assert fields_equal(*states([SequenceNoise(7), SequenceNoise(7)]))
    assert fields_equal(*states([BatchNoise(torch.Generator().manual_seed(7)) for _ in range(2)]))


# --- what inference must not touch


def test_inference_leaves_gradients_weights_and_flags_as_they_were(scheme, ltm, texts):
    weights = dict(ltm.named_parameters())
    for number, (name, weight) in enumerate(weights.items()):
        weight.grad = None if "norm" in name else torch.full_like(weight, number + 0.5)
    before = copy.deepcopy({name: (weight.detach(), weight.grad) for name, weight in weights.items()})
    rng = SequenceNoise(0)
    state = infer(scheme, ltm, texts, rng)
    scheme.posterior(state, num_draws(scheme), rng)
    scheme.guide(ltm, state, texts, rng)(texts)
    for name, weight in weights.items():
        value, gradient = before[name]
        assert weight.equal(value), name
        assert weight.grad is None if gradient is None else weight.grad.equal(gradient), name
        assert weight.requires_grad, name
    assert all(module.training for module in ltm.modules())


def test_a_step_by_itself_leaves_gradients_as_they_were(scheme, ltm, texts):
    """Also outside of `infer`, with the weights not frozen."""
    for weight in ltm.parameters():
        weight.grad = torch.full_like(weight, 0.5)
    rng = SequenceNoise(0)
    with pyro.get_param_store().scope():
        scheme.step(ltm, scheme.init(ltm, texts, rng), texts, rng)
    assert all((weight.grad == 0.5).all() for weight in ltm.parameters())


@pytest.mark.parametrize("rng", [SequenceNoise(0), BatchNoise(torch.Generator())], ids=lambda rng: type(rng).__name__)
def test_pyros_store_and_torchs_generator_are_not_used(scheme, ltm, texts, rng):
    before = torch.random.get_rng_state()
    state = infer(scheme, ltm, texts, rng)
    scheme.posterior(state, num_draws(scheme), rng)
    guide = scheme.guide(ltm, state, texts, rng)
    with pyro.get_param_store().scope():  # a guide may have weights, which it has to tell Pyro of
        guide(texts)
    elbo_backward(ltm, guide, texts, 1.0)
    assert torch.random.get_rng_state().equal(before)
    assert len(pyro.get_param_store()) == 0


def test_inference_works_where_gradients_are_off(scheme, ltm, texts):
    with torch.no_grad():
        state = infer(scheme, ltm, texts, SequenceNoise(0))
    assert fields_equal(state, infer(scheme, ltm, texts, SequenceNoise(0)))


# --- no sequence influences another


def padded(batch, num_columns, filler):
    """The same texts with more columns of weight 0, of any tokens; the padding there was is filled anew, too."""
    tokens = torch.nn.functional.pad(batch.tokens, (0, num_columns), value=filler)
    weights = torch.nn.functional.pad(batch.weights, (0, num_columns))
    tokens = torch.where(weights == 0, torch.arange(tokens.shape[1]).add(filler) % 10, tokens)
    return TokenBatch(tokens, weights, batch.sequence_ids, batch.num_bytes)


def test_a_sequence_does_not_depend_on_its_batch_mates(scheme, ltm, texts):
    rng = SequenceNoise(0)
    whole = infer(scheme, ltm, texts, rng)
    for index in ([4, 2, 0, 1, 3], [2], [3, 1], [0, 4]):
        assert_close(infer(scheme, ltm, texts[torch.tensor(index)], rng), whole[torch.tensor(index)])


def test_a_sequence_does_not_depend_on_its_padding(scheme, ltm, texts):
    rng = SequenceNoise(0)
    expected = infer(scheme, ltm, texts, rng)
    for num_columns, filler in ((0, 3), (1, 9), (5, 0), (20, 9)):
        assert_close(infer(scheme, ltm, padded(texts, num_columns, filler), rng), expected)


def test_z_of_a_prefix_does_not_know_what_comes_later(scheme, ltm, texts):
    """Bit for bit: also the later tokens' share in the sums is exactly 0."""
    num_tokens = torch.tensor([7, 0, 1, 9, 3])
    later = torch.arange(12) >= num_tokens[:, None]
    other = dataclasses.replace(texts, tokens=torch.where(later, (texts.tokens + 4) % 10, texts.tokens))
    rng = SequenceNoise(0)
    state = infer(scheme, ltm, texts.prefix(num_tokens), rng)
    assert fields_equal(state, infer(scheme, ltm, other.prefix(num_tokens), rng))
    # From all of a text it does.
    assert not fields_equal(infer(scheme, ltm, texts, rng), infer(scheme, ltm, other, rng))


@pytest.mark.parametrize("gradient", ["nan", "inf"])
def test_a_failing_sequence_stays_where_it_was_and_the_others_go_on_as_without_it(scheme, failing, world, gradient):
    batch, rng = world.sample(4), SequenceNoise(0)
    state = infer(scheme, failing(world, gradient, bad_ids=(1, 3)), batch, rng)
    assert state.num_skipped.tolist() == [0, NUM_STEPS, 0, NUM_STEPS]
    healthy, bad = torch.tensor([0, 2]), torch.tensor([1, 3])
    assert fields_equal(state[healthy], infer(scheme, world, batch, rng)[healthy])
    start = scheme.init(failing(world, gradient, bad_ids=(1, 3)), batch, rng)[bad]
    for name, value in vars(state[bad]).items():
        if value.is_floating_point():
            assert value.equal(getattr(start, name)), name


@pytest.mark.parametrize("num_steps", [0, 1, NUM_STEPS])
def test_the_gradients_that_inference_takes_are_as_many_as_it_says(scheme, world, num_steps):
    """Counted where they are taken: one for every z of a sequence that the program is run backwards from."""
    batch, counts = world.sample(4), []

    def counting(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1).to_event(1))
            if z.requires_grad:
                z.register_hook(lambda gradient: counts.append(gradient.numel() / (3 * 4)))
            pyro.sample("x", dist.Normal(z @ world.loadings.T, world.noise_scale).to_event(1), obs=batch.x)

    counting.encode = world.encode
    scheme = dataclasses.replace(scheme, num_steps=num_steps)
    infer(scheme, counting, batch, SequenceNoise(0))
    assert sum(counts) == scheme.num_gradients


def test_acceptance_is_a_probability_of_each_sequence_or_none(scheme, world):
    rng, batch = SequenceNoise(0), world.sample(4)
    _, info = scheme.step(world, scheme.init(world, batch, rng), batch, rng)
    if info.acceptance is not None:
        assert scheme.has_chains
        assert info.acceptance.shape == (4,)
        assert ((info.acceptance >= 0) & (info.acceptance <= 1)).all()


class AllocatorStatistics(ctypes.Structure):
    """What `mallinfo2` of glibc returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "top")
    )


def allocated_bytes():
    """Bytes that torch and other C code hold now. What has been freed does not count, as it would in a maximum."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, TypeError):
        pytest.skip("this C library does not say what is allocated")
    mallinfo2.restype = AllocatorStatistics
    statistics = mallinfo2()
    return statistics.used + statistics.mapped


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_is_flat_over_20_calls(name, ltm, texts):
    """Of tensors that live, and of bytes that are allocated: a state is some 3 kB, of which none may stay."""
    scheme = SCHEMES[name](num_steps=2, **({"num_leapfrogs": 2} if name == "hmc" else {}))

    def call(number):
        rng = SequenceNoise(number)
        scheme.posterior(infer(scheme, ltm, texts, rng), 1, rng)

    def held():
        gc.collect()
        num_tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        return num_tensors, allocated_bytes()

    for number in range(5):
        call(number)
    before = held()
    for number in range(20):
        call(number)
    after = held()
    assert after[0] <= before[0]
    assert after[1] - before[1] < 20 * 1000
    assert len(pyro.get_param_store()) == 0


# --- what the posterior is


def test_inference_explains_the_observations_better_than_the_prior(scheme, world):
    """Averaged over a thousand sequences, -log p(x | z) falls by more than half of what it can fall."""
    scheme = dataclasses.replace(scheme, num_steps=40)
    batch, rng = world.sample(1000), BatchNoise(torch.Generator().manual_seed(0))
    samples = scheme.posterior(infer(scheme, world, batch, rng), num_draws(scheme), rng).samples
    inferred = world.neg_log_likelihood(samples, batch.x).mean()
    zero = torch.zeros(1000, 3, dtype=torch.float64)
    prior = world.expected_nll(zero, zero + 1, batch.x).mean()
    # At the posterior's mean with its own spread: the expectation under the exact posterior.
    spread = 0.5 * (world.precision.inverse() * (world.loadings.T @ world.loadings)).sum() / world.noise_scale**2
    exact = (world.neg_log_likelihood(world.posterior_mean(batch.x), batch.x) + spread).mean()
    assert inferred < (prior + exact) / 2


def test_the_guide_is_one_site_that_fits_the_model(scheme, ltm, texts):
    """Pyro's own ELBO takes it, with its checks of shapes and plates on."""
    rng = SequenceNoise(0)
    guide = scheme.guide(ltm, infer(scheme, ltm, texts, rng), texts, rng)
    trace = poutine.trace(guide).get_trace(texts)
    assert trace.stochastic_nodes == ["sequences", "z"]
    assert trace.nodes["z"]["fn"].batch_shape == (5,)
    assert trace.nodes["z"]["fn"].event_shape == (2, 2, 8)
    with pyro.get_param_store().scope():
        assert math.isfinite(TraceMeanField_ELBO().loss(ltm, guide, texts))


def test_inference_starts_where_it_is_told(scheme, world):
    batch, rng = world.sample(5), SequenceNoise(0)
    warm = torch.randn(5, 3, dtype=torch.float64)
    guide = scheme.guide(world, scheme.init(world, batch, rng, warm), batch, rng)
    assert poutine.trace(guide).get_trace(batch).nodes["z"]["fn"].mean.equal(warm)


def test_the_mean_is_that_of_the_density_or_of_the_draws(scheme, world):
    batch, rng = world.sample(5), SequenceNoise(0)
    state = infer(scheme, world, batch, rng)
    if scheme.has_density:
        expected = scheme.distribution(state, rng).mean
    else:
        expected = scheme.posterior(state, scheme.num_draws, rng).samples.mean((0, 1))
        assert not hasattr(scheme, "distribution")
    assert torch.allclose(scheme.mean(state), expected, rtol=1e-12)


def test_a_loss_that_is_said_to_be_a_bound_is_one(scheme, world):
    """Over two thousand sequences, against the exact evidence; a point and a draw cannot say so."""
    if not scheme.has_density:
        assert not scheme.loss_is_bound
        return
    batch, rng = world.sample(2000), BatchNoise(torch.Generator().manual_seed(0))
    state = infer(dataclasses.replace(scheme, num_steps=40), world, batch, rng)
    loss = TraceMeanField_ELBO().loss(world, scheme.guide(world, state, batch, rng), batch)
    q = scheme.distribution(state, rng)
    error = world.nll_variance(q.mean, q.stddev, batch.x).sum().sqrt()
    is_above = loss > world.neg_log_evidence(batch.x).sum() - 5 * error
    assert is_above or not scheme.loss_is_bound


def test_draws_are_by_chain_draw_and_sequence(scheme, ltm, texts):
    rng = SequenceNoise(0)
    posterior = scheme.posterior(infer(scheme, ltm, texts, rng), num_draws(scheme), rng)
    num_chains = scheme.num_chains if scheme.has_chains else 1
    assert posterior.samples.shape == (num_chains, num_draws(scheme) // num_chains, 5, 2, 2, 8)
    assert posterior.samples.isfinite().all()
    assert not posterior.samples.requires_grad
    assert posterior.sequence_ids.equal(texts.sequence_ids)
    z = posterior.to_arviz()["posterior"]["z"]
    assert z.dims == ("chain", "draw", "sequence", "layer", "slot", "dim")
    assert np.array_equal(z.values, posterior.samples.numpy())
    assert z.coords["sequence"].values.tolist() == [31, 4, 159, 26, 5]


@pytest.mark.parametrize("name", SCHEMES)
def test_arviz_summarises_the_draws_of_a_scheme(name, world):
    settings = {"num_chains": 2, "num_kept": 30} if SCHEMES[name].has_chains else {}
    scheme, rng, batch = SCHEMES[name](num_steps=60, **settings), SequenceNoise(0), world.sample(2)
    posterior = scheme.posterior(infer(scheme, world, batch, rng), 60, rng)
    summary = arviz.summary(posterior.to_arviz(), kind="stats", round_to="none")
    assert len(summary) == 2 * 3
    assert np.allclose(np.asarray(summary["mean"], dtype=float), posterior.mean.flatten().numpy(), rtol=1e-9)


# --- number formats and devices


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_a_state_has_at_least_float32_whatever_the_decoder_computes_in(scheme, ltm, texts, decoder, expected):
    state = infer(scheme, ltm.to(decoder), texts, SequenceNoise(0))
    kinds = {name: value.dtype for name, value in vars(state).items() if value.is_floating_point()}
    assert set(kinds.values()) == {expected}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_states_on_cuda_are_those_on_the_cpu(scheme, ltm, texts):
    rng = SequenceNoise(0)
    expected = infer(scheme, ltm, texts, rng)
    on_cuda = infer(scheme, ltm.to("cuda"), texts.to("cuda"), rng)
    assert_close(type(on_cuda)(**{name: value.cpu() for name, value in vars(on_cuda).items()}), expected)
