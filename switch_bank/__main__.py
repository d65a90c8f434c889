"""`python -m switch_bank VERB ...`: what can be done with a run, or with what it left behind."""

import os
import signal
import sys
from importlib import import_module

VERBS = {
    "audit": "RUN|PRESET      is it causal?",
    "generate": "RUN             text from a trained model, as it is made",
    "export": "RUN DIR         safetensors, configuration, tokenizer and a model card",
    "records": "verify|replay   does a log agree with itself, and with another run of its source?",
    "balance": "FILE|RUN        how evenly the experts are used, and what to try",
    "report": "RUN [RUN ...]   one page with a run's curves, loads and routes, or several compared",
}


def main(arguments: list[str]) -> int:
    """Runs a verb with its arguments and returns the exit code; each verb is a module of the package."""
    if arguments and arguments[0] in VERBS:
        return import_module(f"switch_bank.{arguments[0]}").main(arguments[1:])
    asked = arguments[:1] in (["-h"], ["--help"])
    lines = [f"  {verb:<10}{text}" for verb, text in VERBS.items()]
    print("\n".join(["usage: python -m switch_bank VERB ...", *lines]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  None where it was closed
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a verb silently, as it does other programs
    sys.exit(main(sys.argv[1:]))
