"""Exporting a run: a real one of seconds, the folder made of it, and a small server that stands in for the hub."""

import base64
import email
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from switch_bank import checkpoint
from switch_bank.config import Config, from_dict
from switch_bank.data import Shards
from switch_bank.export import find_tokenizer, load_model, main
from switch_bank.model.folder import ModelFolderError
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import step_state

ROOT = Path(__file__).resolve().parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    source = Path(email.__file__).parent
    made = python("data/local_text.py", source, "--vocab-size", 400, "--out", folder)
    assert made.returncode == 0, made.stderr
    return folder


def train(shards: Path, out: Path, *options: str) -> Path:
    result = python(
        "train_switch_bank.py", "nano", "--data.train", shards / "train_*.bin", "--data.val", shards / "val_*.bin",
        "--data.val-tokens", "5001", "--data.slice-tokens", "256", "--data.val-slice-tokens", "256",
        "--data.slices-per-step", "4", "--run.tokens-per-forward", "1024", "--run.no-compile", "--run.log-every", "1",
        "--model.vocab-size", "400", "--model.eod-token", "0", "--model.layers", "2", "--model.width", "32",
        "--model.value-embeddings", "1", "--model.heads", "2", "--model.experts", "4", "--model.expert-width", "32",
        "--model.dtype", "float32", "--optim.muon-dtype", "float32", "--run.out", out, *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 5 steps, with a reading at step 2; the checkpoint before its last one is of step 3."""
    out = tmp_path_factory.mktemp("runs") / "run äöü"
    return train(shards, out, "--run.steps", "5", "--run.val-at-steps", "2", "--run.checkpoint-every", "3")


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


def test_the_exported_model_gives_the_logits_of_the_runs_to_the_bit(run: Path, exported: Path) -> None:
    saved = checkpoint.load(run / "checkpoint.pt")
    config = from_dict(saved["config"])
    plain = SwitchBankGPT(config.model).eval()
    plain.load_state_dict(saved["model"])
    tokens = torch.randint(400, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.logits(plain.trunk(tokens, step_state(5, config, "cpu"))[0])[..., :400]
    assert torch.equal(SwitchBankGPT.from_folder(exported).predict(tokens), expected)
    for folder in (run, exported):
        loaded, model = load_model(folder, "cpu")
        assert loaded == config and not model.training
        assert torch.equal(model.predict(tokens), expected)


def test_the_exported_tokenizer_is_the_one_that_made_the_shards(run: Path, exported: Path, shards: Path) -> None:
    config, _ = load_model(exported, "cpu")
    text = "def parse(räte):\n    return '<|endoftext|>'\n"
    theirs = Tokenizer.from_file(str(shards / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for folder in (run, exported):
        tokenizer = find_tokenizer(folder, config)
        ids = tokenizer.encode(text).ids
        assert ids == theirs.encode(text).ids and config.model.eod_token not in ids
        assert tokenizer.decode(ids) == text


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def val_records(run: Path) -> dict[int, dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if record["kind"] == "val"}


def test_the_cards_numbers_are_the_runs(run: Path, exported: Path, shards: Path) -> None:
    card, last = card_of(exported), val_records(run)[5]
    assert f"| {last['val_loss']:.4f} nats a token over 5,001 tokens, after {last['train_time_s']:.1f} s" in card
    assert "| 5 of 5 steps of 1,024 tokens, seed 0 |" in card
    assert re.search(r"\| causal, .* \| yes \|", card) and "NOT CAUSAL" not in card
    weights = load_model(run, "cpu")[1].parameters()
    size = sum(weight.numel() for weight in weights)
    assert f"A model of {size:,} parameters: 2 layers of width 32, and 4 experts\n" in card
    for part in ("train", "val"):
        for path, tokens, sha256 in Shards.open(f"{shards}/{part}_*.bin", 400).summary():
            assert f"| {Path(path).name} | {tokens:,} | `{sha256}` |" in card
    assert str(shards) not in card


def test_the_cards_instructions_work(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    code = re.findall(r"```python\n(.*?)```", card_of(exported), re.DOTALL)[0]
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], 400)


def test_weights_of_a_run_that_did_not_end_are_exported_as_such(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint.pt.previous").replace(tmp_path / "killed" / "checkpoint.pt")
    assert main([str(tmp_path / "killed"), str(tmp_path / "out")]) == 0
    assert "| 3 of 5 steps of 1,024 tokens, seed 0 |" in card_of(tmp_path / "out")
    assert "| not measured at this step |" in card_of(tmp_path / "out")
    config, model = load_model(tmp_path / "out", "cpu")
    assert model.trained_state == step_state(3, config, "cpu")


def test_a_leaky_models_card_says_not_causal(shards: Path, tmp_path: Path) -> None:
    leaky = train(shards, tmp_path / "leaky", "--run.steps", "2", "--model.reverse-ema", "leaky")
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
    assert len(data) == 2
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
        ("log.txt", Path.unlink, "there is no "),
        ("log.txt", lambda path: path.write_text("hello"), "log.txt is not the log of a run"),
        ("metrics.jsonl", Path.unlink, "there is no "),
        ("metrics.jsonl", lambda path: path.write_text('{"kind": "val", "st'), "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", lambda path: path.write_text('{"kind": "val", "step": 5}'), "line 1 is damaged"),
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


def test_a_folders_own_tokenizer_goes_before_the_one_beside_the_shards(shards: Path, tmp_path: Path) -> None:
    own = (shards / "tokenizer.json").read_text().replace("<|endoftext|>", "<|end|>")
    (tmp_path / "tokenizer.json").write_text(own)
    config = config_with(shards / "train_*.bin", 400, 0)
    assert find_tokenizer(tmp_path, config).token_to_id("<|end|>") == 0
    assert find_tokenizer(tmp_path / "elsewhere", config).token_to_id("<|endoftext|>") == 0


def test_a_tokenizer_is_found_where_its_shards_are_gone_and_where_folders_are_a_pattern(
    shards: Path, tmp_path: Path
) -> None:
    for pattern in (shards / "gone_*.bin", shards.parent / "*" / "train_*.bin", shards / "**" / "train_*.bin"):
        assert find_tokenizer(tmp_path, config_with(pattern, 400, 0)).get_vocab_size() == 400


def test_no_tokenizer_or_one_with_too_many_tokens_is_an_error(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="there is no tokenizer.json in .* or .*nowhere: copy the one that made"):
        find_tokenizer(tmp_path, config_with(tmp_path / "nowhere" / "*.bin", 400, 0))
    with pytest.raises(ModelFolderError, match="has 400 tokens and the model 399"):
        find_tokenizer(tmp_path, config_with(shards / "train_*.bin", 399, 0))


# --- the hub


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub: repositories that take files, the large ones by git's LFS, and give them back."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.downloads: list[str] = []

    def environment(self, home: Path, token: str = "hf_secret") -> dict[str, str]:
        local = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**local, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class HubRequest(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.answer(401, b'{"error": "Invalid username or password."}', {"Content-Type": "application/json"})
            return
        result = json.dumps(self.post(body)).encode()
        self.answer(200, result, {"Content-Type": "application/json"})

    def post(self, body: bytes) -> dict:
        hub = self.server
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.repositories.setdefault(f"{asked['organization']}/{asked['name']}", {})
            return {"url": f"{hub.address}/{asked['organization']}/{asked['name']}"}
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\npipeline_tag: ")
            return {"errors": [], "warnings": []}
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    one | {"actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}} for one in objects
                ],
            }
        files = hub.repositories[self.path.split("/api/models/")[1].rsplit("/", 2)[0]]
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        assert self.path.endswith("/commit/main")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
        repository = next(name for name, held in hub.repositories.items() if held is files)
        return {"commitUrl": f"{hub.address}/{repository}/commit/{'b' * 40}", "commitOid": "b" * 40}

    def do_PUT(self) -> None:
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, b"", {})

    def do_GET(self) -> None:
        repository, _, name = self.path.strip("/").partition("/resolve/main/")
        content = self.server.repositories.get(repository, {}).get(name)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self.server.downloads.append(f"{self.command} {name}")
        self.answer(200, content, {"ETag": f'"{name}-1"', "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


EXPORT = """
import sys
from switch_bank.export import main
run, out, *repositories = sys.argv[1:]
sys.exit(max(main([run, out + str(i), "--push", repository]) for i, repository in enumerate(repositories)))
"""


def test_a_pushed_model_is_on_the_hub_file_for_file(hub: Hub, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model0"
    result = python("-c", EXPORT, run, tmp_path / "model", "me/nano", **hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert hub.repositories == {"me/nano": {name: (out / name).read_bytes() for name in FILES}}
    assert list(hub.large.values()) == [(out / "model.safetensors").read_bytes()]
    assert f"me/nano: pushed, {hub.address}/me/nano/commit/" in result.stdout


def test_a_push_that_is_refused_leaves_the_export_and_says_how_to_send_it(hub: Hub, run: Path, tmp_path: Path) -> None:
    surroundings = hub.environment(tmp_path / "home", token="hf_wrong")
    result = python("-c", EXPORT, run, tmp_path / "the model", "me/nano", "me/na no", **surroundings)
    assert result.returncode == 2
    unknown, misspelt = result.stderr.strip().splitlines()
    assert "the model0 is written, but me/nano did not take it" in unknown and "401" in unknown
    assert "the model1 is written, but me/na no did not take it (HFValidationError" in misspelt
    assert f"`hf upload me/nano '{tmp_path / 'the model0'}'`" in unknown
    for number in range(2):
        assert sorted(file.name for file in (tmp_path / f"the model{number}").iterdir()) == FILES
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
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    hub.repositories["openai-community/gpt2"] = {"tokenizer.json": (shards / "tokenizer.json").read_bytes()}
    twice = python("-c", GPT2, **hub.environment(tmp_path / "home"))
    assert (twice.returncode, twice.stdout) == (0, "400\n400\n"), twice.stderr
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
