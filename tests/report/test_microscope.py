"""The routing microscope's data, against the model's own forward."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from switch_bank.config import Config
from switch_bank.data import Shards
from switch_bank.export import load_model
from switch_bank.model.bank import Bank
from switch_bank.model.folder import ModelFolderError
from switch_bank.report.microscope import expert_similarity, liked, look, routes
from tests.report.conftest import NASTY, WORDS


@pytest.fixture(scope="module")
def tokens(run: Path) -> torch.Tensor:
    return torch.from_numpy(Shards.open(f"{run}/val_*.bin", len(WORDS)).read(0, 1200).astype(np.int64))


def test_routes_are_those_that_the_model_takes(run: Path, tokens: torch.Tensor) -> None:
    _, model = load_model(run, "cpu")
    assert model.trained_state is not None
    with torch.no_grad():
        _, routings, _ = model.trunk(tokens[None, :50], model.trained_state)
    data = routes(model, tokens[:50])
    for layer, routing in enumerate(routings):
        assert data["picks"][layer] == routing.experts[0].tolist()
        for token in range(50):
            top = dict(np.array(data["top"][layer][token]).reshape(-1, 2).tolist())
            assert len(top) == 4 and all(
                abs(1000 * float(routing.probabilities[0, token, expert]) - p) <= 0.5 for expert, p in top.items()
            )


def test_what_an_expert_likes_is_counted_over_its_own_picks(
    run: Path, tokens: torch.Tensor, tokenizer: Tokenizer
) -> None:
    _, model = load_model(run, "cpu")
    data = liked(model, tokens, tokenizer)
    padded = torch.nn.functional.pad(tokens, (0, 1536 - 1200)).view(3, 512)
    for layer, routing in enumerate(model.routes(padded)):
        picked = routing.experts.flatten()[:1200]
        assert sum(likes["picks"] for likes in data["likes"][layer]) == 1200
        for expert, likes in enumerate(data["likes"][layer]):
            own = tokens[picked == expert]
            assert likes["picks"] == len(own)
            counts = {WORDS[token]: int((own == token).sum()) for token in own.unique().tolist()}
            assert [count for _, count in likes["frequent"]] == sorted(counts.values(), reverse=True)[:10]
            assert all(counts[data["names"][name]] == count for name, count in likes["frequent"])
            for name, percent in likes["specific"]:
                token = WORDS.index(data["names"][name])
                share = float((picked[tokens == token] == expert).float().mean())
                assert abs(100 * share - percent) <= 0.5 and share > len(own) / 1200


def test_a_text_is_followed_from_the_start_of_a_document(run: Path) -> None:
    config, model = load_model(run, "cpu")
    seen = look(run, config, model, f"word3| word4|{NASTY}".replace("word3|", " word3|"))
    assert seen.text == ["<|endoftext|>", " word3", " word4", NASTY] and "4 tokens" in seen.note
    assert len(seen.data["picks"]) == 3 and all(len(layer) == 4 for layer in seen.data["picks"])
    long = look(run, config, model, "| word5" * 2000)
    assert len(long.text) == 1024 and long.note.startswith("The first 1024 of 2001")


def test_without_a_tokenizer_tokens_are_numbers_and_a_text_is_refused(run_of: Callable[..., Path]) -> None:
    folder = run_of("mute")
    (folder / "tokenizer.json").unlink()
    config, model = load_model(folder, "cpu")
    assert look(folder, config, model).text[:2] == ["⟨0⟩", f"⟨{int(Shards.open(config.data.val, 97).read(1, 1)[0])}⟩"]
    with pytest.raises(ModelFolderError, match="there is no tokenizer.json"):
        look(folder, config, model, "a text")


def test_similarity_is_the_cosine_between_experts(config_of: Callable[..., Config]) -> None:
    bank = Bank(config_of(experts=3).model)
    with torch.no_grad():
        for part in (bank.w1, bank.w2):
            part.zero_()
        bank.w1[0, 0, 0], bank.w1[1, 0, 0], bank.w2[1, 0, 0], bank.w2[2, 0, 1] = 2.0, 3.0, 4.0, 1.0
    expected = [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(expert_similarity(bank, 3), expected, atol=1e-6)
    own = Bank(config_of(experts=2, layers=3, shared=False).model)
    assert expert_similarity(own, 2).shape == (2, 2)
