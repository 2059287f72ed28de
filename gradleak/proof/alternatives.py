"""What else explains an update: a mean of several examples, a mixture, an update of the opposite sign.

A reconstruction that is matched is not proved while something else is as good an explanation. None of these tests
needs the truth:

- *Mean of several*: where the update is linear in the input, as far as its noise can tell, two examples x + d and x − d
  of the same label have together the update of x. So the second derivative of the update along directions d of the
  inputs' own size is compared with the noise. It vanishes for zero or tiny weights, and where the model is sure.
- *Free directions*: a first layer with fewer outputs than inputs does not see some d at all, and its gradient is linear
  along them. Then one example is never told from several that differ in such a d, and the number of examples must be
  stated for a proof.
- *Too few numbers*: updates of all batches may lie in a space hardly larger than the number of unknowns.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.proof.explained import Explanation, Fit, Parts, times_noise
from gradleak.solve.mapping import mapped
from gradleak.structure.chain import Affine
from gradleak.structure.first_layer import find_input_layer
from gradleak.structure.reader import trace_chain
from gradleak.training import Loss, Simulator, TargetKind, class_axis, target_kind

__all__ = ["has_free_directions", "reversed_sign", "shortage", "tells_examples_apart", "unseen_spread"]

_STEPS = {torch.float32: 1e-4, torch.float64: 1e-3}
"""Size of second differences, relative to the inputs', by the update's arithmetic: small enough to cross few kinks,
large enough that what float64 leaves of them is below the update's own rounding."""
_TURNED = 1e-6
"""The same for first differences of directions."""
_DIRECTIONS = 6
_APART = 8
"""Examples up to which each is moved by itself; in larger batches all are moved together."""
_NEAR = 1e-4
"""How far from the solution examples are drawn to count independent numbers, relative to the inputs' size."""
_SPAN = 1e-12
"""Distance from a span, relative to an update, from which on an update counts as independent of it."""


@torch.no_grad()
def unseen_spread(explanation: Explanation, fit: Fit) -> float:
    """Return how far several examples may lie from a candidate that is their mean without the update showing it.

    Relative to the size of the inputs; infinite where means of examples as far apart as that explain the update as well
    as the candidate does. The deviation grows with the square of the distance.
    """
    x, size, spread = explanation.inputs, explanation.size, 0.0
    if not x.is_floating_point() or size == 0:
        return spread
    draw = torch.Generator().manual_seed(explanation.seed + 3)
    step, here = _STEPS[explanation.arithmetic], explanation.update(x)
    rounding = 16 * 2.0**-52 / step**2 * max(float(h.abs().max()) for h in here)  # What float64 leaves of a bend.
    factors = list(fit.factors.values()) or [fit.factor] * len(here)
    smallest = sorted(range(len(here)), key=lambda i: len(here[i]))
    groups = [[i] for i in range(len(x))] if 1 < len(x) <= _APART else [list(range(len(x)))]
    for group in groups * math.ceil(_DIRECTIONS / len(groups)):
        move = torch.zeros_like(x)
        move[group] = torch.randn((len(group), *x.shape[1:]), generator=draw, dtype=torch.float64).to(x) * size
        ends = explanation.update(x + step * move), explanation.update(x - step * move)

        def bend(i: int, ends: tuple[Parts, Parts] = ends) -> Tensor:
            found = (ends[0][i] + ends[1][i] - 2 * here[i]) / (2 * step**2)
            return factors[i] * torch.where(found.abs() > rounding, found, 0.0)

        # The mean of x + d and x − d deviates from x by the bend; several examples of one label are more of the same.
        # What the candidate leaves unexplained itself is not held against it. One tensor that tells them apart will do.
        shown = 0.0
        if not explanation.simulator.defended:
            shown = next((t for i in smallest if (t := _shown(fit, i, bend(i))) > fit.noise.most), 0.0)
        if not shown:
            moved = [s + bend(i) for i, s in enumerate(fit.simulated)]
            other = explanation.compare(moved, fit.noise, factor=fit.factor)
            if other.matched:
                return math.inf
            shown = max(other.times, fit.noise.most)
        spread = max(spread, math.sqrt(fit.noise.most / shown))
    return spread


def _shown(fit: Fit, tensor: int, bend: Tensor) -> float:
    return times_noise(fit.left[tensor] + fit.noise.weights[tensor] * bend)


def has_free_directions(model: nn.Module, params: dict[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether the first layer leaves directions of the input unseen, or cannot be asked."""
    layer = find_input_layer(model, params, shape, mapped=True)
    if layer is not None:
        weight = params[layer.weight_name].detach().double()
        return int(torch.linalg.matrix_rank(weight)) < math.prod(shape)
    try:
        chain = trace_chain(model, shape)
    except NotApplicable:
        return True
    first = next((s for s in chain.steps if isinstance(s, Affine)), None)
    return chain.stop is not None or first is None or first.outputs < first.inputs


def reversed_sign(explanation: Explanation, fit: Fit) -> str | None:
    """Return what speaks against a proof where the update points against what the stated training gives."""
    if not explanation.simulator.known or fit.factor > 0:
        return None
    return (
        "the update has the opposite sign of what the stated training gives, as weights before minus after, or as "
        "another label of two"
    )


@torch.no_grad()
def shortage(explanation: Explanation, fit: Fit) -> str | None:
    """Return what speaks against a proof where any mixture of examples would be explained as well.

    Updates of all batches may lie in a space that is hardly larger than the number of unknowns: with two classes and
    activations of the same slopes, one input and a factor explain the update of any batch. The dimension of that space
    is the rank of updates near the solution, with random labels.
    """
    x, labels = explanation.inputs, explanation.labels
    fitted = explanation.free_labels
    unknowns = x.numel() + (labels.numel() if fitted else 0)
    # With the client's own scale, one equation more than unknowns is evidence to all the digits of that scale.
    exact = not fit.free and explanation.simulator.known
    wanted = unknowns + 1 if exact else int(1.25 * unknowns) + 9
    draw = torch.Generator().manual_seed(explanation.seed + 2)
    count = wanted + 8
    moves = torch.randn((count, *x.shape), generator=draw, dtype=torch.float64).to(x)
    others = x + _NEAR * (explanation.size or 1.0) * moves
    drawn = _random_labels(explanation, count, draw)
    live = (fit.noise.weight > 0).nonzero().flatten()
    order = torch.randperm(len(live), generator=draw)[: 4 * count]
    live = live[order.to(live.device)]

    def one(inputs: Tensor, targets: Tensor) -> Tensor:
        return explanation.simulate(inputs, targets)[live]

    updates = torch.cat([mapped(one, o, y) for o, y in zip(others.split(64), drawn.split(64), strict=True)])
    updates = updates * fit.noise.weight[live]
    updates = updates / updates.norm(dim=1, keepdim=True).clamp_min(1e-300)
    if updates.shape[1] > count:
        mixed = torch.randn(updates.shape[1], count, generator=draw, dtype=torch.float64).to(updates)
        updates = updates @ mixed / math.sqrt(count)
    # The diagonal of R is how far each is from the span of those before.
    rank = int((torch.linalg.qr(updates.T, mode="r").R.diagonal().abs() > _SPAN).sum())
    if rank >= wanted:
        return None
    return (
        f"the updates of all batches nearby have only {rank} independent numbers for {unknowns} unknowns"
        f"{' and a factor' if fit.free else ''}, so mixtures of examples would be explained as well"
    )


def _random_labels(explanation: Explanation, count: int, draw: torch.Generator) -> Tensor:
    """Return ``count`` random labels of the candidate's form: other classes, or other numbers of the same size."""
    labels = explanation.labels
    if labels.is_floating_point():
        drawn = torch.rand((count, *labels.shape), generator=draw, dtype=torch.float64).to(labels)
        if explanation.probabilities:
            return drawn / drawn.sum(2, keepdim=True)
        return drawn * labels.abs().max().clamp_min(1.0)
    outputs = explanation.simulator.outputs(explanation.inputs, torch.float64)
    if not isinstance(outputs, Tensor):
        return labels.expand(count, *labels.shape)  # How labels of several outputs look is not known.
    classes = int(outputs.shape[class_axis(explanation.simulator.undefended.loss)])
    return torch.randint(0, classes, (count, *labels.shape), generator=draw).to(labels.device)


@torch.no_grad()
def tells_examples_apart(
    simulator: Simulator, bias: str, seen: Tensor, inputs: Tensor, along: Tensor | None = None
) -> bool:
    """Tell whether an outer product at a layer is evidence of one example, whatever the scale of the update.

    The gradients of several examples form an outer product where their gradients at the layer's output are parallel:
    with one live output, two classes and equal slopes, a layer of one unit further on, zero weights, or a model that is
    sure. So the direction of that gradient must change when the input moves, for every label.

    Args:
        simulator: of the client; its loss need not be the right one.
        bias: name of the layer's bias, whose gradient that gradient is.
        seen: its gradient as observed (m,); only live units count.
        inputs: (1, *shape) the input that the outer product shows.
        along: (n,) for a layer without bias, by whose weight's gradient times this vector it goes; ``bias`` is then the
            weight's name.
    """
    live = seen.detach().flatten() != 0
    if int(live.sum()) < 2 or not inputs.is_floating_point():
        return False
    x = inputs.double()
    size = float(x.square().mean().sqrt()) or 1.0
    with torch.random.fork_rng(devices=[]):
        outputs = simulator.outputs(x, torch.float64)
    if not isinstance(outputs, Tensor):
        return False  # Of several outputs it is not known how they are weighed.
    draw = torch.Generator().manual_seed(5)
    moves = torch.randn((_DIRECTIONS, *x.shape), generator=draw, dtype=torch.float64).to(x) * size * _TURNED

    def direction(z: Tensor, labels: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # A random mask is the same one in every run.
            found = simulator.update(z, labels)[bias]
            found = (found if along is None else found @ along).flatten()[live]
        return found / found.norm().clamp_min(1e-300)

    wanted = seen.detach().double().flatten()[live]
    wanted = wanted / wanted.norm()
    likely, every = [], []
    for labels in _some_labels(simulator.undefended.loss, outputs):
        try:
            here = direction(x, labels)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # The loss takes other labels, so nothing is known of it.
        every.append((labels, here))
        if min(float((here - wanted).norm()), float((here + wanted).norm())) <= _LIKE:
            likely.append((labels, here))
    # Where no label gives what was seen, the loss is another one, and it must hold for all of them.
    for labels, here in likely or every:
        turned = [float((direction(x + move, labels) - here).norm()) / _TURNED for move in moves]
        # In the middle: a move that crosses a kink says nothing of those that do not.
        if float(here.norm()) < 0.5 or statistics.median(turned) <= _TURN:
            return False
    return True


_LIKE = 0.1
"""Distance of directions within which a label counts as the client's."""
_MOST = 32
"""Classes of which each is tried as the client's label, at most."""
_TURN = 1e-4
"""Change of a direction, over a move of the inputs' own size, that examples must at least show to be told apart."""


def _some_labels(loss: Loss, outputs: Tensor) -> list[Tensor]:
    """Return a few labels of one example, of the form that ``loss`` takes."""
    kind = target_kind(loss, outputs)
    if kind is not TargetKind.CLASSES:
        return [torch.zeros_like(outputs), torch.ones_like(outputs)]
    likely = outputs.argmax(class_axis(loss))
    classes = outputs.shape[class_axis(loss)]
    if outputs.ndim == 2 and classes <= _MOST:
        return [torch.full_like(likely, c) for c in range(classes)]
    return [likely, (likely + 1) % classes, (likely + classes // 2) % classes]
