"""On a device, the host runs ahead: nothing waits for an answer in fast steps, nor in the slow step of `past`.

(The negative ELBO is Pyro's, which asks for its value and whether it is a number, once in a slow step.)
Torch's device "meta" has shapes and no numbers, so whatever the host wants to know of them raises an error there: a
number, the truth of a condition, how many entries are not zero. So do copies from it. Copies to it are watched for.
"""

import dataclasses
import traceback
from pathlib import Path

import pyro
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ltm_pyro
from ltm_pyro.config import preset, scheme_of
from ltm_pyro.data import token_batch
from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.objectives import OBJECTIVES
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

HOME = Path(ltm_pyro.__file__).parent
# Sequences of one batch may stand at different steps, and lowrank asks for them in each step.
WAITING = ["lowrank"]
VARIANTS = {
    **{name: (name, {}) for name in SCHEMES if name not in WAITING},
    "vi-stride": ("vi", {"stride": 2}),
    **{
        f"{name}-scaled": (name, {"num_chains": 2, "vi_steps": 2})
        for name in ("langevin", "mala", "hmc", "underdamped")
    },
}


class Copies(TorchDispatchMode):
    """Records where numbers are copied from the host to a device."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor) and value.dim()]
        if isinstance(out, torch.Tensor) and any(value.device != out.device for value in tensors):
            stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(HOME)]
            self.places.append(f"{function} in {stack[-1:]}")
        return out


@pytest.fixture(params=[pytest.param("attended", marks=pytest.mark.slow), "fast-weights"])
def model(request):
    config = DecoderConfig(
        num_layers=2,
        width=8,
        num_heads=2,
        hidden=12,
        num_slots=3,
        window=4,
        length=20,
        thoughts=request.param,
        encoder_layers=1,
        prior="scaled",
    )
    return LatentThoughtModel(config, 258, 256).to("meta")


@pytest.fixture
def batch():
    return token_batch(torch.randint(256, (3, 20))).prefix(torch.tensor([20, 3, 11])).to("meta")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_fast_step_waits_nor_a_draw_for_the_slow_step(model, batch, variant):
    name, settings = VARIANTS[variant]
    scheme, rng = SCHEMES[name](num_steps=2, **settings), SequenceNoise(0, "meta")
    with Copies() as copies, pyro.validation_enabled(False):
        state = infer(scheme, model, batch, rng)
        scheme.guide(model, state, batch, rng)(batch)
    assert all(value.device.type == "meta" for value in vars(state).values())
    assert copies.places == []


@pytest.mark.parametrize("name", ["map", "vi", "amortized"])
@pytest.mark.parametrize("fast_steps", [0, 1, 3])
def test_no_gradient_of_blocks_waits(batch, name, fast_steps):
    config = preset("tiny", name, "past")
    model = LatentThoughtModel(config.model, 258, 256).to("meta")
    scheme = dataclasses.replace(scheme_of(config), num_steps=fast_steps)
    with Copies() as copies, pyro.validation_enabled(False):
        loss = Past(block_size=8).backward(model, model, scheme, batch, SequenceNoise(0, "meta"), 34)
    assert copies.places == []
    assert loss.nelbo.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loss.on_host()


@pytest.mark.parametrize("objective", ["whole", "prefix"])
def test_no_choice_of_what_z_is_inferred_from_waits(batch, objective):
    with Copies() as copies:
        OBJECTIVES[objective]().evidence(batch, SequenceNoise(0, "meta"))
    assert copies.places == []


def test_a_wait_is_seen(model, batch):
    """The test above can fail: by a copy, and by a question."""
    with Copies() as copies:
        torch.zeros(3).to("meta")
    assert len(copies.places) == 1
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool(batch.weights.any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, says PyTorch
@pytest.mark.parametrize("what", ["fast steps", "slow step"])
def test_cuda_sees_no_wait(what):
    config = preset("tiny", "vi", "past")
    model = LatentThoughtModel(config.model, 258, 256).to("cuda")
    batch = token_batch(torch.randint(256, (3, 256))).prefix(torch.tensor([256, 3, 110])).to("cuda")
    scheme, rng = scheme_of(config), SequenceNoise(0, "cuda")

    def work():
        if what == "fast steps":
            infer(scheme, model, batch, rng)
        else:
            config.objective.backward(model, model, scheme, batch, rng, 369)

    with pyro.validation_enabled(False):
        work()  # what is done once
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
