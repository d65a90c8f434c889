"""How large a model is: parameters by part, those a token uses, and FLOPs per token."""

from typing import NamedTuple

from switch_bank.config import ModelConfig
from switch_bank.model.gpt import SwitchBankGPT


class Part(NamedTuple):
    name: str
    total: int  # parameters
    active: int  # of them, those that work on one token: looked-up rows, chosen experts, each as often as it is used


def parts(model: SwitchBankGPT) -> list[Part]:
    """Every parameter of the model, by part."""
    config = model.config
    layers, width, chosen = config.layers, config.width, min(config.top_k, config.experts)

    def count(prefix: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))

    expert = 2 * width * config.expert_width
    attending = layers - len(set(config.skip_attention))
    value_uses = sum(
        min(config.value_embeddings, layers) > min(layer, layers - 1 - layer) and layer not in config.skip_attention
        for layer in range(layers)
    )
    adapters = count("bank.adapters")
    return [
        Part("token embedding", count("embedding"), width),
        Part("value embeddings", count("value_embeddings"), value_uses * width),
        Part("attention", count("attention"), attending * 4 * width**2),
        Part("experts", count("bank.") - adapters, layers * expert * (chosen + config.always_on_expert)),
        Part("adapters", adapters, adapters * chosen // config.experts),
        Part("routers", count("routers"), count("routers")),
        Part("scalars", count("scalars"), count("scalars")),
        Part("head", count("head"), count("head")),
    ]


def forward_flops(config: ModelConfig, model_parts: list[Part], visible: float) -> float:
    """FLOPs of one token's forward: 2 for each active parameter of a matrix, and 4·D for each key that a query sees
    in each attention layer. Training takes three times as many."""
    matrices = sum(
        part.active for part in model_parts if part.name in ("attention", "experts", "adapters", "routers", "head")
    )
    return 2 * matrices + 4 * config.width * visible * (config.layers - len(set(config.skip_attention)))


def mean_visible_keys(config: ModelConfig, slice_tokens: int) -> float:
    """Keys a query sees, mean over a slice of one document and over the layers, at the longest windows."""

    def mean(window: int) -> float:
        window = min(window, slice_tokens)
        return window - window * (window - 1) / (2 * slice_tokens)

    longs = [layer % 4 == 3 for layer in range(config.layers) if layer not in config.skip_attention]
    return sum(mean(config.window if is_long else config.window // 2) for is_long in longs) / max(1, len(longs))


def size_table(model: SwitchBankGPT, slice_tokens: int) -> str:
    """The table that a run starts with."""
    rows = parts(model)
    total, active = sum(row.total for row in rows), sum(row.active for row in rows)
    lines = [f"{'part':<18}{'parameters':>14}{'active':>14}"]
    lines += [f"{row.name:<18}{row.total:>14,}{row.active:>14,}" for row in rows]
    lines.append(f"{'total':<18}{total:>14,}{active:>14,}")
    visible = mean_visible_keys(model.config, slice_tokens)
    flops = 3 * forward_flops(model.config, rows, visible)
    lines.append(
        f"training FLOPs per token: {flops:.4g} (attention over {visible:,.0f} keys a query, at the longest windows)"
    )
    return "\n".join(lines)
