"""The command ``gradleak demo``: a photograph from one gradient, by search, by linear algebra, and a larger one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import gradleak.models
from gradleak.audit.build import build_record
from gradleak.audit.factories import build_attack
from gradleak.audit.folder import check_writable
from gradleak.audit.numbers import duration, sig
from gradleak.audit.scores import score
from gradleak.cli.console import say
from gradleak.cli.running import Job, about, attack_one, publish
from gradleak.cli.signals import Watch
from gradleak.cli.threads import choose_threads
from gradleak.clock import Deadline
from gradleak.data import demo_image, load_images
from gradleak.exchange import Client
from gradleak.spaces import ImageSpace
from gradleak.threat import ThreatModel
from gradleak.training import FedSGD
from gradleak.types import Batch

__all__ = ["demo"]

# A minute is promised, start-up included, on a machine with other work to do as well.
_ITERATIONS, _SECONDS = 3000, 20.0
_SHAPE, _CLASSES = (3, 32, 32), 100
_SIDE = 224
_TRANSFORMER: dict[str, Any] = {"dropout": 0.1}
"""ViT-Base/16, but for these options."""


def demo(out: Path, seed: int, image: Path | None, command: str) -> int:
    """Leak one photograph from one gradient of the paper's LeNet; return the exit code."""
    out = out.absolute()
    check_writable(out)
    private = demo_image(_SHAPE[1]) if image is None else load_images(image, shape=_SHAPE).inputs[:1]
    # Drawn, not chosen: the attacker does not know the label, and no seed is better than another.
    label = torch.randint(_CLASSES, (1,), generator=torch.Generator().manual_seed(seed))
    model, batch, training = gradleak.models.lenet(seed=seed), Batch(private, label), FedSGD()
    client = Client(model, batch, training)
    observation = ThreatModel().observe(model, client.send(), space=ImageSpace(_SHAPE), training=training, batch_size=1)
    choose_threads(client.send)
    what = "a photograph of a cat" if image is None else f"{image.name!r}"
    say(f"A client computes one gradient of a LeNet on {what} and shares nothing else.")
    say("The server looks for an image that causes the same gradient, by search, as Zhu et al. proposed in 2019 …")
    search = build_attack("dlg", {"iterations": _ITERATIONS})
    job = Job((observation,), search, seed, out, "lenet", torch.float32, _CLASSES, command, truth=batch)
    with Watch(Deadline()) as watch:
        matched = attack_one(observation, job, watch, Deadline(_SECONDS, within=watch.deadline))
        error = sig(score(matched, batch, observation.space).aggregate("mse").mean, 2)
        how = f"{matched.evaluations:,} evaluations, {duration(matched.seconds)}, MSE {error}"
        say(f"Search: {how}.")
        if watch.signal is not None:
            return watch.exit_code
        say("Now the same gradient by linear algebra …")
        job = replace(job, chosen=build_attack("auto", {}))
        found = attack_one(observation, job, watch, watch.deadline)
        watch.rest()
        found = replace(found, trace=found.trace or matched.trace)
        note = (
            f"Slider and curves show the search, dlg(): {how}. Their last stop is this result, which needed no search."
        )
        folder = build_record(
            observation,
            found,
            scores=score(found, batch, observation.space),
            truth=batch,
            **about(job, (note,)),
        )
        publish(folder, out)
        if watch.signal is None:
            _large(out / "vision-transformer", seed, image, command, watch)
        return watch.exit_code


def _large(out: Path, seed: int, image: Path | None, command: str, watch: Watch) -> None:
    """Leak the photograph, forty-nine times as many pixels, from one gradient of ViT-Base/16 with dropout on."""
    shape = (3, _SIDE, _SIDE)
    space = ImageSpace(shape, (0.5,) * 3, (0.5,) * 3)
    private = demo_image(_SIDE) if image is None else load_images(image, shape=shape).inputs[:1]
    model = gradleak.models.vision_transformer(seed=seed, **_TRANSFORMER).train()
    label = torch.randint(1000, (1,), generator=torch.Generator().manual_seed(seed))
    say(f"The same photograph at {_SIDE} × {_SIDE}, in one gradient of a vision transformer whose dropout is on …")
    with torch.random.fork_rng(devices=[]):
        client = Client(model, Batch(space.encode(private), label), FedSGD())
        observation = ThreatModel().observe(model, client.send(), space=space, training=FedSGD(), batch_size=1)
    truth = Batch(private, label)
    job = Job((observation,), build_attack("auto", {}), seed, out, "vision_transformer", torch.float32, 1000, command)
    found = attack_one(observation, job, watch, watch.deadline)
    watch.rest()
    scores = score(found, truth, space)
    publish(build_record(observation, found, scores=scores, truth=truth, **about(job, ())), out)
