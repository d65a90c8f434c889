"""What a run is made of: typed options with units and bounds, the presets, and the checks that need no data.

Defaults are the `record` preset; the other presets say only where they differ. Every step named here belongs to
`schedule.steps`: `Config.with_steps` rescales them all to another length.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import tyro


class ConfigError(ValueError):
    """An option that cannot work; the message names it, its value and what would do."""


class Range(NamedTuple):
    """Inclusive bounds of a numeric option, for `Annotated`."""

    low: float
    high: float


Count = Annotated[int, Range(1, 10**12)]
Step = Annotated[int, Range(0, 10**12)]
Length = Annotated[int, Range(1, 10**6)]  # of a run, in steps: the state of each is made before the first
Seconds = Annotated[float, Range(1e-3, 1e7)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Weight = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True)
class ModelConfig:
    """The network and its routers. The letters are those that shapes are written in."""

    vocab_size: Count = 50_257  # V: token ids the data may hold; embedding and head are padded to 128
    eod_token: Annotated[int, Range(0, 10**9)] = 50_256  # the token that starts every document
    layers: Annotated[int, Range(1, 512)] = 28  # L
    width: Count = 896  # D
    heads: Count = 7  # H: heads of width / heads channels
    skip_attention: tuple[Annotated[int, Range(0, 511)], ...] = (11,)  # layers that have no attention
    tied_layers: Count = 1  # how many consecutive layers share their attention matrices
    value_embeddings: Annotated[int, Range(0, 64)] = 2  # tables mixed into v in the first and the last layers
    window: Annotated[int, Range(128, 10**7)] = 3456  # tokens: the longest attention window, reached at the end

    experts: Annotated[int, Range(1, 1024)] = 8  # E
    top_k: Annotated[int, Range(1, 64)] = 1  # K: experts per token
    expert_width: Count = 1024  # F
    shared: bool = True  # one bank for all layers; off: every layer has E experts of its own
    always_on_expert: bool = False  # one more expert of the same size that every token passes through
    adapter: Literal["none", "scale_bias", "lora"] = "scale_bias"  # what a layer adds to an expert of the bank
    lora_rank: Annotated[int, Range(8, 1024)] = 8  # with adapter=lora

    score: Literal["softmax", "sigmoid"] = "softmax"
    forward_ema: bool = False
    reverse_ema: Literal["off", "causal", "leaky"] = "causal"  # leaky reads future tokens: only to price the leak
    reverse_normalized: bool = True  # off: the weights are not divided by their sum but multiplied by 1 - decay
    forward_decay: Annotated[float, Range(0.01, 0.999)] = 0.85
    reverse_decay: Annotated[float, Range(0.01, 0.999)] = 0.85
    reverse_window: Count = 384  # tokens of a document's opening that the reverse EMA sees
    ema_stride: Count = 28  # layers that share the EMAs of the group's first layer
    flags: bool = True  # document and position flags among the router's inputs
    opening_tokens: Count = 64  # length of the opening that one flag marks
    position_bins: Literal[4, 8, 16] = 8  # one-hot bins of the position in a block of 128

    balance: Literal["none", "aux", "bias"] = "aux"
    balance_scope: Literal["layer", "bank"] = "layer"  # even loads in each layer, or over the bank's total
    cv_weight: Weight = 2.15e-3  # on CV²(importance) + CV²(load)
    entropy_weight: Weight = 2.5e-3  # on the entropy gaps of importance and load
    z_loss_weight: Weight = 0.0  # on the mean square of the router's logsumexp
    bias_step: Weight = 1e-3  # γ: how far balance=bias moves a choice bias in one step
    layer_shape: Literal["peak", "valley", "rising", "falling"] = "peak"
    layer_peak: Annotated[float, Range(0.01, 0.99)] = 0.475  # where over the depth the peak or valley lies
    temperature_boost: Annotated[float, Range(-0.99, 100)] = 0.2  # temperature × (1 + boost·shape)
    balance_boost: Annotated[float, Range(-1, 100)] = 0.5  # balance weights × (1 + boost·shape)

    dtype: Literal["auto", "bfloat16", "float32", "float64"] = (
        "auto"  # of activations and matmuls; parameters are float32
    )
    attention_backend: Literal["auto", "reference", "sdpa", "flex", "triton", "flash"] = "auto"
    bank_backend: Literal["auto", "reference", "grouped", "triton"] = "auto"  # triton: fused kernels, CUDA only

    @property
    def padded_vocab(self) -> int:
        return round_up(self.vocab_size, 128)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def flag_features(self) -> int:
        return 3 + self.position_bins if self.flags else 0

    @property
    def router_features(self) -> int:
        """Width of the router's input: the token, each EMA, the flags."""
        return self.width * (1 + self.forward_ema + (self.reverse_ema != "off")) + self.flag_features

    @property
    def causal(self) -> bool:
        return self.reverse_ema != "leaky"


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes over the steps. `second` below is the step that activates the second expert (s₀ in DESIGN)."""

    steps: Length = 1750  # N: the length that every step below belongs to
    activation: tuple[tuple[Step, Fraction], ...] = (
        (0, 0.125), (75, 0.25), (141, 0.375), (234, 0.5), (338, 0.625), (441, 0.75), (591, 0.875), (695, 1.0),
    )  # fmt: skip  # (step, share of the experts that is active from there on)
    temperature_start: Annotated[float, Range(1e-3, 1e3)] = 1.464
    temperature_end: Annotated[float, Range(1e-3, 1e3)] = 0.93744
    temperature_steps: Count = 284  # Δ: this many steps after `second` ...
    temperature_ratio: Annotated[float, Range(0.01, 0.99)] = 0.49  # ... this share of the way is still to go
    cap_start: Annotated[float, Range(1e-3, 1e6)] = 1.166  # bound on the router's logits in the gate
    cap_end: Annotated[float, Range(1e-3, 1e6)] = 13.757
    cap_steps: Count = 237
    gumbel_windows: tuple[tuple[Step, Step], ...] = (
        (75, 441), (459, 488), (534, 722), (900, 909), (1004, 1022), (1097, 1107), (1200, 1209), (1284, 1313),
        (1472, 1500),
    )  # fmt: skip  # steps [from, to) whose router choices carry Gumbel noise
    cooldown: Fraction = 0.65  # last share of the run over which learning rates fall to zero
    momentum_steps: Count = 300  # Muon's momentum rises over the first steps
    freeze_adapters_at: Step | None = None  # step from which adapters stay as they are
    prune_at: Step | None = None  # step at which experts below `prune_below` are switched off
    prune_below: Fraction = 0.0  # share of an active expert's fair load over the bank


@dataclass(frozen=True)
class OptimConfig:
    muon: Literal["turbo", "plain"] = "turbo"
    muon_lr: Weight = 0.025  # attention and expert matrices
    muon_momentum: tuple[Fraction, Fraction] = (0.85, 0.95)  # from, to
    muon_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the orthogonalization
    embedding_lr: Weight = 0.3  # token and value embeddings
    head_lr: Weight = 1 / 320
    router_lr: Weight = 0.095
    adapter_lr: Weight = 0.03
    scalar_lr: Weight = 0.015
    adam_betas: tuple[Fraction, Fraction] = (0.8, 0.95)
    router_clip_quantile: Fraction = 0.1  # router gradients are clipped to this quantile ...
    router_clip_history: Count = 250  # ... of their norms over this many steps, those of zero left out


@dataclass(frozen=True)
class DataConfig:
    train: str = "data/fineweb10B/fineweb_train_*.bin"
    val: str = "data/fineweb10B/fineweb_val_*.bin"
    val_tokens: Count = 10_485_760  # the first tokens of the validation split, exactly
    slice_tokens: Count = 12_288  # T
    slices_per_step: Count = 8
    val_slice_tokens: Count = 65_536
    repeat: bool = False  # may the run read its training data more than once?


@dataclass(frozen=True)
class RunConfig:
    steps: Length | None = None  # length of the run; left out: schedule.steps
    seconds: Seconds | None = None  # length of the run on the training clock; fixes the steps once, before step 0
    val_at_seconds: tuple[Seconds, ...] = tuple(range(60, 841, 60))
    val_at_steps: tuple[Step, ...] = ()
    out: str = ""  # the folder of the run; left out: a new one under runs/
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    resume: bool = False
    checkpoint_every: Annotated[int, Range(0, 10**9)] = 0  # steps; 0: only at the end
    timeout_seconds: Annotated[float, Range(1, 10**6)] = 600  # how long a process waits for another one's answer
    profile: bool = False  # write a trace of the 12th to 14th step into the run's folder
    compile: bool = True
    cuda_graphs: bool = True  # on a GPU, if compiled: forward and backward are recorded once and launched as one
    tokens_per_forward: Count = 49_152  # slices go through together up to this many: record keeps 0.7 MB a token
    same_on_processes: Count = 8  # on a CPU, any number that divides this takes the same steps to the bit
    recompute: bool = False  # compute a layer's activations again in the backward instead of keeping them
    log_every: Count = 25  # steps
    track: Literal["none", "trackio", "wandb", "tensorboard"] = "none"  # where metrics are sent to as well
    report: bool = True  # write report.html at the end, where the extra `report` is installed


@dataclass(frozen=True)
class Config:
    preset: tyro.conf.Fixed[str] = "record"
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def with_steps(self, steps: int) -> "Config":
        """The same run in another length: every step of the schedule is scaled by steps / schedule.steps.

        The length is a number of steps from here on, so run.seconds, which it may come from, is left out.
        """
        old, ratio = self.schedule, steps / self.schedule.steps

        def scale(step: int) -> int:
            return round(step * ratio)

        def scale_optional(step: int | None) -> int | None:
            return None if step is None else scale(step)

        schedule = dataclasses.replace(
            old,
            steps=steps,
            activation=tuple((scale(step), share) for step, share in old.activation),
            temperature_steps=max(1, scale(old.temperature_steps)),
            cap_steps=max(1, scale(old.cap_steps)),
            gumbel_windows=tuple((scale(start), scale(end)) for start, end in old.gumbel_windows),
            momentum_steps=max(1, scale(old.momentum_steps)),
            freeze_adapters_at=scale_optional(old.freeze_adapters_at),
            prune_at=scale_optional(old.prune_at),
        )
        run = dataclasses.replace(self.run, steps=steps, seconds=None)
        return dataclasses.replace(self, schedule=schedule, run=run)

    def microbatch(self, processes: int, device: torch.device) -> tuple[int, int | None]:
        """The slices of a microbatch, and how many microbatches each of `processes` processes sends through the model
        at a time (see `switch_bank.ops.microbatches`; None: one, and no care is taken).

        A microbatch is what memory allows; on a CPU no more than each of run.same_on_processes could send, so that it
        is the same slices for them all. Where their number does not show, as many go through together as fit."""
        step, limit = self.data.slices_per_step, max(1, self.run.tokens_per_forward // self.data.slice_tokens)
        own = step // processes
        most = math.gcd(own, step // math.gcd(step, self.run.same_on_processes)) if device.type == "cpu" else own
        slices = max(n for n in range(1, most + 1) if most % n == 0 and n <= limit)
        if device.type != "cpu":
            return slices, None
        if not STRICT_PRODUCTS or compute_dtype(self.model.dtype, device) != torch.float32:
            return slices, 1
        # A power of two: a mean over so many of them is divided exactly.
        return slices, max(2**n for n in range(16) if own % (2**n * slices) == 0 and 2**n * slices <= limit)

    def records_graphs(self, device: torch.device) -> bool:
        """Whether forward and backward are recorded as CUDA graphs."""
        return device.type == "cuda" and self.run.compile and self.run.cuda_graphs

    def check(self, world_size: int = 1) -> "Config":
        """The configuration itself, if it can run on `world_size` processes; otherwise raises ConfigError."""
        for group in ("model", "schedule", "optim", "data", "run"):
            options = getattr(self, group)
            for name, hint in get_type_hints(type(options), include_extras=True).items():
                _typed(getattr(options, name), hint, f"{group}.{name}")
        model, schedule, data, run = self.model, self.schedule, self.data, self.run
        _require(
            model.width % model.heads == 0, "model.width", model.width, f"a multiple of model.heads ({model.heads})"
        )
        _require(model.head_dim % 4 == 0, "model.width / model.heads", model.head_dim, "a multiple of 4 (rotary pairs)")
        _require(model.top_k <= model.experts, "model.top_k", model.top_k, f"at most model.experts ({model.experts})")
        _require(model.eod_token < model.vocab_size, "model.eod_token", model.eod_token, "below model.vocab_size")
        _require(
            2 * model.value_embeddings <= model.layers or model.layers == 1 and model.value_embeddings <= 1,
            "model.value_embeddings", model.value_embeddings, f"at most half of model.layers ({model.layers})",
        )  # fmt: skip
        _require(
            all(layer < model.layers for layer in model.skip_attention),
            "model.skip_attention", model.skip_attention, f"layers in 0..{model.layers - 1}",
        )  # fmt: skip
        for option in ("width", "expert_width", "lora_rank"):
            size = getattr(model, option)
            _require(size % 8 == 0, f"model.{option}", size, "a multiple of 8 (grouped_mm's alignment)")
        _require(
            model.bank_backend != "triton" or model.adapter != "lora",
            "model.bank_backend", model.bank_backend, "auto or grouped with adapter=lora",
        )  # fmt: skip
        _require(
            model.bank_backend in ("auto", "reference") or model.dtype != "float64",
            "model.bank_backend", model.bank_backend, "auto or reference with dtype=float64",
        )  # fmt: skip
        _require(
            model.attention_backend != "flash" or model.dtype in ("auto", "bfloat16"),
            "model.attention_backend", model.attention_backend, f"auto or reference with dtype={model.dtype}",
        )  # fmt: skip
        _require(data.slice_tokens % 128 == 0, "data.slice_tokens", data.slice_tokens, "a multiple of 128")
        _require(data.val_slice_tokens % 128 == 0, "data.val_slice_tokens", data.val_slice_tokens, "a multiple of 128")
        _require(
            data.slices_per_step % world_size == 0, "data.slices_per_step", data.slices_per_step,
            f"a multiple of the number of processes ({world_size}), which share a step's slices",
        )  # fmt: skip
        _require(
            schedule.activation[:1] != () and schedule.activation[0][0] == 0,
            "schedule.activation", schedule.activation, "a list of (step, share of the experts) that starts at step 0",
        )  # fmt: skip
        steps, shares = zip(*schedule.activation, strict=True)
        _require(
            list(steps) == sorted(steps) and list(shares) == sorted(shares) and shares[0] > 0 and shares[-1] == 1,
            "schedule.activation", schedule.activation, "rising steps with shares that rise from above 0 to 1",
        )  # fmt: skip
        _require(
            all(start <= end for start, end in schedule.gumbel_windows),
            "schedule.gumbel_windows", schedule.gumbel_windows, "pairs with from <= to",
        )  # fmt: skip
        _require(
            run.steps is None or run.seconds is None, "run.seconds", run.seconds, "left out when run.steps is given"
        )
        for option in ("muon_momentum", "adam_betas"):
            pair = getattr(self.optim, option)
            _require(max(pair) < 1, f"optim.{option}", pair, "two numbers from 0 to below 1")
        return self


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""  # Linux has it


def _multiplies_bfloat16_faster() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: with AMX, and with AVX-512 on AMD's cores. Intel's take
    twice as long by AVX-512 alone, which is what is left where a virtual machine hides AMX."""
    of_amd = "AuthenticAMD" in CPUINFO
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and of_amd


CPU_PREFERS_BFLOAT16 = _multiplies_bfloat16_faster()  # read once: compiled code may not ask
# MKL's products of float32 have the same bits for a row whatever other rows there are, if it is told so (`numerics`).
# It was seen to listen on Intel's processors and on AMD's with AVX2; nobody has looked on AMD's with AVX-512.
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
STRICT_PRODUCTS = _CAPABILITY == "AVX2" or _CAPABILITY == "AVX512" and "GenuineIntel" in CPUINFO


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of an option; "auto" is bfloat16 where the device is faster with it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" or CPU_PREFERS_BFLOAT16 else torch.float32


def _require(holds: bool, option: str, value: Any, must_be: str) -> None:
    if not holds:
        text = str(value)
        raise ConfigError(f"{option} is {text if len(text) <= 200 else f'{text[:200]}...'}: it must be {must_be}")


def _shown(value: Any) -> str:
    """One line for a value that may be anything: lists can be too deep to print, and integers too long."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if isinstance(value, (str, int, float, NoneType)) else f"a {type(value).__name__}"


def _typed(value: Any, hint: Any, option: str) -> Any:
    """`value` as the type `hint`, within its bounds; dicts become dataclasses and lists tuples. Else ConfigError."""
    kind, parts = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _require(isinstance(value, dict), option, _shown(value), "a dict of options")
        hints = get_type_hints(hint, include_extras=True)
        for name in value:
            if name not in hints:
                raise ConfigError(f"{option} has the unknown option {_shown(name)}: another version saved it")
        group = "" if hint is Config else f"{option}."
        return hint(**{name: _typed(item, hints[name], group + name) for name, item in value.items()})
    if kind is Annotated:
        value = _typed(value, parts[0], option)
        for bound in parts[1:]:
            if isinstance(bound, Range):
                _require(bound.low <= value <= bound.high, option, _shown(value), f"in {bound.low:g}..{bound.high:g}")
    elif kind in (Union, UnionType):  # X | None
        value = None if value is None else _typed(value, parts[0], option)
    elif kind is tuple:
        _require(isinstance(value, (list, tuple)), option, _shown(value), "a list")
        inner = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        _require(len(value) == len(inner), option, _shown(value), f"a list of {len(inner)}")
        value = tuple(_typed(item, part, option) for item, part in zip(value, inner, strict=True))
    elif kind is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in parts)
        _require(fits, option, _shown(value), f"one of {', '.join(map(str, parts))}")
    else:
        fits = type(value) is hint or hint is float and type(value) is int
        _require(
            fits, option, _shown(value), {int: "a whole number", float: "a number", bool: "on or off"}.get(hint, "text")
        )
    return value


def parse(arguments: list[str], default_preset: str, program: str = "train_switch_bank.py") -> Config:
    """The configuration of a command line `[PRESET] [--group.option VALUE ...]`; exits with code 2 if it is wrong."""
    preset = default_preset
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = arguments[0], arguments[1:]
    if preset not in presets:
        raise ConfigError(f"there is no preset {preset[:50]!r}: choose one of {', '.join(presets)}")
    config = tyro.cli(Config, default=presets[preset], args=arguments, prog=f"{program} {preset}")
    # A length given by hand replaces the preset's own way of giving it.
    given, own = config.run, presets[preset].run
    if given.steps is not None and given.seconds is not None and given.seconds == own.seconds:
        config = dataclasses.replace(config, run=dataclasses.replace(given, seconds=None))
    return config


def resumed(given: Config, saved: Config) -> Config:
    """The configuration of a saved run, in the length fixed then, with the run options given now.

    Raises ConfigError if the command line asks for another model, schedule, optimizer, data, seed or number of steps.
    """
    asked = given.with_steps(saved.schedule.steps)
    if given.run.seed != saved.run.seed:
        raise ConfigError(f"run.seed is {given.run.seed} now and was {saved.run.seed} in the run to resume")
    if given.run.steps not in (None, saved.schedule.steps):
        raise ConfigError(f"run.steps is {given.run.steps} now and was {saved.schedule.steps} in the run to resume")
    for group in ("model", "schedule", "optim", "data"):
        then, now = dataclasses.asdict(getattr(saved, group)), dataclasses.asdict(getattr(asked, group))
        for option, value in then.items():
            if now[option] != value:
                raise ConfigError(f"{group}.{option} is {now[option]} now and was {value} in the run to resume")
    return dataclasses.replace(saved, run=dataclasses.replace(given.run, steps=saved.run.steps, seconds=None))


def from_dict(values: Any) -> Config:
    """A checked Config from what `dataclasses.asdict` and JSON made of one; options that it lacks keep their defaults.

    `values` may be anything. Raises ConfigError for an unknown name, a value of another type or one that cannot work.
    """
    config: Config = _typed(values, Config, "the saved configuration")
    return config.check()


_nano = Config(
    preset="nano",
    model=ModelConfig(
        vocab_size=2048, eod_token=0, layers=4, width=128, heads=2, skip_attention=(), window=256,
        experts=16, expert_width=256, ema_stride=4, score="sigmoid", cv_weight=0.01, entropy_weight=0.01,
    ),
    schedule=ScheduleConfig(
        steps=2000, activation=((0, 0.125), (50, 1.0)), gumbel_windows=((50, 600),),
        temperature_start=1.4, temperature_end=0.9, temperature_steps=400, temperature_ratio=0.5,
        cap_start=2.0, cap_end=12.0, cap_steps=300, prune_at=1800, prune_below=0.4,
    ),
    data=DataConfig(
        train="data/local/train_*.bin", val="data/local/val_*.bin",
        val_tokens=131_072, slice_tokens=256, slices_per_step=32, val_slice_tokens=256, repeat=True,
    ),
    # At record's 0.095 every logit is at the cap after 100 steps, at 0.003 after 600, and no router learns any more.
    optim=OptimConfig(muon_lr=0.05, embedding_lr=0.5, head_lr=0.02, router_lr=0.0003),
    run=RunConfig(seconds=200, val_at_seconds=(30, 60, 120, 180), tokens_per_forward=8192),
)  # fmt: skip

presets: dict[str, Config] = {
    "record": Config(),
    "small": Config(
        preset="small",
        model=ModelConfig(layers=16, width=768, heads=6, skip_attention=(), window=2048, experts=16, ema_stride=16),
        schedule=ScheduleConfig(
            steps=465, activation=((0, 0.0625), (20, 0.125), (40, 0.25), (80, 0.5), (140, 1.0)),
            gumbel_windows=((20, 140),), temperature_steps=75, cap_steps=63, momentum_steps=80,
        ),
        data=DataConfig(
            val_tokens=1_048_576, slice_tokens=8192, slices_per_step=8, val_slice_tokens=16_384, repeat=True,
        ),
        run=RunConfig(seconds=180, val_at_seconds=(60, 120, 180), log_every=10),
    ),
    "nano": _nano,
    # An expert of a layer is one of the bank's, which all layers share, plus a LoRA of the layer's own; 3 of 6 a token.
    "lora_moe": dataclasses.replace(
        _nano,
        preset="lora_moe",
        model=dataclasses.replace(
            _nano.model, experts=6, top_k=3, expert_width=128, adapter="lora", window=512, score="softmax",
        ),
        schedule=dataclasses.replace(
            _nano.schedule, activation=((0, 1.0),), gumbel_windows=((0, 600),), prune_at=None, prune_below=0.0,
        ),
        data=dataclasses.replace(_nano.data, slice_tokens=512, slices_per_step=16, val_slice_tokens=512),
    ),
}  # fmt: skip
