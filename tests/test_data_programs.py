"""The programs in data/, run as a user runs them: as their own process from some other folder, and here, in the tests'
process, where that changes nothing but the time it takes."""

import json
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from switch_bank.data import Shards, read_header, write_shard

PROGRAMS = Path(__file__).resolve().parent.parent / "data"
END = "<|endoftext|>"


def run(
    program: str, *arguments: object, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=100
    )


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    def main(program: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(PROGRAMS / program), run_name="__main__")
        output = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, output.out, output.err

    return main


def one_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


# --- local_text.py


def a_program(seed: int, functions: int = 30, lines: int = 8) -> str:
    """Python-like text, no two alike, with blank lines inside its functions too."""
    words = random.Random(seed)

    def function(number: int) -> str:
        body = ["    total = " + " + ".join(words.choices(["alpha", "beta", "räte", "x"], k=8)) for _ in range(lines)]
        body.insert(lines // 2, "")
        return "\n".join([f"def function_{seed}_{number}(x):", *body, ""])

    return "import os\n\n\n" + "\n\n".join(map(function, range(functions)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "inner").mkdir()
    for seed in range(12):
        (folder / ("inner" if seed % 2 else ".") / f"file_{seed}.py").write_text(a_program(seed))
    (folder / "one_long_function.py").write_text("import sys" + a_program(99, functions=1, lines=80)[9:])
    (folder / "copy.py").write_text(a_program(3))
    (folder / "tag.md").write_text(f"before {END} after\n")
    (folder / "line.txt").write_text("0123456789 " * 700)
    (folder / "latin.txt").write_bytes("Räte".encode("latin-1"))
    (folder / "image.png").write_bytes(b"not text, by its name")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.py").write_text("hidden = 1\n")
    return folder


LOCAL = ("--vocab-size", 400, "--max-document-tokens", 300)


@pytest.fixture(scope="module")
def made(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("made")
    result = run("local_text.py", sources, "--out", "shards", *LOCAL, folder=folder)
    assert result.returncode == 0, result.stderr
    return folder / "shards", result.stdout


def documents_of(folder: Path) -> dict[str, list[np.ndarray]]:
    found = {}
    for part in ("train", "val"):
        shards = Shards.open(str(folder / f"{part}_*.bin"), 400)
        tokens = shards.read(0, shards.total)
        assert tokens[0] == 0
        found[part] = np.split(tokens, np.flatnonzero(tokens == 0)[1:])
    return found


def test_local_shards_hold_every_text_once_and_no_file_in_both_parts(sources: Path, made: tuple[Path, str]) -> None:
    folder, stdout = made
    assert "17 files, 15 different" in stdout
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id(END) == 0
    texts = {file.read_text() for file in sources.rglob("*.*") if file.suffix in {".py", ".md"}}
    texts = {text for text in texts if "hidden" not in text} | {(sources / "line.txt").read_text()}
    assert len(texts) == 15
    documents = {
        part: [tokenizer.decode(document[1:].tolist(), skip_special_tokens=False) for document in found]
        for part, found in documents_of(folder).items()
    }
    assert documents["train"] and documents["val"]
    assert sum(map(len, documents["train"] + documents["val"])) == sum(map(len, texts))
    for text in texts:
        inside = [sum(len(document) for document in found if document in text) for found in documents.values()]
        assert sorted(inside) == [0, len(text)]


def test_local_documents_are_short_and_begin_where_a_reader_would_begin(made: tuple[Path, str]) -> None:
    folder, _ = made
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = [document for found in documents_of(folder).values() for document in found]
    assert max(map(len, documents)) <= 300 + 3  # the lengths of pieces are added up before they are joined
    assert np.mean([len(document) for document in documents]) > 150
    texts = [tokenizer.decode(document[1:].tolist()) for document in documents]
    functions = [text for text in texts if "def function" in text and "function_99_" not in text]
    assert len(functions) > 50
    assert all(text.startswith(("def ", "import os")) and text.endswith("\n") for text in functions)


def test_local_documents_are_shuffled(made: tuple[Path, str]) -> None:
    folder, _ = made
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [tokenizer.decode(document[1:].tolist()) for document in documents_of(folder)["train"]]
    files = [text.split("_")[1] for text in texts if text.startswith("def ")]
    same_as_next = sum(a == b for a, b in zip(files, files[1:], strict=False))
    assert same_as_next < len(files) / 3


def test_local_shards_are_the_same_on_a_second_run_and_nothing_else_is_left(
    sources: Path, made: tuple[Path, str], tmp_path: Path, run_here: Callable
) -> None:
    shutil.copytree(sources, tmp_path / "moved")
    shutil.copytree(made[0], tmp_path / "again")
    write_shard(tmp_path / "again" / "train_000000.bin", np.array([1, 2, 3]))
    code, _, stderr = run_here("local_text.py", tmp_path / "moved", "--out", tmp_path / "again", *LOCAL)
    assert code == 0, stderr
    assert {file.name for file in tmp_path.iterdir()} == {"again", "moved"}
    files = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert sorted(files) == ["tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert files == {file.name: file.read_bytes() for file in made[0].iterdir()}


def test_too_little_local_text_is_one_line_and_leaves_the_old_shards(
    made: tuple[Path, str], tmp_path: Path, run_here: Callable
) -> None:
    shutil.copytree(made[0], tmp_path / "out")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        code, _, stderr = run_here("local_text.py", tmp_path / "texts", "--out", tmp_path / "out")
        assert code == 2
        assert "too little text" in one_line(stderr)
        (tmp_path / "texts" / f"{number}.txt").write_text(f"a few words {number}")
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "texts"}
    for file in made[0].iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_local_text_never_replaces_a_folder_that_holds_other_files(
    sources: Path, tmp_path: Path, run_here: Callable
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, stderr = run_here("local_text.py", sources, "--out", tmp_path)
    assert code == 2
    assert "choose another --out" in one_line(stderr)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_local_text_without_text_at_a_path_names_the_path(tmp_path: Path, run_here: Callable) -> None:
    code, _, stderr = run_here("local_text.py", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert code == 2
    assert one_line(stderr) == f"error: {tmp_path / 'nowhere'}: no such file or folder"


# --- cached_fineweb10B.py

# huggingface_hub keeps what it received in pieces of 10 MiB, so that less could not be resumed.
SHARD_TOKENS = {"fineweb_val_000000.bin": 1000, "fineweb_train_000001.bin": 6_000_000, "fineweb_train_000002.bin": 1000}


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub's file endpoint that can drop a connection in the middle of a file."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files = files
        self.drop_once: str | None = None  # the name of the file whose next download breaks off before its end
        self.downloads: list[tuple[str, str | None]] = []  # name and Range of each GET


class HubRequest(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def find(self) -> bytes | None:
        prefix = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
        self.name = self.path.removeprefix(prefix)
        content = self.server.files.get(self.name) if self.path.startswith(prefix) else None
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        return content

    def headers_of(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{self.name}-1"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))

    def do_HEAD(self) -> None:
        content = self.find()
        if content is not None:
            self.headers_of(200, len(content))
            self.end_headers()

    def do_GET(self) -> None:
        content = self.find()
        if content is None:
            return
        wanted = self.headers.get("Range")
        self.server.downloads.append((self.name, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.headers_of(206 if wanted else 200, len(content) - start)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.server.drop_once == self.name:
            self.server.drop_once = None
            self.wfile.write(content[start : len(content) - 1000])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {}
    for name, count in SHARD_TOKENS.items():
        write_shard(tmp_path / name, np.arange(count) % 50_257)
        files[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(port: int, folder: Path, shards: int) -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(folder / "hub_cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return run("cached_fineweb10B.py", shards, "--out", "shards", folder=folder, environment=environment)


def test_fineweb_survives_dropped_connections_and_keeps_only_whole_shards(hub: Hub, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    hub.drop_once = "fineweb_train_000001.bin"
    result = fetch(hub.server_port, tmp_path, 1)
    assert result.returncode == 0, result.stderr
    assert [name for name, _ in hub.downloads] == ["fineweb_val_000000.bin"] + 2 * ["fineweb_train_000001.bin"]
    resumed_at = hub.downloads[-1][1]
    assert resumed_at == f"bytes={10 << 20}-"
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        assert (shards / name).read_bytes() == hub.files[name]
    assert not (shards / "fineweb_train_000002.bin").exists()

    # Of those here one was cut short, and the next one is bad on the hub itself: only these two are asked for.
    cut = shards / "fineweb_train_000001.bin"
    cut.write_bytes(cut.read_bytes()[:-2])
    hub.files["fineweb_train_000002.bin"] = hub.files["fineweb_train_000002.bin"][:-100]
    hub.downloads.clear()
    result = fetch(hub.server_port, tmp_path, 2)
    assert result.returncode == 2
    assert [name for name, _ in hub.downloads] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    deleted_first, deleted_second, error = result.stderr.strip().splitlines()
    assert deleted_first.startswith("deleted: ") and "fineweb_train_000001.bin: the header says" in deleted_first
    assert deleted_second.startswith("deleted: ") and "fineweb_train_000002.bin: the header says" in deleted_second
    assert "fineweb_train_000002.bin could not be fetched (what arrived is not a whole shard)" in error
    del hub.files["fineweb_train_000002.bin"]
    assert {file.name: file.read_bytes() for file in shards.glob("*.bin")} == hub.files


def test_without_a_network_fineweb_says_what_to_do_and_what_is_here_counts(
    hub: Hub, tmp_path: Path, run_here: Callable
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    result = fetch(port, tmp_path, 1)
    assert result.returncode == 2
    says = one_line(result.stderr)
    for part in ("fineweb_val_000000.bin", "kjj0/fineweb10B-gpt2", "shards", "data/local_text.py"):
        assert part in says
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        (tmp_path / "shards" / name).write_bytes(hub.files[name])
    code, stdout, stderr = run_here("cached_fineweb10B.py", 1, "--out", tmp_path / "shards")
    assert code == 0, stderr
    assert "2/2 fineweb_train_000001.bin is here" in stdout


# --- fineweb.py


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The first one is so long that a second process is done with others before it."""
    return [f"Document {n}.\n" + a_program(n, functions=1 + n % 3 + 1000 * (n == 0)) + f"\n{END}" for n in range(60)]


def read_all(paths: Sequence[Path]) -> list[np.ndarray]:
    return [np.fromfile(path, dtype="<u2", offset=1024, count=read_header(path)) for path in paths]


def test_tokenised_shards_hold_all_documents_in_order_for_any_number_of_processes(
    made: tuple[Path, str], texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    tokenizer = Tokenizer.from_file(str(made[0] / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected = [token for text in texts for token in (0, *tokenizer.encode(text).ids)]
    for processes in (1, 2):
        result = run(
            "fineweb.py",
            *("--dataset", "stories.jsonl", "--tokenizer", made[0] / "tokenizer.json", "--out", f"by_{processes}"),
            *("--shard-tokens", 30_000, "--val-shards", 2, "--processes", processes),
            folder=tmp_path,
        )
        assert result.returncode == 0, result.stderr
    paths = sorted((tmp_path / "by_1").iterdir(), key=lambda path: path.name[-10:])
    assert [path.name for path in paths] == [
        f"stories_{'val' if number < 2 else 'train'}_{number:06d}.bin" for number in range(-(-len(expected) // 30_000))
    ]
    shards = read_all(paths)
    assert [len(shard) for shard in shards[:-1]] == [30_000] * (len(paths) - 1)
    assert np.array_equal(np.concatenate(shards), expected)
    assert len(list((tmp_path / "by_2").iterdir())) == len(paths)
    assert all((tmp_path / "by_2" / path.name).read_bytes() == path.read_bytes() for path in paths)


def test_tokenising_that_fails_on_the_way_leaves_no_shards(made: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one document\n\nanother document\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n' * 100 + '{"words": "not fine"}\n')
    for dataset, shard_tokens, says in [
        ("texts.txt", 1000, "fills 1 shards of 1000 tokens"),
        ("broken.jsonl", 10, 'broken.jsonl: line 101 is no JSON object with a "text"'),
    ]:
        result = run(
            "fineweb.py",
            *("--dataset", dataset, "--tokenizer", made[0] / "tokenizer.json", "--processes", 1),
            *("--shard-tokens", shard_tokens, "--out", "out"),
            folder=tmp_path,
        )
        assert result.returncode == 2
        assert says in one_line(result.stderr)
        assert not list(tmp_path.glob("out/*"))


def test_tokenising_says_in_one_line_what_it_will_not_start(
    made: tuple[Path, str], tmp_path: Path, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in ("datasets", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails as if it were not installed
    (tmp_path / "texts.txt").write_text("one document\n\nanother document\n")
    renamed = (made[0] / "tokenizer.json").read_text().replace(END, "<|end|>")
    (tmp_path / "renamed.json").write_text(renamed)
    (tmp_path / "taken").mkdir()
    write_shard(tmp_path / "taken" / "x_train_000001.bin", np.array([1]))
    for dataset, out, tokenizer, says in [
        ("none.jsonl", "out", "renamed.json", "none.jsonl: no such file"),
        ("texts.txt", "taken", "renamed.json", "taken: holds shards already"),
        ("texts.txt", "out", "none.json", "none.json: no such tokenizer file"),
        ("texts.txt", "out", "renamed.json", f"renamed.json: needs the token {END}"),
        ("HuggingFaceFW/fineweb", "out", "renamed.json", "pip install datasets"),
        ("texts.txt", "out", None, "pip install tiktoken"),
    ]:
        chosen = () if tokenizer is None else ("--tokenizer", tokenizer)
        code, _, stderr = run_here("fineweb.py", "--dataset", dataset, "--out", out, *chosen)
        assert code == 2
        assert says in one_line(stderr)
        assert not (tmp_path / "out").exists()
