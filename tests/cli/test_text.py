from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

from gradleak.integrations.small_gpt2 import write_small_gpt2  # noqa: E402
from gradleak.integrations.tokenizer import Tokenizer  # noqa: E402

PRIVATE = ("It rained all day.", "The ship was sold in 1905, and they left.")
MORE = "We They all left was rained sold in on day night the a ship house 7 1905 . , ? !"
GUESS = """
from dataclasses import dataclass
from pathlib import Path
import torch
from gradleak.attacks.base import Attack
from gradleak.types import Reconstruction

@dataclass(frozen=True)
class Guess(Attack):
    def _one(self, observation, seed, callback):
        lines = Path("guess.txt").read_text(encoding="utf-8").splitlines()
        rows = [torch.tensor(observation.space.words.encode(line)) for line in lines]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return Reconstruction(ids, None, 1.0)

def guess():
    return Guess()
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Write a model and the gradient of two sentences, as a client would with nothing but transformers."""
    folder = tmp_path_factory.mktemp("text")
    model, tokenizer = write_small_gpt2(folder / "model", [*PRIVATE, MORE])
    batch = tokenizer(list(PRIVATE), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
    save_file({k: p.grad for k, p in model.named_parameters()}, folder / "U.safetensors")
    (folder / "guess.py").write_text(GUESS, encoding="utf-8")
    return folder


@pytest.fixture
def attack(shared, run, tmp_path):
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)

    def go(*more: str, model: str = "model", update: str = "U.safetensors", guess: tuple[str, ...] = PRIVATE[::-1]):
        (tmp_path / "guess.txt").write_text("\n".join(guess), encoding="utf-8")
        words = ("--model", f"hf:{model}", "--update", update, "--batch-size", "2", "--out", "out")
        return run("attack", *words, "--attack", "guess.py:guess", *more)

    return go


def test_sentences_are_written_scored_and_shown(attack, tmp_path) -> None:
    (tmp_path / "truth.txt").write_text("\n".join(PRIVATE) + "\n", encoding="utf-8")
    guess = ("The ship was sold in 7, and they left.", PRIVATE[0])
    said = attack("--truth", "truth.txt", guess=guess)
    assert said.code == 0, said.err
    assert (tmp_path / "out/sentences.txt").read_text(encoding="utf-8").splitlines() == list(guess)
    record = json.loads((tmp_path / "out/result.json").read_text(encoding="utf-8"))
    assert record["verdict"]["headline"] == "Both private sentences came back, 1 of them word for word."
    scores = {a["metric"]: a for a in record["aggregates"]}
    assert scores["exact_match"]["mean"] == 0.5
    assert scores["rouge_1"]["mean"] == pytest.approx(1 - 1 / 22)
    assert scores["rouge_1"]["guessed"] < 0.5
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<mark>7,</mark>" in html
    assert '<mark class="missed">1905,</mark>' in html
    assert "1 of 2" in html
    assert guess[0] in said.out
    assert run_again(attack, tmp_path) == html


def run_again(attack, tmp_path) -> str:
    from gradleak.audit.folder import read_folder
    from gradleak.report import picture, render

    folder = read_folder(tmp_path / "out")
    return render(folder.record, picture(folder.record, folder.inputs, folder.truth, folder.snapshots))


def test_without_truth_words_are_shown_and_no_ids(attack, tmp_path) -> None:
    assert attack().code == 0
    record = json.loads((tmp_path / "out/result.json").read_text(encoding="utf-8"))
    assert record["shown"]["lines"] == list(PRIVATE[::-1])
    assert "Sentence 1" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_names_that_an_update_may_have(attack, tmp_path) -> None:
    update = load_file(tmp_path / "U.safetensors")
    save_file({**update, "lm_head.weight": update["transformer.wte.weight"].clone()}, tmp_path / "tied.safetensors")
    assert attack(update="tied.safetensors").code == 0
    save_file({k: v for k, v in update.items() if "wte" not in k}, tmp_path / "frozen.safetensors")
    assert attack(update="frozen.safetensors").code == 0
    notes = json.loads((tmp_path / "out/result.json").read_text(encoding="utf-8"))["outcome"]["notes"]
    assert any("nothing of 'transformer.wte.weight'" in note for note in notes)


def pickled(folder) -> None:
    torch.save(load_file(folder / "model/model.safetensors"), folder / "model/pytorch_model.bin")
    (folder / "model/model.safetensors").unlink()


def without_tokenizer(folder) -> None:
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()


def configure(folder, **changed) -> None:
    path = folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def remote_code(folder) -> None:
    configure(folder, model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "model/evil.py").write_text("import pathlib; pathlib.Path('pwned').touch()")


def another_model(folder) -> None:
    write_small_gpt2(folder / "model", [*PRIVATE, MORE], width=32)


def a_deeper_model(folder) -> None:
    write_small_gpt2(folder / "model", [*PRIVATE, MORE], layers=3)


def adapter(folder) -> None:
    save_file({"base_model.model.h.0.lora_A.weight": torch.ones(2, 2)}, folder / "U.safetensors")


BAD = {
    "no such folder": (lambda folder: shutil.rmtree(folder / "model"), (), "config.json"),
    "no tokenizer": (without_tokenizer, (), "has no tokenizer"),
    "a broken tokenizer": (lambda folder: (folder / "model/tokenizer.json").write_text("{}"), (), "cannot be read"),
    "pickled weights": (pickled, (), "pickled (pytorch_model.bin)"),
    "weights that do not fit": (lambda folder: configure(folder, n_embd=32), (), "do not fit their config.json"),
    "weights that lack layers": (lambda folder: configure(folder, n_layer=3), (), "would be random"),
    "an update of a narrower model": (another_model, (), "has shape"),
    "an update of a shallower model": (a_deeper_model, (), "ends with layer 1"),
    "an update of an adapter": (adapter, (), "--lora"),
    "remote code": (remote_code, (), "No causal language model can be loaded"),
    "no task": (lambda folder: configure(folder, architectures=None), (), "state the task"),
    "another task": (lambda folder: None, ("--task", "masked"), "No masked language model"),
    "an unknown task": (lambda folder: None, ("--task", "poetry"), "no task named 'poetry'"),
    "no adapter": (lambda folder: None, ("--lora", "model"), "adapter_model.safetensors"),
    "a shape": (lambda folder: None, ("--input-shape", "3"), "--input-shape"),
    "dropout": (lambda folder: None, ("--mode", "train"), "without dropout"),
    "a loss": (lambda folder: None, ("--loss", "mse"), "its own"),
    "labels": (lambda folder: None, ("--labels", "1,0"), "whole sentences"),
    "too few true sentences": (
        lambda folder: (folder / "t.txt").write_text("One."),
        ("--truth", "t.txt"),
        "1 sentences for a batch of 2",
    ),
    "a truth of bytes": (lambda folder: None, ("--truth", "U.safetensors"), "UTF-8"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_sentence(what, attack, tmp_path) -> None:
    spoil, more, expected = BAD[what]
    spoil(tmp_path)
    said = attack(*more)
    assert (said.code, said.out) == (2, "")
    assert expected in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "pwned").exists()


def test_a_vocabulary_of_another_size(attack, tmp_path) -> None:
    write_small_gpt2(tmp_path / "other", [*PRIVATE, MORE, " ".join(f"word{i}" for i in range(40))])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "model" / name)
    said = attack()
    assert said.code == 2
    assert "is that of another model" in said.err


def test_pieces_of_a_tokenizer_make_the_text(tmp_path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        ["the whole thing"], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    text = "the café 日本 🙂!"
    ids = tokenizer.encode(text)
    pieces = [p for p in tokenizer.pieces(ids) if p]
    assert " ".join(pieces).replace(" ##", "") == text == tokenizer.decode([0, *ids, 0])
    assert tokenizer.decode(tokenizer.encode("two\nlines")) == "two lines"
    assert tokenizer.special == (0,)
