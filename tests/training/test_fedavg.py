"""FedAvg against torch.optim, against a gradient, and against itself under every transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jvp, vmap

from gradleak.errors import InvalidInput
from gradleak.training import SGD, Adam, CrossEntropy, FedAvg, FedSGD, Optimizer, parameters
from gradleak.training.checkpoint import checkpoint
from gradleak.types import Batch, UpdateKind

CLASSES = 4
# Forward mode imports decompositions that torch itself scripts.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    ).double()


def small_batch(examples: int = 5) -> Batch:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(examples, 1, 6, 6, dtype=torch.float64, generator=g)
    return Batch(x, torch.randint(0, CLASSES, (examples,), generator=g))


@pytest.fixture(autouse=True)
def _globals() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


OPTIMIZERS: list[tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = [
    (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (
        SGD(0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        Adam(0.01, betas=(0.8, 0.9), weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1),
    ),
    (Adam(0.01, weight_decay=0.1, decoupled=True), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
]


@pytest.mark.parametrize(("ours", "theirs"), OPTIMIZERS)
@pytest.mark.parametrize("shuffle", [None, 3])
def test_equals_steps_of_torch_optim(
    ours: Optimizer, theirs: Callable[[list[Tensor]], torch.optim.Optimizer], shuffle: int | None
) -> None:
    model, batch = small_model(), small_batch()
    before = parameters(model)
    training = FedAvg(optimizer=ours, epochs=3, batch_size=2, shuffle=shuffle)
    update = training(model, batch)
    assert update.kind is UpdateKind.WEIGHT_DELTA
    assert all(torch.equal(before[k], p) for k, p in model.named_parameters())
    before = {k: p.clone() for k, p in before.items()}
    steps = theirs(list(model.parameters()))
    for chosen in training.batches(len(batch)):
        steps.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs[list(chosen)]), batch.labels[list(chosen)]).backward()
        steps.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(update.tensors[name], p.detach() - before[name], rtol=1e-12, atol=1e-14)


def test_one_step_is_minus_lr_times_the_gradient_exactly() -> None:
    model, batch = small_model(), small_batch()
    gradient = FedSGD()(model, batch).tensors
    delta = FedAvg(0.03)(model, batch).tensors
    for name, g in gradient.items():
        assert torch.equal(delta[name], -0.03 * g)


def test_weights_as_stored_carry_their_rounding() -> None:
    model, batch = small_model().float(), small_batch().to(torch.float32)
    exact, stored = FedAvg(1e-4)(model, batch).tensors, FedAvg(1e-4, as_weights=True)(model, batch).tensors
    for name, p in model.named_parameters():
        assert torch.equal(stored[name], (p + exact[name]) - p)
    assert any(not torch.equal(stored[k], exact[k]) for k in exact)


def test_each_epoch_sees_every_example_once_in_its_own_order() -> None:
    training = FedAvg(0.1, epochs=3, batch_size=4, shuffle=7)
    batches = training.batches(10)
    assert [len(b) for b in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i : i + 3], ()) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len(set(epochs)) == 3
    assert batches == FedAvg(0.1, epochs=3, batch_size=4, shuffle=7).batches(10)
    assert batches != FedAvg(0.1, epochs=3, batch_size=4, shuffle=8).batches(10)


def test_steps_override_epochs() -> None:
    assert FedAvg(0.1, batch_size=2, steps=5).batches(6) == ((0, 1), (2, 3), (4, 5), (0, 1), (2, 3))
    assert FedAvg(0.1, epochs=4).count(1) == 4


@pytest.mark.parametrize("rule", [SGD(0.3), SGD(0.3, momentum=0.5), Adam(0.05, eps=1e-2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_in_inputs_and_soft_labels(rule: Optimizer, recompute: bool) -> None:
    model, batch = small_model(), small_batch(3)
    training = FedAvg(optimizer=rule, epochs=2, batch_size=2, checkpoint=recompute)
    params = parameters(model)
    y = torch.softmax(torch.randn(3, CLASSES, dtype=torch.float64), -1).requires_grad_()
    x = batch.inputs.clone().requires_grad_()

    def update(inputs: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in training.tensors(model, params, inputs, labels).values()])[::7]

    assert torch.autograd.gradcheck(update, (x, y), fast_mode=True)


def mismatch(training: FedAvg, model: nn.Module, observed: dict[str, Tensor], labels: Tensor) -> Callable[..., Tensor]:
    params = parameters(model)

    def distance(inputs: Tensor) -> Tensor:
        simulated = training.tensors(model, params, inputs, labels)
        return sum(((simulated[k] - observed[k]) ** 2).sum() for k in observed)  # type: ignore[return-value]

    return distance


@pytest.mark.slow
@forward_mode
@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(0.01)])
def test_recomputed_equals_stored_under_every_transform(rule: Optimizer) -> None:
    model, batch = small_model(), small_batch(3)
    stored = FedAvg(optimizer=rule, epochs=2, batch_size=2, shuffle=0)
    recomputed = FedAvg(optimizer=rule, epochs=2, batch_size=2, shuffle=0, checkpoint=True)
    observed = dict(stored(model, batch).tensors)
    xs = torch.rand(2, *batch.inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    a, b = (mismatch(t, model, observed, batch.labels) for t in (stored, recomputed))

    def by_autograd(f: Callable[[Tensor], Tensor]) -> Tensor:
        x = xs[0].clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    for transform in (
        lambda f: f(xs[0]),
        by_autograd,
        lambda f: grad(f)(xs[0]),
        lambda f: vmap(grad(f))(xs),
        lambda f: grad(lambda x: grad(f)(x).square().sum())(xs[0]),
        lambda f: vmap(grad(lambda x: grad(f)(x).square().sum()))(xs),
        lambda f: jvp(f, (xs[0],), (xs[1],))[1],
        lambda f: vmap(lambda t: jvp(f, (xs[0],), (t,))[1])(xs),
        lambda f: jvp(grad(f), (xs[0],), (xs[1],))[1],
    ):
        torch.testing.assert_close(transform(b), transform(a), rtol=1e-9, atol=1e-15)


@forward_mode
def test_hessian_of_a_checkpoint() -> None:
    def cubic(x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return (x**3 * n, x)

    x, n = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([2, 3])
    found = hessian(lambda v: checkpoint(cubic, v, n)[0].sum())(x)
    torch.testing.assert_close(found, torch.diag(6 * x * n))
    assert torch.equal(grad(lambda v: checkpoint(cubic, v, n)[1].sum())(x), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("recompute", [False, True])
def test_vmap_equals_a_loop(recompute: bool) -> None:
    model, batch = small_model(), small_batch()
    training = FedAvg(0.1, epochs=2, batch_size=2, shuffle=1, checkpoint=recompute)
    params = parameters(model)
    xs = torch.stack([batch.inputs, batch.inputs.flip(0), batch.inputs * 0.5])
    ys = torch.rand(3, 5, CLASSES, dtype=torch.float64)
    together = vmap(lambda x, y: training.tensors(model, params, x, y))(xs, ys)
    for i in range(3):
        alone = training.tensors(model, params, xs[i], ys[i])
        for name, t in alone.items():
            torch.testing.assert_close(together[name][i], t, rtol=1e-12, atol=1e-14)


def test_the_client_runs_the_map_that_the_attacker_inverts() -> None:
    model, batch = small_model(), small_batch()
    training = FedAvg(0.1, epochs=2, batch_size=3, shuffle=1)
    sent = training(model, batch).tensors
    simulated = training.tensors(model, parameters(model), batch.inputs, batch.labels)
    residual = training.residual(simulated, sent)
    assert all(torch.equal(r, torch.zeros_like(r)) for r in residual.values())


def test_who_does_not_know_the_order_gets_no_seed() -> None:
    training = FedAvg(0.1, epochs=2, batch_size=3, shuffle=1)
    assert training.known().shuffle is None
    assert training.known(order=True) == training
    assert training.reseed(5).shuffle == 5
    assert training.known().reseed(5).shuffle is None
    assert training.undefended is training


def test_a_weight_without_gradient_keeps_the_adam_update_differentiable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    with torch.no_grad():
        model[0].bias[0] = -100.0  # a dead unit
    training = FedAvg(optimizer=Adam(0.01), epochs=3)
    labels = torch.tensor([1])

    def total(x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in training.tensors(model, parameters(model), x, labels).values())  # type: ignore[return-value]

    x = torch.rand(1, 3, dtype=torch.float64)
    assert torch.isfinite(grad(total)(x)).all()
    assert grad(total)(x).abs().max() > 0


def test_running_statistics_follow_every_step() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()

    model, reference, batch = build(), build(), small_batch()
    sent = FedAvg(0.1, epochs=3)(model, batch)
    steps = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        steps.zero_grad()
        CrossEntropy()(reference(batch.inputs), batch.labels).backward()
        steps.step()
    assert sent.buffers is not None
    for name, b in reference.named_buffers():
        torch.testing.assert_close(sent.buffers[name], b, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(b, build().state_dict()[k]) for k, b in model.named_buffers())
    FedSGD().tensors(model, parameters(model), batch.inputs, batch.labels)
    assert all(torch.equal(b, build().state_dict()[k]) for k, b in model.named_buffers())


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.1, "optimizer": SGD(0.1)}, {"lr": 0.0}, {"lr": 0.1, "epochs": 0}, {"lr": 0.1, "batch_size": 0}],
)
def test_refuses_unusable_options(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=r"give|take"):
        FedAvg(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build",
    [
        lambda: SGD(momentum=1.0),
        lambda: SGD(nesterov=True),
        lambda: SGD(-1.0),
        lambda: Adam(betas=(0.9, 1.0)),
        lambda: Adam(eps=0.0),
        lambda: Adam(weight_decay=-1.0),
    ],
)
def test_refuses_unusable_optimizers(build: Callable[[], Optimizer]) -> None:
    with pytest.raises(InvalidInput, match="take"):
        build()
