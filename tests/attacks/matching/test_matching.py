"""Gradient matching end to end on small models, and its identities."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap

import gradleak as gl
from gradleak.attacks.base import Progress
from gradleak.attacks.matching import LBFGS, Adam, Cosine, GradientMatching, SquaredError, TotalVariation
from gradleak.errors import InvalidInput, InvalidModel, MissingKnowledge, UnknownName

SHAPE = (1, 8, 8)
SPACE = gl.ImageSpace(SHAPE)


def small(seed: int = 0, width: int = 6) -> nn.Module:
    return gl.models.lenet(width=width, classes=5, in_channels=1, image_size=8, seed=seed).double()


def observe(
    seed: int = 0, n: int = 1, knows: gl.Knowledge | None = None, **model: int
) -> tuple[gl.Batch, gl.Observation]:
    generator = torch.Generator().manual_seed(seed)
    batch = gl.Batch(
        torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64),
        torch.randint(5, (n,), generator=generator),
    )
    client = gl.Client(small(seed), batch)
    threat = gl.ThreatModel() if knows is None else gl.ThreatModel(knows)
    return batch, threat.observe(
        client.model, client.send(), space=SPACE, training=client.training, batch_size=n, labels=batch.labels
    )


def test_dlg_recovers_image_and_label() -> None:
    batch, seen = observe()
    found = gl.attacks.dlg().reconstruct(seen)
    assert found.status == "converged"
    assert found.labels is not None
    assert found.labels.tolist() == batch.labels.tolist()
    assert float((found.inputs - batch.inputs).square().mean()) <= 1e-8
    assert found.trace is not None
    assert found.trace.objectives[0] > 1e3 * found.objective
    assert found.trace.snapshots is not None
    assert found.trace.snapshots.shape == (len(found.trace.iterations), 1, *SHAPE)
    assert set(found.trace.layers) == set(seen.update.tensors)


def test_observations_of_different_models_advance_together_as_alone() -> None:
    pairs = [observe(seed) for seed in range(3)]
    # In float32, paths part by rounding.
    solver = LBFGS(iterations=40, history_dtype=torch.float64)
    attack = dataclasses.replace(gl.attacks.dlg(), solver=solver, warm_dtype=None)
    together = attack.reconstruct_all([seen for _, seen in pairs])
    first = attack.reconstruct(pairs[0][1])
    torch.testing.assert_close(first.inputs, together[0].inputs, rtol=1e-6, atol=1e-8)
    assert len({float(r.objective) for r in together}) == 3


def test_vmap_equals_loop() -> None:
    _, seen = observe(n=2)
    attack = dataclasses.replace(gl.attacks.idlg(iterations=25), restarts=3, warm_dtype=None)
    fast = dataclasses.replace(attack, vectorize=True).reconstruct(seen)
    slow = dataclasses.replace(attack, vectorize=False).reconstruct(seen)
    assert fast.objective == pytest.approx(slow.objective, rel=1e-4)
    torch.testing.assert_close(fast.inputs, slow.inputs, rtol=1e-4, atol=1e-6)


def test_more_restarts_never_have_a_worse_objective() -> None:
    _, seen = observe(3)
    attack = dataclasses.replace(gl.attacks.dlg(iterations=60), warm_dtype=None)
    one, four = (dataclasses.replace(attack, restarts=r).reconstruct(seen) for r in (1, 4))
    assert four.objective <= one.objective
    assert four.evaluations == 4 * one.evaluations


def test_known_labels_are_used() -> None:
    batch, seen = observe(1, n=2, knows=gl.ThreatModel().knows | gl.Knowledge.LABELS)
    found = gl.attacks.dlg(iterations=5).reconstruct(seen)
    assert found.labels is not None
    assert found.labels.tolist() == batch.labels.tolist()


def test_inverting_gradients_lowers_its_objective_inside_the_box() -> None:
    _, seen = observe(2)
    found = gl.attacks.inverting_gradients(iterations=150).reconstruct(seen)
    assert found.trace is not None
    assert found.objective < 0.2 * found.trace.objectives[0]
    assert float(found.inputs.min()) >= 0
    assert float(found.inputs.max()) <= 1


def test_progress_and_interruption() -> None:
    _, seen = observe()
    heard: list[Progress] = []

    def callback(progress: Progress) -> None:
        heard.append(progress)
        raise KeyboardInterrupt

    found = gl.attacks.dlg().reconstruct(seen, callback=callback)
    assert found.status == "interrupted"
    assert len(heard) == 1
    assert heard[0].total == gl.attacks.dlg().solver.iterations


def test_missing_knowledge_is_refused_before_any_work() -> None:
    _, seen = observe(knows=gl.Knowledge.TRAINING)
    with pytest.raises(MissingKnowledge, match="BATCH_SIZE"):
        gl.attacks.dlg().reconstruct(seen)


def test_active_dropout_and_batch_statistics_are_refused() -> None:
    for layer in (nn.Dropout(0.5), nn.BatchNorm2d(1)):
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 5)).double()
        update = gl.FedSGD()(model.eval(), gl.Batch(torch.rand(2, *SHAPE).double(), torch.tensor([0, 1])))
        seen = gl.ThreatModel().observe(model.train(), update, space=SPACE, training=gl.FedSGD(), batch_size=2)
        with pytest.raises(InvalidModel, match=r"model\.eval\(\)"):
            gl.attacks.dlg().reconstruct(seen)


def test_unknown_options_are_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'lbfgs'"):
        gl.attacks.dlg(solver="lbgfs")
    with pytest.raises(InvalidInput, match="recovered"):
        GradientMatching(labels="given")


def test_float32_updates_match_to_their_noise() -> None:
    generator = torch.Generator().manual_seed(4)
    batch = gl.Batch(torch.rand(1, *SHAPE, generator=generator), torch.tensor([2]))
    exchange = gl.simulate(gl.Client(small(4).float(), batch), gl.attacks.dlg())
    assert float((exchange.reconstruction.inputs - exchange.truth.inputs).square().mean()) <= 1e-6


def test_normalized_inputs_are_decoded() -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64)
    space = gl.ImageSpace(SHAPE, mean=(0.4,), std=(0.3,))
    client = gl.Client(small(5), gl.Batch(space.encode(images), torch.tensor([1])))
    exchange = gl.simulate(client, gl.attacks.dlg(), space=space)
    torch.testing.assert_close(exchange.truth.inputs, images)
    assert float((exchange.reconstruction.inputs - images).square().mean()) <= 1e-6


@pytest.mark.slow
def test_an_attacker_who_knows_the_pruning_beats_one_who_does_not() -> None:
    generator = torch.Generator().manual_seed(6)
    batch = gl.Batch(torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64), torch.tensor([1]))
    client = gl.Client(small(6, 12), batch, gl.defenses.prune(ratio=0.3).wrap(gl.FedSGD()))
    errors = []
    for knows in (gl.ThreatModel().knows, gl.ThreatModel().knows | gl.Knowledge.DEFENSE):
        exchange = gl.simulate(client, gl.attacks.dlg(iterations=300), threat=gl.ThreatModel(knows))
        errors.append(float((exchange.reconstruction.inputs - batch.inputs).square().mean()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("objective", [SquaredError(), Cosine()])
def test_objectives_vanish_at_the_truth_and_pass_gradcheck(objective: SquaredError | Cosine) -> None:
    batch, seen = observe(n=2)
    model, labels = seen.model, torch.nn.functional.one_hot(batch.labels, 5).double()
    observed = dict(seen.update.tensors)
    scale = objective.scale(observed)

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return objective(gl.FedSGD().tensors(model, seen.params, x, y), observed, scale)

    assert float(distance(batch.inputs, labels)) == pytest.approx(0, abs=1e-12)
    x = torch.rand_like(batch.inputs).requires_grad_()
    y = torch.rand_like(labels).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(distance, (x, y), fast_mode=True, atol=1e-6)


def test_cosine_has_the_derivatives_of_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = {k: torch.randn(n, generator=draw, dtype=torch.float64) for k, n in (("a", 3), ("b", 4))}
    a, b = (torch.randn(3, n, generator=draw, dtype=torch.float64) for n in (3, 4))
    scale = Cosine().scale(seen)

    def ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return Cosine()({"a": a, "b": b}, seen, scale)

    def formula(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 - torch.nn.functional.cosine_similarity(torch.cat([a, b]), torch.cat([*seen.values()]), dim=0)

    for f in (grad, lambda f, argnums: jacrev(grad(f, argnums), argnums)):
        found, expected = (vmap(f(g, (0, 1)))(a, b) for g in (ours, formula))
        torch.testing.assert_close(found, expected)


def test_cosine_into_old_memory_gives_the_same_derivative_twice() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = {k: torch.randn(n, generator=draw) for k, n in (("a", 3), ("b", 4))}
    scale, workspace = Cosine().scale(seen), list[torch.Tensor]()
    for _ in range(2):
        inner = {k: torch.randn(t.shape, generator=draw).requires_grad_() for k, t in seen.items()}
        outer = {k: t.square() for k, t in inner.items()}
        wanted = torch.autograd.grad(Cosine()(outer, seen, scale), list(inner.values()), retain_graph=True)
        found = torch.autograd.grad(Cosine()(outer, seen, scale, workspace), list(inner.values()))
        torch.testing.assert_close(found, wanted)
    assert [t.shape for t in workspace] == [(3,), (4,)]


def test_total_variation_is_the_mean_of_neighbor_differences() -> None:
    image = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    assert float(TotalVariation(2.0)(image)) == pytest.approx(2.0)


def test_group_of_first_order_problems_drops_finished_ones() -> None:
    _, seen = observe(n=1)
    attack = GradientMatching(
        solver=Adam(iterations=300, lr=0.05, check_every=10), labels="recovered", restarts=3, tolerance=1e-2
    )
    found = attack.reconstruct(seen)
    assert found.status == "converged"
    assert found.evaluations < 900


def test_labels_are_read_off_a_weight_delta() -> None:
    _, seen = observe(n=2)
    batch = gl.Batch(torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(8)).double(), torch.tensor([0, 1]))
    training = gl.FedAvg(lr=0.01, epochs=2)
    update = gl.Client(seen.model, batch, training).send()
    delta = gl.ThreatModel().observe(seen.model, update, space=SPACE, training=training, batch_size=2)
    found = gl.attacks.idlg(iterations=1).reconstruct(delta)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0, 1]
