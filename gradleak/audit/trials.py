"""One trial of an audit: a batch is drawn, a client sends its update, an attack is let loose on it, and it is scored.

A trial is named by its content, so that it is measured once: the model and data by their hashes, and all that the plan
says about it. Its result depends on nothing else, unless the time of its budget is used up.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradleak.attacks
from gradleak.attacks.base import Attack, Progress, nothing_found
from gradleak.audit.factories import build_attack
from gradleak.audit.federation import build, tensors_hash
from gradleak.audit.plan import Case, Utility
from gradleak.audit.scores import score
from gradleak.audit.store import place
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import MissingKnowledge, NotApplicable, clean, is_memory
from gradleak.models import parse_options
from gradleak.spaces import InputSpace
from gradleak.threat import Knowledge, ThreatModel
from gradleak.types import Batch, Reconstruction, Shows, Verdict

__all__ = ["Result", "Trial", "attempt", "choose_attack", "findings", "kept", "prior", "scored", "unscored"]

VERSION = 1
"""Of what a trial measures; another one measures everything anew."""
_PUBLIC = 256
"""Public examples that guesses without the update are made of."""
_ROUNDED = torch.float32


@dataclass(frozen=True)
class Trial:
    """What one trial tries.

    Attributes:
        kind: "attack", or "utility", which trains with the case's filters and says how good the model becomes.
        content: names the trial, with ``kind``; plain JSON.
    """

    kind: str
    case: Case
    stage: int = 0
    batch_size: int = 1
    seed: int = 0
    attack: str = "auto"
    knows: tuple[str, ...] = ()
    budget: float | None = None
    tolerance: float = 1e-3

    def content(self) -> dict[str, Any]:
        """Return everything that the result depends on, in plain JSON."""
        federation = build(self.case)
        client: dict[str, Any] = {
            "model": federation.model_hash,
            "data": federation.pool.sha256,
            "mode": self.case.mode,
        }
        client |= {"training": asdict(self.case.training), "filters": list(self.case.filters)}
        client["space"] = repr(federation.pool.space) if federation.pool.space.kind != "table" else "table"
        if self.kind == "utility" or self.stage:
            client |= {"federation": asdict(self.case.utility or Utility()), "seed": self.seed}
        if self.kind == "utility":
            return client
        asked = {"stage": self.stage, "batch_size": self.batch_size, "seed": self.seed, "attack": self.attack}
        return client | asked | {"knows": sorted(self.knows), "budget": self.budget, "tolerance": self.tolerance}

    def path(self, folder: Path) -> Path:
        """Return the file of its result in the folder of trials."""
        return place(folder, "audit", self.kind, self.content(), version=VERSION)


@dataclass(frozen=True, eq=False)
class Result:
    """What a trial found: JSON values, and arrays by name, or the traceback of what went wrong."""

    values: Mapping[str, Any]
    seconds: float


def choose_attack(spec: str, budget: float | None) -> Attack:
    """Return the attack ``NAME[:K=V,…]`` or ``module:factory``.

    Raises:
        InvalidInput: there is no such attack.
    """
    name, _, rest = spec.partition(":")
    if name in gradleak.attacks.__all__:
        return build_attack(name, parse_options(rest.split(",") if rest else ()), budget).attack
    return build_attack(spec, {}, budget).attack


def attempt(trial: Trial) -> Result:
    """Run one trial."""
    return kept(lambda: _quality(trial) if trial.kind == "utility" else _attack(trial))


def kept(work: Callable[[], Mapping[str, Any]]) -> Result:
    """Run ``work`` with one thread; what goes wrong in it is its result."""
    begin = time.perf_counter()
    try:
        with _one_thread():
            values = work()
    except Exception as error:  # noqa: BLE001 - kept with its traceback, and measured again on request
        if is_memory(error):
            error = MemoryError("The trial does not fit in memory; take a smaller batch or model.")
        values = {"error": clean(f"{type(error).__name__}: {error}"), "traceback": traceback.format_exc()[-8000:]}
    return Result(values, time.perf_counter() - begin)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Sums of several threads round differently, and a trial has the same bits wherever it runs.
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # noqa: TID251 - put back below
    try:
        yield
    finally:
        torch.set_num_threads(before)  # noqa: TID251


def _quality(trial: Trial) -> dict[str, Any]:
    federation, plan = build(trial.case), trial.case.utility or Utility()
    trained = federation.train(plan, plan.rounds, trial.seed, federation.training)
    metric, value = federation.quality(trained)
    return {"metric": metric, "value": value, "before": federation.quality(federation.model)[1]}


def _attack(trial: Trial) -> dict[str, Any]:
    federation = build(trial.case)
    space, model = federation.pool.space, federation.at(trial.stage)
    truth, batch = federation.batch(federation.pool.test, trial.batch_size, trial.seed)
    public = federation.pool.train.inputs[:_PUBLIC]
    training = federation.training.reseed(trial.seed + 1)
    knows = reduce(or_, (Knowledge[name.upper()] for name in trial.knows), Knowledge.NOTHING)
    observation = ThreatModel(knows).observe(
        model,
        training(model, batch),
        space=space,
        training=training,
        batch_size=trial.batch_size,
        labels=batch.labels,
        public=space.encode(public).to(batch.inputs),
    )
    deadline = Deadline(trial.budget)

    def watch(_: Progress) -> None:
        deadline.raise_if_over()

    values: dict[str, Any] = {"model": tensors_hash(model)}
    try:
        found = choose_attack(trial.attack, trial.budget).reconstruct(
            observation, seed=trial.seed, callback=watch, deadline=deadline
        )
    except TimeSpent:
        found = nothing_found(observation)
    except (NotApplicable, MissingKnowledge) as refusal:
        return values | {"refused": str(refusal), "findings": findings(refusal.findings)}
    return values | scored(space, found, truth, public, trial.tolerance)


def unscored(space: InputSpace, found: Reconstruction) -> dict[str, Any]:
    """Return what is known of a reconstruction without the truth: what it proves, and whether it came back is not."""
    certificate = found.certificate
    assert certificate is not None  # the template method of every attack makes one
    examples = [
        {"index": i, "recovered": None, "proved": v is Verdict.PROVED, "error": None, "words": ""}
        for i, v in enumerate(certificate.examples)
    ]
    return {
        "status": found.status.value,
        "way": found.attack,
        "evaluations": found.evaluations,
        "certificate": certificate.verdict.value,
        "reason": certificate.reason,
        "findings": findings(found.findings),
        "error_name": space.error_name,
        "nouns": space.nouns,
        "nulls": [],
        "examples": examples,
    }


def scored(
    space: InputSpace, found: Reconstruction, truth: Batch, public: Tensor | None, tolerance: float
) -> dict[str, Any]:
    """Return what is known of a reconstruction beside the truth, decoded, and ``public`` examples."""
    certificate, values = found.certificate, unscored(space, found)
    assert certificate is not None
    guesses = [(n.description, space.errors(n.inputs, truth.inputs), n.oracle) for n in space.null_guesses(
        truth.inputs, public)]  # fmt: skip
    nulls = [
        {"guess": d, "error": float(e.nanmean()), "recovered": int((e <= tolerance).sum())}
        for d, e, o in guesses
        if not o
    ]
    if found.shows is not Shows.INPUTS or found.inputs.shape[1:] != truth.inputs.shape[1:]:
        nothing = [{"index": i, "recovered": False, "proved": False, "error": None, "words": "Only features came back."}
                   for i in range(len(truth))]  # fmt: skip
        return values | {"examples": nothing, "nulls": nulls}
    scores = score(found, truth, space, public=public, threshold=tolerance)
    assigned = _assigned(found.inputs, scores.assignment)
    errors = space.errors(space.prepare(assigned), space.prepare(truth.inputs)).tolist()
    examples = []
    for e in sorted(scores.examples, key=lambda e: e.index):
        sure = e.guess is not None and e.guess < len(certificate.examples)
        proved = sure and e.guess is not None and certificate.examples[e.guess] is Verdict.PROVED
        examples.append(
            {
                "index": e.index,
                "recovered": e.success,
                "proved": proved,
                "error": errors[e.index] if errors[e.index] == errors[e.index] else None,
                "words": e.words,
                "label": e.label,
                "label_found": e.recovered,
            }
        )
    return values | {"examples": examples, "nulls": nulls} | _shown(space, assigned, truth.inputs)


def _assigned(guess: Tensor, assignment: tuple[int | None, ...]) -> Tensor:
    none = torch.full_like(guess[0], torch.nan) if guess.is_floating_point() else torch.zeros_like(guess[0])
    return torch.stack([none if a is None else guess[a] for a in assignment])


def _shown(space: InputSpace, guess: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return what a person sees: pictures as arrays, everything else as texts."""
    if space.display == "pictures":
        return {"guess": guess.to(_ROUNDED), "truth": truth.to(_ROUNDED)}
    texts = [space.texts(values) for values in (guess, truth)]
    if texts[0] is None or texts[1] is None:
        flat = [[[f"{v:.4g}" for v in row[:12].tolist()] for row in values.flatten(1)] for values in (guess, truth)]
        return {"names": [], "guess_text": flat[0], "truth_text": flat[1]}
    return {
        "names": list(space.names),
        "guess_text": [list(t) for t in texts[0]],
        "truth_text": [list(t) for t in texts[1]],
    }


def findings(found: Any) -> list[dict[str, Any]]:
    """Return what was read besides whole examples, in plain JSON."""
    return [
        {"kind": f.kind.value, "count": f.count, "of": f.of, "proved": f.proved, "text": str(f.text)} for f in found
    ]


def prior(case: Case, tolerance: float) -> dict[str, Any]:
    """Return how often the best single guess without the update is right, of public examples and the null guesses.

    ``hits`` of ``of`` held-out examples, the best guess chosen by them, which favors the guess.
    """
    pool = build(case).pool
    truth, public = pool.test.inputs, pool.train.inputs[:_PUBLIC]
    space = pool.space
    best = max(int((space.errors(n.inputs, truth) <= tolerance).sum()) for n in space.null_guesses(truth, public))
    for guess in public:
        best = max(best, int((space.errors(guess.expand_as(truth), truth) <= tolerance).sum()))
    return {"hits": best, "of": len(truth), "guesses": len(public)}
