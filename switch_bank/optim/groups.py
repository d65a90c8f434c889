"""Which parameter is optimised how: Muon for matrices, AdamW for the rest, and the clipping of router gradients."""

import torch
from torch import Tensor, nn

from switch_bank.config import Config, compute_dtype
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.ops.bank import ARRANGED
from switch_bank.optim.turbo_muon import TurboMuon
from switch_bank.schedules import learning_rate_factor, muon_momentum


def parameter_groups(model: SwitchBankGPT) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model, once, by the name of its group."""
    bank, routers = model.bank, model.routers
    return {
        "attention": list(model.attention.values()),
        "experts": [parameter for name, parameter in bank.named_parameters() if not name.startswith("adapters")],
        "embeddings": [*model.embedding.parameters(), *model.value_embeddings.parameters()],
        "head": [model.head],
        "routers": [] if routers is None else [routers.weight, routers.bias],
        "adapters": list(bank.adapters.values()),
        "scalars": [model.scalars],
    }


def in_backward_order(model: SwitchBankGPT, microbatches: int | None = None) -> list[nn.Parameter]:
    """Every parameter of the model, once, in the order in which a backward finishes their gradients: what the layers
    share, or hold stacked, is finished with the first layer only. microbatches: of the model's forward."""
    groups = parameter_groups(model)
    attention, bank = groups["attention"], model.bank
    # Some kernels sum their gradients themselves, and hand them over after all that the adapters get; so do sums over
    # microbatches.
    collects = model.bank_backend in ARRANGED and model.routers is not None
    collected = groups["experts"] if microbatches is not None else [bank.w1, bank.w2] if collects else []
    late = collected[::-1]
    early = [p for p in reversed(groups["experts"]) if not any(p is other for other in late)]
    return [
        *groups["head"], *attention[:0:-1], *early, *attention[:1],
        *reversed(groups["routers"]), *groups["scalars"], *reversed(groups["adapters"]), *late,
        *reversed(groups["embeddings"]),
    ]  # fmt: skip


def build_optimizers(model: SwitchBankGPT, config: Config) -> tuple[TurboMuon, torch.optim.AdamW]:
    """Muon for attention and expert matrices, fused AdamW for all others; `base_lr` in a group is its rate before
    the schedule, `name` its name."""
    groups, optim = parameter_groups(model), config.optim
    device = model.head.device
    muon = TurboMuon(
        [dict(params=groups.pop("attention") + groups.pop("experts"), name="matrices", base_lr=optim.muon_lr)],
        lr=optim.muon_lr, variant=optim.muon, dtype=compute_dtype(optim.muon_dtype, device),
    )  # fmt: skip
    rates = {
        "embeddings": optim.embedding_lr, "head": optim.head_lr, "routers": optim.router_lr,
        "adapters": optim.adapter_lr, "scalars": optim.scalar_lr,
    }  # fmt: skip
    # While output matrices are zero, norms cancel the scalars: their gradient is rounding alone, some 1e-10, and a
    # smaller eps would make whole steps of it, other ones on other numbers of processes. At work it is 1e-3 and more.
    epsilon = {"scalars": 1e-6}
    adam = torch.optim.AdamW(
        [
            dict(params=params, name=name, lr=rates[name], base_lr=rates[name], eps=epsilon.get(name, 1e-10))
            for name, params in groups.items() if params
        ],
        betas=optim.adam_betas, weight_decay=0.0, fused=True,
    )  # fmt: skip
    return muon, adam


def set_rates(muon: TurboMuon, adam: torch.optim.AdamW, step: int, config: Config) -> None:
    """Learning rates and momentum of one step. Frozen adapters have a rate of zero: nothing recompiles."""
    schedule = config.schedule
    factor = learning_rate_factor(step, schedule)
    frozen = schedule.freeze_adapters_at is not None and step >= schedule.freeze_adapters_at
    for group in muon.param_groups + adam.param_groups:
        group["lr"] = 0.0 if frozen and group["name"] == "adapters" else group["base_lr"] * factor
    for group in muon.param_groups:
        group["momentum"] = muon_momentum(step, schedule, config.optim.muon_momentum)


class QuantileClip:
    """Clips the joint norm of some gradients to a quantile of its own last values; all on the device. Steps without a
    gradient do not count: after as many of them as a bank's first expert is alone, a low quantile would be zero."""

    def __init__(self, parameters: list[nn.Parameter], quantile: float, history: int) -> None:
        self.gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.quantile = quantile
        device = self.gradients[0].device if self.gradients else None
        self.norms = torch.full((history,), torch.nan, device=device)

    def step(self) -> None:
        if not self.gradients:
            return
        norm = torch.stack(torch._foreach_norm(self.gradients)).norm()
        counted = torch.where(norm > 0, norm, torch.nan)
        self.norms.copy_(torch.cat([self.norms[1:], counted[None]]))
        limit = torch.nanquantile(self.norms, self.quantile)
        torch._foreach_mul_(self.gradients, (limit / counted).clamp(max=1.0).nan_to_num(1.0))

    def state_dict(self) -> dict[str, Tensor]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.norms.copy_(state["norms"])
