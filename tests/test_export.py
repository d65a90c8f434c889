"""Exporting a run: a real one, the folder made of it, and a small server that stands in for the hub."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from switch_bank import checkpoint
from switch_bank.config import Config, from_dict
from switch_bank.data import Shards
from switch_bank.export import find_tokenizer, load_model, main
from switch_bank.model.folder import ModelFolderError
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import step_state
from tests.hub import Hub
from tests.runs import EOD, ROOT, records, tiny, train

END = "<|endoftext|>"
FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of every byte and the end of a document, 257 tokens as the model has. It appends the end to a text,
    unless it is asked not to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, EOD)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def run(finished: tuple[Path, object], tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 50 steps that has its tokenizer; the checkpoint before its last one is of step 40."""
    out = Path(shutil.copytree(finished[0], tmp_path_factory.mktemp("runs") / "run äöü"))
    shutil.copy(tokenizer_file, out)
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main([str(run), str(out)]) == 0
    return out


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(*arguments): the one line that an export says before it ends with exit code 2."""

    def export(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        lines = output.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), output.err
        return lines[0]

    return export


def test_an_export_holds_four_files_and_leaves_nothing_beside_them(exported: Path) -> None:
    assert sorted(file.name for file in exported.iterdir()) == FILES
    assert [file.name for file in exported.parent.iterdir()] == ["model"]


def test_the_files_of_an_export_are_as_open_as_any_new_file(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in exported.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_the_exported_model_gives_the_logits_of_the_runs_to_the_bit(run: Path, exported: Path) -> None:
    saved = checkpoint.load(run / "checkpoint.pt")
    config = from_dict(saved["config"])
    plain = SwitchBankGPT(config.model).eval()
    plain.load_state_dict(saved["model"])
    tokens = torch.randint(257, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.logits(plain.trunk(tokens, step_state(50, config, "cpu"))[0])[..., :257]
    assert torch.equal(SwitchBankGPT.from_folder(exported).predict(tokens), expected)
    for folder in (run, exported):
        loaded, model = load_model(folder, "cpu")
        assert loaded == config and not model.training
        assert torch.equal(model.predict(tokens), expected)


def test_the_exported_tokenizer_is_the_runs_and_reads_special_tokens_as_text(run: Path, exported: Path) -> None:
    config, _ = load_model(exported, "cpu")
    text = f"def parse(räte):\n    return '{END}'\n"
    for folder in (run, exported):
        tokenizer = find_tokenizer(folder, config)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.token_to_id(END) == EOD and EOD not in ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_cards_numbers_are_the_runs(run: Path, exported: Path, shards: Path) -> None:
    card, last = card_of(exported), records(run, "val")[-1]
    assert f"| {last['val_loss']:.4f} nats a token over 20,001 tokens, after {last['train_time_s']:.1f} s" in card
    assert "| 50 of 50 steps of 4,096 tokens, seed 0 |" in card
    assert re.search(r"\| causal, .* \| yes \|", card) and "NOT CAUSAL" not in card
    weights = load_model(run, "cpu")[1].parameters()
    size = sum(weight.numel() for weight in weights)
    assert f"A model of {size:,} parameters: 2 layers of width 32, and 4 experts\n" in card
    for part in ("train", "val"):
        for path, tokens, sha256 in Shards.open(f"{shards}/{part}_*.bin", 257).summary():
            assert f"| {Path(path).name} | {tokens:,} | `{sha256}` |" in card
    assert str(shards) not in card


def test_the_cards_instructions_work(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    code = re.findall(r"```python\n(.*?)```", card_of(exported), re.DOTALL)[0]
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], 257)
    assert names["tokens"].shape[1] == 1 + len("The text so far")
    assert names["tokens"][0, 0] == EOD and EOD not in names["tokens"][0, 1:]
    assert EOD not in names["tokenizer"].encode(END, add_special_tokens=False).ids
    for name in ", ".join(re.findall(r"import (.*)", code)).split(", "):
        assert len(re.findall(rf"\b{name}\b", code)) > 1, f"{name} is imported and not used"


def test_weights_of_a_run_that_did_not_end_are_exported_as_such(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint.pt.previous").replace(tmp_path / "killed" / "checkpoint.pt")
    assert main([str(tmp_path / "killed"), str(tmp_path / "out")]) == 0
    assert "| 40 of 50 steps of 4,096 tokens, seed 0 |" in card_of(tmp_path / "out")
    assert "| not measured at this step |" in card_of(tmp_path / "out")
    config, model = load_model(tmp_path / "out", "cpu")
    assert model.trained_state == step_state(40, config, "cpu")


def test_a_leaky_models_card_says_not_causal(shards: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky"
    result = train([*tiny(shards), "--run.steps", "2", "--model.reverse-ema", "leaky"], leaky)
    assert result.returncode == 0, result.stderr
    shutil.copy(tokenizer_file, leaky)
    assert main([str(leaky), str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert "# SwitchBank nano, NOT CAUSAL\n" in card
    assert re.search(r"\| causal, .* \| NOT CAUSAL \|", card)
    log = leaky / "log.txt"
    log.write_text(log.read_text(encoding="utf-8").replace("NOT CAUSAL", "causal: yes"), encoding="utf-8")
    assert main([str(leaky), str(tmp_path / "whatever the log says")]) == 0
    assert card_of(tmp_path / "whatever the log says") == card


def test_a_model_that_failed_a_check_is_not_causal_whatever_the_others_said(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "failed")
    with open(tmp_path / "failed" / "log.txt", "a", encoding="utf-8") as log:
        log.write("NOT CAUSAL\n  suffix: FAILED: token 3 reads at least 1 ahead\n")
    assert main([str(tmp_path / "failed"), str(tmp_path / "out")]) == 0
    assert "# SwitchBank nano, NOT CAUSAL\n" in card_of(tmp_path / "out")


def test_a_run_that_names_its_data_again_when_it_is_resumed_has_each_file_once_on_its_card(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "resumed")
    log = tmp_path / "resumed" / "log.txt"
    data = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("data ")]
    assert len(data) == 3
    with open(log, "a", encoding="utf-8") as file:
        file.write("\n".join(data) + "\n")
    assert main([str(tmp_path / "resumed"), str(tmp_path / "out")]) == 0
    assert card_of(tmp_path / "out") == card_of(exported)


def test_a_log_without_a_verdict_makes_no_causal_card(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "unsaid")
    log = tmp_path / "unsaid" / "log.txt"
    source, _, rest = log.read_text(encoding="utf-8").partition("\n===== run\n")
    log.write_text(f"{source}\n===== run\n{rest.replace('causal: yes', '')}", encoding="utf-8")
    assert main([str(tmp_path / "unsaid"), str(tmp_path / "out")]) == 0
    assert re.search(r"\| causal, .* \| not said in its log \|", card_of(tmp_path / "out"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("checkpoint.pt", Path.unlink, "holds no model"),
        ("checkpoint.pt", cut, "checkpoint.pt is damaged"),
        ("log.txt", Path.unlink, "there is no file"),
        ("log.txt", lambda path: path.write_text("hello"), "log.txt is no log of a run"),
        ("metrics.jsonl", Path.unlink, "No such file or directory"),
        ("metrics.jsonl", lambda path: path.write_text('{"kind": "val", "st'), "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", lambda path: path.write_text('{"kind": "val", "step": 50}'), "line 1 is damaged"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer.json is no tokenizer"),
    ],
)
def test_a_missing_or_damaged_file_of_a_run_is_one_line_and_nothing_is_written(
    run: Path, tmp_path: Path, fails: Callable[..., str], file: str, damage: Callable, says: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt.previous").unlink()
    damage(tmp_path / "run" / file)
    line = fails(tmp_path / "run", tmp_path / "out")
    assert says in line and str(tmp_path / "run") in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_holds_files_is_never_written_into(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for out in (tmp_path / "taken", tmp_path / "file", run):
        assert f"{out} exists already: choose another folder" in fails(run, out)
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert main([str(run), str(tmp_path / "empty")]) == 0
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == FILES


def test_a_full_disk_leaves_no_half_of_an_export(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        line = fails(run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line
    assert not list(tmp_path.iterdir())


# --- tokenizers


def config_with(train: Path, vocab_size: int, eod_token: int) -> Config:
    return from_dict({"model": {"vocab_size": vocab_size, "eod_token": eod_token}, "data": {"train": str(train)}})


def test_a_folders_own_tokenizer_goes_before_the_one_beside_the_shards(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_file.read_text().replace(END, "<|end|>"))
    config = config_with(tokenizer_file.parent / "train_*.bin", 257, EOD)
    assert find_tokenizer(tmp_path, config).token_to_id("<|end|>") == EOD
    assert find_tokenizer(tmp_path / "elsewhere", config).token_to_id(END) == EOD


def test_a_tokenizer_is_found_where_its_shards_are_gone_and_where_folders_are_a_pattern(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(tokenizer_file, folder)
    (folder / "train_0.bin").write_bytes(b"")
    for pattern in (folder / "gone_*.bin", tmp_path / "*" / "train_*.bin", folder / "**" / "train_*.bin"):
        assert find_tokenizer(tmp_path, config_with(pattern, 257, EOD)).get_vocab_size() == 257


def test_no_tokenizer_or_one_with_too_many_tokens_is_an_error(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="there is no tokenizer.json in .* or .*nowhere: copy the one that made"):
        find_tokenizer(tmp_path, config_with(tmp_path / "nowhere" / "*.bin", 257, EOD))
    with pytest.raises(ModelFolderError, match="has 257 tokens and the model 256"):
        find_tokenizer(tmp_path, config_with(tokenizer_file.parent / "train_*.bin", 256, 0))


# --- the hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_pushed_model_is_on_the_hub_file_for_file(hub: Hub, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = ["-m", "switch_bank", "export", run, out, "--push", "me/nano"]
    result = python(*command, **hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert hub.repositories == {"me/nano": {name: (out / name).read_bytes() for name in FILES}}
    assert list(hub.large.values()) == [(out / "model.safetensors").read_bytes()]
    assert f"me/nano: pushed, {hub.address}/me/nano/commit/" in result.stdout


def test_a_push_that_is_refused_leaves_the_export_and_says_how_to_send_it(hub: Hub, run: Path, tmp_path: Path) -> None:
    out, surroundings = tmp_path / "the model", hub.environment(tmp_path / "home", token="hf_wrong")
    result = python("-m", "switch_bank", "export", run, out, "--push", "me/nano", **surroundings)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {out} is written, but me/nano did not take it (") and "401" in line
    assert f"`hf upload me/nano '{out}'`" in line
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert hub.repositories == {}


GPT2 = """
import sys
from pathlib import Path
from switch_bank.config import from_dict
from switch_bank.export import find_tokenizer
from switch_bank.model.folder import ModelFolderError
config = from_dict({"data": {"train": "nowhere/*.bin"}})
try:
    for _ in range(2):
        print(find_tokenizer(Path("nowhere"), config).get_vocab_size())
except ModelFolderError as error:
    sys.exit(f"error: {error}")
"""


def test_gpt2s_tokenizer_is_fetched_once_and_without_a_network_that_is_said(
    hub: Hub, tokenizer_file: Path, tmp_path: Path
) -> None:
    hub.repositories["openai-community/gpt2"] = {"tokenizer.json": tokenizer_file.read_bytes()}
    twice = python("-c", GPT2, **hub.environment(tmp_path / "home"))
    assert (twice.returncode, twice.stdout) == (0, "257\n257\n"), twice.stderr
    assert twice.stderr.count("fetching tokenizer.json of openai-community/gpt2 from the Hugging Face hub, once") == 1
    assert hub.downloads.count("GET tokenizer.json") == 1
    assert hub.downloads[-1] == "GET tokenizer.json"

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub.address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    offline = python("-c", GPT2, **hub.environment(tmp_path / "empty"))
    assert offline.returncode == 1 and not offline.stdout
    fetching, error = offline.stderr.strip().splitlines()
    assert fetching.startswith("fetching ")
    assert error.startswith("error: GPT-2's tokenizer could not be fetched (ConnectError): connect this machine")
