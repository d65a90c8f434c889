"""SwitchBankGPT: the language model whose layers share one bank of experts."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switch_bank.compiled_code import remove_half_written
from switch_bank.config import Config, ModelConfig, compute_dtype
from switch_bank.model.attention import Ring, attention_matrices, rms_norm, rotary_tables, self_attention
from switch_bank.model.bank import Bank, Experts
from switch_bank.model.features import Documents, EmaSums, documents_of, emas_of
from switch_bank.model.folder import ModelFolderError, read_folder
from switch_bank.model.router import RouterOfLayer, Routers, Routing, RoutingSums
from switch_bank.ops.attention import BLOCK, build_mask, choose_backend, ring_mask
from switch_bank.ops.bank import ARRANGED, MANY
from switch_bank.ops.head import IGNORE, chunked_head_losses, soft_cap
from switch_bank.ops.microbatches import lookup, per_microbatch, scaled
from switch_bank.ops.noise import gumbel, gumbel_keys
from switch_bank.schedules import StepState, step_state

SKIPS = {9: 6, 10: 4, 11: 2}  # U-net skips: layer -> the earlier layer whose output it gets

# Of the forward, each compiled by itself.
PARTS = ("begin", "noise", "attend_and_route", "feed_forward", "dense_block", "losses")
LAYER_PARTS = ("attend_and_route", "feed_forward", "dense_block")  # of them, those that hold a layer's activations


class Start(NamedTuple):
    """What a forward knows before its first layer."""

    x0: Tensor  # [B, T, D]: the normed embedding
    value_embeddings: list[Tensor]  # [B, T, D] each
    documents: Documents
    rotary: tuple[Tensor, Tensor]
    long_mask: Any  # of ops.attention.build_mask
    short_mask: Any
    active: Tensor  # [E] bool: the experts that may be chosen


class AttentionInputs(NamedTuple):
    """What the attention of a block works with beside x; scalars and qkvo may be per microbatch."""

    x0: Tensor  # [B, T, D]
    skip: Tensor | None  # [B, T, D]: the output of an earlier block
    scalars: Tensor  # [5]
    qkvo: Tensor | None  # [4, D, D]; None in a block without attention
    value_embedding: Tensor | None  # [B, T, D]
    rotary: tuple[Tensor, Tensor]
    mask: Any
    ring: Ring | None


class Group(NamedTuple):
    """Layers that share their EMAs, as the first of them sees them."""

    routers: tuple[RouterOfLayer, ...]
    documents: Documents
    sums: EmaSums | None  # the EMAs of streams before these tokens


class LayerWeights(NamedTuple):
    """What layers do not share, or see of what they share, as lists over the layers; all may be per microbatch."""

    experts: list[Experts]
    scalars: tuple[Tensor, ...]  # [5] each
    routers: list[RouterOfLayer] | None


@dataclass
class Past:
    """What a forward of the next tokens of streams knows of those before them; the forward brings it up to date."""

    weights: LayerWeights  # taken apart once for all tokens
    windows: tuple[int, int]  # tokens that a long and a short attention window span
    tokens_read: int  # of each stream
    documents: Documents  # of the last tokens
    rings: dict[int, Ring]  # of the layers that have attention
    sums: list[EmaSums]  # of each group of layers that share EMAs


class Output(NamedTuple):
    """What a forward with targets returns."""

    loss: Tensor  # 0-dim float32: mean cross-entropy, plus the auxiliary loss in training
    cross_entropy: Tensor  # 0-dim float32, detached: mean over the targets
    token_losses: Tensor  # [B, T] float32, detached; 0 at ignored targets
    routing: RoutingSums
    margins: Tensor  # [B, T] float32: least lead, over the layers, of the last pick over the next best; inf in training


class Table(nn.Embedding):
    """A row for each token of the vocabulary; `weight` is its own, or that per microbatch."""

    def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return lookup(tokens, weight)


class SwitchBankGPT(nn.Module):
    """Parameters are float32, activations of `config.dtype`. Builds on any device, meta included."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Table(config.padded_vocab, config.width)
        self.value_embeddings = nn.ModuleList(
            Table(config.vocab_size, config.width) for _ in range(config.value_embeddings)
        )
        groups = sorted({i // config.tied_layers for i in range(config.layers) if i not in config.skip_attention})
        self.attention = nn.ParameterDict({str(group): attention_matrices(config.width) for group in groups})
        self.routers = Routers(config) if config.experts > 1 else None  # one expert leaves nothing to choose
        self.bank = Bank(config)
        # A layer's scalars: weight of its U-net skip, λ₀ of x, λ₁ of x⁰, weights of v and of the value embedding.
        self.scalars = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.5, 0.5]).repeat(config.layers, 1))
        self.head = nn.Parameter(torch.zeros(config.padded_vocab, config.width))
        self.trained_state: StepState | None = None  # of the step that loaded weights were trained to

    @classmethod
    def from_folder(cls, folder: str | Path, device: torch.device | str = "cpu") -> "SwitchBankGPT":
        """The model, in eval mode, of a folder that `python -m switch_bank export` wrote; `predict` gives its logits.

        Raises ModelFolderError or ConfigError for a file that is missing, damaged or does not fit.
        """
        return cls.trained(*read_folder(Path(folder)), device)

    @classmethod
    def trained(
        cls, config: Config, weights: dict[str, Tensor], step: int, device: torch.device | str
    ) -> "SwitchBankGPT":
        """The model of a run after `step` steps, in eval mode. weights: its state_dict, which the model takes over."""
        with torch.device("meta"):
            model = cls(config.model)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            lines = " ".join(str(error).split())
            raise ModelFolderError(f"the weights do not fit their configuration: {lines}") from error
        model.trained_state = step_state(step, config, device)
        return model.to(device).eval()

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """The logits of each next token, [B, T, vocab_size] float32, of a trained model in eval mode.

        tokens: [B, T] int64; documents begin with `config.eod_token`. Row t depends on tokens 0..t alone, unless
        the model is leaky.
        """
        hidden, _ = self._read(tokens)
        return self.logits(hidden).float()[..., : self.config.vocab_size]

    @torch.no_grad()
    def routes(self, tokens: Tensor) -> list[Routing]:
        """Where each layer of a trained model in eval mode sends tokens [B, T] int64, read as `predict` reads them."""
        return self._read(tokens)[1]

    def _read(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """`trunk` in the state that the weights were trained to."""
        if self.trained_state is None:
            raise RuntimeError("this model is not trained: load one with SwitchBankGPT.from_folder")
        backend, length = self.attention_backend, tokens.shape[1]
        window = int(self.trained_state.window) if backend == "flash" else None
        if backend == "flex":  # which takes whole blocks
            tokens = F.pad(tokens, (0, -length % BLOCK), value=self.config.eod_token)
        hidden, routings, _ = self.trunk(tokens, self.trained_state, window=window)
        return hidden[:, :length], [Routing(*(part[:, :length] for part in routing)) for routing in routings]

    @property
    def attention_backend(self) -> str:
        device = self.head.device
        dtype = compute_dtype(self.config.dtype, device)
        return choose_backend(self.config.attention_backend, device, dtype, self.config.head_dim)

    @property
    def bank_backend(self) -> str:
        """Of a forward of slices; one of a few tokens may take another."""
        return self.bank.backend(compute_dtype(self.config.dtype, self.head.device), MANY)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: StepState,
        slices: Tensor | None = None,
        seed: Tensor | None = None,
        window: int | None = None,
        microbatches: int | None = None,
    ) -> Output:
        """tokens, targets: [B, T] int64. Gumbel noise is drawn where a seed (0-dim int64) is given, for slices [B]
        int64 of the step. `window` in tokens replaces state.window for attention kernels that take a Python int.

        With `microbatches`, which divide B, gradients do not depend on how many of them share a forward: those of
        parameters are summed by microbatch, and over microbatches in float64; a `grad_dtype` of None keeps them so."""
        hidden, routings, active = self.trunk(tokens, state, slices, seed, window, microbatches=microbatches)
        output = self.losses(hidden, per_microbatch(self.head, microbatches), targets, routings, state, active)
        # Detached here: within a compiled part, a detached twin of the loss makes the loss come out without a gradient.
        return output._replace(cross_entropy=output.cross_entropy.detach(), token_losses=output.token_losses.detach())

    def recompute_layers(self) -> None:
        """From here on, only the inputs of a layer's parts are kept for the backward, which computes the rest again
        (Chen et al., arXiv 1604.06174). To be called before `compile`: a part is compiled with its recomputation."""
        for part in LAYER_PARTS:
            # There is no random state to preserve: draws are hashes.
            own = functools.partial(checkpoint, getattr(self, part), use_reentrant=False, preserve_rng_state=False)
            setattr(self, part, own)

    def compile(self) -> None:
        """Compiles the parts of the forward, each without a graph break. What differs between layers reaches a part
        as tensors, so that the graphs, and the time it takes to compile them, do not grow with the layers."""
        remove_half_written()
        # Kinds of layers, shapes, training and validation make a graph each: more than the 8 that dynamo lets pass.
        torch._dynamo.config.recompile_limit = 256
        for part in PARTS:
            if part == "feed_forward" and self.bank_backend in ARRANGED:
                continue  # its kernels are compiled already
            setattr(self, part, torch.compile(getattr(self, part), fullgraph=True, dynamic=False))

    def uncompiled(self) -> "SwitchBankGPT":
        """This model, sharing every tensor with it, but with the parts of its forward as they are written."""
        twin = copy.copy(self)
        for part in PARTS:
            twin.__dict__.pop(part, None)
        return twin

    def trunk(
        self,
        tokens: Tensor,
        state: StepState,
        slices: Tensor | None = None,
        seed: Tensor | None = None,
        window: int | None = None,
        past: Past | None = None,
        microbatches: int | None = None,
    ) -> tuple[Tensor, list[Routing], Tensor]:
        """The output of the last block [B, T, D], each layer's routes, and the active experts [E] bool. With `past`,
        tokens are the next ones of each stream."""
        config = self.config
        tables = [per_microbatch(table.weight, microbatches) for table in (self.embedding, *self.value_embeddings)]
        start = self.begin(tokens, tables, state, window, past)
        x = start.x0
        # After `begin`, so that a backward finishes their gradients before those of the tables.
        of_layers = self.of_layers(x.dtype, tokens.numel(), microbatches) if past is None else past.weights
        bank, scalars, routers = of_layers
        noise = noise_keys = None
        if seed is not None and slices is not None and routers is not None:
            noise_keys = gumbel_keys(seed, state.step, slices, config.layers)
        if self.training and routers is not None:
            noise = torch.zeros(*tokens.shape, config.experts, device=tokens.device)  # a step without noise adds this
        outputs: list[Tensor] = []
        routings: list[Routing] = []
        contexts: list[Tensor] = []  # of the next layers of a group
        for layer in range(config.layers):
            skip = outputs[SKIPS[layer]] if layer in SKIPS else None
            attends = layer not in config.skip_attention
            qkvo = per_microbatch(self.attention[str(layer // config.tied_layers)], microbatches) if attends else None
            mask = start.long_mask if layer % 4 == 3 else start.short_mask
            value_embedding = self._value_embedding(layer, start) if attends else None
            ring = past.rings[layer] if past is not None and attends else None
            inputs = AttentionInputs(start.x0, skip, scalars[layer], qkvo, value_embedding, start.rotary, mask, ring)
            if routers is None:
                x = self.dense_block(x, inputs, bank[layer])
            else:
                if noise_keys is not None:
                    noise = self.noise(noise_keys[layer], tokens.shape[1])
                context: Tensor | Group
                if layer % config.ema_stride == 0:
                    sums = None if past is None else past.sums[layer // config.ema_stride]
                    context = Group(tuple(routers[layer : layer + config.ema_stride]), start.documents, sums)
                else:
                    context = contexts.pop(0)
                x, n, routing, more = self.attend_and_route(
                    x, inputs, routers[layer], context, state, start.active, noise
                )
                contexts += more
                x = self.feed_forward(x, n, bank[layer], routing.experts, routing.gates)
                routings.append(routing)
            outputs.append(x)
        return x, routings, start.active

    def of_layers(self, dtype: torch.dtype, tokens: int, microbatches: int | None = None) -> LayerWeights:
        """The weights for forwards of `tokens` tokens each, with activations of `dtype`."""
        return LayerWeights(
            experts=self.bank.of_layers(self.bank.backend(dtype, tokens), dtype, microbatches),
            scalars=per_microbatch(self.scalars, microbatches).unbind(-2),
            routers=None if self.routers is None else self.routers.of_layers(microbatches),
        )

    # ---- the parts that are compiled ------------------------------------------------------------------------------

    def begin(
        self, tokens: Tensor, tables: list[Tensor], state: StepState, window: int | None, past: Past | None
    ) -> Start:
        """All that depends on the tokens and the step alone. tables: the embedding, and the value embeddings."""
        config, backend = self.config, self.attention_backend
        dtype = compute_dtype(config.dtype, tokens.device)
        if past is None:
            documents = documents_of(tokens, config)
            long_window = state.window if window is None else window
            short_window = torch.div(long_window, 2, rounding_mode="floor") if window is None else window // 2
            long_mask, short_mask = (build_mask(backend, documents.document, w) for w in (long_window, short_window))
        else:
            documents = past.documents = documents_of(tokens, config, past.documents)
            long_mask, short_mask = (ring_mask(documents.position, past.tokens_read, w) for w in past.windows)
            past.tokens_read += tokens.shape[1]
        modules = (self.embedding, *self.value_embeddings)
        rows = [table(tokens, weight) for table, weight in zip(modules, tables, strict=True)]
        return Start(
            x0=rms_norm(rows[0].to(dtype)),
            value_embeddings=[values.to(dtype) for values in rows[1:]],
            documents=documents,
            rotary=rotary_tables(documents.position, config.head_dim, dtype),
            long_mask=long_mask,
            short_mask=short_mask,
            active=(state.active_experts > 0).view(1) if self.routers is None else self.routers.active(state),
        )

    def attend_and_route(
        self, x: Tensor, inputs: AttentionInputs, router: RouterOfLayer, context: Tensor | Group, state: StepState,
        active: Tensor, noise: Tensor | None,
    ) -> tuple[Tensor, Tensor, Routing, list[Tensor]]:  # fmt: skip
        """A block up to its bank: x [B, T, D], its norm, which is the bank's input, and where the tokens go. The first
        layer of a group is given the group as context, and returns the contexts of the other layers, too."""
        x, n = self.attend(x, inputs)
        contexts = self.contexts(n, context) if isinstance(context, Group) else [context]
        assert self.routers is not None
        return x, n, self.routers(router, n, contexts[0], state, active, noise), contexts[1:]

    def attend(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """A block's attention. Returns x [B, T, D] and its norm, the bank's input."""
        scalars = inputs.scalars.to(x.dtype)
        if inputs.skip is not None:
            x = x + scaled(inputs.skip, scalars[..., 0])
        x = scaled(x, scalars[..., 1]) + scaled(inputs.x0, scalars[..., 2])
        if inputs.qkvo is not None:
            x = x + self_attention(
                inputs.qkvo, rms_norm(x), self.config.heads, inputs.rotary, inputs.value_embedding, scalars[..., 3:],
                self.attention_backend, inputs.mask, inputs.ring,
            )  # fmt: skip
        return x, rms_norm(x)

    def contexts(self, n: Tensor, group: Group) -> list[Tensor]:
        """What is added to the logits that the token alone gives in each layer of a group, [B, T, E]: by bias, EMAs and
        flags. n is the bank's input of the group's first layer."""
        assert self.routers is not None
        emas = emas_of(group.documents, self.config, group.sums)
        return self.routers.context_logits(n, emas, group.documents.flags, group.routers)

    def noise(self, keys: Tensor, tokens: int) -> Tensor:
        """The Gumbel noise of one layer's choices, [B, tokens, E], from the layer's keys [B]."""
        return gumbel(keys, tokens, self.config.experts)

    def feed_forward(self, x: Tensor, n: Tensor, experts: Experts, chosen: Tensor, gates: Tensor) -> Tensor:
        """x plus the bank's output."""
        return x + self.bank(experts, n, chosen, gates)

    def dense_block(self, x: Tensor, inputs: AttentionInputs, experts: Experts) -> Tensor:
        """A whole block with a bank of one expert, which leaves nothing to choose."""
        x, n = self.attend(x, inputs)
        one = torch.zeros_like(n[..., :1])
        return x + self.bank(experts, n, one.long(), one + 1)

    def losses(
        self, x: Tensor, head: Tensor, targets: Tensor, routings: list[Routing], state: StepState, active: Tensor
    ) -> Output:
        """From the last block's output to the losses."""
        loss_sum, token_losses = chunked_head_losses(rms_norm(x).flatten(0, 1), head, targets.flatten())
        counted = targets != IGNORE
        cross_entropy = loss_sum / counted.sum().clamp(min=1)
        loss = cross_entropy
        margins = torch.full_like(token_losses, torch.inf).view_as(targets)
        if self.routers is None:
            layers = self.config.layers
            sums = RoutingSums.from_flat(torch.zeros(5 * layers, device=targets.device), layers, experts=1)
        else:
            sums = self.routers.sums(routings, state, active, counted)
            if self.training:
                loss = loss + self.routers.auxiliary_loss(routings, active)
            else:
                margins = torch.stack([self.routers.margin(r) for r in routings]).amin(0)
        return Output(loss, cross_entropy, token_losses.view_as(targets), sums, margins)

    def logits(self, x: Tensor) -> Tensor:
        """The last block's output [..., D] -> [..., padded vocabulary], softly capped at ±15."""
        return soft_cap(F.linear(rms_norm(x), self.head.to(x.dtype)))

    def _value_embedding(self, layer: int, start: Start) -> Tensor | None:
        """Table i serves layer i of the first and of the last layers."""
        count, layers = self.config.value_embeddings, self.config.layers
        if layer < count:
            return start.value_embeddings[layer]
        return start.value_embeddings[layer - (layers - count)] if layer >= layers - count else None
