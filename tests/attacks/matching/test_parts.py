"""Parts that somebody adds: a prior that sees the model, fewer unknowns than pixels, a penalty across restarts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak as gl
from gradleak.attacks.matching import (
    LBFGS,
    Adam,
    ColorVariation,
    Context,
    Coordinates,
    GradientMatching,
    GroupPrior,
    Prior,
)
from gradleak.attacks.matching.evaluate import Evaluator, Group
from gradleak.attacks.matching.problem import Problem
from gradleak.clock import Deadline
from gradleak.errors import InvalidInput
from gradleak.metrics import psnr
from gradleak.spaces import InputSpace

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (1, 8, 8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return model.double()


def observe(model: nn.Module, inputs: Tensor, labels: Tensor) -> gl.Observation:
    client = gl.Client(model, gl.Batch(inputs, labels))
    space = gl.ImageSpace(tuple(inputs.shape[1:]))
    return gl.ThreatModel().observe(model, client.send(), space=space, training=client.training, batch_size=len(inputs))


# ----------------------------------------------------------------------------------------------- priors that see


@dataclass(frozen=True)
class BatchStatistics(Prior):
    """The batch has the stored statistics of every BatchNorm layer (Yin et al. 2021, Equation 6)."""

    weight: float

    def __call__(self, inputs: Tensor, context: Context) -> Tensor:
        total = inputs.new_zeros(())
        for layer in context.statistics.values():
            assert layer.running_mean is not None
            assert layer.running_variance is not None
            total = total + (layer.mean - layer.running_mean).square().sum()
            total = total + (layer.variance - layer.running_variance).square().sum()
        return self.weight * total


def normalized() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, 4))
    return seeded(model).eval()


def test_a_prior_sees_outputs_features_and_statistics_of_the_whole_batch() -> None:
    model, x, y = normalized(), draw(3, *SHAPE), torch.tensor([0, 1, 2])
    context = Context(model, dict(model.named_parameters()), dict(model.named_buffers()), x, y)
    torch.testing.assert_close(context.outputs, model(x))
    assert context.features is not None
    torch.testing.assert_close(context.features, model[:4](x))
    (layer,) = context.statistics.values()
    before = model[0](x)
    torch.testing.assert_close(layer.mean, before.mean((0, 2, 3)))
    torch.testing.assert_close(layer.variance, before.var((0, 2, 3), unbiased=False))
    assert layer.running_mean is model[1].running_mean
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_search_follows_a_prior_that_sees_the_model(vectorize: bool) -> None:
    model, x, y = normalized(), draw(2, *SHAPE), torch.tensor([0, 1])
    with torch.no_grad():
        before = model[0](x)
        model[1].running_mean.copy_(before.mean((0, 2, 3)))
        model[1].running_var.copy_(before.var((0, 2, 3), unbiased=False))
    seen = observe(model, x, y)
    attack = GradientMatching(
        solver=LBFGS(iterations=6), labels="recovered", restarts=2, vectorize=vectorize, trace=False
    )
    errors = []
    for priors in ((), (BatchStatistics(10.0),)):
        found = dataclasses.replace(attack, priors=priors).reconstruct(seen)
        context = Context(model, seen.params, dict(model.named_buffers()), found.inputs, y)
        errors.append(float(BatchStatistics(1.0)(found.inputs, context)))
    assert errors[1] < 0.1 * errors[0]


def test_a_prior_that_asks_nothing_costs_no_forward_pass() -> None:
    model, runs = normalized(), []
    seen = observe(model, draw(1, *SHAPE), torch.tensor([1]))
    seen.model.register_forward_hook(lambda *_: runs.append(1))

    @dataclass(frozen=True)
    class Asking(Prior):
        def __call__(self, inputs: Tensor, context: Context) -> Tensor:
            return 0 * context.outputs.sum() + 0 * context.outputs.sum()  # computed once for both

    counts = []
    for priors in ((), (gl.attacks.matching.TotalVariation(1e-3),), (Asking(),)):
        runs.clear()
        made = GradientMatching(solver=Adam(iterations=9), labels="joint", priors=priors, trace=False)
        # The search alone: how often a certificate runs the model depends on the result.
        evaluations = made._reconstruct([seen], 0, None)[0].evaluations
        counts.append(len(runs))
    assert counts[0] == counts[1]
    assert counts[2] == counts[0] + evaluations


# -------------------------------------------------------------------------------------------------------- latents


@dataclass(frozen=True)
class Coarse(Coordinates):
    """Images of a coarse grid, enlarged: fewer unknowns than pixels."""

    side: int

    def shape(self, space: InputSpace) -> tuple[int, ...]:
        return (space.shape[0], self.side, self.side)

    def inputs(self, z: Tensor, space: InputSpace) -> Tensor:
        images = F.interpolate(z, size=space.shape[1:], mode="bilinear", align_corners=True)
        return space.encode(images + 0.5)


@pytest.mark.parametrize("restarts", [1, 3])
def test_fewer_unknowns_than_pixels_find_what_pixels_cannot(restarts: int) -> None:
    """54 equations determine 16 coordinates, but not 64 pixels."""
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, 4, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(18, 1)), 1)
    model = nn.Sequential(model, nn.Tanh(), seeded(nn.Linear(1, 2, bias=False), 2))
    assert sum(p.numel() for p in model.parameters()) < 64
    coarse = Coarse(4)
    truth = coarse.inputs(draw(1, 1, 4, 4) - 0.5, gl.ImageSpace(SHAPE))
    seen = observe(model, truth, torch.tensor([1]))
    attack = GradientMatching(
        solver=LBFGS(iterations=1500), labels="recovered", restarts=restarts, tolerance=1e-20, trace=restarts == 1
    )
    latent = dataclasses.replace(attack, coordinates=coarse).reconstruct(seen)
    pixels = attack.reconstruct(seen)
    assert latent.inputs.shape == truth.shape
    assert float((latent.inputs - truth).square().mean()) < 1e-8
    assert pixels.objective < 1e-8  # which explains the update as well
    assert float((pixels.inputs - truth).square().mean()) > 1e-3


# ------------------------------------------------------------------------------------------------- across restarts


@dataclass(frozen=True, eq=False)
class Consensus(GroupPrior):
    """Restarts stay near their mean (Yin et al. 2021, Equation 8, without registration)."""

    weight: float
    spread: list[float] = dataclasses.field(default_factory=list)

    def __call__(self, inputs: Tensor) -> Tensor:
        away = (inputs - inputs.mean(0)).flatten(1).square().mean(1)
        self.spread.append(float(away.detach().mean()))
        return self.weight * away


def test_a_penalty_across_restarts_is_added_with_its_gradient() -> None:
    models = [seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), i) for i in range(2)]
    seen = [observe(model, draw(1, *SHAPE), torch.tensor([i])) for i, model in enumerate(models)]
    tied = GradientMatching(solver=Adam(), restarts=3, group_priors=(Consensus(2.0),))
    group = Group([Problem.of(o, tied, 0) for o in seen], tied)
    rows, z = torch.arange(6), group.start(0)
    ours = Evaluator(group, 6, Deadline())(z, rows)
    alone = dataclasses.replace(tied, group_priors=())
    plain = Evaluator(Group(group.problems, alone), 6, Deadline())(z, rows)
    x = z.view(2, 3, -1)[:, :, :64].clone().requires_grad_()
    penalty = 2.0 * (x - x.mean(1, keepdim=True)).square().mean(2)
    (slope,) = torch.autograd.grad(penalty.sum(), x)
    torch.testing.assert_close(ours[0] - plain[0], penalty.detach().flatten())
    torch.testing.assert_close((ours[1] - plain[1])[:, :64], slope.flatten(0, 1))
    assert not bool((ours[1] - plain[1])[:, 64:].any())


def test_restarts_that_are_tied_come_together() -> None:
    seen = observe(normalized(), draw(1, *SHAPE), torch.tensor([1]))
    spreads = []
    for weight in (0.0, 10.0):
        consensus = Consensus(weight)
        attack = GradientMatching(
            solver=Adam(iterations=60, lr=0.05), restarts=4, labels="recovered", group_priors=(consensus,), trace=False
        )
        attack.reconstruct(seen)
        spreads.append(consensus.spread[-1] / consensus.spread[0])
    assert spreads[1] < 0.1 * spreads[0]


def test_a_penalty_across_restarts_takes_a_solver_without_line_search() -> None:
    with pytest.raises(InvalidInput, match="use Adam"):
        GradientMatching(group_priors=(Consensus(1.0),))


# ------------------------------------------------------------------------------------------------------ a new paper


@pytest.mark.slow
def test_a_new_paper_is_one_file_and_one_line(run_extended: Callable[[str, str, str, str], str]) -> None:
    """The block of ``docs/extend.md``, put where the page says, is listed and runs."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python[^\n]*\n(.*?)```", page, re.DOTALL) if "def smooth_dlg" in b)
    code = (
        "import sys, torch, gradleak as gl\n"
        "client = gl.Client(gl.models.lenet(width=4, classes=5, in_channels=1, image_size=8, seed=0), "
        "gl.Batch(torch.rand(1, 1, 8, 8), torch.tensor([3])))\n"
        "print(gl.simulate(client, gl.attacks.smooth_dlg(iterations=5)).reconstruction.evaluations)\n"
        "from gradleak.cli import main\n"
        "sys.argv = ['gradleak', 'list', 'attacks']\n"
        "main()\n"
    )
    told = run_extended("gradleak.attacks.matching.papers.smooth_dlg", block, "smooth_dlg", code)
    assert told.startswith("5\n")
    assert "smooth_dlg" in told.split()


def test_color_variation_counts_edges_of_colors_and_of_their_differences() -> None:
    gray = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    gray[..., 1] = 1.0
    red = gray * torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    prior = ColorVariation(2.0, epsilon=0.0)
    assert float(prior(gray)) == pytest.approx(2 * 0.5 * 3 / 6)  # One of two columns; no color has an edge of its own.
    assert float(prior(red)) == pytest.approx(2 * 0.5 * 3 / 6)  # Red, and its differences to green and to blue.
    assert float(prior(gray[:, :1])) == pytest.approx(2 * 0.5)
    assert float(prior(torch.rand(4, 7))) == 0


def test_relative_priors_multiply_the_objective() -> None:
    @dataclass(frozen=True)
    class Constant(Prior):
        def __call__(self, inputs: Tensor, context: Context) -> Tensor:
            return inputs.new_ones(())

    seen = observe(normalized(), draw(1, *SHAPE), torch.tensor([1]))
    plain = GradientMatching(solver=Adam(iterations=5), labels="recovered", trace=False)
    free, added, multiplied = (
        dataclasses.replace(plain, priors=priors, relative=relative).reconstruct(seen)
        for priors, relative in (((), False), ((Constant(), Constant()), False), ((Constant(), Constant()), True))
    )
    assert added.objective == pytest.approx(free.objective + 2)
    assert multiplied.objective == pytest.approx(free.objective * math.exp(2), rel=1e-3)  # Adam adds ε.


@pytest.mark.slow
def test_on_kinks_a_strong_prior_beats_the_published_weight() -> None:
    gains = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = F.interpolate(torch.rand(1, 3, 3, 3, generator=generator), size=16, mode="bilinear")
        model = gl.models.lenet(width=12, classes=10, image_size=16, activation="relu", init="he", seed=seed)
        client = gl.Client(model, gl.Batch(x, torch.tensor([seed])))
        threat, space = gl.ThreatModel(), gl.ImageSpace((3, 16, 16))
        seen = threat.observe(model, client.send(), space=space, training=client.training, batch_size=1)
        weak, strong = (
            make(iterations=80, trace=False).reconstruct(seen, seed=seed)
            for make in (gl.attacks.inverting_gradients, gl.attacks.prior_matching)
        )
        gains.append(float(psnr(strong.inputs, x) - psnr(weak.inputs, x)))
    assert sum(gains) / len(gains) > 3
