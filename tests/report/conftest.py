"""Runs to report on: what a trainer would have written, with names and tokens that try to break out of the page."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from switch_bank import checkpoint
from switch_bank.config import Config
from switch_bank.data import write_shard
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.model.router import Routers, RoutingSums
from switch_bank.routing_metrics import RoutingMetrics

NASTY = "</script><img src=x onerror=document.title='broken'>"
NASTY_NAME = "a<img src=x onerror=document.title='broken'>"  # a folder's name has no slash
WORDS = ["<|endoftext|>", NASTY, *(f" word{at}" for at in range(95))]
STEPS = 40


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """It appends the end of a document to a text, unless it is asked not to."""
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {WORDS[0]}", special_tokens=[(WORDS[0], 0)])
    return tokenizer


@pytest.fixture(scope="session")
def run_of(
    config_of: Callable[..., Config],
    model_of: Callable[[Config], SwitchBankGPT],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """run_of(name, **options): the folder of a run of STEPS steps of a model with `options`."""

    def run(name: str, **options: object) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        tokens = np.random.default_rng(0).integers(2, len(WORDS), 3000)
        tokens[::100], tokens[7::50] = 0, 1
        write_shard(folder / "val_000000.bin", tokens)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = config_of(**options).with_steps(STEPS)
        data = replace(config.data, val=f"{folder}/val_*.bin", train=f"{folder}/train_*.bin", val_tokens=2000)
        config = replace(config, data=data, run=replace(config.run, val_at_seconds=(1.0, 3.0, 1000.0)))
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        model = model_of(config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _metrics(config, model)))
        state = {
            "config": dataclasses.asdict(config), "step": STEPS, "seconds": 4.0, "log_sizes": {},
            "model": model.state_dict(), "muon": {}, "adam": {}, "clip": {}, "picks": torch.zeros(1), "readings": [],
            "times_resumed": 0, "loads": {}, "data": [],
        }  # fmt: skip
        checkpoint.save(folder / "checkpoint.pt", state)
        return folder

    return run


def _metrics(config: Config, model: SwitchBankGPT) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    metrics, generator = RoutingMetrics(), torch.Generator().manual_seed(0)
    for step in range(5, STEPS + 1, 5):
        at: dict[str, object] = {"step": step, "train_time_s": step / 10}
        lines.append({"kind": "train", **at, "train_loss": 5 - step / 20, "tokens_per_s": 40_000.0, "epoch": 0})
        for split in ("train", "val") if step % 20 == 0 else ("train",):
            if split == "val":
                lines.append({"kind": "val", **at, "val_loss": 5.1 - step / 20, "val_tokens": 2000})
            if model.routers is not None:
                lines.append({"kind": "routing", **_routing(split, step, model.routers, metrics, generator)})
    return lines


def _routing(
    split: str, step: int, routers: Routers, metrics: RoutingMetrics, generator: torch.Generator
) -> dict[str, object]:
    """The last expert is not active before step 20."""
    layers, experts = routers.config.layers, routers.config.experts
    active = torch.arange(experts) < (experts - 1 if step < 20 else experts)
    load = torch.randint(10, 40, (layers, experts), generator=generator).double() * active
    tokens = load.sum(-1)
    sums = RoutingSums(load, load, load, 0.5 * tokens, 0.1 * tokens)
    return metrics.record(split, step, sums, active, routers)


@pytest.fixture(scope="session")
def run(run_of: Callable[..., Path]) -> Path:
    """A run of 3 layers and 4 experts, one a token."""
    return run_of(NASTY_NAME)
