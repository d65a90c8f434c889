"""One bank layer, forward and backward, against a dense feed-forward of the same active size.

python -m benchmarks.bank [--presets record nano] [--experts 8 64] [--dtypes bfloat16] [--routings skewed]
                          [--backend triton] [--json]
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import alternate, dense_ffn, device_name, quartiles, random_like, show, start_device
from switch_bank.config import ModelConfig
from switch_bank.model.bank import Bank, Experts
from switch_bank.model.router import RouterOfLayer, Routers, Routing
from switch_bank.ops.arranged import Arranged
from switch_bank.ops.bank import ARRANGED, Adapter, expert_ffn
from switch_bank.ops.microbatches import per_microbatch
from switch_bank.schedules import StepState


class Shape(NamedTuple):
    tokens: int  # rows that go through together
    width: int
    expert_width: int
    experts: int
    top_k: int
    layers: int = 1  # that share the bank
    microbatches: int = 1  # if more, gradients are summed by microbatch, as in training on a CPU


SHAPES = {
    "record": [Shape(12_288, 896, 1024, experts, 1, 28) for experts in (8, 64)],  # one slice, as on each of 8 GPUs
    "nano": [Shape(8192, 128, 256, 16, 1, 4, 8)],
}
ROUTINGS = ("balanced", "skewed")
BACKENDS = ("auto", "grouped", "triton", "reference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # as a share of a tensor's largest value
COMPARED_TOKENS = 64
DRAWN = 4  # routings that the repetitions take in turn: no two steps of a training route alike


class WrongError(ArithmeticError):
    """The bank does not compute what its reference computes: there is nothing to time."""


def routes(routing: str, shape: Shape, device: torch.device) -> Tensor:
    """[1, tokens, K] int64: K different experts for each token, any as likely as any other; "skewed" sends one half of
    the first picks to expert 0."""
    liking = torch.rand(shape.tokens, shape.experts, device=device)
    if routing == "skewed":
        liking[torch.rand(shape.tokens, device=device) < 0.5, 0] = 2.0
    return liking.topk(shape.top_k, dim=1).indices[None]


class GradientSums:
    """What the gradients of parameters are added to, as in `distributed.Gradients`: float64 for microbatches, and not
    the parameters' own but during a backward."""

    def __init__(self, parameters: list[Tensor], microbatches: int | None) -> None:
        dtype = torch.float32 if microbatches is None else torch.float64
        self.of = {parameter: torch.zeros_like(parameter, dtype=dtype) for parameter in parameters}

    def backward(self, outputs: list[Tensor], directions: list[Tensor]) -> None:
        for parameter, total in self.of.items():
            parameter.grad_dtype, parameter.grad = None, total
        torch.autograd.backward(outputs, directions)
        for parameter in self.of:
            parameter.grad = None


class BankLayer:
    """The bank and the router of a model of one layer, with random parameters, inputs and output gradients."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, compile: bool = True, backend: str = "auto"
    ) -> None:
        self.shape, self.dtype, self.device, self.compile = shape, dtype, device, compile
        config = ModelConfig(
            layers=1, width=shape.width, heads=1, skip_attention=(), value_embeddings=0, experts=shape.experts,
            top_k=shape.top_k, expert_width=shape.expert_width, reverse_ema="off", flags=False,
            bank_backend=backend,  # type: ignore[arg-type]
        )  # fmt: skip
        with device:
            self.bank, self.routers = Bank(config), Routers(config)
        for name, parameter in [*self.bank.named_parameters(), *self.routers.named_parameters()]:
            around, scale = (name == "adapters.scale"), 0.3 if "adapters" in name else parameter.shape[-1] ** -0.5
            parameter.data.copy_(around + scale * torch.randn_like(parameter))
        self.microbatches = shape.microbatches if shape.microbatches > 1 else None
        self.sums = GradientSums([*self.bank.parameters(), *self.routers.parameters()], self.microbatches)
        self.backend = self.bank.backend(dtype, shape.tokens)
        eager = not compile or self.backend in ARRANGED  # whose kernels are compiled already
        self.forward = torch.compile(self.bank.forward, fullgraph=True, dynamic=False, disable=eager)
        self.route = torch.compile(self._route, fullgraph=True, dynamic=False, disable=not compile)
        tokens = (1, shape.tokens)
        self.n = random_like((*tokens, shape.width), device, dtype).requires_grad_()
        self.gates = torch.rand(*tokens, shape.top_k, device=device).requires_grad_()
        self.direction = random_like((*tokens, shape.width), device, dtype)
        self.gate_direction = random_like((*tokens, shape.top_k), device, torch.float32)
        self.probability_direction = random_like((*tokens, shape.experts), device, torch.float32)
        self.noise = torch.zeros(*tokens, shape.experts, device=device)
        self.state = StepState(*(torch.tensor(float(v), device=device) for v in (0, shape.experts, 1, 10, 128)))
        self.active = torch.ones(shape.experts, dtype=torch.bool, device=device)

    def step(self, chosen: Tensor, direction: Tensor) -> Tensor:
        """Forward and backward of a model that has this layer alone. Gradients of n and of the gates are new; those of
        parameters are added to what is there."""
        return self._step(self.experts(), chosen, direction)

    def experts(self) -> Experts:
        return self.bank.of_layers(self.backend, self.dtype, self.microbatches)[0]

    def shared_step(self, experts: Experts, chosen: Tensor, direction: Tensor) -> Tensor:
        """`step` as one more layer adds it to a forward that has arranged the experts already."""
        if isinstance(experts.matrices, Arranged):
            # No gradient goes on from here to the parameters.
            link = torch.zeros((), device=self.device, requires_grad=True)
            experts = experts._replace(matrices=experts.matrices._replace(link=link))
        return self._step(experts, chosen, direction)

    def _step(self, experts: Experts, chosen: Tensor, direction: Tensor) -> Tensor:
        self.n.grad = self.gates.grad = None
        y = self.forward(experts, self.n, chosen, self.gates)
        self.sums.backward([y], [direction])
        return y.detach()

    def router_step(self) -> None:
        """Forward and backward of the router, of the token alone: logits, noise, top-K, gates."""
        self.n.grad = None
        routing = self.route(self.n, self.routers.of_layers(self.microbatches)[0])
        directions = [self.gate_direction, self.probability_direction]
        self.sums.backward([routing.gates, routing.probabilities], directions)

    def _route(self, n: Tensor, router: RouterOfLayer) -> Routing:
        (context,) = self.routers.context_logits(n, [], None, (router,))
        return self.routers(router, n, context, self.state, self.active, self.noise)


class DenseLayer:
    """A feed-forward as wide as all experts that work on one token, on a bank layer's inputs."""

    def __init__(self, layer: BankLayer) -> None:
        hidden, width = layer.shape.top_k * layer.shape.expert_width, layer.shape.width
        self.w1 = random_like((hidden, width), layer.device, torch.float32, width**-0.5).requires_grad_()
        self.w2 = random_like((width, hidden), layer.device, torch.float32, hidden**-0.5).requires_grad_()
        self.microbatches = layer.microbatches
        self.sums = GradientSums([self.w1, self.w2], self.microbatches)
        self.forward = torch.compile(dense_ffn, fullgraph=True, dynamic=False, disable=not layer.compile)
        self.n, self.direction = layer.n, layer.direction

    def step(self) -> None:
        self.n.grad = None
        w1, w2 = (per_microbatch(weight, self.microbatches) for weight in (self.w1, self.w2))
        self.sums.backward([self.forward(self.n, w1, w2)], [self.direction])


def largest_error(layer: BankLayer, chosen: Tensor) -> float:
    """The compiled bank against the reference in float32 on the same rounded inputs: its output and every gradient.

    Some tokens are compared. No other token has an output gradient, so weight gradients come of these alone. Returns
    the largest difference, as a share of its tensor's largest value; raises WrongError if it is above the tolerance.
    """
    sample = torch.randperm(layer.shape.tokens, device=layer.device)[:COMPARED_TOKENS]
    direction = torch.zeros_like(layer.direction)
    direction[0, sample] = layer.direction[0, sample]

    def rounded(value: Tensor) -> Tensor:
        return value.detach().to(layer.dtype).float().requires_grad_()

    def gradient(value: Tensor) -> Tensor:
        assert value.grad is not None
        return value.grad

    n, gates = rounded(layer.n[0, sample]), rounded(layer.gates[0, sample])
    bank = layer.bank
    stacked = [bank.w1, bank.w2, bank.adapters["scale"][0], bank.adapters["bias"][0]]
    # One leaf an expert: the gradient of a slice of them all would be as large as they all, for each.
    experts = [[rounded(part[e : e + 1]) for part in stacked] for e in range(layer.shape.experts)]
    y = torch.zeros_like(n)
    for e, (own_w1, own_w2, scale, bias) in enumerate(experts):
        own_gates = torch.where(chosen[0, sample] == e, gates, 0.0)
        only = torch.zeros_like(chosen[0, sample])
        y = y + expert_ffn("reference", n, own_w1, own_w2, Adapter(scale, bias), only, own_gates)
    y.backward(direction[0, sample].float())

    found_y = layer.step(chosen, direction)
    pairs = [(found_y[0, sample], y.detach())]
    pairs += [(gradient(layer.n)[0, sample], gradient(n)), (gradient(layer.gates)[0, sample], gradient(gates))]
    whole_parameters = [bank.w1, bank.w2, bank.adapters["scale"], bank.adapters["bias"]]
    for whole, parts in zip(whole_parameters, zip(*experts, strict=True), strict=True):
        pairs.append((layer.sums.of[whole], torch.cat([gradient(part) for part in parts]).view_as(whole)))
    error = max(float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)
    if not error <= TOLERANCE[layer.dtype]:
        raise WrongError(f"the bank at {layer.shape} in {layer.dtype} is off its reference by {error:.2g}")
    return error


def measure(layer: BankLayer, dense: DenseLayer, routing: str, error: float, seconds: float) -> dict[str, Any]:
    """One row: medians of one layer's forward and backward, in ms."""
    drawn = itertools.cycle([routes(routing, layer.shape, layer.device) for _ in range(DRAWN)])
    experts = layer.experts()
    functions: dict[str, Callable[[], object]] = {
        "dense": dense.step,
        "alone": lambda: layer.step(next(drawn), layer.direction),
        "router": layer.router_step,
    }
    if isinstance(experts.matrices, Arranged):
        functions["shared"] = lambda: layer.shared_step(experts, next(drawn), layer.direction)
    times = alternate(functions, layer.device, seconds, warm_up=DRAWN)
    medians = {name: statistics.median(of_name) for name, of_name in times.items()}
    own = times.get("shared", times["alone"])
    once = medians["alone"] - statistics.median(own)  # for all layers: arranging the experts, adding up their gradients
    dense_ms, bank_ms = medians["dense"], statistics.median(own) + once / layer.shape.layers
    return {
        "device": device_name(layer.device), "dtype": str(layer.dtype).removeprefix("torch."),
        "backend": layer.backend, "shape": layer.shape._asdict(), "routing": routing,
        "dense_ms": dense_ms, "bank_ms": bank_ms, "ratio": bank_ms / dense_ms,
        "dense_quartiles_ms": quartiles(times["dense"]), 
        "bank_quartiles_ms": [round(value + once / layer.shape.layers, 4) for value in quartiles(own)],
        "alone_ms": medians["alone"], "router_ms": medians["router"], "repetitions": len(own), "largest_error": error,
    }  # fmt: skip


def print_profile(layer: BankLayer, dense: DenseLayer, routing: str) -> None:
    """What each operation of one forward and backward costs by itself, dense and bank."""
    chosen = routes(routing, layer.shape, layer.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (layer.device.type == "cuda")
    for name, step in ("dense", dense.step), ("bank", lambda: layer.step(chosen, layer.direction)):
        step()
        with profile(activities=activities) as profiler:
            step()
        order = f"self_{layer.device.type}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
        print(f"{name}, {layer.dtype}, {routing}, {layer.shape}\n{table}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bank", description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose shapes")
    parser.add_argument("--experts", nargs="+", type=int, help="instead of the preset's")
    for option in ("tokens", "width", "expert-width", "top-k", "layers", "microbatches"):
        parser.add_argument(f"--{option}", type=int, help="instead of the preset's")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="default: all that the device has")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="the bank's; triton takes a CUDA GPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row; at least 5 repetitions")
    parser.add_argument("--no-compile", action="store_true", help="time the parts without torch.compile")
    parser.add_argument("--profile", action="store_true", help="also print to stderr what each operation costs")
    parser.add_argument("--json", action="store_true", help="an object a line")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in Shape._fields if name != "experts"}
    given = {name: value for name, value in given.items() if value is not None}
    shapes = [shape._replace(**given) for preset in options.presets for shape in SHAPES[preset]]
    if options.experts:
        shapes = [shape._replace(experts=experts) for shape in shapes for experts in options.experts]
    shapes = list(dict.fromkeys(shapes))
    for shape in shapes:
        if min(shape) < 1 or shape.top_k > shape.experts or shape.tokens % shape.microbatches:
            parser.error(
                f"{shape}: every number must be at least 1, top_k at most experts, and microbatches divide tokens"
            )
    device = start_device()
    if options.backend == "triton" and device.type != "cuda":
        parser.error("--backend triton takes a CUDA GPU: there is none")
    # CUDA's grouped products are bfloat16.
    dtypes = options.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    if options.profile and device.type == "cpu":
        torch._inductor.config.cpp.enable_kernel_profile = True  # compiled loops appear by name
    torch.manual_seed(0)
    try:
        for dtype in dtypes:
            for shape in shapes:
                layer = BankLayer(shape, getattr(torch, dtype), device, not options.no_compile, options.backend)
                dense = DenseLayer(layer)
                error = largest_error(layer, routes("skewed", shape, device))
                for routing in options.routings:
                    row = measure(layer, dense, routing, error, options.seconds)
                    text = " ".join(f"{name}={size}" for name, size in row["shape"].items())
                    text = f"{row['dtype']:<9}{row['backend']:<9}{text}  {routing:<9} dense {row['dense_ms']:.2f} ms"
                    text += f"  bank {row['bank_ms']:.2f} ms  ratio {row['ratio']:.3f}"
                    text += f"  (alone {row['alone_ms']:.2f} ms, router {row['router_ms']:.2f} ms)"
                    show(row, options.json, text)
                    if options.profile:
                        print_profile(layer, dense, routing)
    except WrongError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
