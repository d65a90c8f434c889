"""Routers: which experts a token goes to, with what gate, and what uneven loads cost."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_bank.config import ModelConfig
from switch_bank.ops.float32_linear import float32_linear
from switch_bank.ops.microbatches import linear, per_microbatch
from switch_bank.schedules import StepState, layer_shape


class Routing(NamedTuple):
    """One layer's routes."""

    experts: Tensor  # [B, T, K] int64
    gates: Tensor  # [B, T, K] router dtype; 0 for a pick beyond the active experts
    probabilities: Tensor  # [B, T, E] router dtype; softmax or sigmoid of the capped logits, 0 for inactive experts
    logits: Tensor  # [B, T, E] before noise, temperature and cap
    capped: Tensor  # [B, T, E] what the probabilities are taken of, without a gradient
    choice: Tensor  # [B, T, E] the values that the top-K was taken of, -inf for inactive experts; without a gradient


class RoutingSums(NamedTuple):
    """How the tokens that have a target were routed, summed over them; float32, so that parts of a step add up."""

    counts: Tensor  # [L, E]: how often they picked each expert; inactive picks are none
    load: Tensor  # [L, E]: how often each expert was their first pick
    importance: Tensor  # [L, E]: of their probabilities
    top_probability: Tensor  # [L]: of their highest probability
    at_cap: Tensor  # [L]: of the share of their active experts whose logit is cut off at the cap

    def flat(self) -> Tensor:
        """All of them in one row, to be summed over processes in one call."""
        return torch.cat([part.flatten() for part in self])

    @classmethod
    def from_flat(cls, row: Tensor, layers: int, experts: int) -> "RoutingSums":
        """Undoes `flat`."""
        each = layers * experts
        matrices, vectors = row[: 3 * each].view(3, layers, experts), row[3 * each :].view(2, layers)
        return cls(*matrices.unbind(), *vectors.unbind())


class RouterOfLayer(NamedTuple):
    """What tells one layer's router from another's, as tensors: one compiled graph serves all layers."""

    weight: Tensor  # [E, router_features], or per microbatch, as the bias
    bias: Tensor  # [E]
    balance_bias: Tensor  # [E]
    temperature_factor: Tensor  # 0-dim


class Routers(nn.Module):
    """The routers of all layers, in stacked tensors: weight [L, E, router_features], bias [L, E]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.layers, config.experts, config.router_features))
        self.bias = nn.Parameter(torch.zeros(config.layers, config.experts))
        nn.init.normal_(self.weight, std=0.02)
        # What balance="bias" adds to the choice, and which experts were pruned: state, not parameters.
        self.balance_bias: Tensor
        self.register_buffer("balance_bias", torch.zeros(config.layers, config.experts))
        self.pruned: Tensor
        self.register_buffer("pruned", torch.zeros(config.experts, dtype=torch.bool))
        self.shape: Tensor
        self.register_buffer("shape", torch.tensor(layer_shape(config), dtype=torch.float32))

    def of_layers(self, microbatches: int | None = None) -> list[RouterOfLayer]:
        """One RouterOfLayer a layer; unbound together, so that their gradients are stacked once, not added up."""
        factors = 1 + self.config.temperature_boost * self.shape
        weights = per_microbatch(self.weight, microbatches).unbind(-3)
        biases = per_microbatch(self.bias, microbatches).unbind(-2)
        rows = zip(weights, biases, self.balance_bias.unbind(), factors.unbind(), strict=True)
        return [RouterOfLayer(*row) for row in rows]

    def active(self, state: StepState) -> Tensor:
        """[E] bool: the experts that may be chosen."""
        return (torch.arange(self.config.experts, device=self.pruned.device) < state.active_experts) & ~self.pruned

    def ema_channels(self, layers: int) -> int:
        """How many numbers of a token the EMAs of a group of `layers` layers run over."""
        return min(self.config.width, layers * self.config.experts)

    def context_logits(
        self,
        n: Tensor,
        emas: list[Callable[[Tensor], Tensor]],
        flags: Tensor | None,
        routers: tuple[RouterOfLayer, ...],
    ) -> list[Tensor]:
        """What bias, EMAs of n [B, T, D], the bank's input of one of the layers, and flags [B, T, ·] add to the logits
        of several layers: one product each for all of them. Returns [B, T, E] for each layer.

        EMAs are linear and work token by token: before the product with the weights, or behind it, where there are
        fewer logits than numbers in n."""
        ones = torch.ones_like(n[..., :1], dtype=torch.promote_types(n.dtype, torch.float32))
        # The bias as a product too: how a plain sum of its gradients is cut up depends on the number of threads.
        logits = linear(ones, torch.cat([router.bias for router in routers], dim=-1)[..., None].to(ones.dtype))
        stacked, width = torch.cat([router.weight for router in routers], dim=-2), self.config.width
        behind = self.ema_channels(len(routers)) < width
        for i, ema in enumerate(emas, start=1):
            weight = stacked[..., i * width : (i + 1) * width]
            logits = logits + (ema(self._product(n, weight)) if behind else self._product(ema(n), weight))
        if flags is not None:
            logits = logits + self._product(flags.to(ones.dtype), stacked[..., (1 + len(emas)) * width :])
        return list(logits.split(self.config.experts, dim=-1))

    def forward(
        self,
        router: RouterOfLayer,
        n: Tensor,
        context: Tensor,
        state: StepState,
        active: Tensor,
        noise: Tensor | None,
    ) -> Routing:
        """n: [B, T, D], the bank's input; context: [B, T, E] of `context_logits`; noise: [B, T, E] or None."""
        config = self.config
        logits = self._product(n, router.weight[..., : config.width]) + context
        noisy = logits if noise is None else logits + noise
        values = noisy / (state.temperature * router.temperature_factor)
        choice = values.detach()  # no gradient goes through which experts are best, nor is one made of zeros
        choice = choice + router.balance_bias if config.balance == "bias" else choice
        choice = choice.masked_fill(~active, -torch.inf)
        # argmax, because topk took three times as long for one expert of 16 on a CPU.
        experts = choice.argmax(-1, keepdim=True) if config.top_k == 1 else choice.topk(config.top_k, dim=-1).indices
        # Chosen by the values, weighed by the capped ones: at a low cap many tie, and a tie goes to the lower index.
        capped = _Capped.apply(values, state.cap)
        if config.score == "softmax":
            probabilities = torch.softmax(capped.masked_fill(~active, -torch.inf), dim=-1)
        else:
            probabilities = torch.sigmoid(capped) * active
        return Routing(experts, probabilities.gather(-1, experts), probabilities, logits, capped.detach(), choice)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, ·] times weightᵀ, in float32 whatever the dtype of activations, or in float64."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            return float32_linear(x, weight)
        x = x if x.dtype == torch.float64 else x.float()
        return linear(x, weight.to(x.dtype))

    def margin(self, routing: Routing) -> Tensor:
        """[B, T] float32: by how much the last pick beats the best expert that was not picked; a rounding error above
        it would change the route. inf where every active expert is picked."""
        if self.config.top_k == self.config.experts:
            return torch.full_like(routing.choice[..., 0], torch.inf)
        best = routing.choice.topk(self.config.top_k + 1, dim=-1).values
        return (best[..., -2] - best[..., -1]).nan_to_num(nan=torch.inf, posinf=torch.inf).float()

    def sums(self, routings: list[Routing], state: StepState, active: Tensor, counted: Tensor) -> RoutingSums:
        """What the tokens of counted [B, T] bool picked; one Routing a layer."""
        tokens, count = counted[..., None], self.config.experts
        layers = []
        for routing in routings:
            picks = F.one_hot(routing.experts, count) * active
            at_cap = (routing.capped.abs() >= state.cap) & active
            of_layer = (
                (picks.sum(dim=2) * tokens).sum(dim=(0, 1)),
                (picks[:, :, 0] * tokens).sum(dim=(0, 1)),
                (routing.probabilities * tokens).sum(dim=(0, 1)),
                (routing.probabilities.amax(-1) * counted).sum(),
                (at_cap * tokens).sum() / active.sum(),
            )
            layers.append([part.detach().float() for part in of_layer])
        return RoutingSums(*(torch.stack(part) for part in zip(*layers, strict=True)))

    @torch.no_grad()
    def feature_shares(self) -> dict[str, Tensor]:
        """Of each kind of input, its share [L] of the squared norm of a layer's weights."""
        config = self.config
        widths = {"token": config.width}
        widths |= {"forward_ema": config.width} if config.forward_ema else {}
        widths |= {"reverse_ema": config.width} if config.reverse_ema != "off" else {}
        widths |= {"flags": config.flag_features} if config.flags else {}
        squares = self.weight.square().sum(1)
        parts = squares.split(list(widths.values()), dim=-1)
        return {name: part.sum(-1) / squares.sum(-1) for name, part in zip(widths, parts, strict=True)}

    def auxiliary_loss(self, routings: list[Routing], active: Tensor) -> Tensor:
        """The mean over slices of what balance and z-loss cost, a 0-dim tensor.

        Importance is the mean probability (Shazeer et al., arXiv 1701.06538), load the share of first picks, whose
        gradient is taken straight through the probabilities.
        """
        config = self.config
        total = torch.zeros((), device=active.device)
        if config.balance == "aux":
            importance = torch.stack([routing.probabilities.mean(dim=1) for routing in routings])  # [L, B, E]
            first = torch.stack([_one_hot_mean(routing.experts[..., 0], config.experts) for routing in routings])
            load = first + importance - importance.detach()
            layer_weight = 1 + config.balance_boost * self.shape
            if config.balance_scope == "bank":
                importance, load = importance.sum(0, keepdim=True), load.sum(0, keepdim=True)
                layer_weight = layer_weight.sum(0, keepdim=True)
            cost = imbalance_cost(importance, active, config) + imbalance_cost(load, active, config)
            total = total + (layer_weight[:, None] * cost).sum(0).mean()
        if config.z_loss_weight > 0:
            for routing in routings:
                logits = routing.logits.masked_fill(~active, -torch.inf)
                total = total + config.z_loss_weight * logits.logsumexp(-1).square().mean()
        return total

    @torch.no_grad()
    def update_balance_bias(self, pick_counts: Tensor, active: Tensor) -> None:
        """One step of balance="bias" (Wang et al., arXiv 2408.15664): up by γ below the mean load, down above it.

        pick_counts: [L, E] of the whole step, all processes; active: [E] bool.
        """
        if self.config.balance_scope == "bank":
            pick_counts = pick_counts.sum(0, keepdim=True)
        mean = (pick_counts * active).sum(-1, keepdim=True) / active.sum()
        self.balance_bias += self.config.bias_step * torch.sign(mean - pick_counts) * active

    @torch.no_grad()
    def prune(self, pick_counts: Tensor, below: float, active: Tensor) -> None:
        """Switches off the active experts whose share of the bank's picks is under `below` of an even share."""
        counts = pick_counts.sum(0) * active
        self.pruned |= active & (counts * active.sum() < below * counts.sum())


class _Capped(torch.autograd.Function):
    """clamp(x, -cap, cap). For its gradient torch's own keeps a bool for each number, which a compiled part writes one
    by one on a CPU: that took half of a router's time."""

    @staticmethod
    def forward(ctx, x, cap):  # type: ignore[no-untyped-def]
        capped = torch.clamp(x, -cap, cap)
        ctx.save_for_backward(capped, cap)
        return capped

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        capped, cap = ctx.saved_tensors
        return torch.where(capped.abs() < cap, grad, 0.0), None


def _one_hot_mean(experts: Tensor, count: int) -> Tensor:
    return F.one_hot(experts, count).float().mean(dim=1)


def imbalance_cost(share: Tensor, active: Tensor, config: ModelConfig) -> Tensor:
    """cv_weight·CV²(q) + entropy_weight·gap(q), q being `share` [..., E] normalised to 1 over the active experts.

    gap = (log A - H(q)) / log A with A active experts. Both are 0 where at most one expert is active. Returns [...].
    """
    share = share * active
    q = share / share.sum(-1, keepdim=True).clamp(min=1e-20)
    count = active.sum()
    cv_squared = count * ((q - 1 / count) * active).square().sum(-1)
    entropy = -(q * q.clamp(min=1e-9).log()).sum(-1)  # clamped: x·log x is 0 at 0, and so is no gradient infinite
    most = count.clamp(min=2).log()
    cost = config.cv_weight * cv_squared + config.entropy_weight * (most - entropy) / most
    return torch.where(count > 1, cost, 0.0)
