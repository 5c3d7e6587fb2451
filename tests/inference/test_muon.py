"""Muon, against singular value decompositions and against the one of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ltm_pyro.inference.muon import COEFFICIENTS, NUM_ITERATIONS, Muon, orthogonalised
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer

SHAPES = [(5, 5), (12, 5), (5, 12), (1, 7), (7, 1)]


def matrix_with(values, shape, seed=0):
    """A matrix with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0][:, : len(values)]
        for size in shape
    )
    return left @ torch.diag(values) @ right.T, left, right


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape):
    values = torch.linspace(0.4, 3.0, min(shape), dtype=torch.float64)
    matrix, left, right = matrix_with(values, shape)
    a, b, c = COEFFICIENTS
    expected = values / values.norm()
    for _ in range(NUM_ITERATIONS):
        expected = a * expected + b * expected**3 + c * expected**5
    found = orthogonalised(matrix)
    torch.testing.assert_close(found, left @ torch.diag(expected) @ right.T)
    assert torch.linalg.svdvals(found).min() > 0.65
    assert torch.linalg.svdvals(found).max() < 1.25


def test_the_size_of_a_matrix_does_not_matter_and_zero_stays_zero():
    matrix, *_ = matrix_with(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), (4, 3))
    torch.testing.assert_close(orthogonalised(1e4 * matrix), orthogonalised(matrix))
    assert orthogonalised(torch.zeros(4, 3)).equal(torch.zeros(4, 3))


class Network(nn.Module):
    """Matrices of all shapes, and what is no matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in SHAPES)
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.Parameter(torch.randn(4))


def with_gradients(network, step):
    generator = torch.Generator().manual_seed(step)
    for weight in network.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
def test_matrices_take_the_steps_of_torchs_muon(monkeypatch):
    # Which computes in bfloat16 and is exact but for that.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, others = Network().matrices, Network().matrices
    muon = Muon([{"params": list(ours), "num_maps": 1}], lr=0.02, weight_decay=0.3, betas=(0.95, 0.9))
    expected = torch.optim.Muon(list(others), lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        with_gradients(ours, step)
        with_gradients(others, step)
        muon.step()
        expected.step()
    for weight, other, before in zip(ours, others, Network().matrices, strict=True):
        torch.testing.assert_close(weight, other)
        assert not torch.allclose(weight, before, atol=0.01)


def optimizer_of(network, algorithm):
    config = OptimizerConfig(0.02, 0.02, warmup_steps=0, algorithm=algorithm)
    return WeightOptimizer(network, config, num_steps=10)


def test_what_is_no_matrix_and_an_embedding_take_the_steps_of_adamw():
    networks = {algorithm: Network() for algorithm in ("adamw", "muon")}
    optimizers = {name: optimizer_of(network, name) for name, network in networks.items()}
    for step in range(3):
        for name, optimizer in optimizers.items():
            with_gradients(networks[name], step)
            optimizer.update(step)
    adamw, muon = networks["adamw"], networks["muon"]
    assert muon.norm.equal(adamw.norm)
    assert muon.embedding.weight.equal(adamw.embedding.weight)
    assert not any(weight.equal(other) for weight, other in zip(muon.matrices, adamw.matrices, strict=True))


def test_every_weight_of_the_model_is_stepped_on_once(ltm):
    optimizer = optimizer_of(ltm, "muon").algorithm
    places = [(id(weight), group["num_maps"]) for group in optimizer.param_groups for weight in group["params"]]
    assert len(places) == len(dict(places)) == len(list(ltm.parameters()))
    num_maps = {"query_key_value": 3, "key_value": 2, "gate_up": 2}
    for name, weight in ltm.named_parameters():
        is_matrix = weight.dim() == 2 and "embedding" not in name
        assert dict(places)[id(weight)] == (num_maps.get(name.split(".")[-2], 1) if is_matrix else 0), name


def test_matrices_one_above_the_other_are_stepped_on_as_if_each_stood_alone():
    torch.manual_seed(0)
    parts = [nn.Parameter(torch.randn(4, 5)) for _ in range(3)]
    stack = nn.Parameter(torch.cat([part.detach() for part in parts]))
    alone, together = (
        Muon([{"params": parts, "num_maps": 1}], lr=0.1),
        Muon([{"params": [stack], "num_maps": 3}], lr=0.1),
    )
    for step in range(3):
        with_gradients(nn.ParameterList(parts), step)
        stack.grad = torch.cat([part.grad for part in parts])
        alone.step()
        together.step()
    torch.testing.assert_close(stack, torch.cat(parts))


def test_a_network_without_matrices_has_a_muon_too():
    network = nn.LayerNorm(3)
    with_gradients(network, 0)
    assert optimizer_of(network, "muon").update(0)


def test_a_weight_without_gradient_stays():
    network = Network()
    before = copy.deepcopy(network)
    with_gradients(network, 0)
    network.matrices[1].grad = network.norm.grad = None
    optimizer_of(network, "muon").algorithm.step()
    assert [weight.equal(other) for weight, other in zip(network.parameters(), before.parameters(), strict=True)] == [
        name in ("norm", "matrices.1") for name, _ in network.named_parameters()
    ]


def test_only_matrices_can_be_muons():
    for shape, num_maps in (((3,), 1), ((4, 3), 3)):
        with pytest.raises(ValueError, match="matrices alone"):
            Muon([{"params": [nn.Parameter(torch.zeros(shape))], "num_maps": num_maps}])
