"""The checks of the audit, from outside the model: what a token's logits may not depend on is changed or taken away."""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_bank.config import ModelConfig
from switch_bank.model.decode import decode_logits
from switch_bank.model.features import documents_of
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.model.router import Routing
from switch_bank.ops.attention import BLOCK
from switch_bank.schedules import StepState

MARGIN = 1e-5  # a route whose top-K margin is below this may flip by rounding
CUTS = 24
POSITIONS, STREAMS = 1024, 4  # that are decoded, at most
SHOWN = 4  # tokens that a finding names


class Tolerances(NamedTuple):
    """How closely the results of a path must agree."""

    rerun: float  # between runs of one shape that differ in later tokens: of a token's loss in nats, or its logits
    recompute: float  # of logits, between two ways to compute the same on the same routes
    margin: float  # between these, a router may pick otherwise where its top-K margin is below it, or below as many
    # times its largest row norm where that is above 1


class ComputePath(NamedTuple):
    """One way to run a model."""

    name: str
    model: SwitchBankGPT  # in eval mode
    state: StepState
    window: int | None  # in place of state.window, for attention kernels that take a Python int
    slices: int  # that go through together
    tokens: int  # of a slice
    exact: bool  # takes any shape, and is compared by its logits and routes; else by losses, in the shape above
    tolerances: Tolerances


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    passed: bool
    detail: str


class Reading(NamedTuple):
    """What is compared of each token."""

    values: Tensor  # [B, T, C]: its logits, or the loss of a target that is held fixed
    margins: Tensor  # [B, T, L], or [B, T, 1] with the least: how far its routes are from flipping
    routes: (
        Tensor  # [B, T, L, K] int64: the experts it is sent to, in rising order; -1 where there is no gate. Or L is 0
    )


def twin(model: SwitchBankGPT, **options: object) -> SwitchBankGPT:
    """An uncompiled model in eval mode that has the model's own parameters and other `options` of its configuration."""
    with torch.device("meta"):
        other = SwitchBankGPT(dataclasses.replace(model.config, **options))  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


# ---- what the checks read, and how they compare ----------------------------------------------------------------------


def starts_of(tokens: int) -> list[int]:
    """Where documents start in a slice of `random_documents`: short ones, an empty one, and one of 3/4 of the slice."""
    return [0, tokens // 16, tokens // 16 + 1, tokens // 8, tokens - tokens // 8]


def random_documents(config: ModelConfig, slices: int, tokens: int, device: torch.device, seed: int) -> Tensor:
    """[slices, tokens] int64: random text in the documents of `starts_of`, of which the first has begun earlier."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab_size, (slices, tokens), generator=generator)
    text[text == config.eod_token] = (config.eod_token + 1) % config.vocab_size
    text[:, starts_of(tokens)[1:]] = config.eod_token
    return text.to(device)


def cut_points(config: ModelConfig, tokens: int, window: int, count: int, seed: int) -> list[int]:
    """First changed tokens: at the edges of documents, of blocks, of the windows within the long document, and at
    random."""
    starts = starts_of(tokens)
    edges = [1, tokens - 1, *starts[1:], starts[3] + 1, 64, 127, 128]
    for length in (window // 2, window, config.reverse_window):
        edges += [starts[3] + length - 1, starts[3] + length]
    edges = list(dict.fromkeys(edge for edge in edges if 0 < edge < tokens))[:count]
    generator = torch.Generator().manual_seed(seed)
    return edges + (1 + torch.randint(tokens - 1, (count - len(edges),), generator=generator)).tolist()


def picks(routing: Routing) -> Tensor:
    """[B, T, K] as in `Reading.routes`."""
    return routing.experts.where(routing.gates != 0, -1).sort(dim=-1).values


def read_logits(path: ComputePath, tokens: Tensor, streams: int, positions: int) -> Reading:
    """The first logits of the first slices of tokens [B, T]."""
    hidden, routings, _ = path.model.trunk(tokens, path.state, window=path.window)
    kept = slice(streams), slice(positions)
    values = path.model.logits(hidden[kept])
    if path.model.routers is None:
        return Reading(values, *_no_routes(tokens[kept]))
    margins = torch.stack([path.model.routers.margin(routing) for routing in routings], dim=2)
    # What rounding of a router's input does to its values grows with its weights.
    margins = margins / torch.linalg.vector_norm(path.model.routers.weight, dim=-1).amax(-1).clamp(min=1)
    return Reading(values, margins[kept], torch.stack([picks(routing) for routing in routings], dim=2)[kept])


def read(path: ComputePath, tokens: Tensor, targets: Tensor) -> Reading:
    """What the path says of tokens [B, T]: logits where it is exact, else the losses of the targets [B, T]."""
    if path.exact:
        return read_logits(path, tokens, *tokens.shape)
    output = path.model(tokens, targets, path.state, window=path.window)
    return Reading(output.token_losses[..., None], output.margins[..., None], _no_routes(tokens)[1])


def _no_routes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    margins = torch.full((*tokens.shape, 1), torch.inf, device=tokens.device)
    return margins, tokens.new_empty(*tokens.shape, 0, 0)


def on_routes(path: ComputePath, routes: Tensor) -> tuple[SwitchBankGPT, list[Tensor]]:
    """A twin whose tokens go where `routes` of a Reading says, whatever its routers pick; and the list of their picks,
    [B, ·, K] for each part of the sequence and, within it, each layer.

    Of two computations that round differently, in bfloat16 above all, one may send a token elsewhere and then has
    another result. On the same routes the results must agree, and where the picks differ their margin says if they may.
    """
    model, own = twin(path.model), list[Tensor]()

    def follow(routers: nn.Module, arguments: tuple[object, ...], routing: Routing) -> Routing:
        part, layer = divmod(len(own), path.model.config.layers)
        own.append(picks(routing))
        tokens = routing.experts.shape[1]
        held = routes[:, part * tokens : (part + 1) * tokens, layer]
        gates = routing.probabilities.gather(-1, held.clamp(min=0)).where(held >= 0, 0.0)
        return routing._replace(experts=held.clamp(min=0), gates=gates)

    if model.routers is not None:
        model.routers.register_forward_hook(follow)
    return model, own


class Comparison:
    """How far two readings of the same tokens lie apart, over all that was compared."""

    def __init__(self, tolerance: float, margin: float) -> None:
        self.tolerance, self.margin = tolerance, margin
        self.compared, self.largest, self.flipped = 0, 0.0, 0

    def wrong(self, one: Reading, two: Reading, where: Tensor, document: Tensor | None = None) -> Tensor:
        """[B, T] bool: the tokens among `where` whose values differ by more than the tolerance, or whose routes differ
        though their margin in `one` is not below `margin`.

        Where the two went on different routes, `document` [B, T] is given: a token is excused if it differs and its
        margin is below `margin`, and so are those that follow such a token in its document, which a flipped route
        changes too, through attention and state.
        """
        difference = (one.values - two.values).abs().amax(-1).nan_to_num(nan=torch.inf)
        wrong, may_flip = where & (difference > self.tolerance), one.margins < self.margin
        if document is None:
            rerouted = where[..., None] & (one.routes != two.routes).any(-1)
            self.flipped += int((rerouted & may_flip).any(-1).sum())
            wrong = wrong | (rerouted & ~may_flip).any(-1)
        else:
            last_flipped = torch.where(wrong & may_flip.any(-1), document, -1).cummax(dim=1).values
            excused = wrong & (last_flipped == document)
            self.flipped += int(excused.sum())
            wrong, where = wrong & ~excused, where & ~excused
        self.compared += int(where.sum())
        self.largest = max(self.largest, float(difference.masked_fill(~where, 0.0).max()))
        return wrong


# ---- the checks ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_suffix(path: ComputePath, seed: int = 0) -> Finding:
    """(a) All tokens from a cut on are changed: nothing before it may move."""
    config, device, shape = path.model.config, path.model.head.device, (path.slices, path.tokens)
    batches = -(-CUTS // path.slices)
    cuts = cut_points(config, path.tokens, int(path.state.window), batches * path.slices, seed)
    text = random_documents(config, *shape, device, seed)
    targets = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(device)
    document = None if path.exact else documents_of(text, config).document
    index = torch.arange(path.tokens, device=device)
    comparison = Comparison(path.tolerances.rerun, 0.0 if path.exact else MARGIN)
    before, moves, ahead = read(path, text, targets), False, []
    for batch in range(batches):
        cut = torch.tensor(cuts[batch * path.slices : (batch + 1) * path.slices], device=device)[:, None]
        other = random_documents(config, *shape, device, seed + 1 + batch)
        other[::2] = torch.where(index == cut[::2], config.eod_token, other[::2])  # here a document begins at the cut
        other = torch.where(other == text, (other + 1) % config.vocab_size, other)
        after = read(path, torch.where(index < cut, text, other), targets)
        moves = moves or not torch.equal(before.values, after.values)
        wrong = comparison.wrong(before, after, index < cut, document)
        ahead += [(int(cut[row] - t), int(t)) for row, t in wrong.nonzero()]
    name = f"suffix, {path.name}"
    if not moves:
        return Finding(name, False, "nothing moves after a change either: nothing can be said")
    detail = f"{len(cuts)} cuts, {comparison.compared} tokens before them, largest change {comparison.largest:.2g} "
    if path.exact:
        detail += f"of a logit (tolerance {path.tolerances.rerun:g}), the same routes required"
    else:
        detail += (
            f"nats (tolerance {path.tolerances.rerun:g}), {comparison.flipped} excused by a margin below {MARGIN:g}"
        )
    return Finding(name, not ahead, detail + _reading_ahead(ahead, "at least "))


def check_gradients(path: ComputePath, seed: int = 0) -> Finding:
    """(b) The gradient of logits at t with respect to the embeddings after t is exactly zero, and before t it is not,
    if the configuration has attention or an EMA to carry one.

    path: an eager one.
    """
    model, config, device = twin(path.model), path.model.config, path.model.head.device
    looked_up: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        looked_up.append(output.detach().requires_grad_())
        return looked_up[-1]

    for embedding in [model.embedding, *model.value_embeddings]:
        embedding.register_forward_hook(keep)
    tokens, long_start = path.tokens, starts_of(path.tokens)[3]
    hidden = model.trunk(random_documents(config, 1, tokens, device, seed), path.state, window=path.window)[0]
    points = sorted({0, 1, tokens // 16 + 1, long_start, long_start + 1, tokens // 2, tokens - 2})
    ahead, reads_back = [], False
    for t in points:
        direction = torch.randn(config.padded_vocab, generator=torch.Generator().manual_seed(seed + t)).to(device)
        total = (model.logits(hidden[0, t]) * direction).sum()
        gradients = torch.autograd.grad(total, looked_up, retain_graph=True, allow_unused=True)
        strength = torch.stack([g[0].abs().amax(-1) for g in gradients if g is not None]).amax(0)  # [tokens]
        read_at = (strength != 0).nonzero().flatten()  # a NaN is not zero
        reads_back = reads_back or bool((read_at < t).any())
        if len(read_at) and read_at[-1] > t:
            ahead.append((int(read_at[-1]) - t, t))
    name = f"gradient, {path.name}"
    attends = any(layer not in config.skip_attention for layer in range(config.layers))
    routers_read_ema = config.experts > 1 and (config.forward_ema or config.reverse_ema != "off")
    if not reads_back and (attends or routers_read_ema):
        return Finding(name, False, "no gradient reaches any earlier token either: nothing can be said")
    detail = f"logits at {len(points)} positions of {tokens}, gradient to every later embedding "
    detail += "NOT 0" if ahead else "exactly 0"
    if not reads_back:
        detail += ", to earlier ones too: no layer attends and no router reads an EMA"
    return Finding(name, not ahead, detail + _reading_ahead(ahead, "up to "))


@torch.no_grad()
def check_decode(path: ComputePath, seed: int = 0) -> Finding:
    """(c) Tokens read one by one, with caches, give the logits of the full forward."""
    text, full = _documents_and_logits(path, seed)
    model, own = on_routes(path, full.routes)
    decoded = full._replace(values=decode_logits(model, text, path.state), routes=_routes(own, full.routes))
    comparison = Comparison(path.tolerances.recompute, path.tolerances.margin)
    wrong = comparison.wrong(full, decoded, torch.ones_like(text, dtype=torch.bool))
    name, detail = f"decode, {path.name}", f"{len(text)} streams of {text.shape[1]} tokens, one by one: "
    detail += _agreement(comparison)
    if not full.values.any():
        return Finding(name, False, "all logits are zero: nothing can be said")
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0])
        at = [int(t) for t in wrong[row].nonzero()]
        detail += f"; {int(wrong.sum())} tokens differ, in stream {row} token " + ", ".join(map(str, at[:SHOWN]))
        if path.exact:
            ahead = [(_needed(path, text[row], full.values[row], t) - t - 1, t) for t in at[:SHOWN]]
            detail += _reading_ahead([pair for pair in ahead if pair[0] > 0])
    return Finding(name, not bool(wrong.any()), detail)


@torch.no_grad()
def check_packing(path: ComputePath, seed: int = 0) -> Finding:
    """(d) A document alone, in a slice of its own, has the logits that it has packed among others."""
    text, full = _documents_and_logits(path, seed)
    config, starts, parts = path.model.config, starts_of(text.shape[1]), []
    for start, end in zip(starts, [*starts[1:], text.shape[1]], strict=True):
        length = end - start
        # Kernels that take whole blocks only get the rest of one filled with another document.
        filled = 0 if path.exact else -length % BLOCK
        tokens = F.pad(text[:, start:end], (0, filled), value=(config.eod_token + 1) % config.vocab_size)
        tokens[:, length : length + 1] = config.eod_token
        routes = F.pad(full.routes[:, start:end], (0, 0, 0, 0, 0, filled), value=-1)
        model, own = on_routes(path, routes)
        alone = read_logits(path._replace(model=model), tokens, len(text), length)
        parts.append(alone._replace(routes=_routes(own, routes)[:, :length]))
    alone = Reading(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    comparison = Comparison(path.tolerances.recompute, path.tolerances.margin)
    wrong = comparison.wrong(full, alone, torch.ones_like(text, dtype=torch.bool))
    detail = f"{len(text) * len(starts)} documents alone and packed: {_agreement(comparison)}"
    if wrong.any():
        at = [int(t) for t in wrong.any(0).nonzero()]
        detail += f"; {len(at)} positions depend on other documents: " + ", ".join(map(str, at[:SHOWN]))
    return Finding(f"packing, {path.name}", not bool(wrong.any()), detail)


def _documents_and_logits(path: ComputePath, seed: int) -> tuple[Tensor, Reading]:
    """At most STREAMS slices' first tokens, at most POSITIONS, documents of all lengths among them, and what the full
    forward says of them."""
    config, device = path.model.config, path.model.head.device
    streams, positions = min(path.slices, STREAMS), min(path.tokens, POSITIONS)
    text = random_documents(config, path.slices, path.tokens, device, seed + 1)
    text[:, :positions] = random_documents(config, path.slices, positions, device, seed)
    return text[:streams, :positions], read_logits(path, text, streams, positions)


def _routes(own: list[Tensor], like: Tensor) -> Tensor:
    """The picks that `on_routes` has gathered, as [B, T, L, K]."""
    if not own:
        return like
    layers = like.shape[2]
    parts = [torch.stack(own[first : first + layers], dim=2) for first in range(0, len(own), layers)]
    return torch.cat(parts, dim=1)


def _agreement(comparison: Comparison) -> str:
    text = f"{comparison.compared} tokens, largest difference {comparison.largest:.2g} of a logit (tolerance "
    text += f"{comparison.tolerance:g})"
    if comparison.margin == 0:
        return text + ", the same routes required"
    text += f" on the same routes, {comparison.flipped} tokens would flip one by a margin below {comparison.margin:g} "
    return text + "* max(1, largest row norm of its router)"


def _needed(path: ComputePath, stream: Tensor, logits: Tensor, t: int) -> int:
    """How many of the stream's tokens [T] the full forward must be given for its logits at t, logits[t] of [T, C]."""
    few, enough = t, len(stream)
    while enough - few > 1:
        half = (few + enough) // 2
        got = read_logits(path, stream[None, :half], 1, half).values[0, t]
        few, enough = (
            (few, half) if bool(((got - logits[t]).abs() <= path.tolerances.recompute).all()) else (half, enough)
        )
    return enough


def _reading_ahead(ahead: list[tuple[int, int]], words: str = "") -> str:
    """ahead: pairs (how far ahead, token) of what reads what it must not; the farthest are named."""
    shown = ", ".join(f"token {t} reads {words}{far} ahead" for far, t in sorted(ahead, reverse=True)[:SHOWN])
    return f"; {len(ahead)} tokens read ahead: {shown}" if ahead else ""
