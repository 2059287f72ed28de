"""Synthetic images: model inversion and the GAN attack find the class, gradients give the example away.

One class per client, on MNIST. Ten honest clients hold one digit each; in every round each sends the gradient of a
minibatch. An eleventh, malicious client trains a generator against the shared model as discriminator (Hitaj et al.
2017, Algorithm 1): it sends gradients on generated images labelled as a class of their own. After the last round the
victim sends the gradient of one image that nobody trained on. All attackers look at this same model: model inversion
(Fredrikson et al. 2015) climbs its confidence, the GAN attack has its generator, and DLG reads the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gradleak as gl
from gradleak.metrics import mse, psnr, ssim
from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, median, share
from gradleak.training import Adam, gradient, parameters

from . import _cohort, _ours, _shared  # noqa: TID252
from ._model_inversion import model_inversion  # noqa: TID252
from ._published import published  # noqa: TID252

NAME = "synthetic"
NEEDS = ("mnist.npz",)
VERSION = 1

CLASSES, FAKE = 11, 10  # ten digits and the generator's images
PER_CLIENT = 16
NOISE = 64
SHOWN = 16  # generated images that are scored
SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class Config:
    """Scale: victim digits, private images of each, rounds of training, budgets."""

    digits: int
    ours: int
    published: int
    rounds: int
    outer: int
    inversion: int


SMOKE = Config(1, 1, 1, 20, 2, 50)
DEFAULT = Config(4, 8, 3, 800, 100, 2000)
FULL = Config(10, 100, 100, 5000, 300, 5000)


class Generator(nn.Module):
    """Noise (N, 64) → digits (N, 1, 28, 28) in [0, 1]."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.dense = nn.Linear(NOISE, 32 * 7 * 7)
        self.up = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return images."""
        images: Tensor = self.up(self.dense(z).view(-1, 32, 7, 7))
        return images


def victim(seed: int) -> nn.Module:
    """Return the LeNet of all clients, with random weights."""
    return gl.models.lenet(classes=CLASSES, in_channels=1, image_size=28, seed=seed)


def federation(lab: Lab, *, digit: int, rounds: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the shared model and, inside the malicious client, the generator of ``digit``."""
    x, y = lab.images("mnist", "train")
    x = x.float()
    held = [x[y == c] for c in range(10)]
    rng = torch.Generator().manual_seed(100 + digit)
    model, loss = victim(digit), gl.CrossEntropy()
    params, server = parameters(model), Adam(lr=3e-3)
    state = server.start(params)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(200 + digit)  # layers draw from the global generator only
        generator = Generator()
    solver = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    targets = torch.full((PER_CLIENT,), digit)
    labels = torch.arange(CLASSES).repeat_interleave(PER_CLIENT)
    for step in range(rounds):
        # The malicious client: first its generator, against the model it has just received.
        made = generator(torch.randn(PER_CLIENT, NOISE, generator=rng))
        solver.zero_grad()
        F.cross_entropy(functional_call(model, params, (made,)), targets).backward()
        solver.step()
        chosen = [h[torch.randint(len(h), (PER_CLIENT,), generator=rng)] for h in held]
        # Equal numbers each: the mean of the clients' gradients is the gradient of all their images together.
        update, _ = gradient(model, loss, params, torch.cat([*chosen, made.detach()]), labels)
        change, state = server.step(step, params, update, state)
        params = {k: (p + change[k]).detach() for k, p in params.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(params[name])
        generated = generator(torch.randn(SHOWN, NOISE, generator=rng))
        fooled = functional_call(model, params, (generated,)).argmax(-1) == digit
    test, truth = lab.images("mnist", "test")
    notes = {
        "accuracy": _cohort.accuracy(model, test.float(), truth),
        "fooled": float(fooled.double().mean()),
    }
    return {**params, "generated": generated, "average": held[digit].mean(0)}, notes


def _model(tensors: Mapping[str, Tensor]) -> nn.Module:
    model = victim(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name])
    return model


def distances(guesses: Tensor, example: Tensor, average: Tensor) -> dict[str, float]:
    """Return the mean over ``guesses`` (N, C, H, W) of MSE, PSNR and SSIM to the example and to the class average."""
    guesses = torch.nan_to_num(guesses, nan=0.5, posinf=1.0, neginf=0.0).clamp(0, 1)
    found = {}
    for name, truth in (("example", example), ("average", average)):
        whole = truth.expand_as(guesses)
        found |= {f"{m.name} to {name}": float(m(guesses, whole).mean()) for m in (mse, psnr, ssim)}
    return found


def attack(lab: Lab, *, digit: int, image: int, attacker: str, rounds: int, budget: int) -> Mapping[str, Any]:
    """Let one attacker loose on the private image (number ``image`` among the test images of its digit)."""
    tensors, notes = lab.tensors(federation, digit=digit, rounds=rounds)
    model, average = _model(tensors), tensors["average"]
    x, y = lab.images("mnist", "test")
    private = x[y == digit][image : image + 1].float()
    batch, training = gl.Batch(private, torch.tensor([digit])), gl.FedSGD()
    update = training(model, batch)
    extra: dict[str, Any] = {"accuracy": notes["accuracy"], "fooled": notes["fooled"]}
    if attacker == "ours":
        found = _ours.reconstruct([_shared.observe(model, batch, update=update)], iterations=budget, seed=image)[0]
        guesses = found.inputs
        extra |= {"status": found.status, "evaluations": found.evaluations}
    elif attacker == "published":
        result = published(model, update.tensors, SHAPE, CLASSES, seed=image, outer=budget)
        guesses = result.inputs
        extra |= {"status": result.status, "evaluations": result.evaluations}
    elif attacker == "model inversion":
        seen = gl.ThreatModel(gl.Knowledge.LABELS).observe(
            model, update, space=gl.ImageSpace(SHAPE), labels=batch.labels
        )
        inverted = model_inversion(iterations=budget).reconstruct(seen)
        guesses = inverted.inputs
        extra |= {"status": inverted.status, "confidence": 1 - inverted.objective}
    elif attacker == "GAN attack":
        guesses = tensors["generated"]
    else:
        guesses = average[None]
    picture = torch.nan_to_num(guesses[0].detach(), nan=0.5).clamp(0, 1)
    return distances(guesses, private[0], average) | extra | {"image": picture, "truth": private[0], "average": average}


TITLES = {
    "ours": "DLG's claim, our attacker",
    "published": "DLG as published",
    "model inversion": "model inversion (Fredrikson et al. 2015)",
    "GAN attack": "GAN attack (Hitaj et al. 2017)",
    "average": "the class average itself",
}


def run(config: Config, lab: Lab) -> Result:
    """Score every attacker against the private example and against the average of its class."""
    digits = lab.sample(10, config.digits, seed=0)
    counts = {"ours": config.ours, "published": config.published}
    budgets = {"ours": 3000, "published": config.outer, "model inversion": config.inversion}
    found: dict[str, list[Measured]] = {}
    for attacker in TITLES:
        cases = [
            {
                "digit": d,
                "image": i,
                "attacker": attacker,
                "rounds": config.rounds,
                "budget": budgets.get(attacker, 0),
            }
            for d in digits
            for i in lab.sample(150, counts.get(attacker, config.ours), seed=d)
        ]
        found[attacker] = lab.measure(attack, cases)
    rows = [_row(kind, to, unit, found) for to in ("example", "average") for kind, unit in _METRICS]
    for attacker in ("model inversion", "GAN attack", "average"):
        for to in ("example", "average"):
            if attacker == to:
                continue
            records = found[attacker]
            note = "; ".join(
                f"{name} {median([r[f'{kind} to {to}'] for r in records]).value:.3g}{unit}"
                for kind, name, unit in (("psnr", "PSNR", " dB"), ("ssim", "SSIM", ""))
            )
            rows.append(
                Row(
                    f"MSE to the {_NAMES[to]}, {attacker}",
                    None,
                    median([r[f"mse to {to}"] for r in records]),
                    note=note,
                )
            )
    rows.append(
        Row("nearer to the example than to the average, DLG", nearer(found["ours"]), nearer(found["published"]))
    )
    rows += [
        Row(f"nearer to the example than to the average, {a}", None, nearer(found[a]))
        for a in ("model inversion", "GAN attack")
    ]
    return Result(
        rows=rows,
        figures=[
            Figure(
                "images",
                "One private digit per client (top), what each attacker shows of it, and the average of its class.",
                lambda figure: _draw(figure, found, config),
                (1.3 * config.digits + 3, 6.0),
            )
        ],
        texts={"Victims": _victims(found, digits)},
        scaled=""
        if config is FULL
        else f"{config.digits} digits with {config.ours} ({config.published}) images instead of {FULL.digits} with "
        f"{FULL.ours}, {config.rounds} instead of {FULL.rounds} rounds, up to {20 * config.outer} instead of "
        f"{20 * FULL.outer} evaluations of the published algorithm",
    )


_METRICS = (("mse", ""), ("psnr", "dB"), ("ssim", ""))
_NAMES = {"example": "private example", "average": "class average"}


def _row(kind: str, to: str, unit: str, found: Mapping[str, Sequence[Measured]]) -> Row:
    ours, theirs = (median([r[f"{kind} to {to}"] for r in found[a]]) for a in ("ours", "published"))
    cost = f"{median([r.seconds for r in found['ours']]).value:.0f} s each"
    return Row(f"{kind.upper()} to the {_NAMES[to]}, DLG", ours, theirs, unit=unit, cost=cost)


def nearer(records: Sequence[Measured]) -> Any:
    """Return the share of results with a smaller MSE to the private example than to the average of its class."""
    return share([r["mse to example"] < r["mse to average"] for r in records])


def _victims(found: Mapping[str, Sequence[Measured]], digits: Sequence[int]) -> str:
    lines = []
    for digit in digits:
        of = next(r for r in found["GAN attack"] if r.case["digit"] == digit)
        climbed = next(r for r in found["model inversion"] if r.case["digit"] == digit)
        lines.append(
            f"digit {digit}: model accuracy {100 * of['accuracy']:.1f} %, generated images classified as it "
            f"{100 * of['fooled']:.0f} %, confidence of the inverted image {climbed['confidence']:.2f} "
            f"({climbed['status']})"
        )
    return "\n".join(lines)


def _draw(figure: Any, found: Mapping[str, Sequence[Measured]], config: Config) -> None:
    def first(attacker: str, name: str = "image") -> list[Any]:
        seen: dict[int, Any] = {}
        for record in found[attacker]:
            seen.setdefault(record.case["digit"], record[name])
        return list(seen.values())

    rows = [("private", first("ours", "truth"))]
    rows += [(TITLES[a], first(a)) for a in TITLES]
    _shared.pictures(figure, rows)
