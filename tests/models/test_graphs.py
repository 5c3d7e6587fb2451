"""A step can be recorded and replayed: it changes tensors in place, keeps no number on the host, and asks for none.

Shapes: B texts, V vocabulary.
"""

import contextlib
import dataclasses
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltm_pyro.models import Decoder, DecoderConfig, Sampling, generate, generation, graphs
from ltm_pyro.models.generation import _unchecked_tokens

TOY = DecoderConfig(num_layers=2, width=12, num_heads=3, hidden=10, num_slots=2, window=4, length=11)
FAST = dataclasses.replace(TOY, thoughts="fast-weights")
VOCAB_SIZE, END = 20, 18
PROMPTS = [[], [3], [0, 1, 2, 3, 4, 0]]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=1.4, top_k=4, top_p=0.75, repetition_penalty=0.6),
]


class Recorded(TorchDispatchMode):
    """What a CUDA graph does, on any device: the operations of its block are recorded and not done.

    They can be replayed, on the same tensors and with the numbers of Python that they were recorded with.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.changed = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.uniform_.default)
        for value, argument in zip(args, function._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.changed.append((value, value.clone()))
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def __exit__(self, *args):
        super().__exit__(*args)
        for value, before in reversed(self.changed):
            value.copy_(before)

    def replay(self):
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and not function.is_view and old is not new:
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """What graphs were made of: on this device, in the place of CUDA's."""
    found = []

    @contextlib.contextmanager
    def capture(graph, **settings):
        found.append(graph)
        with graph:
            yield

    monkeypatch.setattr(graphs.torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(graphs.torch.cuda, "graph", capture)
    monkeypatch.setattr(graphs, "_side_stream", MagicMock())
    monkeypatch.setattr(graphs.torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(graphs.torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(generation, "repeated", lambda work, num_times, device: graphs.Graphed(work, device))
    return found


def sharp_decoder(config, dtype=None):
    decoder = Decoder(config, VOCAB_SIZE)
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    decoder.compute_dtype = dtype
    return decoder.requires_grad_(False)


def begun(decoder, num_steps):
    """The memory of three texts of different lengths."""
    u = torch.randn(3, *decoder.config.latent_shape)
    return decoder.read(torch.randint(VOCAB_SIZE, (3, 6)), torch.tensor([2, 6, 1]), u, num_steps)[1]


def tensors_of(memory):
    parts = [memory.num_read_B, memory.is_seen_BR, memory.place_1]
    for block in memory.blocks:
        parts += [block.ring.k_BHRK, block.ring.v_BHRK, *(block.thought or [block.fast_BHD])]
    return parts


def write(decoder, u, sampling, num_tokens, seed=0):
    return generate(decoder, u, END, num_tokens, PROMPTS, sampling, torch.Generator(u.device).manual_seed(seed))


@pytest.mark.parametrize("config", [TOY, FAST])
def test_a_step_changes_its_memory_where_it_is(config):
    decoder = sharp_decoder(config)
    memory = begun(decoder, 9)
    tensors = tensors_of(memory)
    addresses = [tensor.data_ptr() for tensor in tensors]
    for place in (1, 2, 3, 0, 1):
        before = [tensor.clone() for tensor in tensors]
        decoder.step(torch.tensor([1, 2, 3]), memory)
        assert all(one is other for one, other in zip(tensors_of(memory), tensors, strict=True))
        assert [tensor.data_ptr() for tensor in tensors] == addresses
        assert not memory.num_read_B.equal(before[0])
        assert not memory.blocks[-1].ring.k_BHRK.equal(before[-4 if config is TOY else -3])
        assert memory.place_1.tolist() == [place]


@pytest.mark.filterwarnings("ignore")  # the compiler's own, of parts of PyTorch that it uses
@pytest.mark.parametrize("config", [TOY, FAST])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_step_is_one_graph_for_all_steps(config):
    """The compiler refuses what asks for a number, and compiles again where a number of Python has changed."""
    torch.compiler.reset()
    decoder = sharp_decoder(config)
    torch.manual_seed(0)
    memory = begun(decoder, 12)
    torch.manual_seed(0)
    other = begun(decoder, 12)
    step = torch.compile(decoder.step, fullgraph=True, backend="eager")
    for tokens in torch.randint(VOCAB_SIZE - 1, (12, 3)):
        torch.testing.assert_close(step(tokens, memory), decoder.step(tokens, other))
    for one, expected in zip(tensors_of(memory), tensors_of(other), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("config", [TOY, FAST])
def test_no_token_makes_the_host_wait(config, sampling):
    """Torch's device "meta" has no numbers, so it answers no question for one."""
    decoder = sharp_decoder(config).to("meta")
    u = torch.randn(3, *config.latent_shape, device="meta")
    with torch.no_grad():
        tokens = list(_unchecked_tokens(decoder, u, END, 9, PROMPTS, sampling, None))
    assert {(token.shape, token.device.type) for token in tokens} == {((3,), "meta")}
    assert len(tokens) == 9
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        tokens[0].tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize(("config", "dtype"), [(TOY, None), (FAST, None), (TOY, torch.bfloat16)])
def test_replayed_steps_write_the_same_texts(config, dtype, sampling, request):
    decoder = sharp_decoder(config, dtype)
    u = torch.randn(3, *config.latent_shape)
    expected = [write(decoder, u, sampling, 24, seed) for seed in range(2)]
    recorded = request.getfixturevalue("recorded")
    for seed, text in enumerate(expected):
        assert write(decoder, u, sampling, 24, seed).equal(text)
    assert 0 < len(recorded) <= 2  # one for each call


def test_work_is_done_once_each_time_and_recorded_once(recorded):
    total, calls = torch.zeros(()), []

    def work():
        calls.append(total.add_(1))

    again = graphs.Graphed(work, torch.device("cpu"))
    for number in range(1, 9):
        again()
        assert total.item() == number
    assert len(recorded) == 1
    assert len(calls) == graphs.NUM_WARM_UPS + 1


@pytest.mark.parametrize(("device", "num_times"), [("cpu", 10**6), ("cuda", graphs.WORTH_A_GRAPH - 1)])
def test_work_stays_as_it_is_where_a_graph_does_not_pay(device, num_times):
    work = MagicMock()
    assert graphs.repeated(work, num_times, torch.device(device)) is work


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize(("config", "dtype"), [(TOY, None), (FAST, None), (TOY, torch.bfloat16)])
def test_cuda_writes_the_same_texts_with_a_graph_and_without(config, dtype, sampling, monkeypatch):
    decoder = sharp_decoder(config, dtype).cuda()
    u = torch.randn(3, *config.latent_shape, device="cuda")
    with_graph = [write(decoder, u, sampling, 200, seed) for seed in range(3)]
    monkeypatch.setattr(graphs, "WORTH_A_GRAPH", 10**9)
    for seed, text in enumerate(with_graph):
        assert torch.equal(write(decoder, u, sampling, 200, seed), text)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, says PyTorch
def test_cuda_sees_no_wait_between_tokens():
    decoder = sharp_decoder(TOY).cuda()
    u = torch.randn(3, *TOY.latent_shape, device="cuda")
    with torch.no_grad():
        tokens = _unchecked_tokens(decoder, u, END, 30, PROMPTS, SAMPLINGS[-1], None)
        next(tokens)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(tokens)) == 29
        finally:
            torch.cuda.set_sync_debug_mode("default")
