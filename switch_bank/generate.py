"""Text from a trained model, as it is made.

python -m switch_bank generate RUN [--prompt TEXT] [--tokens N] [--temperature T] [--top-k K] [--seed N]
"""

import argparse
import dataclasses
import math
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from switch_bank.checkpoint import CheckpointError
from switch_bank.config import Config, ConfigError
from switch_bank.export import find_tokenizer, load_model
from switch_bank.model.decode import Decoder
from switch_bank.model.folder import ModelFolderError
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import StepState

BYTE = re.compile("<0x..>")  # a token of one byte, in a tokenizer of characters


class GenerateError(ValueError):
    """An option or a tokenizer that no text can be made with; the message says which and why, in one line."""


def sample(
    model: SwitchBankGPT, state: StepState, tokens: list[int], count: int, temperature: float = 1.0,
    top_k: int | None = None, seed: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Draws what follows `tokens` in a document that begins with them, one token after the other: at most `count`, and
    none after the document's end. Neither end-of-document token, before and after the document, is among them.

    state: of the step that the weights were trained to. temperature: divides the logits; at 0 the likeliest token is
    taken. top_k: only the k likeliest tokens can be drawn. The same seed on the same device gives the same tokens.
    """
    device, eod = model.head.device, model.config.eod_token
    generator = torch.Generator(device).manual_seed(seed)
    decoder, unread = Decoder(model, state), [eod, *tokens]
    for _ in range(count):
        logits = decoder.read(torch.tensor([unread], device=device))
        token = _draw(logits[0, : model.config.vocab_size].float(), temperature, top_k, generator)
        if token == eod:
            return
        yield token
        unread = [token]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """logits: [V] float32."""
    if temperature == 0:
        return int(logits.argmax())
    likeliest, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    # Less the highest first: a temperature near 0 makes infinities of large numbers.
    weights = torch.softmax((likeliest - likeliest[0]) / temperature, dim=0)
    return int(tokens[torch.multinomial(weights, 1, generator=generator)])


def text_of(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come after those of `prompt`, in whole characters, though a token may end inside of
    one. What the last token leaves unfinished comes as U+FFFD."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    # Only the tokens of the last piece are decoded again: before others, a token can have another text than alone.
    before, after, told = prompt, list[int](), len(text(prompt))
    for token in tokens:
        name = tokenizer.id_to_token(token)
        if name is None:  # a model may have more tokens than its tokenizer
            continue
        after.append(token)
        if BYTE.fullmatch(name):  # one wrong byte, and no byte of its run is a character
            continue
        piece = text([*before, *after])[told:]
        if piece and not piece.endswith("\ufffd"):
            yield piece
            before, after, told = after, [], len(text(after))
    if rest := text([*before, *after])[told:]:
        yield rest


def sample_line(model: SwitchBankGPT, state: StepState, folder: Path, config: Config) -> str:
    """What a run says at its end: the beginning of a document, or why there is none."""
    try:
        tokenizer = find_tokenizer(folder, config)
    except ModelFolderError as error:
        return f"no sample: {error}"
    return f"sample: {tokenizer.decode(list(sample(model, state, [], 48)), skip_special_tokens=False)!r}"


def generate(run: Path, prompt: str, count: int, temperature: float, top_k: int | None, seed: int) -> Iterator[str]:
    """The text, piece by piece, that the model of a run's or an exported folder writes after `prompt`; the options are
    those of `sample`.

    Raises CheckpointError, ModelFolderError or ConfigError as `load_model` and `find_tokenizer` do, and GenerateError.
    """
    config, model = load_model(run, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = find_tokenizer(run, config)
    advice = f"put the tokenizer.json that made the shards into {run}"
    try:
        tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises nothing narrower
        raise GenerateError(f"the tokenizer does not take the prompt, {error}: {advice}") from error
    if tokenizer.get_vocab_size() == 0 or prompt and not tokens:
        raise GenerateError(f"the tokenizer has no tokens for the prompt: {advice}")
    if not config.model.causal:
        print("NOT CAUSAL: this model was trained on tokens to come, and writes without them", file=sys.stderr)
    if model.head.device.type == "cpu" and config.model.dtype == "auto":
        model = _in_float32(config, model)
    assert model.trained_state is not None
    return text_of(tokenizer, tokens, sample(model, model.trained_state, tokens, count, temperature, top_k, seed))


def _in_float32(config: Config, model: SwitchBankGPT) -> SwitchBankGPT:
    """A CPU that multiplies bfloat16 takes many tokens faster in it, but single ones slower: every weight is cast."""
    float32 = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    assert model.trained_state is not None
    return SwitchBankGPT.trained(float32, model.state_dict(), int(model.trained_state.step), "cpu")


def check_options(options: argparse.Namespace) -> None:
    """Raises GenerateError for a value that no text can be made with."""

    def require(holds: bool, name: str, must_be: str) -> None:
        if not holds:
            raise GenerateError(f"--{name} is {getattr(options, name.replace('-', '_'))!r}: it must be {must_be}")

    require(options.tokens >= 1, "tokens", "at least 1")
    require(0 <= options.temperature < math.inf, "temperature", "0 or more, and finite")
    require(options.top_k is None or options.top_k >= 1, "top-k", "at least 1")
    require(0 <= options.seed < 2**63, "seed", "in 0..2^63-1")
    # Bytes of the command line that are no UTF-8 come as surrogates.
    require(not any("\ud800" <= character <= "\udfff" for character in options.prompt), "prompt", "valid UTF-8")


def main(arguments: list[str]) -> int:
    """`python -m switch_bank generate`; returns the exit code, 2 where an option or a file is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m switch_bank generate",
        description="Write text with a trained model: the prompt, and what the model writes after it, until it ends "
        "the document.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="how the document begins (default: nothing)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="at most this many tokens (default 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default 0)")
    given = parser.parse_args(arguments)
    try:
        check_options(given)
        pieces = generate(given.run, given.prompt, given.tokens, given.temperature, given.top_k, given.seed)
    except (GenerateError, CheckpointError, ConfigError, ModelFolderError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # not every terminal shows every character
    try:
        print(given.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        return 128 + signal.SIGINT
    print()
    return 0
