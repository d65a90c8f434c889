"""The bank: expert matrices that all layers share, and each layer's adapters to them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from switch_bank.config import ModelConfig
from switch_bank.ops.arranged import Arranged
from switch_bank.ops.bank import ARRANGED, Adapter, arrange, arranged_expert_ffn, choose_backend, expert_ffn
from switch_bank.ops.microbatches import per_microbatch


class Experts(NamedTuple):
    """The experts as one layer sees them; matrices and adapters may be per microbatch."""

    matrices: tuple[Tensor, Tensor] | Arranged  # w1 [E, F, D] and w2 [E, D, F], or as the backend's kernels read them
    adapter: Adapter  # parts [E, ...]
    always_on: tuple[Tensor, Tensor] | None  # w1 [1, F, D] and w2 [1, D, F] of the expert that works on every token


class Bank(nn.Module):
    """w1 [G·E, F, D] and w2 [G·E, D, F]; G is 1 when the bank is shared, else the number of layers.

    Adapter tensors are stacked over layers and experts; `Adapter` says their shapes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden, experts, rank = config.width, config.expert_width, config.experts, config.lora_rank
        sets = experts * (1 if config.shared else config.layers)
        self.w1 = nn.Parameter(_uniform(sets, hidden, width))
        self.w2 = nn.Parameter(torch.zeros(sets, width, hidden))
        if config.always_on_expert:
            self.always_w1 = nn.Parameter(_uniform(1, hidden, width))
            self.always_w2 = nn.Parameter(torch.zeros(1, width, hidden))
        of_layer = (config.layers, experts)
        self.adapters = nn.ParameterDict()
        if config.adapter == "scale_bias":
            self.adapters["scale"] = nn.Parameter(torch.ones(*of_layer, width))
            self.adapters["bias"] = nn.Parameter(torch.zeros(*of_layer, width))
        elif config.adapter == "lora":
            self.adapters["in_down"] = nn.Parameter(torch.randn(*of_layer, rank, width) * width**-0.5)
            self.adapters["in_up"] = nn.Parameter(torch.zeros(*of_layer, hidden, rank))
            self.adapters["out_down"] = nn.Parameter(torch.randn(*of_layer, rank, hidden) * hidden**-0.5)
            self.adapters["out_up"] = nn.Parameter(torch.zeros(*of_layer, width, rank))

    def backend(self, dtype: torch.dtype, tokens: int) -> str:
        """How the experts' products are computed for `tokens` tokens of `dtype`."""
        config = self.config
        plain = config.adapter != "lora" and config.width % 2 == config.expert_width % 2 == 0
        return choose_backend(config.bank_backend, self.w1.device, dtype, tokens, plain)

    def of_layers(self, backend: str, dtype: torch.dtype, microbatches: int | None = None) -> list[Experts]:
        """One Experts a layer, for products by `backend` in `dtype`; unbound together, so that their gradients are
        stacked once, not added up."""
        config, count, sets = self.config, self.config.experts, 1 if self.config.shared else self.config.layers
        matrices: list[tuple[Tensor, Tensor]] | list[Arranged]
        if backend in ARRANGED and count > 1:
            matrices = arrange(backend, self.w1, self.w2, dtype, microbatches).chunk(sets)
        else:
            w1, w2 = per_microbatch(self.w1, microbatches), per_microbatch(self.w2, microbatches)
            matrices = [(w1, w2)] if sets == 1 else list(zip(w1.split(count, -3), w2.split(count, -3), strict=True))
        always_on = None
        if config.always_on_expert:
            always_on = per_microbatch(self.always_w1, microbatches), per_microbatch(self.always_w2, microbatches)
        at = 0 if microbatches is None else 1  # the dimension of the layers
        parts = {name: per_microbatch(part, microbatches).unbind(at) for name, part in self.adapters.items()}
        adapters = [Adapter(**{name: part[i] for name, part in parts.items()}) for i in range(config.layers)]
        return [Experts(matrices[i % sets], own, always_on) for i, own in enumerate(adapters)]

    def forward(self, experts: Experts, n: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """n: [B, T, D]; chosen [B, T, K] int64 and gates [B, T, K] as in `Routing`. Returns [B, T, D] in n's dtype."""
        rows, chosen, gates = n.flatten(0, 1), chosen.flatten(0, 1), gates.flatten(0, 1)
        backend = self.backend(n.dtype, len(rows))
        matrices, adapter, always_on = experts
        if isinstance(matrices, Arranged):
            y = arranged_expert_ffn(rows, matrices, adapter, chosen, gates)
        else:
            y = expert_ffn(backend, rows, *matrices, adapter, chosen, gates)
        if always_on is not None:
            all_to_one = torch.zeros_like(chosen[:, :1])
            ungated = torch.ones_like(gates[:, :1])
            y = y + expert_ffn(backend, rows, *always_on, Adapter(), all_to_one, ungated)
        return y.view_as(n)

    @torch.no_grad()
    def start_adapters(self, before: Tensor, after: Tensor) -> None:
        """Experts of after [E] bool that are not in before [E] bool start from the mean adapter of those in before."""
        new = after & ~before
        for part in self.adapters.values():
            weight = before.to(part.dtype) / before.sum()
            mean = torch.einsum("e,le...->l...", weight, part)[:, None]
            part.copy_(torch.where(new.view(1, -1, *[1] * (part.ndim - 2)), mean, part))


def _uniform(sets: int, rows: int, columns: int) -> Tensor:
    """Uniform with half of the standard deviation 1/sqrt(columns), as the speedrun starts its first matrices."""
    bound = 0.5 * (3 / columns) ** 0.5
    return torch.empty(sets, rows, columns).uniform_(-bound, bound)
