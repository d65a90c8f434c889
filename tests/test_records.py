"""A log is believed as far as it agrees: with itself, with the files beside it, with its data, and with a second run
of its own source. Each kind of tampering is done here to the log of a real run."""

import email
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from switch_bank.data import write_shard
from switch_bank.read_log import Log
from switch_bank.records import main
from switch_bank.replay import disagreements
from tests.test_train import EOD, ROOT, byte_documents, tiny, train

OPTIONS = ["--run.steps", "12", "--run.val-at-steps", "4", "8", "--run.checkpoint-every", "5"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(Path(email.__file__).parent.glob("*.py"))
    write_shard(folder / "train_000000.bin", byte_documents(files[1::2], EOD))
    write_shard(folder / "val_000000.bin", byte_documents(files[0::2], EOD))
    return folder


@pytest.fixture(scope="module")
def honest(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 12 steps; the checkpoint before its last one is of step 10."""
    out = tmp_path_factory.mktemp("runs") / "honest"
    result = train([*tiny(shards), *OPTIONS], out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "copy"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, list[str]]]:
    """verify(folder): the exit code, and the lines on what does not agree."""

    def run(folder: Path) -> tuple[int, list[str]]:
        code = main(["verify", str(folder / "log.txt")])
        lines = capsys.readouterr().out.splitlines()
        return code, [line.removeprefix("does not agree: ") for line in lines if line.startswith("does not agree: ")]

    return run


def change(file: Path, pattern: str, new: str, count: int = 1) -> None:
    """Replaces the only place in the file that matches."""
    text, found = re.subn(pattern, new, file.read_text(), flags=re.MULTILINE)
    assert found == count, f"{pattern} is there {found} times"
    file.write_text(text)


def test_an_honest_log_agrees(honest, capsys):
    assert main(["verify", str(honest / "log.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("files, the same as this package")
    assert lines[1].startswith("result: val_loss ")
    assert lines[2:] == [f"{honest}/log.txt: all agrees"]


def test_the_log_of_a_resumed_run_agrees(copy, shards, verify):
    os.replace(copy / "checkpoint.pt.previous", copy / "checkpoint.pt")
    now = ["--run.resume", "--run.log-every", "5", "--run.val-at-steps", "11"]
    result = train([*tiny(shards), *OPTIONS, *now], copy)
    assert result.returncode == 0, result.stderr
    assert "resumed 1 times" in result.stdout
    assert verify(copy) == (0, [])
    change(copy / "log.txt", "resumed at step 10, resume number 1", "resumed at step 10, resume number 2")
    change(copy / "log.txt", r"(resume number 2\nconfig .*'muon_lr': )0.025", r"\g<1>0.05")
    start, resume = (copy / "log.txt").read_text().split("\nresumed at step ")
    resume = resume.replace("'seed': 0", "'seed': 7").replace("seed 0", "seed 7")
    (copy / "log.txt").write_text(f"{start}\nresumed at step {resume}")
    (copy / "metrics.jsonl").unlink()
    change(copy / "log.txt", r"^step:11/12 val_loss.*\n", "")
    assert verify(copy)[1] == [
        "the config lines at the start and at step 10: optim.muon_lr is 0.025 and 0.05, run.seed is 0 and 7",
        "no validation line at step 11",
        "there are 2 config lines, one for each start, and resumes with the numbers [2]",
    ]


def test_a_resume_with_another_source_is_named(copy, verify):
    with (copy / "log.txt").open("a") as file:
        file.write("source switch_bank/data.py sha256 0123\n")
    assert verify(copy)[1] == ["source switch_bank/data.py: the log gives the checksum 0123 and holds another text"]


# --- Tampering with the log: what is replaced, by what, and what verify says

TAMPERING = {
    "the loss of the result": (
        r"^(result: val_loss )[\d.]+",
        r"\g<1>2.8960",
        "the result: val_loss is 2.8960, by the last validation it is ",
    ),
    "the tokens of the result": (
        "over 20001 tokens",
        "over 10485760 tokens",
        "the result: tokens is 10485760, by the config line it is 20001",
    ),
    "the steps of the result": (
        "after 12 steps",
        "after 11 steps",
        "the result: steps is 11, by the last validation it is 12",
    ),
    "the seconds of the result": (
        r"[\d.]+ s of training",
        "99.9 s of training",
        "the result: 99.9 s of training, by the last validation ",
    ),
    "the seed of the result": (
        "seed 0, resumed",
        "seed 1, resumed",
        "the result: seed is 1, by the config line it is 0",
    ),
    "a resume left out": (
        "resumed 0 times",
        "resumed 1 times",
        "the result: resumed is 1, by the number of resumes it is 0",
    ),
    "the verdict of the result": (
        "(resumed 0 times), causal: yes",
        r"\1, NOT CAUSAL",
        "the result: verdict is NOT CAUSAL, by the checks of causality it is causal: yes",
    ),
    "a result that is not the checks'": (
        r"\A((?s:.*?)\n)causal: yes$",  # the first of two
        r"\1NOT CAUSAL",
        "the result: verdict is causal: yes, by the checks of causality it is NOT CAUSAL",
    ),
    "a verdict over other findings": (
        "^  packing, float64 reference: passed",
        "  packing, float64 reference: FAILED",
        "the verdict 'causal: yes' stands over 6 of 7 checks passed",
    ),
    "no result": (r"^result: .*\n", "", "0 result lines, 3 validations: there must be a whole one, of the last"),
    "a validation": (r"^(step:8/12 val_loss:)[\d.]+", r"\g<1>2.8960", "the log has step 8, val_loss 2.8960 at "),
    "a training loss": (r"^(step:3/12 train_loss:)[\d.]+", r"\g<1>5.1234", "the log has step 3, train_loss 5.1234 at "),
    "a dropped training line": (r"^step:6/12 train.*\n", "", "no training line at step 6"),
    "a dropped validation": (r"^step:4/12 val.*\n", "", "no validation line at step 4"),
    "an added line": (r"^(step:6/12 train.*\n)", r"\1\1", "step 6 has two training lines"),
    "lines in another order": (r"^(step:5/12 .*\n)(step:6/12 .*\n)", r"\2\1", "step 5 comes after step 6"),
    "lines that were not asked for": (
        "^(config .*'log_every': )1",
        r"\g<1>5",
        "the training line of step 2 is one that this run does not write",
    ),
    "half a line": ("^(step:7/12 train_loss:.*) step_avg.*", r"\1", "not a whole step line: 'step:7/12 train_loss:"),
    "another length": ("^step:9/12 train", "step:9/10 train", "step 9 is one of 10, and the config line has 12"),
    "an average": (r"^(step:9/12 .*step_avg:)[\d.]+", r"\g<1>1.00", "step 9: step_avg is 1.0 ms, train_time by steps "),
    "a time": (r"^(step:9/12 .*train_time:)\d+", r"\g<1>9", "step 9 is at 9 ms, a line after "),
    "a line of source": (
        "^MAGIC = 20240520$",
        "MAGIC = 20240521",
        "source switch_bank/data.py: the log gives the checksum ",
    ),
    "no checksum": (
        r"^source switch_bank/data.py sha256 .*\n",
        "",
        "source switch_bank/data.py: the log gives no checksum",
    ),
    "a data checksum": (
        r"^(data .*/val_000000.bin .* sha256 )\w+",
        r"\g<1>0123",
        "val_000000.bin: the log gives the checksum 0123",
    ),
    "a number of data tokens": (
        r"(val_000000.bin tokens )\d+",
        r"\g<1>99",
        "val_000000.bin: the log says 99 tokens and the file holds another",
    ),
    "all data": (r"^(data .*\n)+", "", "data: the log names no file"),
    "a row of the table": (
        "^(experts +)16,384",
        r"\g<1>1,024",
        "its rows add up to 43,146 and 29,514, its total is 58,506 and 29,514",
    ),
    "half a table": (r"^total .*\n", "", "the table of parameters is not whole"),
    "a graph compiled late": (
        "(graphs compiled .* after it: )0",
        r"\g<1>2",
        "2 graphs were compiled after step 0, where there must be none",
    ),
    "no count of graphs": (r"^graphs compiled.*\n", "", "no line says how many graphs were compiled after step 0"),
    "no check of the trained weights": (
        r"^the same of the trained weights:\ncausal: yes\n(  .*\n)+",
        "",
        "the log has no check of causality of the trained weights",
    ),
    "an option": ("^(config .*'seed': )0", r"\g<1>7", "the config line and config.json: run.seed is 7 and 0"),
    "half a config line": ("^(config .{100}).*", r"\1", "the config line cannot be read: SyntaxError: "),
    "no config line": (r"^config .*\n", "", "no config line comes before the first step line"),
    "an impossible option": (
        "^(config .*'heads': )2",
        r"\g<1>3",
        "model.width is 32: it must be a multiple of model.heads",
    ),
    "another name": (
        r"(===== run\nname: )nano",
        r"\1record",
        "'name: record' is not the name 'nano', as the config line",
    ),
    "a leak that is not owned up to": (
        "^(config .*'reverse_ema': )'causal'",
        r"\1'leaky'",
        "is not the name 'nano-NOT-CAUSAL'",
    ),
    "another step's tokens": (
        "^12 steps of 4096 tokens",
        "12 steps of 8192 tokens",
        "there is no line '12 steps of 4096 tokens, N an epoch, seed 0'",
    ),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_what_was_changed_in_a_log_is_named(copy, verify, what):
    pattern, new, named = TAMPERING[what]
    change(copy / "log.txt", pattern, new)
    code, wrong = verify(copy)
    assert code == 1
    assert any(named in line for line in wrong), wrong


def test_a_log_without_any_check_of_causality_is_named(copy, verify):
    change(copy / "log.txt", r"^causal: yes\n(  .*\n)+", "", count=2)
    assert "the log has no check of causality" in verify(copy)[1]


@pytest.mark.parametrize("what", ["a dropped training line", "a dropped validation", "lines in another order"])
def test_a_missing_line_is_named_without_the_files_beside_the_log_too(copy, verify, what, capsys):
    for beside in ("config.json", "metrics.jsonl"):
        (copy / beside).unlink()
    assert main(["verify", str(copy / "log.txt")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "was not compared" in line] == [
        "config.json",
        "metrics.jsonl",
    ]
    test_what_was_changed_in_a_log_is_named(copy, verify, what)


def test_a_validation_left_out_at_its_time_is_named(copy, verify):
    """Made from a run without one: the configuration asks for a reading at a time that two training lines pass."""
    times = re.findall(r"^step:[56]/12 train_loss.* train_time:(\d+)ms", (copy / "log.txt").read_text(), re.MULTILINE)
    first, second = map(int, times)
    assert first < second
    asked = (first - 1) / 1000
    change(copy / "log.txt", r"'val_at_seconds': \([^)]*\)", f"'val_at_seconds': ({asked},)")
    (copy / "config.json").unlink()
    assert verify(copy)[1] == [f"the validation line of {asked:g} s is missing"]


# --- Tampering with what lies beside it


def test_a_changed_byte_of_a_data_file_is_named_and_an_absent_file_is_no_fault(copy, shards, tmp_path, capsys):
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    change(copy / "log.txt", f"^data {shards}", f"data {data}", count=2)
    content = bytearray((data / "train_000000.bin").read_bytes())
    content[5000] ^= 1
    (data / "train_000000.bin").write_bytes(content)
    assert main(["verify", str(copy / "log.txt")]) == 1
    assert f"does not agree: data {data}/train_000000.bin: the log gives the checksum " in capsys.readouterr().out
    (data / "train_000000.bin").unlink()
    assert main(["verify", str(copy / "log.txt")]) == 0
    assert f"data: {data}/train_000000.bin is not here, its checksum was not compared" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs files that do not say how long they are")
def test_a_file_of_another_length_is_named_and_not_read(copy, verify):
    """Some files of /proc never end."""
    with (copy / "log.txt").open("a") as file:
        file.write("data /proc/version tokens 1 sha256 0123\n")
    assert verify(copy)[1] == ["data /proc/version: the log says 1 tokens and the file holds another number"]


def test_a_validation_that_was_read_twice_is_named(copy, verify):
    for file, line in (("log.txt", "^step:8/12 val.*\n"), ("metrics.jsonl", '^{"kind": "val", "step": 8,.*\n')):
        change(copy / file, f"({line})", r"\1\1")
    assert verify(copy)[1] == ["step 8 has 2 validation lines"]


def test_a_validation_of_other_tokens_is_named(copy, verify):
    change(copy / "metrics.jsonl", r'("step": 4, .*"val_tokens": )20001', r"\g<1>20000")
    assert verify(copy) == (1, ["the validation at step 4 read 20000 tokens, not 20001"])


def test_metrics_that_are_not_the_logs_are_named(copy, verify):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    at = next(at for at, record in enumerate(records) if (record["kind"], record["step"]) == ("train", 3))
    third = records[at]
    lines[at] = "half a li\n"
    (copy / "metrics.jsonl").write_text("".join([*lines, json.dumps(third | {"step": 13})]))
    loss = f"train_loss {third['train_loss']:.4f} at {1000 * third['train_time_s']:.0f} ms"
    assert verify(copy)[1] == [
        f"line {at + 1} of metrics.jsonl cannot be read",
        f"the log has step 3, {loss}, and metrics.jsonl has not",
        f"metrics.jsonl has step 13, {loss}, and the log has not",
    ]


def test_a_line_of_metrics_that_is_too_deep_is_named(copy, verify):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000)
    number = len((copy / "metrics.jsonl").read_text().splitlines())
    assert verify(copy)[1] == [f"line {number} of metrics.jsonl cannot be read"]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_neighbour_that_is_no_file_is_not_waited_for(copy, capsys, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert main(["verify", str(copy / "log.txt")]) == 0
    assert f"{name} is not beside the log and was not compared" in capsys.readouterr().out


def test_a_config_json_that_is_not_the_logs_is_named(copy, verify):
    change(copy / "config.json", r'"muon_lr": 0.025', '"muon_lr": 0.05')
    assert verify(copy)[1] == ["the config line and config.json: optim.muon_lr is 0.025 and 0.05"]


def test_a_source_that_is_not_this_packages_is_said_and_is_no_fault(copy, monkeypatch, capsys):
    files = {"train_switch_bank.py": "another", "switch_bank/later.py": ""}
    monkeypatch.setattr("switch_bank.run_log.source_files", lambda: files)
    assert main(["verify", str(copy / "log.txt")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "differs from this package in switch_bank/__init__.py, " in first
    assert "switch_bank/later.py" in first and first.endswith("train_switch_bank.py")


# --- What is no log, or must not be touched


def source_with(name: str) -> bytes:
    """A log whose source holds a file of that name."""
    return f"===== train_switch_bank.py\n\n===== {name}\nprint()\n\n===== run\n".encode()


@pytest.mark.parametrize("arguments", [["verify", "log.txt"], ["replay", "log.txt", "--steps", "1", "--yes"]])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"", "does not begin with the line '===== train_switch_bank.py'"),
        (b"step:1/2 train_loss:1.0000\n", "does not begin with the line '===== train_switch_bank.py'"),
        (b"\x93\xff\x00", "it is not UTF-8 text"),
        (b"===== train_switch_bank.py\nprint()\n", "no line '===== run' ends its source"),
        (source_with("../../x.py"), "'../../x.py' in its source is neither"),
        (source_with("switch_bank/../../x.py"), "'switch_bank/../../x.py' in its source is neither"),
        (source_with("/tmp/x.py"), "'/tmp/x.py' in its source is neither"),
        (source_with("switch_bank//x.py"), "'switch_bank//x.py' in its source is neither"),
        (source_with("switch_bank/x"), "'switch_bank/x' in its source is neither"),
        (source_with("x.py"), "'x.py' in its source is neither"),
        (source_with("train_switch_bank.py"), "its source holds 'train_switch_bank.py' twice"),
    ],
)
def test_what_is_no_log_or_leaves_its_folder_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, arguments, content, message
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "log.txt").write_bytes(content)
    before = sorted(tmp_path.parent.rglob("*"))
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(tmp_path.parent.rglob("*")) == before


# --- Replay


@pytest.fixture
def replay(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """replay(*options): the exit code of a replay of the copy, in an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # not the log's: the replay has to see to that

    def run(*options: str) -> int:
        return main(["replay", str(copy / "log.txt"), *options])

    return run


def test_the_first_losses_come_out_of_the_source_again(replay, copy, shards, tmp_path, capfd):
    shutil.move(shutil.copytree(shards, tmp_path / "data"), tmp_path / "moved data")
    moved = [part for split in ("train", "val") for part in (f"--data.{split}", f"{tmp_path}/moved data/{split}_*.bin")]
    assert replay("--steps", "5", "--yes", *moved) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2] == (
        "5 training and 1 validation losses compared: largest difference 0.0000, at step 1; "
        "tolerance 0: the same kind of CPU, versions and threads"
    )
    (folder,) = (tmp_path / "here" / "runs").iterdir()
    log = (copy / "log.txt").read_text()
    assert (folder / "run" / "log.txt").read_text().split("===== run\n")[0] == log.split("===== run\n")[0]
    assert (folder / "switch_bank" / "data.py").is_file()


def test_losses_that_the_source_does_not_give_are_caught(replay, copy, capfd):
    said = re.findall(r"^step:2/12 train_loss:([\d.]+)", (copy / "log.txt").read_text(), re.MULTILINE)[0]
    better = f"{float(said) - 0.0001:.4f}"
    change(copy / "log.txt", r"^(step:2/12 train_loss:)[\d.]+", rf"\g<1>{better}")
    assert replay("--steps", "2", "--yes") == 1
    out = capfd.readouterr().out
    assert "largest difference 0.0001, at step 2" in out
    assert f"does not agree: train_loss of step 2: {better} in the log, {said} in the replay" in out


def test_other_data_is_caught(replay, shards, capfd):
    assert replay("--steps", "1", "--yes", "--data.train", f"{shards}/val_*.bin") == 1
    assert "does not agree: the data that was read does not have the checksums of the log" in capfd.readouterr().out
    (folder,) = Path("runs").iterdir()
    assert "\nresult: " not in (folder / "run" / "log.txt").read_text()  # it went no further than it had to


def test_a_replay_of_another_source_than_the_logs_is_caught(replay, copy, monkeypatch, capfd):
    """Python is told not to look beside the program for its modules, and finds those of this package."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    change(copy / "log.txt", "^MAGIC = 20240520$", "MAGIC = 20240520  # nothing else")
    assert replay("--steps", "1", "--yes") == 1
    assert "does not agree: the source that ran is not the log's" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("here", "there", "why"),
    [
        ("torch 2.13.0", "torch 2.12.0", "the log's run had torch 2.12.0"),
        ("threads 1", "threads 8", "the log's run had threads 8"),
        ("processes 1 on 2 CPU cores (A)", "processes 1 on 2 CPU cores (B)", "the log's run had processes 1 on 2"),
        ("cuda 13.0", "cuda 13.0", "a GPU does not give the same bits twice"),
    ],
)
def test_on_another_machine_and_on_gpus_losses_may_differ_by_a_tolerance_that_is_said(
    tmp_path, capsys, here, there, why
):
    log, again = (Log(tmp_path / "log.txt", {}, [line]) for line in (there, here))
    said = {("train", 1): "5.9506", ("val", 2): "5.8000"}
    assert list(disagreements(log, again, said, said | {("train", 1): "5.9106"})) == []
    assert f"largest difference 0.0400, at step 1; tolerance 0.05: {why}" in capsys.readouterr().out
    assert list(disagreements(log, again, said, said | {("val", 2): "5.8600"})) == [
        "val_loss of step 2: 5.8000 in the log, 5.8600 in the replay"
    ]


def test_a_source_that_does_not_run_is_told_with_its_error(replay, copy, capfd):
    change(copy / "log.txt", r"^MAGIC = 20240520$", "raise RuntimeError('half a module')")
    assert replay("--steps", "1", "--yes") == 1
    out = capfd.readouterr().out
    assert "not replayed: the run ended with exit code 1 before it reported step 1: RuntimeError: half a module" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1"], "this runs the code that is in "),
        (["--steps", "0", "--yes"], "--steps 0: the run in "),
        (["--steps", "13", "--yes"], "has 12 steps"),
        (["--steps", "1", "--yes", "--data.val", "nowhere/*"], "no file matches nowhere/*: say with --data.val where"),
    ],
)
def test_nothing_runs_and_nothing_is_written_without_yes_or_with_bad_options(replay, tmp_path, capfd, options, message):
    assert replay(*options) == 2
    out, error = capfd.readouterr()
    assert out == "" and message in error and error.count("\n") == 1
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.slow
def test_a_run_of_given_seconds_on_two_processes_is_replayed_in_the_length_that_it_got(
    shards, tmp_path, monkeypatch, capfd
):
    result = train([*tiny(shards), "--run.seconds", "2", "--run.val-at-seconds", "1"], tmp_path / "two", processes=2)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    assert main(["verify", str(tmp_path / "two" / "log.txt")]) == 0
    assert main(["replay", str(tmp_path / "two" / "log.txt"), "--steps", "4", "--yes"]) == 0
    assert "largest difference 0.0000, at step 1" in capfd.readouterr().out
