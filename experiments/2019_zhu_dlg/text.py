"""A masked language model: are sentences readable from its gradient?

Two ways of ours: gradient matching, which gives the project page's trace, and reading in closed form, which needs no
iterations and is the better one. The published algorithm is told the masked positions; reading finds them. All
measured sentences were drawn after the attacks were finished, with seeds that no development had used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradleak as gl
from gradleak.attacks.matching import LBFGS, BalancedError, GradientMatching
from gradleak.errors import NotApplicable
from gradleak.integrations.huggingface import MaskedLanguageModel, TokenCrossEntropy
from gradleak.metrics import assign
from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, mean, median, share
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.training import FedSGD, parameters
from gradleak.types import Batch

from . import _language  # noqa: TID252

NAME = "text"
VERSION = 2
NEEDS = ("wikitext2_valid.txt", "wikitext2_test.txt", "bert_base_uncased_vocab.txt")
SHOWN = (0, 10, 20, 30)  # iterations of the project page
INNER = 20  # evaluations an iteration, torch.optim.LBFGS's default
EARLY = 6  # iterations after which matching looks for the first time whether its sentences explain the update
TRAINED = (
    ". Training moves the gradient to the head: tensors of the first layers are left with little of its norm, in "
    "which a search hardly sees the input; reading needs their direction only"
)
METRICS = (gl.metrics.token_accuracy, gl.metrics.rouge_1, gl.metrics.rouge_2, gl.metrics.rouge_l)


@dataclass(frozen=True)
class Config:
    """How much is measured.

    Attributes:
        width: of the small BERT.
        layers: of the small BERT.
        steps: training steps of the trained model.
        sentences: sentences read at batch 1.
        matched: of these, how many are also matched iteratively at random and at trained weights.
        published: of these, how many the published algorithm gets (and of the batches, at most).
        batches: batches read at each larger size.
        sizes: batch sizes beyond 1.
        iterations: of matching and of the published algorithm.
        base: sentences read from the shape of bert-base (12 layers, width 768, random weights).

    """

    width: int
    layers: int
    steps: int
    sentences: int
    matched: tuple[int, int]
    published: tuple[int, int]
    batches: int
    sizes: tuple[int, ...]
    iterations: int
    base: int


SMOKE = Config(128, 3, 2, 1, (1, 1), (1, 1), 1, (2,), 1, 0)
DEFAULT = Config(256, 4, 800, 20, (20, 5), (5, 1), 3, (2, 3, 4), 30, 3)
FULL = Config(256, 4, 20000, 200, (200, 200), (200, 100), 100, (2, 3, 4, 8), 30, 50)


def _batch(lab: Lab, number: int, size: int) -> Tensor:
    """Return random sentence ``number`` with random others of its length, (N, T); −1 is the project page's sentence."""
    if number < 0:
        return torch.tensor([_language.tokenizer(lab).encode(_language.PAGE)])
    known = _language.sentences(lab)
    same = [s for i, s in enumerate(known) if len(s) == len(known[number]) and i != number]
    return torch.tensor([known[number], *(same[j] for j in lab.sample(len(same), size - 1, seed=number))])


def _mask(lab: Lab, originals: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    words, generator = _language.tokenizer(lab), torch.Generator().manual_seed(seed)
    parts = [words.mask(s.tolist(), _language.MASKED_SHARE, generator) for s in originals]
    ids, positions, labels = (torch.stack(list(x)) for x in zip(*parts, strict=True))
    return ids, positions, labels


def _scores(guesses: Tensor, originals: Tensor, told: Tensor | None = None) -> dict[str, list[float]]:
    """Return every metric of each sentence between [CLS] and [SEP], sentences assigned one to one.

    ``told`` (N, T) leaves out tokens that an attacker was told.
    """
    truth = originals if told is None else originals.masked_fill(told, -1)
    guesses, truth = guesses[:, 1:-1], truth[:, 1:-1]
    return {m.name: m(guesses[assign(guesses, truth)], truth).tolist() for m in METRICS}


def read(lab: Lab, *, number: int, size: int, seed: int, model: Mapping[str, int]) -> Mapping[str, Any]:
    """Read a batch in closed form: positions, labels and tokens from the float32 gradient alone."""
    lm, _ = _language.language_model(lab, **model)
    originals, began = _batch(lab, number, size), time.process_time()
    ids, positions, labels = _mask(lab, originals, seed)
    training = FedSGD(TokenCrossEntropy())
    update = training(lm.at(positions), Batch(ids, labels))
    observation = ThreatModel().observe(
        lm, update, space=lm.space(ids.shape[1]), training=training, batch_size=size
    )  # the attacker's copy does not say which positions are masked
    words = _language.tokenizer(lab)
    try:
        found = gl.attacks.read_sentences(mask=words.id("[MASK]")).reconstruct(observation, seed=seed)
    except NotApplicable as error:
        nothing = {m.name: [0.0] * size for m in METRICS}
        spent = time.process_time() - began
        return {
            "scores": nothing,
            "verdict": f"not applicable: {error}",
            "processor_seconds": spent,
            "texts": [],
        }
    guesses = found.inputs if found.labels is None else torch.where(found.labels >= 0, found.labels, found.inputs)
    verdict = found.certificate.verdict if found.certificate else "unproved"
    return {
        "scores": _scores(guesses, originals),
        "verdict": verdict,
        "residual": found.objective**0.5 if verdict == "proved" else -1.0,
        "processor_seconds": time.process_time() - began,
        "texts": [words.decode(g) for g in guesses.tolist()],
        "originals": [words.decode(s) for s in originals.tolist()],
    }


def match(
    lab: Lab, *, number: int, size: int, seed: int, model: Mapping[str, int], iterations: int, attacker: str
) -> Mapping[str, Any]:
    """Match the gradient by L-BFGS over the input embeddings; tokens at every shown iteration."""
    lm, _ = _language.language_model(lab, **model)
    originals, began = _batch(lab, number, size), time.process_time()
    ids, positions, labels = _mask(lab, originals, seed)
    lm, training = lm.at(positions), FedSGD(TokenCrossEntropy())
    words, space = _language.tokenizer(lab), lm.space(ids.shape[1], _never(lab))
    shown = sorted({min(s, iterations) for s in SHOWN})
    evaluations = iterations * INNER
    if attacker == "published":
        frames = _published(lm, training, ids, labels, seed, shown)
    else:
        observation = ThreatModel(Knowledge.BATCH_SIZE | Knowledge.TRAINING | Knowledge.LABELS).observe(
            lm, training(lm, Batch(ids, labels)), space=space, training=training, batch_size=size, labels=labels
        )
        for most in sorted({min(EARLY, iterations), iterations}):
            found = GradientMatching(
                BalancedError(),
                LBFGS(iterations=most * INNER, history=100),
                init_std=float(space.table.std()),
                dtype=None,
                vectorize=False,
            ).reconstruct(observation, seed=seed)
            evaluations = found.evaluations
            if _explains(observation, found.inputs):
                break
        assert found.trace is not None
        assert found.trace.snapshots is not None
        steps = torch.tensor(found.trace.iterations)
        frames = {s: found.trace.snapshots[int((steps <= s * INNER).nonzero()[-1])].long() for s in shown}
        frames[shown[-1]] = found.inputs
    hidden = torch.zeros_like(ids, dtype=torch.bool).scatter(1, positions, True)
    return {
        "scores": {str(s): _scores(f, ids, hidden) for s, f in frames.items()},
        "evaluations": evaluations,
        "processor_seconds": time.process_time() - began,
        "texts": {
            str(s): [words.decode(g) for g in f.scatter(1, positions, labels).tolist()] for s, f in frames.items()
        },
    }


def _explains(observation: Observation, ids: Tensor) -> bool:
    """Tell whether ``ids`` cause the update that was seen, down to its rounding: the attacker's own reason to stop."""
    assert observation.training is not None
    assert observation.labels is not None
    seen = observation.update.tensors
    embedded = observation.space.encode(ids)
    simulated = observation.training.tensors(observation.model, observation.params, embedded, observation.labels)
    wrong = sum(float((simulated[k] - v).square().sum()) for k, v in seen.items())
    return wrong**0.5 <= 1e-5 * sum(float(v.square().sum()) for v in seen.values()) ** 0.5


def _never(lab: Lab) -> list[int]:
    words = _language.tokenizer(lab)
    return [words.id("[PAD]"), *(words.id(f"[unused{i}]") for i in range(99))]


def _published(
    lm: MaskedLanguageModel, training: FedSGD, ids: Tensor, labels: Tensor, seed: int, shown: Sequence[int]
) -> dict[int, Tensor]:
    """Algorithm 1: float32, N(0, 1) starts, labels jointly, L-BFGS with unit steps and no line search."""
    params, space = parameters(lm), lm.space(ids.shape[1])
    seen = training(lm, Batch(ids, labels)).tensors
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(ids), *space.shape, generator=generator).requires_grad_()
    y = torch.randn(*labels.shape, len(space.table), generator=generator).requires_grad_()
    optimizer = torch.optim.LBFGS([x, y], lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        simulated = training.tensors(lm, params, x, y.softmax(-1))
        distance = torch.stack([(simulated[k] - seen[k]).square().sum() for k in seen]).sum()
        distance.backward()
        return distance

    frames = {0: space.decode(x.detach())}
    for iteration in range(1, shown[-1] + 1):
        if bool(torch.isfinite(x).all()):  # once diverged, it stays so
            optimizer.step(closure)
        if iteration in shown:
            frames[iteration] = space.decode(x.detach())
    return frames


def rows_apart(lab: Lab, *, number: int, seed: int, model: Mapping[str, int]) -> Mapping[str, Any]:
    """Name the tokens whose rows stand out of the word-embedding gradient, were it shared."""
    lm, _ = _language.language_model(lab, **model)
    shared = MaskedLanguageModel(lm.model, share_embeddings=True)
    ids, positions, labels = _mask(lab, _batch(lab, number, 1), seed)
    update = FedSGD(TokenCrossEntropy())(shared.at(positions), Batch(ids, labels)).tensors
    name = next(k for k, p in shared.named_parameters() if p is shared.model.get_input_embeddings().weight)
    # The tied decoder's part of every row lies in the span of the K masked positions' last hidden states; rows of
    # unit length, because frequent words have long rows there.
    gradient = update[name].double()
    norms = gradient.norm(dim=1)
    unit = gradient / norms[:, None].clamp_min(1e-300)
    rows = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:3000]]
    for _ in range(30):
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        logs = values.flip(0).clamp_min(1e-40).log10()[: len(values) // 2]
        span = vectors.flip(1)[:, : int((logs[:-1] - logs[1:]).argmax()) + 1]
        part = (rows @ span).square()
        alone = (part / part.sum(0).clamp_min(1e-300)).amax(1) > 0.2  # a direction that one row has for itself
        if not bool(alone.any()):
            break
        rows = rows[~alone]
    apart = (unit - unit @ span @ span.T).norm(dim=1) > 1e-4
    bias = next(v for k, v in update.items() if v.shape == norms.shape)
    named = set(apart.nonzero().flatten().tolist()) | set((bias < 0).nonzero().flatten().tolist())
    truth = set(ids[0].tolist()) | set(labels[0].tolist())
    return {"recall": len(named & truth) / len(truth), "precision": len(named & truth) / len(named)}


def _cost(records: Sequence[Measured], what: str) -> str:
    return f"{median([r['processor_seconds'] for r in records]).value:.0f} s of processor time {what}"


def _accuracy(record: Measured, step: str | None = None) -> float:
    """Return the mean over a batch's sentences."""
    scores = record["scores"] if step is None else record["scores"][step]
    values = scores["token_accuracy"]
    return sum(values) / len(values)


def _rouge(records: Sequence[Measured], step: str | None = None) -> str:
    def average(metric: str) -> float:
        scores = [r["scores"] if step is None else r["scores"][step] for r in records]
        return sum(sum(s[metric]) / len(s[metric]) for s in scores) / len(scores)

    return "ROUGE-1, 2, L: " + ", ".join(f"{average(m):.2f}" for m in ("rouge_1", "rouge_2", "rouge_l"))


def run(config: Config, lab: Lab) -> Result:
    """Measure every row."""
    total = len(_language.sentences(lab))
    numbers = lab.sample(total, config.sentences, seed=1)
    small = {"width": config.width, "layers": config.layers, "seed": 0}
    models: dict[str, dict[str, int]] = {
        "random weights": small | {"steps": 0},
        "trained": small | {"steps": config.steps},
    }
    _, notes = _language.language_model(lab, **models["trained"])
    rows = [
        Row(
            "masked-language-model loss of the trained BERT",
            f"{notes['loss_test']:.2f}",
            unit="nats a token",
            cost=f"{notes['seconds']:.0f} s of training",
            note=f"{config.layers} layers, width {config.width}, {notes['steps']} steps on the WikiText-2 validation "
            f"text, loss on its test text, {notes['loss_before']:.2f} before; a lightly trained model",
        )
    ]
    texts: dict[str, str] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    last, at = str(config.iterations), f"iteration {config.iterations}"
    for kind, model in models.items():
        reading = [{"number": n, "size": 1, "seed": n, "model": model} for n in numbers]
        page = {"number": -1, "size": 1, "seed": 0, "model": model}
        searches = [c | {"iterations": config.iterations} for c in [page, *reading]]
        matched = config.matched[0] if model["steps"] == 0 else config.matched[1]
        tried = config.published[0]
        read_page, *records = lab.measure(read, [page, *reading])
        ours = lab.measure(match, [c | {"attacker": "ours"} for c in searches[: matched + 1]])
        published = lab.measure(match, [c | {"attacker": "published"} for c in searches[: tried + 1]])
        theirs = mean([_accuracy(r, last) for r in published[1:]])
        rows += [
            Row(
                f"token accuracy, {kind}, batch 1",
                mean([_accuracy(r) for r in records]),
                theirs,
                cost=_cost(records, "a sentence"),
                note=f"ours reads in closed form; published: {tried} of these sentences, at {at}, the masked "
                "positions told",
            ),
            Row(
                f"sentences read without an error and proved, {kind}, batch 1",
                share([_accuracy(r) == 1.0 and r["verdict"] == "proved" for r in records]),
                share([_accuracy(r, last) == 1.0 for r in published[1:]]),
                note=f"published: {tried} of these sentences, right ones",
            ),
            Row(
                f"token accuracy by matching at {at}, {kind}, batch 1",
                mean([_accuracy(r, last) for r in ours[1:]]),
                theirs,
                cost=_cost(ours[1:], "a sentence"),
                note="ours: float32, tensors balanced, strong-Wolfe L-BFGS, start of the table's spread, positions "
                f"and labels as read; it stops once its sentence explains the update. {_rouge(ours[1:], last)}"
                + (TRAINED if model["steps"] else ""),
            ),
        ]
        for name, found in (("ours, matching", ours[0]), ("published", published[0])):
            shown = "\n".join(f"[iter={s}] {t[0]}" for s, t in found["texts"].items())
            texts[f"The project page's sentence, {kind}, {name}"] = shown
            curves[f"{kind}, {name}"] = [(int(s), _accuracy(found, s)) for s in found["texts"]]
        texts[f"The project page's sentence, {kind}, ours, read ({read_page['verdict']})"] = "\n".join(
            read_page["texts"]
        )
        for size in config.sizes:
            cases = [
                {"number": n, "size": size, "seed": n, "model": model}
                for n in lab.sample(total, config.batches, seed=10 * size)
            ]
            several = lab.measure(read, cases)
            tries = [
                c | {"iterations": config.iterations, "attacker": "published"} for c in cases[: config.published[1]]
            ]
            rival = [_accuracy(r, last) for r in lab.measure(match, tries)]
            whole = sum(r["verdict"] == "proved" for r in several)
            rows.append(
                Row(
                    f"token accuracy, {kind}, batch {size}",
                    mean([_accuracy(r) for r in several]),
                    mean(rival) if rival else "not run",
                    cost=_cost(several, "a batch"),
                    note=f"ours reads in closed form; {whole} of {len(several)} batches proved; n counts batches"
                    + (f", published: {len(rival)}" if rival else "")
                    + f". {_rouge(several)}",
                )
            )
        leaks = lab.measure(rows_apart, [{"number": n, "seed": n, "model": model} for n in numbers[:5]])
        rows.append(
            Row(
                f"share of a sentence's tokens named by the word-embedding gradient, {kind}",
                mean([r["recall"] for r in leaks]),
                note="a leak of its own, were these rows shared; elsewhere they are not. "
                f"Precision {mean([r['precision'] for r in leaks]).value:.2f}",
            )
        )
    if config.base:
        base = {"width": 768, "layers": 12, "steps": 0, "seed": 0}
        cases = [{"number": n, "size": 1, "seed": n, "model": base} for n in numbers[: config.base]]
        records = lab.measure(read, cases)
        rows.append(
            Row(
                "token accuracy, shape of bert-base with random weights, batch 1",
                mean([_accuracy(r) for r in records]),
                "not run",
                cost=_cost(records, "a sentence"),
                note=f"{sum(r['verdict'] == 'proved' for r in records)} of {len(records)} proved",
            )
        )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), "o-" if "ours" in name else "s--", label=name)
        axes.set(xlabel="iteration", ylabel="token accuracy", title="The project page's sentence", ylim=(-0.02, 1.02))
        axes.legend()

    scaled = (
        ""
        if config == FULL
        else (
            f"{config.sentences} sentences ({config.matched[1]} matched at trained weights), {config.batches} batches "
            f"a size, {config.base} sentences at the shape of bert-base instead of {FULL.sentences}, {FULL.batches} "
            f"and {FULL.base}; the published algorithm on {config.published[0]} sentences and {config.published[1]} "
            f"batch a size; {config.steps} training steps instead of {FULL.steps}"
        )
    )
    return Result(rows, [Figure("text", "Token accuracy along the iterations.", draw)], texts, scaled)
