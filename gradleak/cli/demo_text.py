"""The command ``gradleak demo --text``: four messages out of one gradient of a language model."""

from __future__ import annotations

import shlex
from pathlib import Path

from gradleak.audit.folder import check_writable
from gradleak.cli.console import say
from gradleak.data import write_bytes, write_tensors
from gradleak.integrations.huggingface import load_folder
from gradleak.integrations.small_gpt2 import write_small_gpt2
from gradleak.integrations.tokenizer import Tokenizer

__all__ = ["prepare"]

_PRIVATE = (
    "The biopsy of Ms. Keller came back positive, so we start the therapy on Monday.",
    "My account number is 4417 and the rent is two months late.",
    "Please do not tell my manager that I am looking for a new job.",
    "He said the door code is 2093; the alarm is off at night.",
)
_WORDS = (
    " after all are at before but by can could did does every from had has have her here him his how if in into it its"
    " knows last let me more much negative never next no nobody now of on open or our out over paid said see sent she"
    " should soon still talk thank their them then there they this today tomorrow too under until up us very was were"
    " what when where which who why will with would yes you Tuesday Friday March June doctor nurse bank neighbor car"
    " house letter friend street city 12 7 31 2024 ? ! : -"
)
"""More words of the tokenizer, so that not every one of them is private."""


def prepare(out: Path, seed: int) -> list[str]:
    """Write a language model and the gradient of a client's four messages; return the attack on it as a command."""
    check_writable(out)
    folder, update, truth = out / "model", out / "U.safetensors", out / "private.txt"
    folder.mkdir(parents=True, exist_ok=True)
    write_small_gpt2(folder, (*_PRIVATE, _WORDS), seed, width=256, layers=4)
    model, tokenizer = load_folder(folder), Tokenizer(folder)
    shared = model.local_training(model, model.batch([tokenizer.encode(text) for text in _PRIVATE]))
    write_tensors(update, shared.tensors)
    write_bytes(truth, "".join(f"{text}\n" for text in _PRIVATE).encode())
    say("A client trains a small GPT-2 on four messages, shares one gradient, and nothing else.")
    say("The server reads the messages out of it:")
    words = ["attack", "--model", f"hf:{folder}", "--update", str(update), "--batch-size", str(len(_PRIVATE))]
    words += ["--truth", str(truth), "--out", str(out)]
    say(f"  gradleak {shlex.join(words)}")
    return words
