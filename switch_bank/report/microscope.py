"""The routing microscope: where each token of a text goes in each layer, and which tokens each expert likes."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from switch_bank.balance.statistics import Floats
from switch_bank.config import Config
from switch_bank.data import Shards
from switch_bank.export import find_tokenizer
from switch_bank.model.bank import Bank
from switch_bank.model.folder import ModelFolderError
from switch_bank.model.gpt import SwitchBankGPT

TEXT_TOKENS = 320  # of the validation split that are shown
OWN_TEXT_TOKENS = 1024  # of the user's text at most
LIKE_TOKENS = 4096  # of the validation split that likes are counted over
SLICE = 512  # tokens in one row of them
SEEN = 4  # how often a token must occur there before it can be specific
PROBABILITIES = 8  # shown for a token
LIKED = 10  # tokens of each list


class Microscope(NamedTuple):
    text: list[str]  # a token's text each
    note: str  # where the text comes from
    data: dict[str, Any]  # what the page's script reads
    similarity: Floats  # [E, E]


def look(folder: Path, config: Config, model: SwitchBankGPT, text: str | None = None) -> Microscope:
    """Follows `text`, or the start of the run's validation split, through a trained model in eval mode.

    Raises ModelFolderError where the model has no routers or the text no tokenizer, and DataError where the validation
    shards are not there.
    """
    if config.model.experts == 1:
        raise ModelFolderError("the model has one expert: there is nothing to route")
    shards = Shards.open(config.data.val, config.model.vocab_size)
    likes = torch.from_numpy(shards.read(0, min(LIKE_TOKENS, shards.total)).astype(np.int64))
    try:
        tokenizer = find_tokenizer(folder, config)
    except ModelFolderError:
        if text is not None:
            raise
        tokenizer = None  # tokens are shown by their numbers
    if text is None:
        tokens, note = likes[:TEXT_TOKENS], f"The first {min(TEXT_TOKENS, len(likes))} tokens of the validation split."
    else:
        assert tokenizer is not None
        read = [config.model.eod_token, *tokenizer.encode(text, add_special_tokens=False).ids]
        tokens, note = torch.tensor(read[:OWN_TEXT_TOKENS]), f"{len(read)} tokens of the text that was given."
        if len(read) > OWN_TEXT_TOKENS:
            note = f"The first {OWN_TEXT_TOKENS} of {note}"
    return Microscope(
        text=[text_of_token(tokenizer, token) for token in tokens.tolist()],
        note=note,
        data=routes(model, tokens) | liked(model, likes, tokenizer),
        similarity=expert_similarity(model.bank, config.model.experts),
    )


def text_of_token(tokenizer: Tokenizer | None, token: int) -> str:
    """U+FFFD stands for the bytes of a character that a token has only a part of."""
    return (tokenizer.decode([token], skip_special_tokens=False) if tokenizer else "") or f"⟨{token}⟩"


def routes(model: SwitchBankGPT, tokens: Tensor) -> dict[str, Any]:
    """tokens: [T]. `picks` [L][T][K], and `top` [L][T]: the likeliest experts and their probabilities in thousandths,
    one after the other."""
    routings = model.routes(tokens[None].to(model.head.device))
    picks, top = [], []
    for routing in routings:
        likeliest = routing.probabilities[0].topk(min(PROBABILITIES, routing.probabilities.shape[-1]))
        thousandths = (1000 * likeliest.values).round().long()
        picks.append(routing.experts[0].tolist())
        top.append(torch.stack([likeliest.indices, thousandths], -1).flatten(1).tolist())
    return {"picks": picks, "top": top, "experts": model.config.experts}


def liked(model: SwitchBankGPT, tokens: Tensor, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """tokens: [T]. `likes` [L][E]: how many picks an expert has, its most `frequent` tokens with their counts, and its
    most `specific` ones with the share of their picks that it gets, in percent; tokens are indices into `names`.

    Specific are tokens that the expert gets more of than its share of all picks: those with the largest
    count·log(count / expected count), which is what a token adds to the mutual information of token and expert.
    """
    device, eod = model.head.device, model.config.eod_token
    rows = tokens.split(SLICE)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=eod)
    routings = model.routes(padded.to(device))
    kinds, kind_of = np.unique(tokens.numpy(), return_inverse=True)
    occurrences = np.bincount(kind_of)
    names: dict[int, int] = {}
    likes = []

    def most(order: Floats, shown: Floats) -> list[list[int]]:
        """The kinds with the largest `order`, if it is above 0, as [index into names, rounded value of `shown`]."""
        chosen = [kind for kind in np.argsort(-order, kind="stable")[:LIKED] if order[kind] > 0]
        return [[names.setdefault(int(kinds[kind]), len(names)), round(float(shown[kind]))] for kind in chosen]

    for routing in routings:
        picks = routing.experts.flatten(0, 1)[: len(tokens)].cpu().numpy()  # [T, K]
        counts = np.zeros((model.config.experts, len(kinds)))
        np.add.at(counts, (picks.flatten(), np.repeat(kind_of, picks.shape[1])), 1)
        totals = occurrences * picks.shape[1]
        expected = counts.sum(1, keepdims=True) * totals / totals.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where((counts > expected) & (occurrences >= SEEN), counts * np.log(counts / expected), 0)
        likes.append(
            [
                {"picks": int(of_expert.sum()), "frequent": most(of_expert, of_expert), "specific": most(g, share)}
                for of_expert, g, share in zip(counts, gain, 100 * counts / totals, strict=True)
            ]
        )
    return {"likes": likes, "names": [text_of_token(tokenizer, kind) for kind in names], "counted": len(tokens)}


def expert_similarity(bank: Bank, experts: int) -> Floats:
    """The cosine [E, E] between the experts' matrices, all weights of an expert in a row; the mean over the layers
    where each layer has experts of its own."""
    weights = torch.cat([bank.w1.detach().flatten(1), bank.w2.detach().flatten(1)], dim=1).float()
    units = torch.nn.functional.normalize(weights, dim=1).view(-1, experts, weights.shape[1])
    return (units @ units.mT).mean(0).double().cpu().numpy()
