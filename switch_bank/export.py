"""A trained model and its tokenizer, read from a run's folder or an exported one; and the program that exports a run.

python -m switch_bank export RUN DIR [--push REPO]
"""

import argparse
import glob
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from switch_bank import checkpoint
from switch_bank.checkpoint import CheckpointError
from switch_bank.config import Config, ConfigError, from_dict
from switch_bank.model.folder import WEIGHTS, ModelFolderError, read_folder, write_folder
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.read_log import Log, LogError

GPT2 = "openai-community/gpt2"  # on the Hugging Face hub
CONNECT_SECONDS = 10.0
NOT_CAUSAL = "NOT CAUSAL"


class PushError(RuntimeError):
    """What the Hugging Face hub did not take, and how to send it again, in one line."""


def load_model(folder: Path, device: torch.device | str) -> tuple[Config, SwitchBankGPT]:
    """The configuration and the trained model, in eval mode, of a run's folder or of an exported one.

    `model.trained_state` is the StepState of the last step that the weights were trained for. Raises CheckpointError,
    ModelFolderError or ConfigError where there is no model, or one that is damaged or does not fit.
    """
    config, weights, step = _read_trained(folder)
    return config, SwitchBankGPT.trained(config, weights, step, device)


def _read_trained(folder: Path) -> tuple[Config, dict[str, Tensor], int]:
    """Configuration, weights and the step that they were trained to."""
    if (folder / WEIGHTS).exists():
        return read_folder(folder)
    if (folder / "checkpoint.pt").exists():
        saved = checkpoint.load(folder / "checkpoint.pt")
        return from_dict(saved["config"]), saved["model"], saved["step"]
    raise ModelFolderError(f"{folder} holds no model: neither a run's checkpoint.pt nor an exported {WEIGHTS}")


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


def export(run: Path, out: Path) -> None:
    """Writes model.safetensors, config.json, tokenizer.json and README.md of the run in `run` into a new folder `out`,
    all or nothing.

    Raises as `load_model` and `find_tokenizer` do, ModelFolderError where `out` is taken or the metrics are damaged,
    LogError for a log that is missing or damaged, and OSError.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelFolderError(f"{out} exists already: choose another folder, or delete it")
    config, weights, step = _read_trained(run)
    model = SwitchBankGPT.trained(config, weights, step, "cpu")
    tokenizer = find_tokenizer(run, config)
    card = model_card(run, config, model, step)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        write_folder(new, config, weights, step)
        tokenizer.save(str(new / "tokenizer.json"))
        (new / "README.md").write_text(card, encoding="utf-8")
        new.rename(out)


def push(folder: Path, repository: str) -> str:
    """Sends an exported folder to a repository of the Hugging Face hub, which is made if it is not there. Returns the
    commit's address; raises PushError."""
    try:
        HfApi().create_repo(repository, exist_ok=True)
        return HfApi().upload_folder(repo_id=repository, folder_path=folder).commit_url
    except Exception as error:  # huggingface_hub passes on its HTTP client's own errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise PushError(
            f"{folder} is written, but {repository} did not take it ({reason}): see to the network and "
            f"`hf auth login`, then `hf upload {shlex.quote(repository)} {shlex.quote(str(folder))}`"
        ) from error


def model_card(run: Path, config: Config, model: SwitchBankGPT, step: int) -> str:
    """README.md: what the model is after `step` steps, in numbers from the run's own files alone."""
    options, data = config.model, config.data
    log = Log.read(run / "log.txt")
    rows = [f"| {Path(path).name} | {tokens:,} | `{sha256}` |" for path, tokens, sha256 in log.data()]
    files = "\n".join(dict.fromkeys(rows))  # a resumed run names its data again
    step_tokens = data.slices_per_step * data.slice_tokens
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = "one expert" if options.experts == 1 else f"{options.experts} experts"
    place = "that all layers share" if options.shared else "in each layer"
    causal = causal_verdict(log, config)
    title = f"SwitchBank {config.preset}"
    if causal == NOT_CAUSAL:
        title += f", {NOT_CAUSAL}\n\n**It reads tokens to come. Its loss is not that of a language model.**"
    return f"""---
pipeline_tag: text-generation
---
# {title}

A model of {parameters:,} parameters: {options.layers} layers of width {options.width}, and {experts}
{place}. In each layer a token goes to {options.top_k} of them.

| | |
|---|---|
| trained for | {step:,} of {config.schedule.steps:,} steps of {step_tokens:,} tokens, seed {config.run.seed} |
| validation loss | {_validation(run, step)} |
| causal, by the checks in the run's log | {causal} |

## Data

| file | tokens | sha256 |
|---|---|---|
{files}

## How to load it

With the SwitchBank package, in this folder:

```python
import torch
from tokenizers import Tokenizer
from switch_bank.model.gpt import SwitchBankGPT

model = SwitchBankGPT.from_folder(".")
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
text = tokenizer.encode("The text so far", add_special_tokens=False).ids
tokens = torch.tensor([[model.config.eod_token, *text]])
logits = model.predict(tokens)  # [1, T, {options.vocab_size}]: of each next token
```
"""


def causal_verdict(log: Log, config: Config) -> str:
    """What a run's log says of causality. The last word is NOT CAUSAL if any check of the run said so."""
    lines = [line for line in log.lines if line.startswith(("causal: ", NOT_CAUSAL, "result: "))]
    if not config.model.causal or any(NOT_CAUSAL in line for line in lines):
        return NOT_CAUSAL
    return "yes" if any("causal: yes" in line for line in lines) else "not said in its log"


def _validation(run: Path, step: int) -> str:
    """The run's reading of the weights after `step`."""
    path, reading = run / "metrics.jsonl", "not measured at this step"
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["kind"] == "val" and record["step"] == step:
                reading = (
                    f"{record['val_loss']:.4f} nats a token over {record['val_tokens']:,} tokens, "
                    f"after {record['train_time_s']:.1f} s of training"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ModelFolderError(f"{path}, line {number} is damaged: delete that line") from error
    return reading


def main(arguments: list[str]) -> int:
    """`python -m switch_bank export`; returns the exit code, 2 where something is wrong with the files or the hub."""
    parser = argparse.ArgumentParser(
        prog="python -m switch_bank export",
        description="Write a run's model for other programs: weights, configuration, tokenizer and a model card.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write; it must be new or empty")
    parser.add_argument("--push", metavar="REPO", help="send it to this repository of the Hugging Face hub (USER/NAME)")
    given = parser.parse_args(arguments)
    try:
        export(given.run, given.out)
        print(f"{given.out}: written")
        if given.push is not None:
            print(f"{given.push}: pushed, {push(given.out, given.push)}")
    except (CheckpointError, ConfigError, LogError, ModelFolderError, PushError, SafetensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
