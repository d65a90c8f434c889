"""Trains a SwitchBank language model. This file is the whole run, top to bottom.

python train_switch_bank.py [PRESET] [--group.option VALUE ...]     torchrun --nproc_per_node=8 train_switch_bank.py
"""

import contextlib
import dataclasses
import importlib.util
import os
import shlex
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Compiled code outlives a reboot here, unlike in /tmp; set before torch reads it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parent / ".cache" / "inductor"))

import torch
import torch.distributed as dist
from torch import Tensor

from switch_bank import audit, checkpoint, distributed, run_log, schedules, tracking
from switch_bank.clock import TrainingClock
from switch_bank.config import Config, ConfigError, compute_dtype, from_dict, parse, resumed
from switch_bank.cuda_graphs import CudaGraphs, directly
from switch_bank.data import DataError, Shards, TokenStream, validation_batches
from switch_bank.distributed import World
from switch_bank.generate import sample_line
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.model.router import RoutingSums
from switch_bank.model.size import size_table
from switch_bank.numerics import set_numerics
from switch_bank.ops import cpu_kernels
from switch_bank.ops.attention import FLASH_ATTN_INSTALLED, TRITON_WIDTHS, choose_backend
from switch_bank.optim.groups import QuantileClip, build_optimizers, in_backward_order, parameter_groups, set_rates
from switch_bank.routing_metrics import RoutingMetrics
from switch_bank.schedules import StepState
from switch_bank.stopping import Stopped, on_stop_signals, stop_at_once
from switch_bank.validation import least_share, validate


class VoidError(ArithmeticError):
    """The loss, a gradient or a parameter is inf or NaN, or processes hold other weights: the message names the step,
    and the parts and the saved state."""


def main(config: Config, world: World) -> None:
    # ---- configuration, and the folder of the run ----------------------------------------------------------------
    config.check(world.size)
    tracking.require(config.run.track)
    device, run = world.device, config.run
    if config.model.bank_backend == "triton" and device.type != "cuda":
        raise ConfigError("model.bank_backend is triton: it must be auto, reference or grouped without a CUDA GPU")
    kernel = config.model.attention_backend
    if kernel in ("flex", "triton", "flash") and device.type != "cuda":
        raise ConfigError(f"model.attention_backend is {kernel}: it must be auto, reference or sdpa without a CUDA GPU")
    if kernel == "flash" and not FLASH_ATTN_INSTALLED:
        raise ConfigError("model.attention_backend is flash: it must be auto or flex where flash-attn is not installed")
    dtype = compute_dtype(config.model.dtype, device)
    if kernel == "triton" and choose_backend(kernel, device, dtype, config.model.head_dim) != "triton":
        raise ConfigError(
            "model.attention_backend is triton: it must be auto or flex where Triton is not installed, in float64, and "
            f"where a head's width is none of {', '.join(map(str, TRITON_WIDTHS))}"
        )
    name = config.preset if config.model.causal else f"{config.preset}-NOT-CAUSAL"
    # torchrun --max-restarts starts all processes anew when one has died: from the last checkpoint, if there is one.
    begun = distributed.text_left()  # the folder, if an earlier attempt has begun to write there
    folder = Path(begun or distributed.text_from_first(str(run_log.choose_folder(run, name))))
    resumes = run.resume or begun is not None and (folder / "checkpoint.pt").exists()
    saved: dict[str, Any] | None = checkpoint.load(folder / "checkpoint.pt") if resumes else None
    if saved is not None:
        config = resumed(config, from_dict(saved["config"]))
        if not 0 <= saved["step"] <= config.schedule.steps:
            raise checkpoint.CheckpointError(f"{folder / 'checkpoint.pt'} is of no step of the run: start a new run")
    elif run.steps is not None:
        config = config.with_steps(run.steps)
    length_is_fixed = run.seconds is None or saved is not None

    # ---- data, checked whole before anything is built ------------------------------------------------------------
    data = config.data
    train_shards = Shards.open(data.train, config.model.vocab_size)
    val_shards = Shards.open(data.val, config.model.vocab_size)
    microbatch_slices, microbatches = config.microbatch(world.size, device)
    slices_together = microbatch_slices * (microbatches or 1)
    stream = TokenStream(
        train_shards, data.slice_tokens, data.slices_per_step, world.rank, world.size, device, microbatch_slices
    )
    val_slices_together = max(1, run.tokens_per_forward // data.val_slice_tokens)

    def val_batches() -> Iterator[tuple[Tensor, Tensor]]:
        shape = (data.val_tokens, data.val_slice_tokens, val_slices_together)
        return validation_batches(val_shards, *shape, world.rank, world.size, config.model.eod_token, device)

    val_batches()  # raises here if the split is too short
    shards = train_shards.summary() + val_shards.summary()
    content = [[tokens, sha256] for _, tokens, sha256 in shards]
    if saved is not None and saved["data"] != content:
        other = [path for path, *own in shards if own not in saved["data"]] or ["the list of shards"]
        raise DataError(f"{other[0]} is another than the run began with: put the old one back, or start a new run")
    if length_is_fixed and not data.repeat:
        stream.check_length(config.schedule.steps)
    dist.barrier()  # nobody looks at the folder after the first process has begun to write there

    # ---- the log: its own source first, then all that the run is made of -----------------------------------------
    log = run_log.RunLog(folder, world.rank == 0, mode="a" if saved is not None else "w" if begun else "x")
    if world.rank == 0:
        distributed.leave_text(str(folder))
    if saved is not None:
        log.require_whole(saved["log_sizes"])
    else:
        log.line(f"{run_log.source()}\n===== run\nname: {name}", console=False)
    log.line(f"{run_log.source_checksums()}\n{run_log.environment(device, world.size)}", console=False)
    for path, tokens, sha256 in shards:
        log.line(f"data {path} tokens {tokens} sha256 {sha256}", console=False)

    # ---- model and optimizers ------------------------------------------------------------------------------------
    set_numerics(device)
    if device.type == "cpu":
        cpu_kernels.compile_ahead()
    recorded = config.records_graphs(device)
    launch = CudaGraphs(device) if recorded else directly
    torch.manual_seed(run.seed)
    with device:
        model = SwitchBankGPT(config.model)
    if run.recompute:
        model.recompute_layers()
    backwards = data.slices_per_step // world.size // slices_together
    gradients = distributed.Gradients(in_backward_order(model, microbatches), backwards, overlap=not recorded)
    muon, adam = build_optimizers(model, config)
    optim = config.optim
    clip = QuantileClip(parameter_groups(model)["routers"], optim.router_clip_quantile, optim.router_clip_history)
    picks = torch.zeros(config.model.layers, config.model.experts, device=device)  # fades over some ten steps
    seed = torch.tensor(run.seed, device=device)
    states = schedules.step_states(config, device)
    if saved is None:
        log.line(f"name: {name}\nfolder: {folder}\n{size_table(model, data.slice_tokens)}")
        backends = f"attention {model.attention_backend}, bank {model.bank_backend}"
        log.line(f"{backends}, activations {dtype}, {optim.muon} Muon in {muon.dtype}")

    def window_of(step: int) -> int | None:
        """The window as a Python int for attention kernels that are compiled for one; else it is in the StepState."""
        if model.attention_backend != "flash":
            return None
        return schedules.attention_window(step, config.schedule.steps, config.model.window)

    def forward_backward(
        noise: bool, window: int | None, tokens: Tensor, targets: Tensor, slices: Tensor, *state: Tensor
    ) -> Tensor:
        """Adds the gradients of some slices' losses to what is there. In one row, the sum of the losses and the sums of
        the slices' routing."""
        output = model(tokens, targets, StepState(*state), slices, seed if noise else None, window, microbatches)
        gradients.backward(output.loss * (slices_together / data.slices_per_step))
        loss = output.token_losses.sum(dtype=torch.float64) / stream.step_tokens
        return torch.cat([loss.view(1), output.routing.flat()])

    def train_step(step: int, noise: bool, check_finite: bool) -> tuple[Tensor, RoutingSums]:
        """One update from this process's slices of the step. The mean loss over all slices, and their routing; both on
        the device."""
        inputs, targets = stream.batch(step)
        gradients.zero_()
        sums = torch.zeros((), dtype=torch.float64, device=device)  # exact, whatever the order
        variant = noise, window_of(step)
        for some in zip(*(part.split(slices_together) for part in (inputs, targets, stream.own_slices)), strict=True):
            sums = sums + launch(variant, partial(forward_backward, *variant), *some, *states[step])
        gradients.wait()
        loss, routing_row = distributed.summed(sums).float().tensor_split([1])
        routing = RoutingSums.from_flat(routing_row, *picks.shape)
        if check_finite and not bool(torch.isfinite(gradients.flat.sum() + loss)):
            stop_non_finite(step, loss)
        clip.step()
        set_rates(muon, adam, step, config)
        muon.start_step()
        adam.step()  # while the processes exchange what Muon made
        muon.finish_step()
        picks.mul_(0.9).add_(routing.counts)
        if model.routers is not None and config.model.balance == "bias":
            model.routers.update_balance_bias(routing.counts, model.routers.active(states[step]))
        return loss, routing

    def stop_non_finite(step: int, loss: Tensor | None = None) -> None:
        candidates = [] if loss is None else [("the loss", loss)]
        candidates += model.named_parameters()
        candidates += [(f"the gradient of {n}", p.grad) for n, p in model.named_parameters() if p.grad is not None]
        parts = ", ".join(part for part, value in candidates if not bool(torch.isfinite(value).all()))
        state = f"the state is saved in {folder / 'nonfinite.pt'}"
        if world.rank == 0:
            try:
                checkpoint.save(folder / "nonfinite.pt", run_state(step))
            except OSError as error:  # a full disk must not hide what has happened
                state = str(error)
        raise VoidError(f"step {step}: not finite: {parts}; {state}")

    def require_sound(step: int) -> None:
        """Before weights are saved or validated: they are all processes' the same, and finite."""
        if not distributed.same_weights(model):
            raise VoidError(f"step {step}: the weights differ between the processes; this run is void")
        if not bool(torch.stack([torch.isfinite(parameter).all() for parameter in model.parameters()]).all()):
            stop_non_finite(step)

    def save(step: int) -> None:
        require_sound(step)
        if world.rank == 0:
            checkpoints.save(folder / "checkpoint.pt", run_state(step))

    def run_state(step: int) -> dict[str, Any]:
        """All that the future of the run depends on, before `step` is taken."""
        return {
            "config": dataclasses.asdict(config), "step": step, "seconds": clock.seconds, "log_sizes": log.sizes(),
            "model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(),
            "clip": clip.state_dict(), "picks": picks, "readings": readings, "times_resumed": times_resumed,
            "loads": routing_metrics.loads, "data": content,
        }  # fmt: skip

    def load_state(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        clip.load_state_dict(state["clip"])
        picks.copy_(state["picks"])

    # ---- warm-up: all that will run is compiled here; the steps it takes are undone ------------------------------
    clock, readings, times_resumed = TrainingClock(device), sorted(run.val_at_seconds), 0
    routing_metrics = RoutingMetrics()
    fresh = checkpoint.copy_to_host(run_state(0))
    noises = dict.fromkeys(schedules.gumbel_noise(step, config.schedule) for step in range(config.schedule.steps))
    windows = dict.fromkeys(window_of(step) for step in range(config.schedule.steps + 1))
    log.line(
        f"compiled before step 0: training on {slices_together} x {data.slice_tokens} tokens, noise "
        f"{' and '.join('on' if noise else 'off' for noise in noises)}; validation on {val_slices_together} x "
        f"{data.val_slice_tokens} tokens; windows {', '.join(str(w or 'as tensors') for w in windows)}"
    )
    if run.compile:
        model.compile()
    began = time.perf_counter()
    for noise in noises:
        for window in windows:
            at = next(step for step in range(config.schedule.steps + 1) if window_of(step) == window)
            train_step(min(at, config.schedule.steps - 1), noise, check_finite=False)
    if not length_is_fixed:
        assert run.seconds is not None
        times = []
        # Twice over steps from all of the schedule, timed the second time: libraries build kernels for new shapes.
        for at in 2 * torch.linspace(0, config.schedule.steps - 1, 16).long().tolist():
            timer = TrainingClock(device)
            timer.start()
            train_step(at, schedules.gumbel_noise(at, config.schedule), check_finite=device.type == "cpu")
            timer.stop()
            times.append(timer.seconds)
        steps = int(distributed.from_first(max(1, run.seconds // statistics.median(times[len(times) // 2 :])), world))
        config = config.with_steps(steps).check(world.size)
        states = schedules.step_states(config, device)
        log.line(f"--run.seconds {run.seconds:g}: {steps} steps, fixed now from the median step time of the warm-up")
        if not data.repeat:
            stream.check_length(steps)
    if saved is not None:  # now the optimizers have all the state that they will have
        own = run_state(0)
        for part in ("model", "muon", "adam", "clip", "picks"):
            checkpoint.require_like(saved[part], own[part], part)
        own_loads = {"train": picks, "val": picks.double()}
        for split, load in saved["loads"].items():
            checkpoint.require_like(load, own_loads.get(split), f"loads.{split}")
    load_state(fresh)
    steps = config.schedule.steps

    # ---- is it causal? on the path that validation takes, and on exact gradients ---------------------------------
    model.eval()
    last = states[steps]  # the model is audited, validated at the end and used with the schedule's last values
    with audit.random_parameters(model, run.seed):
        findings = audit.findings(model, last, val_slices_together, data.val_slice_tokens, list(windows))
    model.train()
    causal = audit.verdict(findings).splitlines()[0]
    log.line(f"compiled and warmed up in {time.perf_counter() - began:.1f} s\n{audit.verdict(findings)}")
    if config.model.causal and causal != "causal: yes":
        raise SystemExit("error: this configuration must be causal and is not; nothing was trained")

    # ---- the loop ------------------------------------------------------------------------------------------------
    first_step = 0
    log.track(config)
    if saved is not None:
        load_state(saved)
        first_step, times_resumed = saved["step"], saved["times_resumed"] + 1
        readings = [at for at in readings if at in saved["readings"] or at > saved["seconds"]]
        clock, routing_metrics.loads = TrainingClock(device, saved["seconds"]), saved["loads"]
        log.cut_back(saved["log_sizes"])
        log.line(f"resumed at step {first_step}, resume number {times_resumed}")
    elif world.rank == 0:
        run_log.write_config(folder, config)
    log.line(f"config {dataclasses.asdict(config)}", console=False)
    log.line(f"{steps} steps of {stream.step_tokens} tokens, {stream.steps_in_one_epoch} an epoch, seed {run.seed}")
    graphs_before = compiled_graphs()
    checkpoints = checkpoint.Writer(before=log.sync)
    asked_to_stop = [0]  # the number of the signal

    def ask_to_stop(number: int, frame: Any) -> None:
        asked_to_stop[0] = number
        signal.signal(number, signal.SIG_DFL)  # asked twice, it stops at once

    on_stop_signals(ask_to_stop)
    in_flight: deque[torch.cuda.Event] = deque()
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(skip_first=10, wait=0, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / "trace.json")),
    )
    profiling = run.profile and world.rank == 0
    if profiling and steps - first_step < 14:
        log.line(f"--run.profile traces steps 12 to 14 from here, and {steps - first_step} are left: no whole trace")
    with profiler if profiling else contextlib.nullcontext():
        clock.start()
        for step in range(first_step, steps + 1):
            seconds, stop = distributed.agreed(clock.seconds, asked_to_stop[0], world)
            due = run.checkpoint_every and step % run.checkpoint_every == 0 and first_step < step < steps
            if due or stop:  # before the validation of the step, so that a resumed run has it once
                save(step)
            if stop:
                checkpoints.wait()
                dist.barrier()  # a process that ended sooner would break the connections of the one that saves
                where = f"stopped by {signal.Signals(stop).name} before step {step} of {steps}, which is saved"
                out = shlex.quote(str(folder))
                raise Stopped(f"{where}: go on with the same command and --run.resume --run.out {out}", stop)
            if step in run.val_at_steps or step == steps or readings and seconds >= readings[0]:
                clock.stop()
                if step == steps:
                    save(step)
                else:
                    require_sound(step)
                seconds = distributed.from_first(clock.seconds, world)
                readings = [at for at in readings if at > seconds]
                model.eval()
                validation = validate(model, val_batches(), states[step], window_of(step))
                model.train()
                line = f"step:{step}/{steps} val_loss:{validation.loss:.4f} train_time:{1000 * seconds:.0f}ms"
                log.line(f"{line} step_avg:{1000 * seconds / max(1, step):.2f}ms")
                values = {"val_loss": validation.loss, "val_tokens": validation.tokens}
                log.metrics("val", {"step": step, "train_time_s": seconds} | values)
                if model.routers is not None:
                    active = model.routers.active(states[step])
                    routes = routing_metrics.record("val", step, validation.routing, active, model.routers)
                    log.metrics("routing", routes)
                    parts = ", ".join(f"{part} {value:.2f}" for part, value in routes["health_parts"].items())
                    log.line(f"router health {routes['health']:.2f} at step {step}: {parts}")
                clock.start()
            if step == steps:
                break

            if model.routers is not None and step > 0:
                before, now = model.routers.active(states[step - 1]), model.routers.active(states[step])
                if experts_start(config, step):
                    model.bank.start_adapters(before, now)
                if step == config.schedule.prune_at:
                    model.routers.prune(picks, config.schedule.prune_below, before)
                    log.line(f"step:{step}/{steps} pruned experts: {model.routers.pruned.nonzero().flatten().tolist()}")
            logging = (step + 1) % run.log_every == 0 or step == first_step
            # To read whether a number is finite makes a GPU wait, so there it is read only when logging.
            loss, routing = train_step(
                step, schedules.gumbel_noise(step, config.schedule), logging or device.type == "cpu"
            )
            if device.type == "cuda":
                # At most one step is queued behind the one that runs: the clock stays true and the GPU stays busy.
                in_flight.append(torch.cuda.Event())
                in_flight[-1].record()
                if len(in_flight) > 1:
                    in_flight.popleft().synchronize()
            if profiling and step - first_step in (9, 10, 13):  # it gets ready, begins and writes: that is no training
                clock.stop()
                profiler.step()
                clock.start()
            elif profiling:
                profiler.step()
            if logging:
                seconds, mean_loss = clock.seconds, loss.item()
                average = seconds / (step + 1)
                line = f"step:{step + 1}/{steps} train_loss:{mean_loss:.4f} train_time:{1000 * seconds:.0f}ms"
                log.line(f"{line} step_avg:{1000 * average:.2f}ms", console=not log.terminal)
                speed = stream.step_tokens / average
                values = {"train_loss": mean_loss, "tokens_per_s": speed, "epoch": stream.epoch(step)}
                log.metrics("train", {"step": step + 1, "train_time_s": seconds} | values)
                health = ""
                if model.routers is not None:
                    active = model.routers.active(states[step])
                    routes = routing_metrics.record("train", step + 1, routing, active, model.routers)
                    log.metrics("routing", routes)
                    health = f" health:{routes['health']:.2f}"
                log.progress(f"{line}{health} {speed:,.0f} tokens/s, {average * (steps - step - 1):.0f} s left")
            if stream.epoch(step + 1) > stream.epoch(step):
                log.line(f"step:{step + 1}/{steps} the training data starts over: epoch {stream.epoch(step + 1)}")

    # ---- the result ----------------------------------------------------------------------------------------------
    clock.stop()
    checkpoints.wait()
    if device.type == "cuda":
        log.line(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    log.line(f"graphs compiled before step 0: {graphs_before}, after it: {compiled_graphs() - graphs_before}")
    model.eval()
    findings = audit.findings(model, last, val_slices_together, data.val_slice_tokens, list(windows), whole=True)
    log.line(f"the same of the trained weights:\n{audit.verdict(findings)}")
    causal = "causal: yes" if causal == audit.verdict(findings).splitlines()[0] == "causal: yes" else "NOT CAUSAL"
    if model.routers is not None:
        share = least_share(validation.routing.counts, model.routers.active(states[steps]))
        log.line(f"least used expert: {share:.2f} of an even share of the bank's validation tokens")
    if world.rank == 0:
        log.line(sample_line(model, last, folder, config))
    log.line(
        f"result: val_loss {validation.loss:.4f} over {validation.tokens} tokens after {steps} steps, "
        f"{seconds:.1f} s of training, seed {run.seed}, resumed {times_resumed} times, {causal} ({folder})"
    )
    if world.rank == 0 and run.report and importlib.util.find_spec("vl_convert") is not None:
        from switch_bank.report.page import write_own_report  # only here: vl-convert is an extra

        model.trained_state = last
        write_own_report(folder, config, model.uncompiled())


def experts_start(config: Config, step: int) -> bool:
    """Whether experts are switched on at `step`."""
    schedule, experts = config.schedule, config.model.experts
    return schedules.active_experts(step, schedule, experts) != schedules.active_experts(step - 1, schedule, experts)


def compiled_graphs() -> int:
    """How many graphs dynamo has handed to the compiler so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # None where it was closed
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # no name of a folder ends a run
    on_stop_signals(stop_at_once)
    try:
        arguments = parse(sys.argv[1:], default_preset="record" if torch.cuda.is_available() else "nano").check()
        world = distributed.start(arguments.run.timeout_seconds)
        with distributed.naming_silent_peers(world):
            main(arguments, world)
        message, exit_code = "", 0
    except (ConfigError, DataError, checkpoint.CheckpointError) as error:
        message, exit_code = f"error: {error}", 2
    except (VoidError, distributed.PeerError, OSError) as error:
        message, exit_code = f"error: {error}", 1
    except Stopped as stopped:
        message, exit_code = str(stopped), stopped.exit_code
    print(message, file=sys.stderr, end="\n" if message else "")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(exit_code)
