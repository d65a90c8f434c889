"""What a run leaves behind: its source first, one JSON object a line, and after a resume one unbroken record."""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import switch_bank
from switch_bank import run_log
from switch_bank.config import ConfigError, RunConfig, from_dict, presets

PACKAGE = Path(switch_bank.__file__).parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, where runs/ will be."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_source_begins_with_the_trainer_and_holds_every_file_of_the_package_whole() -> None:
    source, trainer = run_log.source(), (PACKAGE.parent / "train_switch_bank.py").read_text(encoding="utf-8")
    assert source.startswith("===== train_switch_bank.py\n" + trainer)
    modules = [file for file in sorted(PACKAGE.rglob("*")) if file.is_file() and file.suffix != ".pyc"]
    assert {module.suffix for module in modules} == {".py", ".cpp", ".h", ".css", ".js"}, "run_log.SUFFIXES"
    for module in modules:
        name = module.relative_to(PACKAGE.parent).as_posix()
        assert f"===== {name}\n{module.read_text(encoding='utf-8')}" in source
    titles = [line for line in source.splitlines() if line.startswith("===== ")]
    assert len(titles) == len(set(titles)) == len(modules) + 1


def test_every_file_of_the_source_has_its_checksum() -> None:
    lines = run_log.source_checksums().splitlines()
    assert len(lines) == run_log.source().count("\n===== ") + 1
    for line in lines:
        word, name, kind, sha256 = line.split()
        assert (word, kind) == ("source", "sha256")
        assert hashlib.sha256((PACKAGE.parent / name).read_bytes()).hexdigest() == sha256


def test_the_environment_names_versions_and_hardware() -> None:
    lines = run_log.environment(torch.device("cpu"), 2).splitlines()
    assert lines[0].startswith("python 3.")
    assert f"torch {torch.__version__}" in lines and f"threads {torch.get_num_threads()}" in lines
    assert any(line.startswith(f"processes 2 on {os.cpu_count()} CPU cores (") for line in lines)
    assert not any("cuda" in line for line in lines if not line.startswith(("torch", "triton")))


def test_lines_and_metrics_are_in_their_files_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "run"
    log = run_log.RunLog(folder, is_first=True)
    log.line("source\nof the run äöü", console=False)
    log.line("step:0/10 val_loss:9.1")
    log.metrics("val", {"step": 0, "val_loss": 9.1, "val_tokens": 1000})
    log.metrics("train", {"step": 1, "train_loss": 8.5})
    log.progress("only for a terminal")
    assert (folder / "log.txt").read_text(encoding="utf-8") == "source\nof the run äöü\nstep:0/10 val_loss:9.1\n"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"kind": "val", "step": 0, "val_loss": 9.1, "val_tokens": 1000},
        {"kind": "train", "step": 1, "train_loss": 8.5},
    ]
    assert capsys.readouterr().out == "step:0/10 val_loss:9.1\n"


def test_all_processes_but_the_first_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = run_log.RunLog(tmp_path / "run", is_first=False)
    log.line("nothing")
    log.metrics("train", {"step": 1})
    log.progress("nothing")
    assert log.sizes() == {} and not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_new_log_is_never_written_over_another_one(tmp_path: Path) -> None:
    run_log.RunLog(tmp_path, is_first=True).line("the first run")
    with pytest.raises(ConfigError, match=f"^{tmp_path} holds a run already: give --run.resume or another --run.out$"):
        run_log.RunLog(tmp_path, is_first=True)
    assert (tmp_path / "log.txt").read_text() == "the first run\n"


def test_a_resumed_run_cuts_back_to_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    log = run_log.RunLog(tmp_path, is_first=True)
    for step in range(3):
        log.line(f"step {step} äöü")
        log.metrics("train", {"step": step})
        if step == 1:
            sizes = log.sizes()
    log.line("half a li")
    assert sizes == {
        "log.txt": 2 * len("step 0 äöü\n".encode()),
        "metrics.jsonl": 2 * len('{"kind": "train", "step": 0}\n'),
    }
    del log  # its process ends
    again, before = run_log.RunLog(tmp_path, is_first=True, mode="a"), (tmp_path / "log.txt").read_bytes()
    again.line("resumed")  # which may be refused still
    assert (tmp_path / "log.txt").read_bytes() == before
    again.cut_back(sizes)
    assert again.sizes() == sizes | {"log.txt": sizes["log.txt"] + len("resumed\n")}
    for step in range(2, 4):
        again.line(f"step {step} äöü")
        again.metrics("train", {"step": step})
    steps = [f"step {step} äöü" for step in range(4)]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == [*steps[:2], "resumed", *steps[2:]]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"log.txt": 2}, {"log.txt": 10**9, "metrics.jsonl": 0}, {"log.txt": 2, "metrics.jsonl": 10**9},
        {"log.txt": -1, "metrics.jsonl": 0}, {"log.txt": "2", "metrics.jsonl": 0}, {"log.txt": None, "../other.txt": 0},
    ],
)  # fmt: skip
def test_a_log_that_does_not_reach_to_the_checkpoint_is_refused_and_stays_as_it_is(
    tmp_path: Path, sizes: dict[str, Any]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("of somebody else")
    log = run_log.RunLog(tmp_path / "run", is_first=True)
    log.line("one\ntwo")
    log.metrics("train", {"step": 1})
    before = log.sizes()
    with pytest.raises(
        ConfigError, match=r"bytes and had .* at the checkpoint: it is not whole; rename checkpoint.pt.previous"
    ):
        log.cut_back(sizes)
    assert log.sizes() == before and other.read_text() == "of somebody else"


def test_a_log_begun_anew_holds_nothing_of_the_one_before(tmp_path: Path) -> None:
    log = run_log.RunLog(tmp_path, is_first=True)
    log.line("a run that died before its first checkpoint")
    log.metrics("train", {"step": 1})
    del log
    run_log.RunLog(tmp_path, is_first=True, mode="w").line("anew")
    assert (tmp_path / "log.txt").read_text() == "anew\n" and (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_log_that_a_run_is_writing_is_refused_and_stays_as_it_is(tmp_path: Path, mode: Literal["a", "w"]) -> None:
    log = run_log.RunLog(tmp_path, is_first=True)
    log.line("the first run")
    with pytest.raises(ConfigError, match=f"^another run is writing to {tmp_path}: wait for its end or give another"):
        run_log.RunLog(tmp_path, is_first=True, mode=mode)
    assert (tmp_path / "log.txt").read_text() == "the first run\n"
    del log
    again = run_log.RunLog(tmp_path, is_first=True, mode="a")
    again.cut_back(again.sizes())
    again.line("goes on")
    assert (tmp_path / "log.txt").read_text() == "the first run\ngoes on\n"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "run",
        tmp_path / "loop",
        Path("/proc/1/run"),
        Path("/sys/run"),
    ):
        with pytest.raises(ConfigError, match=f"^{folder} cannot be written, .*: give another --run.out$"):
            run_log.RunLog(folder, is_first=True)


def test_a_full_disk_is_named_and_what_was_written_before_stays(tmp_path: Path) -> None:
    log = run_log.RunLog(tmp_path, is_first=True)
    log.line("before")
    free, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        message = (
            "cannot be written, File too large: what was saved before it stays; mend that and go on with --run.resume"
        )
        with pytest.raises(OSError, match=f"^{tmp_path / 'log.txt'} {message}$"):
            log.line("a line that does not fit any more")
        with pytest.raises(OSError, match=f"^{tmp_path / 'metrics.jsonl'} {message}$"):
            log.metrics("train", {"step": 1, "train_loss": 8.5})
        with pytest.raises(OSError, match=f"^{tmp_path / 'config.json'} {message}$"):
            run_log.write_config(tmp_path, presets["nano"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    assert (tmp_path / "log.txt").read_text() == "before\na line that d"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_terminal_that_goes_away_does_not_end_a_run(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from switch_bank.run_log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), is_first=True)\n"
        "for word in ('one', 'two', 'three'): log.line(word)\n"
    )
    with open("/dev/full", "wb") as full:
        run = [sys.executable, "-c", program, str(tmp_path / "run")]
        result = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, cwd=PACKAGE.parent)
    assert (result.returncode, result.stderr) == (0, "")
    one, note, *others = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert one == "one" and "No space left on device" in note and others == ["two", "three"]


def test_names_that_utf_8_has_no_bytes_for_are_written_as_they_are_shown(tmp_path: Path) -> None:
    run_log.RunLog(tmp_path, is_first=True).line("folder: \udcff", console=False)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "folder: \\udcff\n"


def test_the_configuration_is_written_as_it_is(tmp_path: Path) -> None:
    for config in presets.values():
        config = config.with_steps(123)
        run_log.write_config(tmp_path, config)
        assert from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    run_log.write_config(tmp_path, presets["record"])
    assert math.isclose(json.loads((tmp_path / "config.json").read_text())["optim"]["head_lr"], 1 / 320)


# --- The folder of a run


def test_a_run_gets_a_new_folder_by_name_and_time_or_the_one_it_asks_for(here: Path) -> None:
    folder = run_log.choose_folder(RunConfig(), "nano")
    assert folder.parent == Path("runs") and folder.name.startswith("nano-2") and not folder.exists()
    assert run_log.choose_folder(RunConfig(out="somewhere/else"), "nano") == Path("somewhere/else")
    (here / "empty").mkdir()
    assert run_log.choose_folder(RunConfig(out="empty"), "nano") == Path("empty")


def test_a_folder_that_holds_a_run_is_refused_but_to_resume(here: Path) -> None:
    run_log.RunLog(here / "mine", is_first=True)
    with pytest.raises(ConfigError, match="^mine holds a run already, which has saved no state: give another"):
        run_log.choose_folder(RunConfig(out="mine"), "nano")
    (here / "mine" / "checkpoint.pt").touch()
    with pytest.raises(ConfigError, match="^mine holds a run already: give --run.resume or another --run.out$"):
        run_log.choose_folder(RunConfig(out="mine"), "nano")
    assert run_log.choose_folder(RunConfig(out="mine", resume=True), "nano") == Path("mine")


def test_to_resume_finds_the_newest_run_of_that_name(here: Path) -> None:
    resume = RunConfig(resume=True)
    with pytest.raises(
        ConfigError, match="there is no run of nano under runs/ to resume: name its folder with --run.out"
    ):
        run_log.choose_folder(resume, "nano")
    for name in (
        "nano-20250102-090000",
        "nano-20250101-230000",
        "nano-NOT-CAUSAL-20260101-000000",
        "small-20270101-000000",
    ):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").touch()
    (here / "runs" / "nano-20250103-000000").mkdir()  # was killed before its first checkpoint
    assert run_log.choose_folder(resume, "nano") == Path("runs/nano-20250102-090000")
    assert run_log.choose_folder(resume, "nano-NOT-CAUSAL").name == "nano-NOT-CAUSAL-20260101-000000"
