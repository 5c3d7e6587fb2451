"""Reconstruction, on texts of which z is known to say all."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.evaluation import reconstruction
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, Sampling, TokenBatch, generate

CONFIG = DecoderConfig(num_layers=3, width=12, num_heads=3, hidden=10, num_slots=2, window=3, length=12)
NUM_TEXTS = 30


@pytest.fixture
def model():
    """In float64, with weights so large that z decides what is written."""
    model = LatentThoughtModel(CONFIG, vocab_size=9, end_of_text=7).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    return model.requires_grad_(False)


def silence(model, *layers):
    """Let the decoder read nothing of z in these layers."""
    for layer in layers:
        model.decoder.blocks[layer].cross_attention.output.weight.zero_()


def written(model):
    """The most likely texts given z from the prior, and that z."""
    z = torch.randn(NUM_TEXTS, *CONFIG.latent_shape, dtype=torch.float64)
    tokens = generate(model.decoder, z, model.end_of_text, CONFIG.length, sampling=Sampling(temperature=0))
    is_end = (tokens == model.end_of_text).long()
    weights = (is_end.cumsum(-1) - is_end == 0).double()
    return TokenBatch(tokens, weights, torch.arange(NUM_TEXTS), torch.zeros(NUM_TEXTS, dtype=torch.int64)), z


def test_a_text_is_right_where_its_tokens_are(model):
    batch, z = written(model)
    assert (reconstruction.token_accuracy(model, batch, z) == 1).all()
    num_changed = torch.arange(NUM_TEXTS) % 4
    changed = batch.tokens.clone()
    changed[torch.arange(CONFIG.length) < num_changed[:, None]] += 1
    num_tokens = batch.weights.sum(1)
    expected = (num_tokens - num_changed.minimum(num_tokens)) / num_tokens
    accuracy = reconstruction.token_accuracy(model, dataclasses.replace(batch, tokens=changed), z)
    torch.testing.assert_close(accuracy, expected)


def test_what_stands_behind_a_text_does_not_count(model):
    batch, z = written(model)
    padding = torch.where(batch.weights == 0, 3, batch.tokens)
    assert (batch.weights == 0).any()
    assert (reconstruction.token_accuracy(model, dataclasses.replace(batch, tokens=padding), z) == 1).all()


@pytest.mark.parametrize("layer", range(CONFIG.num_layers))
def test_the_layer_that_says_all_is_the_one_that_must_be_kept(model, layer):
    silence(model, *({0, 1, 2} - {layer}))
    batch, z = written(model)
    mean = reconstruction.accuracy_by_layers(model, batch, z, SequenceNoise(0)).mean(1)
    assert mean.shape == (CONFIG.num_layers + 1,)
    for kept, value in enumerate(mean.tolist()):
        assert value == pytest.approx(1) if kept > layer else value < 0.8


def test_the_layers_that_are_not_kept_do_not_depend_on_the_batch(model):
    batch, z = written(model)
    together = reconstruction.accuracy_by_layers(model, batch, z, SequenceNoise(0))
    alone = reconstruction.accuracy_by_layers(model, batch[5:6], z[5:6], SequenceNoise(0))
    assert torch.equal(together[:, 5:6], alone)


class Concentrated(torch.nn.Module):
    """The same model, but the prior of each sequence is all but a point at its z."""

    def __init__(self, model, z):
        super().__init__()
        self.model, self.generate, self.z = model, model.generate, z

    def forward(self, batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(self.z, 1e-9).to_event(3))
        return pyro.condition(self.model, data={"z": z})(batch)


def test_the_layers_that_are_not_kept_have_the_programs_own_prior(model):
    """Where that prior is the z that wrote each text, all texts are right whichever layers are kept."""
    batch, z = written(model)
    accuracies = reconstruction.accuracy_by_layers(Concentrated(model, z), batch, z, SequenceNoise(0))
    assert (accuracies == 1).all()
    # From another prior most texts are wrong.
    assert reconstruction.accuracy_by_layers(model, batch, z, SequenceNoise(0))[0].mean() < 0.5


@pytest.mark.parametrize("num_texts", [1, 5])
def test_the_plot_is_a_picture(num_texts, tmp_path):
    reconstruction.plot(torch.rand(4, num_texts, dtype=torch.float64), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
