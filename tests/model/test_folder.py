"""An exported model's two files: what is read is what was written, or nothing."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switch_bank.model.folder import ModelFolderError, read_folder, write_folder
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import step_state

KINDS: list[dict[str, Any]] = [
    {},
    {"adapter": "lora", "score": "sigmoid", "balance": "bias", "top_k": 2, "forward_ema": True},
    {"shared": False, "always_on_expert": True, "tied_layers": 2, "skip_attention": (1,), "adapter": "none"},
    {"experts": 1, "reverse_ema": "off"},
    {"dtype": "bfloat16", "reverse_ema": "leaky"},
]
STEP = 700  # noise is over, cap and temperature are on their way, and the window too


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_model_from_a_folder_gives_the_logits_of_the_one_that_was_written_to_the_bit(
    options, config_of, model_of, tmp_path
):
    config = config_of(**options)
    model = model_of(config).eval()
    if model.routers is not None:  # what is no parameter and yet decides where tokens go
        model.routers.balance_bias.normal_()
        model.routers.pruned[1] = True
    write_folder(tmp_path, config, model.state_dict(), STEP)
    tokens = torch.randint(97, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, _, _ = model.trunk(tokens, step_state(STEP, config, "cpu"))
        expected = model.logits(hidden)[..., :97].float()
    exported = SwitchBankGPT.from_folder(tmp_path)
    assert not exported.training
    assert torch.equal(exported.predict(tokens), expected)
    last = step_state(config.schedule.steps, config, "cpu")
    if config.model.experts > 1:
        with torch.no_grad():
            assert not torch.equal(model.logits(model.trunk(tokens, last)[0])[..., :97].float(), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # slow on a CPU, and right
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_prediction_takes_any_number_of_tokens_and_depends_on_none_to_come(config_of, model_of, tmp_path, backend):
    config = config_of(attention_backend=backend)
    write_folder(tmp_path, config, model_of(config).state_dict(), STEP)
    model = SwitchBankGPT.from_folder(tmp_path)
    tokens = torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(1))
    logits = model.predict(tokens)
    assert logits.shape == (1, 150, 97)
    for length in (1, 20, 128):
        torch.testing.assert_close(model.predict(tokens[:, :length]), logits[:, :length], atol=1e-5, rtol=0)


def test_a_model_of_kernels_for_a_gpu_is_read_on_a_cpu(config_of, model_of, tmp_path):
    predictions, tokens = [], torch.arange(97)[None]
    for backend in ("flash", "triton", "reference"):
        config = config_of(attention_backend=backend, dtype="bfloat16")
        write_folder(tmp_path, config, model_of(config).state_dict(), STEP)
        predictions.append(SwitchBankGPT.from_folder(tmp_path).predict(tokens))
    assert torch.equal(*predictions[:2]) and torch.equal(*predictions[1:])


def test_a_model_that_was_never_trained_predicts_nothing(config_of):
    with pytest.raises(RuntimeError, match="this model is not trained: load one with SwitchBankGPT.from_folder"):
        SwitchBankGPT(config_of().model).predict(torch.zeros(1, 8, dtype=torch.int64))


@pytest.fixture(scope="module")
def written(config_of, model_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = config_of(layers=2, width=8, expert_width=8)
    write_folder(folder, config, model_of(config).state_dict(), STEP)
    return folder


@given(data=st.data())
def test_damage_is_found_wherever_it_is_or_changes_nothing(written, tmp_path_factory, data):
    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("damaged") / "model"))
    path = folder / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    path.write_bytes(content)
    try:
        config, weights, step = read_folder(folder)
    except ModelFolderError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    expected = read_folder(written)
    assert (config, step) == (expected[0], expected[2])
    assert weights.keys() == expected[1].keys()
    assert all(torch.equal(weights[name], value) for name, value in expected[1].items())


def test_weights_that_name_another_step_than_their_own_are_refused(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"step":"700"', b'"step":"701"'))
    with pytest.raises(ModelFolderError, match="not as they were written"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(written, tmp_path, name):
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=f"there is no {folder / name}: "):
        SwitchBankGPT.from_folder(folder)


def test_weights_of_another_shape_are_refused_in_one_line(config_of, model_of, tmp_path):
    config = config_of()
    write_folder(tmp_path, config_of(width=16), model_of(config).state_dict(), STEP)
    with pytest.raises(ModelFolderError, match="the weights do not fit their configuration") as caught:
        SwitchBankGPT.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_do_not_go_with_a_configuration_that_fits_them(written, config_of, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    config, weights, _ = read_folder(written)
    other = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, temperature_end=0.5))
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "other", other, weights, STEP)
    shutil.copy(tmp_path / "other" / "config.json", folder)
    with pytest.raises(ModelFolderError, match="not as they were written"):
        read_folder(folder)
