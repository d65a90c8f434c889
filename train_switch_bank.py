"""Trains a SwitchBank language model. This file is the whole run, top to bottom.

python train_switch_bank.py [PRESET] [--group.option VALUE ...]     torchrun --nproc_per_node=8 train_switch_bank.py
"""

import dataclasses
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))  # outlives a reboot, unlike /tmp

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from switch_bank import audit, checkpoint, config as configs, run_log, schedules  # noqa: E402
from switch_bank.clock import TrainingClock  # noqa: E402
from switch_bank.data import DataError, Shards, TokenStream, validation_batches  # noqa: E402
from switch_bank.distributed import World, flat_gradients, from_first, same_weights, start, summed, text_from_first  # noqa: E402
from switch_bank.model.gpt import SwitchBankGPT  # noqa: E402
from switch_bank.model.size import size_table  # noqa: E402
from switch_bank.optim.groups import QuantileClip, build_optimizers, parameter_groups, set_rates  # noqa: E402
from switch_bank.validation import least_share, validate  # noqa: E402


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is inf or NaN; the message names the step, the parts and the saved state."""


def main(config: configs.Config, world: World) -> None:
    device, run, name = world.device, config.run, config.preset + ("" if config.model.causal else "-NOT-CAUSAL")
    config.check(world.size)
    if run.steps is not None:
        config = config.with_steps(run.steps)

    # ---- the folder, and what was saved in it --------------------------------------------------------------------
    folder = Path(text_from_first(str(choose_folder(run, name))))
    saved: dict[str, Any] | None = None
    if run.resume:
        saved = checkpoint.load(folder / "checkpoint.pt")
        config = resumed_config(config, configs.from_dict(saved["config"]))
        if world.rank == 0:
            run_log.cut_back(folder, saved["log_sizes"])
    elif (folder / "log.txt").exists():
        raise configs.ConfigError(f"{folder} holds a run already: give --run.resume or another --run.out")

    # ---- data: checked whole before anything is built ------------------------------------------------------------
    data, vocab = config.data, config.model.vocab_size
    train_shards, val_shards = Shards.open(data.train, vocab), Shards.open(data.val, vocab)
    stream = TokenStream(train_shards, data.slice_tokens, data.slices_per_step, world.rank, world.size, device)
    slices_together = largest_divisor(data.slices_per_step // world.size, run.tokens_per_forward // data.slice_tokens)
    val_slices_together = max(1, run.tokens_per_forward // data.val_slice_tokens)

    def val_batches() -> Any:
        shape = data.val_tokens, data.val_slice_tokens, val_slices_together
        return validation_batches(val_shards, *shape, world.rank, world.size, config.model.eod_token, device)

    val_batches()  # raises now if the split is too short

    # ---- the log: source first, then all that the run is made of -------------------------------------------------
    log = run_log.RunLog(folder, world.rank == 0, append=saved is not None)
    if saved is None:
        log.line(run_log.source(), console=False)
        log.line(f"===== run\nname: {name}\n{run_log.environment(device, world.size)}", console=False)
        for path, length, sha256 in [shard for shards in (train_shards, val_shards) for shard in shards.summary()]:
            log.line(f"data {path} tokens {length} sha256 {sha256}", console=False)

    # ---- model and optimizers ------------------------------------------------------------------------------------
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)  # one seed and process count: bit-identical losses
    with device:
        model = SwitchBankGPT(config.model)
    gradients = flat_gradients(model.parameters())
    muon, adam = build_optimizers(model, config)
    routers = parameter_groups(model)["routers"]
    clip = QuantileClip(routers, config.optim.router_clip_quantile, config.optim.router_clip_history)
    picks = torch.zeros(config.model.layers, config.model.experts, device=device)  # recent picks, fading over ~10 steps
    seed = torch.tensor(run.seed, device=device)
    own_slices = torch.arange(world.rank, data.slices_per_step, world.size, device=device)
    static_window = model.attention_backend == "flash"
    if saved is None:
        log.line(f"name: {name}\nfolder: {folder}\n{size_table(model, data.slice_tokens)}")
        backend = f"attention {model.attention_backend}, activations {configs.compute_dtype(config.model.dtype, device)}"
        log.line(f"{backend}, orthogonalization {muon.dtype} ({config.optim.muon})")

    def window_of(step: int) -> int | None:
        """The window as a Python int, for attention kernels that are compiled for one; else it is in the StepState."""
        if not static_window:
            return None
        return schedules.attention_window(step, config.schedule.steps, config.model.window)

    if run.compile:
        model.compile()
    states = schedules.step_states(config, device)

    def train_step(step: int, noise: bool, check_finite: bool) -> torch.Tensor:
        """One update from this process's slices of a step; the mean loss over all slices, on the device."""
        inputs, targets = stream.batch(step)
        gradients.zero_()
        statistics = torch.zeros(1 + picks.numel(), device=device)
        groups = (tensor.split(slices_together) for tensor in (inputs, targets, own_slices))
        for some_inputs, some_targets, some_slices in zip(*groups, strict=True):
            output = model(some_inputs, some_targets, states[step], some_slices, seed if noise else None, window_of(step))
            share = len(some_slices) / data.slices_per_step
            (output.loss * share).backward()
            statistics += torch.cat([output.cross_entropy.view(1) * share, output.pick_counts.flatten()])
        summed(gradients)
        loss, counts = summed(statistics).split([1, picks.numel()])
        if check_finite and not bool(torch.isfinite(gradients.sum() + loss)):
            stop_non_finite(step, loss)
        clip.step()
        set_rates(muon, adam, step, config)
        muon.step()
        adam.step()
        if model.routers is not None:
            counts = counts.view_as(picks)
            picks.mul_(0.9).add_(counts)
            if config.model.balance == "bias":
                model.routers.update_balance_bias(counts, model.routers.active(states[step]))
        return loss

    def stop_non_finite(step: int, loss: torch.Tensor) -> None:
        bad = [] if bool(torch.isfinite(loss)) else ["the loss"]
        bad += [f"the gradient of {n}" for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        bad += [f"the parameter {n}" for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        if world.rank == 0:
            checkpoint.save(folder / "nonfinite.pt", run_state(step))
        raise NonFiniteError(f"step {step}: not finite: {', '.join(bad)}; the state is saved in {folder / 'nonfinite.pt'}")

    def run_state(step: int) -> dict[str, Any]:
        """All that the run's future depends on, before `step` is taken."""
        return {
            "config": dataclasses.asdict(config), "step": step, "seconds": clock.seconds, "log_sizes": log.sizes(),
            "model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(),
            "clip": clip.state_dict(), "picks": picks, "resumed": times_resumed, "readings": readings_left,
        }  # fmt: skip

    def load_state(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        clip.load_state_dict(state["clip"])
        picks.copy_(state["picks"])

    # ---- warm-up: everything that will run is compiled here, and the steps it took are undone --------------------
    clock = TrainingClock(device)
    times_resumed, readings_left = 0, sorted(run.val_at_seconds)
    fresh = to_host(run_state(0))
    began = time.perf_counter()
    variants = dict.fromkeys((schedules.gumbel_noise(step, config.schedule), window_of(step)) for step in range(config.schedule.steps))
    shape = f"{slices_together} x {data.slice_tokens} tokens"
    log.line("compiled variants: " + "; ".join(
        [f"train {shape}, noise {'on' if noise else 'off'}" + (f", window {window}" if window else "") for noise, window in variants]
        + [f"eval {val_slices_together} x {data.val_slice_tokens} tokens"]))  # fmt: skip
    for noise, window in variants:
        step = next(s for s in range(config.schedule.steps) if window_of(s) == window)
        train_step(step, noise, check_finite=False)
        train_step(step, noise, check_finite=False)  # gradients exist now: the second step is the one that repeats
    log.line(f"compiled the training step in {time.perf_counter() - began:.1f} s")
    if run.seconds is not None and saved is None:
        steps = steps_for(run.seconds, train_step, config, device)
        config = config.with_steps(int(from_first(steps, world)))
        states = schedules.step_states(config, device)
        log.line(f"--run.seconds {run.seconds:g} is {config.schedule.steps} steps here")
    load_state(fresh)
    del fresh

    # ---- is it causal? on the path that validation runs, and on exact gradients ----------------------------------
    steps = config.schedule.steps
    model.eval()
    last = schedules.step_state(steps, config, device)
    with audit.random_parameters(model, run.seed):
        tolerance = audit.TOLERANCE[configs.compute_dtype(config.model.dtype, device)]
        shape_of_val = (data.val_slice_tokens, val_slices_together)
        findings = [
            audit.check_suffix(model, config.model, last, *shape_of_val, device, tolerance, window_of(steps)),
            audit.check_gradients(model, last, 256),
        ]
    model.train()
    log.line(audit.verdict(findings))
    causal = audit.verdict(findings).splitlines()[0]
    if config.model.causal and causal != "causal: yes":
        raise SystemExit("this configuration must be causal and is not: nothing was trained")

    # ---- the loop ------------------------------------------------------------------------------------------------
    first_step = 0
    if saved is not None:
        load_state(saved)
        first_step, times_resumed, readings_left = saved["step"], saved["resumed"] + 1, saved["readings"]
        clock = TrainingClock(device, saved["seconds"])
        log.line(f"resumed at step {first_step} (resume number {times_resumed})")
    if world.rank == 0:
        run_log.write_config(folder, config)
    if not data.repeat and steps > stream.steps_in_one_epoch:
        raise DataError(f"{data.train} lasts {stream.steps_in_one_epoch} steps and the run takes {steps}: add shards, or --data.repeat")
    if saved is None:
        log.line(f"config {dataclasses.asdict(config)}", console=False)
        log.line(f"training: {steps} steps of {data.slices_per_step} x {data.slice_tokens} tokens, {stream.steps_in_one_epoch} steps an epoch, seed {run.seed}")

    in_flight: deque[torch.cuda.Event] = deque()
    profiler = None
    validation = None
    clock.start()
    for step in range(first_step, steps + 1):
        seconds = from_first(clock.seconds, world)
        reading = bool(readings_left) and seconds >= readings_left[0]
        if reading or step in run.val_at_steps or step == steps:
            clock.stop()
            seconds = from_first(clock.seconds, world)
            readings_left = [at for at in readings_left if at > seconds]
            model.eval()
            validation = validate(model, val_batches(), states[step], window_of(step))
            model.train()
            average = 1000 * seconds / max(1, step)
            log.line(f"step:{step}/{steps} val_loss:{validation.loss:.4f} train_time:{1000 * seconds:.0f}ms step_avg:{average:.2f}ms")
            log.metrics("val", {"step": step, "train_time_s": seconds, "val_loss": validation.loss, "val_tokens": validation.tokens})
            if not same_weights(model):
                raise RuntimeError(f"step {step}: the processes' weights differ; the run is void")
            clock.start()
        if run.checkpoint_every and step % run.checkpoint_every == 0 and step > first_step and step < steps and world.rank == 0:
            checkpoint.save(folder / "checkpoint.pt", run_state(step))
        if step == steps:
            break

        if model.routers is not None and step > 0:
            if schedules.active_experts(step, config.schedule, config.model.experts) != schedules.active_experts(
                step - 1, config.schedule, config.model.experts
            ):
                model.bank.start_adapters(model.routers.active(states[step - 1]), model.routers.active(states[step]))
            if step == config.schedule.prune_at:
                model.routers.prune(picks, config.schedule.prune_below, model.routers.active(states[step - 1]))
        if run.profile and world.rank == 0 and step in (first_step + 10, first_step + 13):
            profiler = toggle_profiler(profiler, folder / "trace.json")

        logging = step % run.log_every == 0
        check_finite = device.type == "cpu" or logging  # reading the flag makes a GPU wait
        loss = train_step(step, schedules.gumbel_noise(step, config.schedule), check_finite)
        if device.type == "cuda":
            # At most one step is queued behind the one that runs: the clock stays true and the GPU stays busy.
            in_flight.append(torch.cuda.Event())
            in_flight[-1].record()
            if len(in_flight) > 1:
                in_flight.popleft().synchronize()
        if logging:
            now, tokens_per_second = clock.seconds, (step + 1 - first_step) * stream.step_tokens / max(1e-9, clock.seconds - (saved or {"seconds": 0.0})["seconds"])
            line = f"step:{step + 1}/{steps} train_loss:{loss.item():.4f} train_time:{1000 * now:.0f}ms step_avg:{1000 * now / (step + 1):.2f}ms"
            log.line(line, console=not log.terminal)
            log.progress(f"{line} {tokens_per_second:,.0f} tokens/s, {(steps - step - 1) * now / (step + 1):.0f} s left")
            log.metrics("train", {
                "step": step + 1, "train_time_s": now, "train_loss": loss.item(), "tokens_per_s": tokens_per_second,
                "epoch": stream.epoch(step), "learning_rate_factor": schedules.learning_rate_factor(step, config.schedule),
            })  # fmt: skip
        if stream.epoch(step + 1) > stream.epoch(step):
            log.line(f"step:{step + 1}/{steps} epoch {stream.epoch(step + 1)} of the training data begins")

    # ---- the result ----------------------------------------------------------------------------------------------
    clock.stop()
    assert validation is not None
    if world.rank == 0:
        checkpoint.save(folder / "checkpoint.pt", run_state(steps))
    if device.type == "cuda":
        log.line(f"peak memory: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    active = schedules.active_experts(steps, config.schedule, config.model.experts)
    log.line(f"least used expert: {least_share(validation.pick_counts, active):.2f} of an even share of the validation tokens")
    log.line(
        f"result: val_loss {validation.loss:.4f} over {validation.tokens} tokens after {steps} steps, "
        f"{clock.seconds:.1f} s of training, seed {run.seed}, resumed {times_resumed} times, {causal} ({folder})"
    )


def choose_folder(run: configs.RunConfig, name: str) -> Path:
    """The folder of --run.out; by default a new one under runs/, or, to resume, the newest of that name."""
    if run.out:
        return Path(run.out)
    if not run.resume:
        return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    earlier = sorted(Path("runs").glob(f"{name}-2*/checkpoint.pt"))
    if not earlier:
        raise configs.ConfigError(f"there is no run of {name} under runs/ to resume: name its folder with --run.out")
    return earlier[-1].parent


def resumed_config(given: configs.Config, saved: configs.Config) -> configs.Config:
    """The saved run's configuration, with the length fixed then; raises ConfigError if other options were given now."""
    asked = given.with_steps(saved.schedule.steps)
    for group in ("model", "schedule", "optim", "data"):
        for option, value in dataclasses.asdict(getattr(saved, group)).items():
            if getattr(getattr(asked, group), option) != value:
                raise configs.ConfigError(
                    f"{group}.{option} is {getattr(getattr(asked, group), option)} now and was {value} when the run was saved"
                )
    return dataclasses.replace(saved, run=dataclasses.replace(given.run, steps=saved.run.steps, seconds=None))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    return max([d for d in range(1, number + 1) if number % d == 0 and d <= limit], default=1)


def to_host(value: Any) -> Any:
    """A copy of nested state with its tensors in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    return [to_host(item) for item in value] if isinstance(value, list) else value


def steps_for(seconds: float, train_step: Any, config: configs.Config, device: torch.device) -> int:
    """How many steps fit into `seconds`, by the median time of steps spread over the schedule."""
    times = []
    for step in torch.linspace(0, config.schedule.steps - 1, 24).long().tolist():
        clock = TrainingClock(device)
        clock.start()
        train_step(step, schedules.gumbel_noise(step, config.schedule), check_finite=device.type == "cpu")
        clock.stop()
        times.append(clock.seconds)
    return max(1, round(seconds / sorted(times)[len(times) // 2]))


def toggle_profiler(profiler: Any, path: Path) -> Any:
    """Starts a profiler, or stops the one given and writes its trace."""
    if profiler is None:
        profiler = torch.profiler.profile()
        profiler.start()
        return profiler
    profiler.stop()
    profiler.export_chrome_trace(str(path))
    return None


if __name__ == "__main__":
    try:
        arguments = configs.parse(sys.argv[1:], default_preset="record" if torch.cuda.is_available() else "nano")
        this_world = start()
        main(arguments, this_world)
        dist.destroy_process_group()
    except (configs.ConfigError, DataError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
