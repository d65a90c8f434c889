"""What a run asks of the audit, and what a user asks: `python -m switch_bank audit`."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from switch_bank import audit
from switch_bank.causality import Finding
from switch_bank.config import Config, presets
from switch_bank.model import decode, gpt
from switch_bank.model.gpt import Past, SwitchBankGPT
from switch_bank.ops.attention import choose_backend
from switch_bank.schedules import StepState, step_state
from tests.runs import ROOT

ConfigOf = Callable[..., Config]

TINY = [
    "nano", "--model.vocab-size", "97", "--model.layers", "2", "--model.width", "32", "--model.heads", "2",
    "--model.experts", "4", "--model.expert-width", "16", "--model.value-embeddings", "1", "--model.window", "128",
    "--data.val-slice-tokens", "256", "--run.tokens-per-forward", "1024", "--run.no-compile",
]  # fmt: skip


def findings_of(config: Config, whole: bool = False, slices: int = 4, tokens: int = 256) -> list[Finding]:
    """As a run asks for them before step 0, or after its last one if `whole`."""
    torch.manual_seed(0)
    model = SwitchBankGPT(config.model).eval()
    state = step_state(config.schedule.steps, config, "cpu")
    with audit.random_parameters(model, 0):
        return audit.findings(model, state, slices, tokens, whole=whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(dtype="bfloat16"),
        dict(dtype="bfloat16", forward_ema=True, top_k=2, score="sigmoid", adapter="lora"),
        dict(attention_backend="flex", layers=1),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_causal_model_passes_all_checks_exactly_and_with_the_kernels_of_its_run(
    config_of: ConfigOf, options: dict[str, Any]
) -> None:
    config = config_of(**options)
    findings = findings_of(config, whole=True)
    real = f"{config.model.dtype} as trained"
    paths = {"suffix": ["float64 reference", real], "gradient": ["float64 reference"]}
    paths |= {"decode": ["float64 reference", real], "packing": ["float64 reference", real]}
    assert [finding.name for finding in findings] == [f"{c}, {path}" for c in paths for path in paths[c]]
    assert all(finding.passed for finding in findings)
    assert audit.verdict(findings).startswith("causal: yes\n  suffix, float64 reference: passed: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, dict(top_k=2), dict(score="sigmoid", forward_ema=True)], ids=str)
def test_the_leak_shows_on_either_path(config_of: ConfigOf, options: dict[str, Any], dtype: str) -> None:
    findings = findings_of(config_of(reverse_ema="leaky", dtype=dtype, **options))
    assert not any(finding.passed for finding in findings) and len(findings) == 3
    assert audit.verdict(findings).startswith("NOT CAUSAL\n  suffix, float64 reference: FAILED: ")


def failed_on_both_paths(config: Config) -> set[str]:
    """The checks that fail exactly and as trained."""
    names = [finding.name.split(",")[0] for finding in findings_of(config, whole=True) if not finding.passed]
    return {name for name in names if names.count(name) == 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_shows_the_leak_on_both_paths(config_of: ConfigOf, dtype: str) -> None:
    assert failed_on_both_paths(config_of(reverse_ema="leaky", dtype=dtype)) == {"suffix", "decode"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_that_ignores_documents_is_found_on_both_paths(
    config_of: ConfigOf, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_mask = gpt.build_mask
    monkeypatch.setattr(
        gpt, "build_mask", lambda backend, document, window: build_mask(backend, torch.zeros_like(document), window)
    )
    # One expert: no token is sent elsewhere, and the logits alone must tell.
    assert failed_on_both_paths(config_of(dtype=dtype, experts=1)) == {"decode", "packing"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_that_sends_tokens_elsewhere_is_found_on_both_paths(
    config_of: ConfigOf, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def biased(*arguments: Any) -> Past:
        past = nothing_read(*arguments)
        bias = torch.tensor([100.0, 0, 0, 0])  # on the choice alone: gates, and so logits on given routes, stay
        routers = [router._replace(balance_bias=bias) for router in past.weights.routers or []]
        return replace(past, weights=past.weights._replace(routers=routers))

    nothing_read = decode.nothing_read
    monkeypatch.setattr(decode, "nothing_read", biased)
    assert failed_on_both_paths(config_of(dtype=dtype, balance="bias")) == {"decode"}


def test_a_decoder_that_forgets_too_early_is_found_on_both_paths_however_long_the_window_is(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_read = decode.nothing_read
    monkeypatch.setattr(decode, "nothing_read", lambda model, window, n: nothing_read(model, window - 2, n))
    assert failed_on_both_paths(config_of(window=4096)) == {"decode"}


@pytest.mark.slow
def test_the_nano_preset_passes_before_its_first_step_and_would_not_with_the_leak() -> None:
    nano = presets["nano"]
    for kind, passes in (("leaky", False), ("causal", True)):
        config = replace(nano, model=replace(nano.model, reverse_ema=kind))
        assert [finding.passed for finding in findings_of(config)] == [passes] * 3


def test_no_graph_is_compiled_by_the_audit_at_the_end_of_a_run(config_of: ConfigOf) -> None:
    # The real path takes the shape, and the window as a tensor, that validation takes.
    torch._dynamo.reset()
    model = SwitchBankGPT(config_of(dtype="float32").model).eval()
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for part in ("begin", "attend_and_route", "losses"):
        setattr(model, part, torch.compile(getattr(model, part), backend=counting, fullgraph=True, dynamic=False))
    state = step_state(presets["nano"].schedule.steps, config_of(), "cpu")
    with audit.random_parameters(model, 0):
        audit.findings(model, state, 4, 256)
        before = len(graphs)
        audit.findings(model, state, 4, 256, whole=True)
    assert before > 0 and len(graphs) == before


def test_random_values_reach_every_parameter_and_go_without_a_trace(config_of: ConfigOf) -> None:
    model = SwitchBankGPT(config_of(adapter="lora", always_on_expert=True).model)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = []
    for seed in (1, 1, 2):
        with audit.random_parameters(model, seed):
            drawn.append([parameter.detach().clone() for parameter in model.parameters()])
            for name, parameter in model.named_parameters():
                assert (parameter != own[name]).float().mean() > 0.9, name
        assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(one, two) for one, two in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(drawn[0], drawn[2], strict=True))
    with pytest.raises(KeyboardInterrupt), audit.random_parameters(model, 0):
        raise KeyboardInterrupt
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_was_tried_and_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([*TINY, "--model.dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "nano: " in said and "with random values, on cpu" in said
    assert "bfloat16 as trained: reference attention, not compiled, 4 slices of 256 tokens\n" in said
    assert "\ncausal: yes\n" in said and said.count("passed: ") == 7


def test_on_a_cpu_fewer_and_shorter_slices_go_through_than_a_preset_for_gpus_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def findings(model: SwitchBankGPT, state: StepState, slices: int, tokens: int, *rest: Any, **named: Any) -> list:
        shapes.append((slices, tokens))
        return []

    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(audit, "findings", findings)
    for together in ("16384", "17408"):
        assert audit.main([*TINY, "--data.val-slice-tokens", "1024", "--run.tokens-per-forward", together]) == 0
    assert shapes == [(16, 1024), (4, 512)]
    said = capsys.readouterr().out
    assert said.count("this is a CPU") == 1 and ", 4 slices of 512 tokens, not 17 of 1024: this is a CPU\n" in said


def test_a_check_that_cannot_be_made_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any, **named: Any) -> list[Finding]:
        raise torch.OutOfMemoryError("out of memory:\nno room for 1 GiB")

    monkeypatch.setattr(audit, "findings", no_memory)
    assert audit.main(TINY) == 2
    said = capsys.readouterr()
    assert "NOT CAUSAL" not in said.out
    assert said.err == "error: OutOfMemoryError in a check: out of memory: no room for 1 GiB\n"


def test_the_command_ends_with_1_where_the_preset_leaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([*TINY, "--model.reverse-ema", "leaky"]) == 1
    said = capsys.readouterr().out
    assert "\nNOT CAUSAL\n" in said and "token 32 reads up to 191 ahead" in said


def test_a_run_is_audited_as_it_was_trained(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([str(finished[0])]) == 0
    said = capsys.readouterr().out
    attention = choose_backend("auto", torch.device("cpu"), torch.float32, 16)
    assert "as trained, on cpu" in said
    assert f"float32 as trained: {attention} attention, not compiled, 1 slices of 512" in said
    assert "\ncausal: yes\n" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["namo"], "'namo' is neither a run's folder nor a preset: presets are record, small, nano, lora_moe"),
        (["tests"], "tests holds no model"),
        (["tests", "--model.layers", "2"], "--model.layers is for presets: the run in tests has its own configuration"),
        (["nano", "--model.layers", "1000"], "model.layers is 1000: it must be in 1..512"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert audit.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1


def test_a_damaged_checkpoint_is_bad_input(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((finished[0] / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert audit.main([str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [(["--help"], "RUN|PRESET"), (["nano", "--help"], "--model.layers")])
def test_help_tells_what_can_be_asked_and_of_a_preset_its_options(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        audit.main(arguments)
    assert exit_.value.code == 0 and says in capsys.readouterr().out


def test_the_command_line_without_a_subject_in_front_or_with_an_unknown_option_ends_with_2() -> None:
    for arguments in ([], ["--model.layers", "2", "nano"], ["nano", "--model.depth", "3"]):
        command = [sys.executable, "-m", "switch_bank", "audit", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 2 and result.stderr and "Traceback" not in result.stderr
