"""What surrounds a call does not change what it returns: torch's inference mode, and other threads."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import ltm_pyro
from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise, bounds, frozen, infer, log_joint
from ltm_pyro.inference.ais import forward_ais, pilot, reverse_ais
from ltm_pyro.inference.calibration import calibrate
from ltm_pyro.inference.export import evaluate_draws
from ltm_pyro.inference.prequential import prequential
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.smc import smc
from ltm_pyro.inference.streaming import Stream, gradient_of_block
from ltm_pyro.inference.surroundings import entry, normal_tensors
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward, predict_backward

SHORT = {"num_steps": 4}


def by_scheme(name: str) -> Callable[[Any, Any], Any]:
    def run(model, batch):
        scheme, rng = SCHEMES[name](**SHORT), SequenceNoise(0)
        state = infer(scheme, model, batch, rng, watch=lambda state, info: None)
        return scheme.mean(state), scheme.posterior(state, 1, rng).samples

    return run


def q_of(model, batch):
    scheme, rng = SCHEMES["lowrank"](num_steps=6), SequenceNoise(0)
    return scheme.distribution(infer(scheme, model, batch, rng), rng, "test")


def of_bounds(model, batch):
    scheme, rng = SCHEMES["langevin"](**SHORT), SequenceNoise(0)
    fit, state = bounds.gaussian_around(scheme, infer(scheme, model, batch, rng), model, batch, rng, VI(3))
    q = fit.distribution(state, rng)
    return bounds.elbo(model, batch, q, 2).nelbo, bounds.iwae(model, batch, q, 3).nats


def of_annealing(model, batch):
    q, rng = q_of(model, batch), SequenceNoise(0)
    plan = pilot(model, batch, q, rng, num_temperatures=3, num_chains=2)
    z = torch.zeros(len(batch), *q.event_shape, dtype=torch.float64)
    return forward_ais(model, batch, q, plan, rng).log_weights, reverse_ais(model, batch, q, plan, z, rng).log_weights


def of_particles(model, batch):
    return (smc(model, batch, 4, 3, 2, SequenceNoise(0)).block_nats,)


def of_stream(model, batch):
    found = []
    for name in ("map", "vi", "langevin"):
        stream = Stream(SCHEMES[name](num_steps=2), model, batch, SequenceNoise(0))
        stream.read(4)
        stream.continued(batch)
        stream.read(4)
        found += [stream.draw(), stream.posterior(1).samples]
    z = torch.zeros_like(found[0])
    return (*found, gradient_of_block(model, batch, z))


def of_code(model, batch):
    return (prequential(model, batch, SCHEMES["vi"](**SHORT), 4, 2, SequenceNoise(0)).block_nats,)


def of_calibration(model, batch):
    z = torch.zeros(len(batch), *model.config.latent_shape, dtype=torch.float64)
    return (torch.from_numpy(calibrate(model, batch, z, SCHEMES["vi"](**SHORT), 3, SequenceNoise(0)).ranks),)


def of_draws(model, batch):
    scheme, rng = SCHEMES["mala"](**SHORT), SequenceNoise(0)
    posterior = scheme.posterior(infer(scheme, model, batch, rng), 1, rng)
    return (evaluate_draws(posterior, model, batch).log_joint,)


def of_slow_step(model, batch):
    """Two updates of the weights, so that the moments of the first one are used."""
    optimizer, scheme, rng = WeightOptimizer(model, OptimizerConfig(), 10), SCHEMES["vi"](**SHORT), SequenceNoise(0)
    for step in range(2):
        state = infer(scheme, model, batch, rng)
        elbo_backward(model, scheme.guide(model, state, batch, rng), batch, 10)
        predict_backward(model, scheme.mean(state), batch, 10)
        assert optimizer.update(step)
    return tuple(weight.detach().clone() for weight in model.parameters())


def of_frozen(model, batch):
    """A gradient of one's own, as the page on `frozen` takes it."""
    with frozen(model, batch) as ready, torch.enable_grad():
        z = torch.zeros(len(batch), *model.config.latent_shape, dtype=torch.float64).requires_grad_()
        return torch.autograd.grad(log_joint(model, ready, z).log_likelihood.sum(), z)


RUNS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: by_scheme(name) for name in SCHEMES if name != "amortized"},
    "bounds": of_bounds,
    "annealing": of_annealing,
    "particles": of_particles,
    "stream": of_stream,
    "code": of_code,
    "calibration": of_calibration,
    "draws": of_draws,
    "slow step": of_slow_step,
    "frozen": of_frozen,
}


def copied(value: Any) -> Any:
    """A batch of new tensors, which are made in the mode that holds here."""
    fields = {name: field.clone() for name, field in vars(value).items() if isinstance(field, Tensor)}
    return dataclasses.replace(value, **fields)


@pytest.fixture
def model(ltm, texts):
    weights = {name: weight.clone() for name, weight in ltm.state_dict().items()}

    def build():
        ltm.load_state_dict(weights)
        return ltm

    return build


@pytest.mark.parametrize("name", RUNS)
def test_inference_mode_is_as_no_gradients(name, model, texts):
    """Bit for bit, also where the batch was made in that mode; and the mode is as it was afterwards."""
    with torch.no_grad():
        expected = RUNS[name](model(), copied(texts))
    fresh = model()
    with torch.inference_mode():
        batch = copied(texts)
        assert batch.tokens.is_inference()
        found = RUNS[name](fresh, batch)
        assert torch.is_inference_mode_enabled()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert all(weight.requires_grad for weight in fresh.parameters())


@pytest.fixture
def impatient():
    """Python changes the thread after every few operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("names", [("vi", "map", "hmc", "frozen"), ("annealing", "stream", "bounds", "calibration")])
def test_threads_that_infer_at_once_get_what_each_gets_alone(names, ltm, texts, impatient):
    """Of one model, bit for bit; and its weights have their gradients afterwards."""
    jobs = [(name, part) for name in names for part in (texts[:2], texts[2:])]
    alone = [RUNS[name](ltm, part) for name, part in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: RUNS[job[0]](ltm, job[1]), jobs))
    for ones, others in zip(alone, together, strict=True):
        for one, other in zip(ones, others, strict=True):
            assert torch.equal(one, other)
    assert all(weight.requires_grad for weight in ltm.parameters())


def test_threads_that_draw_from_the_prior_share_torchs_generator_in_turns(mixture_prior, impatient):
    """Draws of such a prior are made from torch's generator, which each sequence seeds."""
    batch = mixture_prior.sample(20)
    q = PRIOR.distribution(infer(PRIOR, mixture_prior, batch, SequenceNoise(0)), SequenceNoise(0))
    seeds = q.seeds()
    q.seeds = lambda: seeds
    expected, state = q.sample((5,)), torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(draws, expected) for draws in pool.map(lambda _: q.sample((5,)), range(20)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.inference_mode, contextlib.nullcontext])
def test_weights_that_were_made_in_inference_mode_are_refused_in_a_sentence(ltm, texts, mode):
    with torch.inference_mode():
        for module in ltm.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(weight.clone()))
    with mode(), pytest.raises(ValueError, match=r"made inside torch\.inference_mode"):
        infer(SCHEMES["vi"](**SHORT), ltm, texts, SequenceNoise(0))


def test_a_model_that_is_loaded_in_inference_mode_can_be_inferred_with():
    with torch.inference_mode():
        ltm = ltm_pyro.load("demo")
        batch = ltm.batch(["It was"])
        state = infer(SCHEMES["map"](num_steps=2), ltm.model, batch, SequenceNoise(0))
    assert state.z.isfinite().all()
    assert not next(ltm.model.parameters()).is_inference()


def test_an_error_of_another_kind_stays_what_it_is():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="another kind"), entry():
        raise RuntimeError("another kind")


def test_what_holds_no_tensor_of_inference_mode_is_not_copied(texts):
    assert normal_tensors(texts) is texts
    assert normal_tensors([1]) == [1]
