"""The transformer that writes a text given its thought vectors: plain PyTorch, no Pyro.

Kong et al. 2025 (arXiv 2502.01567, section 2): a causal decoder with a short window, whose layer l cross-attends to
the thought vectors u_l. Block: windowed self-attention with rotary positions, cross-attention, SwiGLU; RMSNorm before
each of the three and once at the end, none on u; no biases; the output layer shares the weights of the embedding.

There is another way for a layer to read its thought vectors: as fast weights, which are added to those of its SwiGLU
network. A row of its last matrix is what a hidden unit writes into the residual stream (Geva et al. 2021, arXiv
2012.14913), so a hidden unit attends to one thought vector, without softmax. That reaches more of the network, and
u = 0 is the decoder without z.

The thought vectors are u = U(z), a map that belongs to the prior (`priors/`). In the paper u is z itself.

Shapes: B sequences, T tokens, L layers, S slots, D width, V vocabulary, R tokens in a ring.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from ltm_pyro.models.attention import CrossAttention, Ring, Rotation, SelfAttention
from ltm_pyro.models.priors import PRIORS
from ltm_pyro.models.stacked import StackedLinear
from ltm_pyro.models.vocabulary import target_log_probs

if TYPE_CHECKING:
    PriorName = str
else:
    PriorName = Literal[tuple(PRIORS)]

PRIOR_HELP = "\n".join(
    [
        "The prior p(z), and the map from z to the thought vectors that the layers attend to.",
        *(f"{name}: {PRIORS[name].summary}" for name in PRIORS),
    ]
)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of the decoder and of z, the prior of z, and the shape of the encoder where there is one."""

    num_layers: int = 3
    """Number of decoder layers; each has thought vectors of its own."""
    width: int = 128
    """Width of a token's hidden state and of a thought vector; a multiple of 2 x num-heads."""
    num_heads: int = 4
    """Attention heads of a layer."""
    hidden: int = 344
    """Width of the SwiGLU network of a layer."""
    thoughts: Literal["attended", "fast-weights"] = "attended"
    """How a layer reads its thought vectors.
    attended: by cross-attention, as in the paper.
    fast-weights: they are added to the output weights of the first num-slots hidden units of its SwiGLU network."""
    num_slots: int = 4
    """Thought vectors (slots) of a layer; z has num-layers x num-slots x width numbers.
    0: no z and no cross-attention, the plain autoregressive model."""
    window: int = 16
    """Positions that self-attention sees, the current one included [tokens]."""
    length: int = 2048
    """Predicted tokens of a sequence [tokens]."""
    encoder_layers: int = 0
    """Layers of the encoder that proposes z, for --inference amortized. 0: no encoder."""
    encoder_reads: Literal["text", "block"] = "text"
    """What the encoder proposes z from, where there is one.
    text: the whole text at once.
    block: a block and the posterior before it, for --infer-from past. This encoder has one layer."""
    prior: Annotated[PriorName, tyro.conf.arg(help=PRIOR_HELP)] = "standard"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("num_slots", "encoder_layers") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.prior not in PRIORS:
            raise ValueError(f"unknown prior {self.prior!r}: choose from {', '.join(PRIORS)}")
        if self.thoughts == "fast-weights" and self.num_slots > self.hidden:
            raise ValueError(
                f"num_slots {self.num_slots} must be at most hidden = {self.hidden}: each thought vector belongs to a "
                "hidden unit, where they are fast weights"
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 x num_heads = {2 * self.num_heads}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[L, S, D], the shape of z of one sequence."""
        return self.num_layers, self.num_slots, self.width

    @property
    def head_dim(self) -> int:
        """K, the width of a head."""
        return self.width // self.num_heads


def draw_weights(network: nn.Module) -> None:
    """Draw all weights of a network anew, from torch's global generator.

    Weights are normal with scale 0.02, as in GPT-2. Those of the projections that end in the residual stream are
    divided by the square root of the number of such projections, so that the stream does not grow with depth
    (Radford et al. 2019, section 2.3).
    """
    residual_scale = 0.02 / math.sqrt(sum(name.endswith(".output") for name, _ in network.named_modules()))
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=residual_scale if name.endswith(".output") else 0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class SwiGLU(nn.Module):
    """Gated feed-forward network (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = StackedLinear(width, hidden, 2)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor, fast_BHD: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            fast_BHD: what :meth:`with_fast_weights` returns, in the place of the output weights.
        """
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        hidden_BTH = F.silu(gate) * up
        output: Tensor = self.output(hidden_BTH) if fast_BHD is None else torch.bmm(hidden_BTH, fast_BHD)
        return output

    def with_fast_weights(self, u_BSD: Tensor) -> Tensor:
        """The output weights of each text, [B, H, D] for H hidden units: u is added to those of the first S units."""
        weight_HD, num_slots = self.output.weight.T, u_BSD.shape[1]
        if num_slots < len(weight_HD):
            u_BSD = F.pad(u_BSD, (0, 0, 0, len(weight_HD) - num_slots))
        return weight_HD + u_BSD


@dataclass(frozen=True, eq=False)
class BelowZ:
    """What a layer computes before it reads its thought vectors, so that it does not depend on z."""

    x_BTD: Tensor
    """The residual stream after self-attention."""
    normed_BTD: Tensor | None
    """The residual stream after the norm of cross-attention; None where there is no cross-attention."""

    def expand(self, shape: torch.Size) -> BelowZ:
        """Broadcast from [..., T, D] to one entry for each text of a batch of this shape, flattened: [B, T, D]."""
        x_BTD, normed_BTD = self.x_BTD, self.normed_BTD
        if normed_BTD is not None:
            normed_BTD = normed_BTD.expand(*shape, -1, -1).flatten(0, -3)
        return BelowZ(x_BTD.expand(*shape, -1, -1).flatten(0, -3), normed_BTD)


@dataclass(frozen=True, eq=False)
class BlockMemory:
    """What a layer keeps of the tokens it has read and of its thought vectors."""

    ring: Ring
    thought: tuple[Tensor, Tensor] | None
    """Keys and values of cross-attention, computed once; None where there is none."""
    fast_BHD: Tensor | None
    """The output weights of the SwiGLU network with the thoughts in them; None where they are no fast weights."""


@dataclass(frozen=True, eq=False)
class DecoderMemory:
    """What the decoder keeps of B texts that it writes token by token.

    :meth:`Decoder.step` changes these tensors in place and nothing else, so that a graph of a step can be replayed.
    """

    blocks: list[BlockMemory]
    num_read_B: Tensor
    """The number of inputs read so far, which is the position of the next one."""
    is_seen_BR: Tensor
    """Whether each place of the rings holds a token of the text."""
    place_1: Tensor
    """The place in the rings that the next token takes, the same for all texts: a single number, [1] int64."""


class Block(nn.Module):
    """One layer: self-attention, cross-attention to u_l if it attends, SwiGLU, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attends = config.num_slots > 0 and config.thoughts == "attended"
        self.has_fast_weights = config.num_slots > 0 and config.thoughts == "fast-weights"
        self.self_attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.self_attention = SelfAttention(config.width, config.num_heads, config.window)
        if self.attends:
            self.cross_attention_norm = nn.RMSNorm(config.width, eps=1e-5)
            self.cross_attention = CrossAttention(config.width, config.num_heads)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = SwiGLU(config.width, config.hidden)

    def below_z(self, x_BTD: Tensor, rotation: Rotation, num_outputs: int) -> BelowZ:
        """The layer up to where it reads its thought vectors, of the last `num_outputs` positions alone."""
        attended_BTD = self.self_attention(self.self_attention_norm(x_BTD), rotation, num_outputs)
        return self._below_z(x_BTD[:, x_BTD.shape[1] - num_outputs :], attended_BTD)

    def forward(self, below: BelowZ, u_BSD: Tensor) -> Tensor:
        """The rest of the layer: cross-attention and SwiGLU."""
        attended_BTD = self.cross_attention(below.normed_BTD, u_BSD) if self.attends else None
        return self._above_z(below, attended_BTD, self._fast_weights(u_BSD))

    def read(self, x_BTD: Tensor, rotation: Rotation, u_BSD: Tensor, index_BR: Tensor) -> tuple[Tensor, BlockMemory]:
        """The whole layer, and what `step` needs of these tokens."""
        attended_BTD, ring = self.self_attention.read(self.self_attention_norm(x_BTD), rotation, index_BR)
        thought = self.cross_attention.keys_values(u_BSD) if self.attends else None
        memory = BlockMemory(ring, thought, self._fast_weights(u_BSD))
        return self._remembering(x_BTD, attended_BTD, memory), memory

    def step(
        self, x_B1D: Tensor, memory: BlockMemory, place_1: Tensor, rotation: Rotation, is_seen_BR: Tensor
    ) -> Tensor:
        """The whole layer for one token of each text; the arguments are those of :meth:`SelfAttention.step`."""
        normed_B1D = self.self_attention_norm(x_B1D)
        attended_B1D = self.self_attention.step(normed_B1D, memory.ring, place_1, rotation, is_seen_BR)
        return self._remembering(x_B1D, attended_B1D, memory)

    def _remembering(self, x_BTD: Tensor, attended_BTD: Tensor, memory: BlockMemory) -> Tensor:
        """The layer after self-attention, with what it reads of the thought vectors from the memory."""
        below = self._below_z(x_BTD, attended_BTD)
        if below.normed_BTD is None or memory.thought is None:
            return self._above_z(below, None, memory.fast_BHD)
        return self._above_z(below, self.cross_attention.attend(below.normed_BTD, *memory.thought), None)

    def _fast_weights(self, u_BSD: Tensor) -> Tensor | None:
        return self.feed_forward.with_fast_weights(u_BSD) if self.has_fast_weights else None

    def _below_z(self, x_BTD: Tensor, attended_BTD: Tensor) -> BelowZ:
        x_BTD = x_BTD + attended_BTD
        return BelowZ(x_BTD, self.cross_attention_norm(x_BTD) if self.attends else None)

    def _above_z(self, below: BelowZ, thought_BTD: Tensor | None, fast_BHD: Tensor | None) -> Tensor:
        x_BTD = below.x_BTD if thought_BTD is None else below.x_BTD + thought_BTD
        fed_BTD: Tensor = self.feed_forward(self.feed_forward_norm(x_BTD), fast_BHD)
        return x_BTD + fed_BTD


class Decoder(nn.Module):
    """p(x_n | u, x_<n): the distribution of the next token at every position, given thought vectors u.

    The vocabulary's last token is begin-of-text. It is only ever read, so it has an embedding and no logit, and no
    probability is spent on it.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, config.width)
        # A `ModuleList` has no type for its elements.
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(config) for _ in range(config.num_layers)))
        self.final_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.compute_dtype: torch.dtype | None = None
        """The dtype of matrix products (bfloat16); None for that of the weights. Sums, norms, the residual stream,
        weights and their gradients keep the dtype of the weights."""
        self._is_compiled = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, from torch's global generator."""
        draw_weights(self)

    def compile(self, **options: Any) -> None:
        """Compile the decoder: what `forward` and `below_z` compute as whole graphs, and on a GPU the vocabulary term.

        Args:
            options: those of `torch.compile` for the former.
        """
        self._is_compiled = True
        self._hidden = torch.compile(self._hidden, fullgraph=True, **options)  # type: ignore[method-assign]
        self._below_z = torch.compile(self._below_z, fullgraph=True, **options)  # type: ignore[method-assign]

    @property
    def begin_of_text(self) -> int:
        """The id of the token that starts every input."""
        return self.vocab_size - 1

    def inputs(self, tokens_BT: Tensor, previous_B: Tensor | None = None) -> Tensor:
        """The input that predicts each of the tokens, which is the token before it.

        Args:
            previous_B: the token before the first; None for begin-of-text.
        """
        if previous_B is None:
            return F.pad(tokens_BT[:, :-1], (1, 0), value=self.begin_of_text)
        return torch.cat([previous_B[:, None], tokens_BT[:, :-1]], dim=1)

    def below_z(self, inputs_BT: Tensor, num_context: int = 0) -> BelowZ:
        """The part that depends on the tokens alone: the first layer up to where it reads its thought vectors.

        Args:
            num_context: the number of inputs at the beginning that are only there to be seen, as in :meth:`forward`.
        """
        return self._below_z(inputs_BT, self._rotation(inputs_BT), num_context)

    def _below_z(self, inputs_BT: Tensor, rotation: Rotation, num_context: int) -> BelowZ:
        with self._autocast():
            num_outputs = self._num_outputs(0, inputs_BT.shape[1], num_context)
            return self.blocks[0].below_z(self.embedding(inputs_BT), rotation, num_outputs)

    def forward(self, inputs_BT: Tensor, u_BLSD: Tensor, below: BelowZ | None = None, num_context: int = 0) -> Tensor:
        """Hidden states [B, T - num_context, D] that predict the token after each input.

        Args:
            u_BLSD: thought vectors of each sequence.
            below: `below_z` of these inputs, where it has been computed already.
            num_context: the number of inputs at the beginning that are only there to be seen: their hidden states are
                not returned, and a layer computes no more of them than the layers above it see.
        """
        # Outside of what is compiled: a compiler would compute the tables anew for each number that it rotates.
        rotation = self._rotation(inputs_BT)
        below = self._below_z(inputs_BT, rotation, num_context) if below is None else below
        return self._hidden(inputs_BT.shape[1], rotation, u_BLSD, below, num_context)

    def _hidden(self, num_inputs: int, rotation: Rotation, u_BLSD: Tensor, below: BelowZ, num_context: int) -> Tensor:
        # Each layer counts positions from the first that it sees: only their differences matter.
        first, *others = u_BLSD.to(below.x_BTD.dtype).unbind(1)
        with self._autocast():
            x_BTD: Tensor = self.blocks[0](below, first)
            for layer, u_BSD in enumerate(others, start=1):
                block, num_outputs = self.blocks[layer], self._num_outputs(layer, num_inputs, num_context)
                x_BTD = block(block.below_z(x_BTD, rotation, num_outputs), u_BSD)
            hidden_BTD: Tensor = self.final_norm(x_BTD)
            return hidden_BTD

    def _num_outputs(self, layer: int, num_inputs: int, num_context: int) -> int:
        """The number of positions, the last ones, whose output of a layer the layers above it see."""
        num_above = self.config.num_layers - 1 - layer
        return min(num_inputs, num_inputs - num_context + num_above * (self.config.window - 1))

    @property
    def reach(self) -> int:
        """The number of inputs that a hidden state depends on, its own included. No layer sees further back."""
        return self.config.num_layers * (self.config.window - 1) + 1

    def read(
        self, inputs_BT: Tensor, num_inputs_B: Tensor, u_BLSD: Tensor, num_steps: int
    ) -> tuple[Tensor, DecoderMemory]:
        """Read the beginnings of texts, all positions at once.

        Args:
            num_inputs_B: number of inputs of each text, at least one; what follows them is padding.
            u_BLSD: thought vectors of each text.
            num_steps: the most steps that will be taken; the memory has room for them.

        Returns:
            the hidden state [B, D] that predicts the token after each text, and what `step` continues from.
        """
        size = min(self.config.window, inputs_BT.shape[1] + num_steps)
        # The newest token stands last, so that what a short text leaves empty is overwritten first.
        index_BR = num_inputs_B[:, None] - size + torch.arange(size, device=inputs_BT.device)
        memory = DecoderMemory([], num_inputs_B.clone(), index_BR >= 0, num_inputs_B.new_zeros(1))
        index_BR = index_BR.clamp(min=0)
        x_BTD: Tensor = self.embedding(inputs_BT)
        rotation = self._rotation(inputs_BT)
        with self._autocast():
            for block, u_BSD in zip(self.blocks, u_BLSD.to(x_BTD.dtype).unbind(1), strict=True):
                x_BTD, block_memory = block.read(x_BTD, rotation, u_BSD, index_BR)
                memory.blocks.append(block_memory)
            last_BD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), num_inputs_B - 1]
            return self.final_norm(last_BD), memory

    def step(self, tokens_B: Tensor, memory: DecoderMemory) -> Tensor:
        """Read one more token of each text. The cost is the same at every position.

        The host neither keeps a number of the step nor asks the device for one.

        Returns:
            the hidden state [B, D] that predicts the token after it.
        """
        place_1, is_seen_BR = memory.place_1, memory.is_seen_BR
        is_seen_BR.index_fill_(1, place_1, True)
        x_B1D: Tensor = self.embedding(tokens_B[:, None])
        rotation = Rotation.at(memory.num_read_B[:, None], self.config.head_dim, x_B1D.dtype)
        with self._autocast():
            for block, block_memory in zip(self.blocks, memory.blocks, strict=True):
                x_B1D = block.step(x_B1D, block_memory, place_1, rotation, is_seen_BR)
            memory.num_read_B.add_(1)
            place_1.add_(1).remainder_(is_seen_BR.shape[1])
            hidden_BD: Tensor = self.final_norm(x_B1D[:, 0])
            return hidden_BD

    def log_probs(self, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """Log-probabilities [N] of the tokens that follow the hidden states, at least in float32."""
        # On a CPU the number of positions changes from text to text.
        is_compiled = self._is_compiled and hidden_ND.device.type != "cpu"
        weight, dtype = self.embedding.weight, self.compute_dtype
        return target_log_probs(hidden_ND, weight, tokens_N, num_unused=1, dtype=dtype, is_compiled=is_compiled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V − 1] of every token but begin-of-text, for hidden states [..., D]."""
        weight, dtype = self.embedding.weight[:-1], self.compute_dtype
        return F.linear(hidden.to(dtype or hidden.dtype), weight.to(dtype or weight.dtype))

    def _rotation(self, inputs_BT: Tensor) -> Rotation:
        """The rotation at the positions of some inputs, for all layers."""
        positions = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
        return Rotation.at(positions, self.config.head_dim, self.embedding.weight.dtype)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.embedding.weight.device.type, self.compute_dtype)
