"""A trained model and its tokenizer, read from a run's folder or from an exported one."""

import glob
import sys
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from tokenizers import Tokenizer

from switch_bank import checkpoint
from switch_bank.config import Config, from_dict
from switch_bank.model import folder as model_folder
from switch_bank.model.folder import ModelFolderError
from switch_bank.model.gpt import SwitchBankGPT

GPT2 = "openai-community/gpt2"  # on the Hugging Face hub
CONNECT_SECONDS = 10.0


def load_model(folder: Path, device: torch.device | str) -> tuple[Config, SwitchBankGPT]:
    """The configuration and the trained model, in eval mode, of a run's folder or of an exported one.

    `model.trained_state` is the StepState of the last step that the weights were trained for. Raises CheckpointError,
    ModelFolderError or ConfigError where there is no model, or one that is damaged or does not fit.
    """
    if (folder / model_folder.WEIGHTS).exists():
        config, weights, step = model_folder.read(folder)
    elif (folder / "checkpoint.pt").exists():
        saved = checkpoint.load(folder / "checkpoint.pt")
        config, weights, step = from_dict(saved["config"]), saved["model"], saved["step"]
    else:
        raise ModelFolderError(f"{folder} holds no model: neither a run's checkpoint.pt nor an exported model")
    return config, SwitchBankGPT.trained(config, weights, step, device)


def find_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer of the model in `folder`: its own tokenizer.json, or the one beside the training shards, or, for
    GPT-2's tokens, GPT-2's from the Hugging Face hub, fetched once. Special tokens inside a text are read as text, as
    they were when the shards were made.

    Raises ModelFolderError where there is none, or one with more tokens than the model.
    """
    shards = {Path(path).parent for path in glob.glob(config.data.train, recursive=True)}
    places = [folder, *sorted(shards or {Path(config.data.train).parent})]
    path = next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)
    if path is None:
        if (config.model.vocab_size, config.model.eod_token) != (50_257, 50_256):
            raise ModelFolderError(
                f"there is no tokenizer.json in {' or '.join(map(str, places))}: copy the one that made the shards "
                f"{config.data.train} into {folder}"
            )
        path = _gpt2_tokenizer()
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelFolderError(f"{path} is no tokenizer, {error}: copy the one that made the shards there") from error
    size = tokenizer.get_vocab_size()
    if size > config.model.vocab_size:
        raise ModelFolderError(
            f"{path} has {size} tokens and the model {config.model.vocab_size}: it is not the one that made the "
            f"training shards; copy that one into {folder}"
        )
    tokenizer.encode_special_tokens = True
    return tokenizer


def _gpt2_tokenizer() -> Path:
    cached = try_to_load_from_cache(GPT2, "tokenizer.json")
    if isinstance(cached, str):
        return Path(cached)
    print(f"fetching tokenizer.json of {GPT2} from the Hugging Face hub, once", file=sys.stderr)
    try:
        # Asked first because hf_hub_download itself repeats a failed request for minutes before it gives up.
        get_hf_file_metadata(hf_hub_url(GPT2, "tokenizer.json"), timeout=CONNECT_SECONDS)
        return Path(hf_hub_download(GPT2, "tokenizer.json"))
    except Exception as error:  # huggingface_hub passes on its HTTP client's own errors
        raise ModelFolderError(
            f"GPT-2's tokenizer could not be fetched ({type(error).__name__}): connect this machine, or copy "
            f"tokenizer.json of {GPT2} beside the training shards"
        ) from error
