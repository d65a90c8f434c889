"""Generation: what is drawn, how it becomes text, and the program, on a small model of random weights."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from switch_bank import checkpoint
from switch_bank.config import Config
from switch_bank.export import load_model
from switch_bank.generate import main, sample, sample_line, text_of
from switch_bank.model.folder import write_folder
from switch_bank.model.gpt import SwitchBankGPT

ROOT = Path(__file__).resolve().parent.parent
EOD, VOCAB, STEP = 0, 280, 1000
PROMPT = "Füße → 🎉"


def byte_level(vocab_size: int) -> Tokenizer:
    """A byte-level BPE: a token for every byte, some for pairs, and token 0 for the end of a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def main() -> None: → 日本語 die Füße"] * 5, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama's: tokens of characters, and one for each byte of any other character."""
    names = ["<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeéF日→�🎉", "▁▁", "▁a", "a▁", "日e"]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def metaspace() -> Tokenizer:
    """Tokens of up to four characters, "▁" for a space. The space before the first token is no part of the text."""
    names = ["".join(name) for length in range(1, 5) for name in itertools.product("▁a🎉�", repeat=length)]
    names = ["<|endoftext|>", *names][: VOCAB - 10]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZER = byte_level(VOCAB)
BYTE_FALLBACK, METASPACE = byte_fallback(), metaspace()


@pytest.fixture(scope="module")
def config(config_of: Callable[..., Config]) -> Config:
    return config_of(vocab_size=VOCAB, reverse_window=8)


@pytest.fixture(scope="module")
def folder(config: Config, model_of: Callable[..., SwitchBankGPT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model."""
    folder = tmp_path_factory.mktemp("exported äöü")
    write_folder(folder, config, model_of(config).state_dict(), STEP)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SwitchBankGPT:
    return load_model(folder, "cpu")[1]


def drawn(model: SwitchBankGPT, *arguments: object, **options: object) -> list[int]:
    return list(sample(model, model.trained_state, *arguments, **options))  # type: ignore[arg-type]


# --- What is drawn


def test_the_likeliest_tokens_are_those_of_the_full_forward_over_the_document_so_far(model: SwitchBankGPT) -> None:
    prompt = TOKENIZER.encode(PROMPT).ids
    greedy = drawn(model, prompt, 40, temperature=0)
    assert len(greedy) == 40 and len(set(greedy)) > 5
    document = torch.tensor([[EOD, *prompt, *greedy]])
    assert model.predict(document)[0, len(prompt) : -1].argmax(-1).tolist() == greedy
    assert drawn(model, prompt, 40, temperature=2.0, top_k=1) == greedy
    assert drawn(model, prompt, 40, temperature=1e-40) == greedy


def test_tokens_are_drawn_with_the_models_probabilities_at_the_temperature(model: SwitchBankGPT) -> None:
    logits = model.predict(torch.tensor([[EOD, 7]]))[0, -1]
    for temperature, top_k in ((1.0, None), (3.0, 5)):
        first = torch.tensor([[*drawn(model, [7], 1, temperature, top_k, seed), EOD][0] for seed in range(150)])
        kept = logits.masked_fill(logits < logits.topk(top_k or VOCAB).values[-1], -torch.inf)
        share = (kept / temperature).softmax(0)
        for token in share.topk(3).indices.tolist():
            expected = float(share[token])
            spread = (expected * (1 - expected) / 150) ** 0.5
            assert abs(float((first == token).float().mean()) - expected) < 4 * spread, (temperature, top_k, token)
        assert set(first.tolist()) <= set(share.nonzero().flatten().tolist())


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(model: SwitchBankGPT) -> None:
    first = drawn(model, [], 30, seed=1)
    assert drawn(model, [], 30, seed=1) == first != drawn(model, [], 30, seed=2)
    assert drawn(model, [], 10, seed=1) == first[:10]


def test_nothing_comes_after_the_end_of_the_document(
    config: Config, model_of: Callable[..., SwitchBankGPT], model: SwitchBankGPT
) -> None:
    greedy = drawn(model, [9], 20, temperature=0)
    at = next(i for i in range(2, 20) if greedy[i] not in greedy[:i])
    # The end of the document is made a little likelier than a token that was drawn.
    weights = model.state_dict() | {"head": model.head.detach().clone()}
    weights["head"][EOD] = 1.001 * weights["head"][greedy[at]]
    ending = SwitchBankGPT.trained(config, weights, STEP, "cpu")
    assert drawn(ending, [9], 20, temperature=0) == greedy[:at]


def test_no_token_beyond_the_vocabulary_is_drawn(model: SwitchBankGPT) -> None:
    assert model.head.shape[0] > VOCAB
    assert max(drawn(model, [], 200, temperature=100.0)) < VOCAB


# --- How it becomes text


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTE_FALLBACK, METASPACE], ids=["bytes", "fallback", "metaspace"])
@given(st.text() | st.text("a é日🎉"), st.lists(st.integers(1, VOCAB - 1), max_size=60))
def test_the_pieces_are_the_text_of_all_tokens_without_the_prompts(
    tokenizer: Tokenizer, prompt: str, ids: list[int]
) -> None:
    before = tokenizer.encode(prompt).ids
    pieces = list(text_of(tokenizer, before, ids))
    assert "".join(pieces) == tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
    assert all(piece and not piece.endswith("\ufffd") for piece in pieces[:-1])


@given(st.lists(st.binary(max_size=3) | st.sampled_from(["a", "日", "é"]).map(str.encode), max_size=20))
def test_characters_of_single_bytes_are_those_of_the_whole_text(characters: list[bytes]) -> None:
    tokens = [f"<0x{byte:02X}>" for byte in b"".join(characters)]
    for name in ("▁a", "🎉"):
        ids = [BYTE_FALLBACK.token_to_id(token) for token in [*tokens, name, *tokens, *tokens[:2]]]
        assert "".join(text_of(BYTE_FALLBACK, [], ids)) == BYTE_FALLBACK.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_FALLBACK, METASPACE], ids=["fallback", "metaspace"])
def test_the_space_between_the_prompt_and_the_first_token_is_kept(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id("▁a")]
    assert list(text_of(tokenizer, tokenizer.encode("a a").ids, 2 * ids)) == [" a", " a"]
    assert list(text_of(tokenizer, [], 2 * ids)) == ["a", " a"]


def test_a_token_becomes_text_without_all_the_text_before_it() -> None:
    class Counting:
        decoded, id_to_token = 0, staticmethod(TOKENIZER.id_to_token)

        def decode(self, ids: list[int], **options: bool) -> str:
            self.decoded += len(ids)
            return TOKENIZER.decode(ids, **options)

    counting, ids = Counting(), TOKENIZER.encode("die Füße 🎉 " * 100).ids
    assert "".join(text_of(counting, ids, ids)) == "die Füße 🎉 " * 100  # type: ignore[arg-type]
    assert counting.decoded < 20 * len(ids)


def test_a_character_comes_whole_as_soon_as_its_last_byte_does() -> None:
    ids = TOKENIZER.encode("a🎉b").ids
    assert len(ids) == 6  # a character of four tokens between two of one
    taken: list[int] = []

    def one_by_one() -> Iterator[int]:
        for token in ids:
            taken.append(token)
            yield token

    assert [(piece, len(taken)) for piece in text_of(TOKENIZER, [], one_by_one())] == [("a", 1), ("🎉", 5), ("b", 6)]
    assert list(text_of(TOKENIZER, [], ids[:3])) == ["a", "\ufffd"]


def test_a_run_says_its_sample_whatever_bytes_its_model_draws(
    config: Config, model: SwitchBankGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BYTE_FALLBACK.save(str(tmp_path / "tokenizer.json"))
    ids = [BYTE_FALLBACK.token_to_id(name) for name in ("▁a", "<0x41>", "<0xFF>", "b")]
    monkeypatch.setattr("switch_bank.generate.sample", lambda *_: iter(ids))
    assert model.trained_state is not None
    assert sample_line(model, model.trained_state, tmp_path, config) == "sample: 'a\ufffd\ufffdb'"


# --- The program


def written(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a call of the program that succeeds writes to the terminal."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_text_is_the_prompt_and_what_is_drawn_after_it(
    folder: Path, model: SwitchBankGPT, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", PROMPT, "--tokens", 30, "--temperature", 0.7, "--top-k", 50, "--seed", 3)
    text = written(capsys, folder, *options)
    after = drawn(model, TOKENIZER.encode(PROMPT).ids, 30, 0.7, 50, 3)
    assert text == PROMPT + TOKENIZER.decode(after) + "\n"
    assert written(capsys, folder, *options) == text
    assert written(capsys, folder, *options[:-1], 4) != text
    assert written(capsys, folder, "--tokens", 5) == TOKENIZER.decode(drawn(model, [], 5, 0.8)) + "\n"


def test_a_runs_folder_does_as_well(
    config: Config, folder: Path, model: SwitchBankGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"config": dataclasses.asdict(config), "model": model.state_dict(), "step": STEP, "seconds": 1.0}
    state |= {part: {} for part in ("log_sizes", "muon", "adam", "clip", "loads")}
    state |= {"picks": torch.zeros(3, 4), "readings": [], "times_resumed": 0, "data": []}
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    options = ("--prompt", PROMPT, "--tokens", 20)
    assert written(capsys, tmp_path, *options) == written(capsys, folder, *options)


def test_where_the_dtype_is_free_a_cpu_generates_in_float32(
    config: Config, model: SwitchBankGPT, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="auto"))
    write_folder(tmp_path, auto, model.state_dict(), STEP)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert config.model.dtype == "float32"
    assert written(capsys, tmp_path, "--tokens", 100) == written(capsys, folder, "--tokens", 100)


def test_a_special_token_in_the_prompt_is_text(
    folder: Path, model: SwitchBankGPT, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<|endoftext|>"
    as_text = Tokenizer.from_str(TOKENIZER.to_str())
    as_text.encode_special_tokens = True
    ids = as_text.encode(text).ids
    assert EOD not in ids
    after = drawn(model, ids, 10, temperature=0)
    assert written(capsys, folder, "--prompt", text, "--tokens", 10, "--temperature", 0) == (
        text + TOKENIZER.decode(after) + "\n"
    )


def test_what_a_tokenizer_appends_to_a_text_is_not_read_after_the_prompt(
    config: Config, model: SwitchBankGPT, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, config, model.state_dict(), STEP)
    ending = Tokenizer.from_str(TOKENIZER.to_str())
    end = "<|endoftext|>"
    ending.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, EOD)])
    ending.save(str(tmp_path / "tokenizer.json"))
    options = ("--prompt", PROMPT, "--tokens", 20)
    assert written(capsys, tmp_path, *options) == written(capsys, folder, *options)


def test_a_model_that_read_ahead_says_so(
    config: Config, model: SwitchBankGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaky = dataclasses.replace(config, model=dataclasses.replace(config.model, reverse_ema="leaky"))
    write_folder(tmp_path, leaky, model.state_dict(), STEP)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert main([str(tmp_path), "--tokens", "3"]) == 0
    assert capsys.readouterr().err.startswith("NOT CAUSAL: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "0"), "--tokens is 0: it must be at least 1"),
        (("--temperature", "-0.1"), "--temperature is -0.1: it must be 0 or more"),
        (("--temperature", "nan"), "--temperature is nan: it must be 0 or more"),
        (("--temperature", "inf"), "--temperature is inf: it must be 0 or more, and finite"),
        (("--top-k", "0"), "--top-k is 0: it must be at least 1"),
        (("--seed", "-1"), "--seed is -1: it must be in 0"),
        (("--prompt", "a\udcff"), "--prompt is 'a\\udcff': it must be valid UTF-8"),
    ],
)
def test_an_option_that_cannot_work_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main([str(folder), *options]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"error: {message}") and output.err.count("\n") == 1


def no_run(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damaged_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7] + b"damaged")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def another_tokenizer(folder: Path) -> None:
    byte_level(VOCAB + 3).save(str(folder / "tokenizer.json"))


def empty_tokenizer(folder: Path) -> None:
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))


def tokenizer_without_the_letter(folder: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))


def tokenizer_without_the_word(folder: Path) -> None:
    Tokenizer(models.WordLevel({"word": 0})).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_run, "holds no model"),
        (damaged_weights, "their checksum does not agree"),
        (no_tokenizer, "there is no tokenizer.json in"),
        (another_tokenizer, f"has {VOCAB + 3} tokens and the model {VOCAB}"),
        (empty_tokenizer, "has no tokens for the prompt"),
        (tokenizer_without_the_letter, "has no tokens for the prompt"),
        (tokenizer_without_the_word, "does not take the prompt"),
    ],
)
def test_a_folder_that_cannot_work_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where there is no data/local that somebody has made
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    assert main([str(tmp_path), "--prompt", "x"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and message in output.err and output.err.startswith("error: ")
    assert output.err.count("\n") == 1


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "switch_bank", "generate", *map(str, arguments)]


def test_a_terminal_that_lacks_a_character_gets_another_one(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command(folder, "--prompt", PROMPT, "--tokens", 50), cwd=ROOT, env=environment, capture_output=True, timeout=500
    )
    assert ended.returncode == 0 and ended.stderr == b"" and ended.stdout.startswith(b"F??e ? ?")


def test_text_that_nobody_reads_is_no_error(folder: Path) -> None:
    unread = ["sh", "-c", '"$@" >&-', "sh", *command(folder, "--prompt", PROMPT, "--tokens", 5)]
    ended = subprocess.run(unread, cwd=ROOT, stderr=subprocess.PIPE, timeout=500)
    assert ended.returncode == 0 and ended.stderr == b""


def test_text_comes_as_it_is_made_and_ctrl_c_ends_it(config: Config, model: SwitchBankGPT, tmp_path: Path) -> None:
    weights = model.state_dict() | {"head": model.head.detach().clone()}
    weights["head"][EOD] = 0  # never the likeliest: the document has no end
    write_folder(tmp_path, config, weights, STEP)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    endless = command(tmp_path, "--prompt", "abc", "--tokens", 10**9, "--temperature", 0)

    def foreground() -> None:  # what a shell starts in the background is told to ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        endless, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=foreground
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(40).startswith(b"abc")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == b""
