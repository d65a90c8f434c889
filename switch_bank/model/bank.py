"""The bank: expert matrices that all layers share, and each layer's adapters to them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from switch_bank.config import ModelConfig
from switch_bank.ops import bank_cpu
from switch_bank.ops.bank import Adapter, choose_backend, expert_ffn


class Experts(NamedTuple):
    """The experts as one layer sees them."""

    w1: Tensor  # [E, F, D]
    w2: Tensor  # [E, D, F]
    adapter: Adapter  # parts [E, ...]
    arranged: bank_cpu.Arranged | None = None  # w1 and w2 as the kernel of backend "avx512" reads them


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

    def of_layers(self, backend: str, dtype: torch.dtype) -> list[Experts]:
        """One Experts a layer, for products by `backend` in `dtype`; unbound together, so that their gradients are
        stacked once, not added up."""
        layers, count = self.config.layers, self.config.experts
        sets = [(self.w1, self.w2)]
        if not self.config.shared:
            sets = list(zip(self.w1.split(count), self.w2.split(count), strict=True))
        arranged = [bank_cpu.arrange(w1, w2, dtype) if backend == "avx512" and count > 1 else None for w1, w2 in sets]
        matrices = [(*own, kernel) for own, kernel in zip(sets, arranged, strict=True)]
        if self.config.shared:
            matrices *= layers
        parts = {name: part.unbind() for name, part in self.adapters.items()}
        adapters = [Adapter(**{name: part[i] for name, part in parts.items()}) for i in range(layers)]
        return [Experts(w1, w2, own, kernel) for (w1, w2, kernel), own in zip(matrices, adapters, strict=True)]

    def forward(self, experts: Experts, n: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """n: [B, T, D]; chosen [B, T, K] int64 and gates [B, T, K] as in `Routing`. Returns [B, T, D] in n's dtype."""
        rows, chosen, gates = n.flatten(0, 1), chosen.flatten(0, 1), gates.flatten(0, 1)
        backend = self.backend(n.dtype, len(rows))
        w1, w2, adapter, arranged = experts
        if arranged is not None:
            y = bank_cpu.expert_ffn(rows, arranged, adapter.scale, adapter.bias, chosen, gates)
        else:
            y = expert_ffn(backend, rows, w1, w2, adapter, chosen, gates)
        if self.config.always_on_expert:
            all_to_one = torch.zeros_like(chosen[:, :1])
            ungated = torch.ones_like(gates[:, :1])
            y = y + expert_ffn(backend, rows, self.always_w1, self.always_w2, Adapter(), all_to_one, ungated)
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
