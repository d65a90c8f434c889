"""Decoding: a model fed token by token, from a state whose size is bounded by the attention window."""

import torch
from torch import Tensor

from switch_bank.config import compute_dtype
from switch_bank.model.attention import Ring
from switch_bank.model.features import Documents, EmaSums
from switch_bank.model.gpt import Past, SwitchBankGPT
from switch_bank.ops.bank import MANY
from switch_bank.schedules import StepState

TOGETHER = 512  # tokens of a stream that go through the model at a time: their scores, [T, window + T], are all held


class Decoder:
    """Reads independent streams of tokens in step: a token of each at a time, or several, which takes less time.

    The logits are those of the full forward over each stream as one slice: an end-of-document token starts a document
    that sees nothing before it, and so does a stream's first token. A token costs the same wherever it stands, once the
    windows are full, and nothing waits for the device. Only the leaky reverse EMA has no such decoder: it is given the
    tokens read so far. The model's weights are read when the decoder is made, and may not change after that.
    """

    def __init__(self, model: SwitchBankGPT, state: StepState, streams: int = 1) -> None:
        """state: of the step whose schedule values the model works with (`schedules.step_state`)."""
        self.model, self.state = model.uncompiled(), state
        self.past = nothing_read(model, int(state.window), streams)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """tokens: [streams, T] int64, the next ones of each. Returns the logits of the one after them, [streams, padded
        vocabulary] in the model's dtype."""
        for some in tokens.split(TOGETHER if self.model.config.causal else 1, dim=1):
            hidden, _, _ = self.model.trunk(some, self.state, past=self.past)
        return self.model.logits(hidden[:, -1])


@torch.no_grad()
def nothing_read(model: SwitchBankGPT, window: int, streams: int) -> Past:
    """The state before the first token. window: tokens that a long attention window spans."""
    config, device = model.config, model.head.device
    dtype = compute_dtype(config.dtype, device)
    windows = window, window // 2

    def ring(layer: int) -> Ring:
        keys = torch.zeros(
            streams, windows[0 if layer % 4 == 3 else 1], config.heads, config.head_dim, dtype=dtype, device=device
        )
        return Ring(keys, torch.zeros_like(keys))

    none = torch.zeros(streams, 1, dtype=torch.int64, device=device)

    def sums(layers: int) -> EmaSums:
        assert model.routers is not None
        channels = model.routers.ema_channels(layers)
        own = torch.zeros(streams, 1, channels, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return EmaSums(own, torch.zeros_like(own))

    groups = [] if model.routers is None else range(0, config.layers, config.ema_stride)
    return Past(
        # MANY: a kernel that wants the experts' matrices arranged pays for few tokens too, once they are.
        weights=model.of_layers(dtype, MANY),
        windows=windows,
        tokens_read=0,
        documents=Documents(document=none, position=none - 1, is_eod=none.bool(), flags=None),
        rings={layer: ring(layer) for layer in range(config.layers) if layer not in config.skip_attention},
        sums=[sums(min(config.ema_stride, config.layers - first)) for first in groups],
    )


def decode_logits(model: SwitchBankGPT, tokens: Tensor, state: StepState) -> Tensor:
    """The logits of tokens [B, T] int64 as a decoder gives them, fed one by one: [B, T, padded vocabulary]."""
    decoder = Decoder(model, state, len(tokens))
    return torch.stack([decoder.read(column) for column in tokens.split(1, dim=1)], dim=1)
