"""Defenses: what is sent, what it means to an attacker who knows, and the walls between the two."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.func import grad, vmap

from gradleak import defenses
from gradleak.defenses import (
    Clipping,
    Composition,
    Defended,
    GaussianNoise,
    LaplacianNoise,
    Pruning,
    Quantization,
    Rounding,
    Sign,
    UpdateDefense,
    adaptive_clip,
    bfloat16,
    clamp,
    clip,
    compose,
    exclude_vars,
    gaussian_noise,
    half_precision,
    int8,
    laplacian_noise,
    percentile_privacy,
    prune,
    sign,
    svt_privacy,
    top_k,
)
from gradleak.defenses.base import straight_through
from gradleak.errors import InvalidInput
from gradleak.spaces import TensorSpace
from gradleak.threat import Knowledge, ThreatModel
from gradleak.training import FedAvg, FedSGD, parameters
from gradleak.types import Batch, UpdateKind

forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DETERMINISTIC: list[UpdateDefense] = [
    half_precision(),
    bfloat16(),
    int8(),
    Quantization(3),
    prune(0.7),
    prune(0.95, globally=True),
    top_k(0.2),
    clamp(1e-3),
    clip(0.05),
    clip(1e3),
    sign(),
    compose(clip(0.05), half_precision()),
    compose(prune(0.5), int8()),
    compose(clip(0.05), prune(0.5)),
    compose(prune(0.1, globally=True), clamp(1e-3)),
    percentile_privacy(percentile=30, gamma=0.9),
    exclude_vars("bias|0.weight"),
    adaptive_clip(0.05),
]
SPARSE = svt_privacy(epsilon=1e3, gamma=0.5)
NOISY: list[UpdateDefense] = [gaussian_noise(1e-2), laplacian_noise(1e-2), compose(clip(0.05), gaussian_noise(1e-2))]


def setting() -> tuple[nn.Module, Batch]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    g = torch.Generator().manual_seed(1)
    return model, Batch(torch.randn(3, 6, dtype=torch.float64, generator=g), torch.tensor([0, 1, 3]))


def update(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    shapes = {"weight": (40, 30), "bias": (40,), "scale": ()}
    return {k: torch.randn(s, generator=g, dtype=dtype) * 10.0 ** (-i) for i, (k, s) in enumerate(shapes.items())}


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())


def test_everything_public_is_exported() -> None:
    listed = [getattr(defenses, name) for name in defenses.__all__]
    concrete = {d for d in listed if isinstance(d, type) and issubclass(d, UpdateDefense) and d is not UpdateDefense}
    assert concrete == {type(d) for d in [*DETERMINISTIC, *NOISY, SPARSE]}


# What is sent


@pytest.mark.parametrize("defense", [*DETERMINISTIC, *NOISY, SPARSE])
def test_transform_is_pure_and_keeps_names_shapes_and_dtypes(defense: UpdateDefense) -> None:
    tensors = update(torch.float32)
    before = {k: t.clone() for k, t in tensors.items()}
    sent = [defense.transform(tensors, torch.Generator().manual_seed(0)) for _ in range(2)]
    for name, t in tensors.items():
        assert torch.equal(t, before[name])
        assert torch.equal(sent[0][name], sent[1][name])
        assert (sent[0][name].shape, sent[0][name].dtype) == (t.shape, t.dtype)
    assert list(sent[0]) == list(tensors)


def test_gaussian_noise_has_its_standard_deviation() -> None:
    zero = {"a": torch.zeros(200_000, dtype=torch.float64)}
    z = GaussianNoise(0.3).transform(zero, torch.Generator().manual_seed(0))["a"]
    # Standard errors: sigma / sqrt(n) and sigma / sqrt(2 n); four of them.
    assert abs(float(z.mean())) < 4 * 0.3 / 200_000**0.5
    assert abs(float(z.std()) - 0.3) < 4 * 0.3 / 400_000**0.5
    assert float(z.abs().median()) == pytest.approx(0.6745 * 0.3, rel=0.02)


def test_laplacian_noise_has_its_scale() -> None:
    zero = {"a": torch.zeros(200_000, dtype=torch.float64)}
    z = LaplacianNoise(0.3).transform(zero, torch.Generator().manual_seed(0))["a"]
    # E|z| = b with standard error b / sqrt(n); the median of |z| is b ln 2.
    assert abs(float(z.mean())) < 4 * 0.3 * 2**0.5 / 200_000**0.5
    assert abs(float(z.abs().mean()) - 0.3) < 4 * 0.3 / 200_000**0.5
    assert float(z.abs().median()) == pytest.approx(0.3 * np.log(2), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_sends_exactly_the_numbers_of_the_format(dtype: torch.dtype) -> None:
    tensors = update(torch.float32)
    for name, t in Rounding(dtype).transform(tensors).items():
        assert torch.equal(t, tensors[name].to(dtype).float())


def test_quantization_uses_255_levels_at_half_a_level_of_error() -> None:
    tensors = update()
    for name, q in int8().transform(tensors).items():
        scale = tensors[name].abs().max() / 127
        levels = q / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
        assert levels.abs().max() <= 127 + 1e-9
        assert ((q - tensors[name]).abs() <= scale / 2 * (1 + 1e-12)).all()
    zero = {"a": torch.zeros(3)}
    assert torch.equal(int8().transform(zero)["a"], zero["a"])


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.999])
def test_pruning_keeps_the_largest(ratio: float) -> None:
    tensors = update()
    for name, p in prune(ratio).transform(tensors).items():
        kept, n = p != 0, p.numel()
        assert int(kept.sum()) == max(1, n - int(ratio * n))
        assert torch.equal(p[kept], tensors[name][kept])
        if not kept.all():
            assert tensors[name][~kept].abs().max() <= p[kept].abs().min()
    together = torch.cat([t.flatten() for t in prune(ratio, globally=True).transform(tensors).values()])
    flat = torch.cat([t.flatten() for t in tensors.values()])
    assert int((together != 0).sum()) == max(1, flat.numel() - int(ratio * flat.numel()))
    assert flat[together == 0].abs().max() <= together[together != 0].abs().min() if ratio else True


def test_ties_do_not_send_more_than_the_share() -> None:
    assert int((prune(0.5).transform({"a": torch.ones(10)})["a"] != 0).sum()) == 5


def test_clipping_bounds_the_norm_and_keeps_the_direction() -> None:
    tensors = update()
    sent = clip(0.05).transform(tensors)
    assert norm(sent) == pytest.approx(0.05, rel=1e-12)
    factor = 0.05 / norm(tensors)
    for name, t in sent.items():
        torch.testing.assert_close(t, factor * tensors[name], rtol=1e-12, atol=0)
    untouched = clip(1e3).transform(tensors)
    assert all(torch.equal(untouched[k], t) for k, t in tensors.items())
    assert norm(clip(1.0).transform({"a": torch.zeros(3)})) == 0.0


def test_sign_sends_signs() -> None:
    assert sign().transform({"a": torch.tensor([-3.0, 0.0, 1e-9])})["a"].tolist() == [-1.0, 0.0, 1.0]


def test_a_composition_applies_its_defenses_in_order() -> None:
    tensors = update()
    step = clip(0.05).transform(tensors)
    expected = gaussian_noise(0.1).transform(step, torch.Generator().manual_seed(4))
    sent = compose(clip(0.05), gaussian_noise(0.1)).transform(tensors, torch.Generator().manual_seed(4))
    assert all(torch.equal(sent[k], t) for k, t in expected.items())
    assert norm(compose(gaussian_noise(0.1), clip(0.05)).transform(tensors)) == pytest.approx(0.05)


# What an attacker who knows makes of it


@pytest.mark.parametrize("defense", DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_true_update_has_no_residual(defense: UpdateDefense, dtype: torch.dtype) -> None:
    tensors = update(dtype)
    residual = defense.residual(tensors, defense.transform(tensors))
    reference = norm(compose(*defense.defenses[:-1]).transform(tensors)) if isinstance(defense, Composition) else 0
    reference = reference if isinstance(defense, Composition) and len(defense.defenses) > 1 else norm(tensors)
    assert norm(residual) <= 4 * torch.finfo(dtype).eps * reference


@pytest.mark.parametrize("defense", DETERMINISTIC)
def test_another_update_has_a_residual(defense: UpdateDefense) -> None:
    tensors = update()
    observed = defense.transform(tensors)
    g = torch.Generator().manual_seed(9)
    other = {k: torch.randn(t.shape, generator=g).double() * 10.0 ** (-i) for i, (k, t) in enumerate(tensors.items())}
    assert norm(defense.residual(other, observed)) > 0.1 * norm(observed) / max(1.0, norm(observed))


@pytest.mark.parametrize("defense", NOISY)
def test_under_noise_the_residual_of_the_true_update_is_the_noise(defense: UpdateDefense) -> None:
    tensors = update()
    residual = defense.residual(tensors, defense.transform(tensors, torch.Generator().manual_seed(0)))
    n = sum(t.numel() for t in tensors.values())
    deviation = 1e-2 * (2**0.5 if isinstance(defense, LaplacianNoise) else 1)
    assert norm(residual) / n**0.5 == pytest.approx(deviation, rel=0.1)


# Not among them: compositions, and 3 bits, where several coordinates share the top level and any may be the largest.
EXPLAINING = [d for d in DETERMINISTIC if not isinstance(d, Composition) and d != Quantization(3)]


@pytest.mark.parametrize("defense", EXPLAINING)
def test_the_explanation_is_an_update_that_would_have_been_sent_so(defense: UpdateDefense) -> None:
    tensors = update()
    observed = defense.transform(tensors)
    g = torch.Generator().manual_seed(9)
    other = {k: t + 0.5 * torch.randn(t.shape, generator=g, dtype=t.dtype) for k, t in tensors.items()}
    explained = defense.explain(other, observed)
    # Boundaries of cells, ties and sign 0 belong to the closure of the explanations: step a little inside.
    inside = {k: e + 1e-3 * (observed[k] - e) for k, e in explained.items()}
    again = defense.transform(inside)
    for name, o in observed.items():
        torch.testing.assert_close(again[name], o, rtol=1e-8, atol=1e-12)
    twice = defense.explain(explained, observed)
    for name, e in explained.items():
        torch.testing.assert_close(twice[name], e, rtol=1e-12, atol=1e-15)


def test_pruned_coordinates_are_bounded_by_those_sent() -> None:
    observed = {"a": torch.tensor([3.0, 0.0, -2.0, 0.0]), "b": torch.tensor([0.0, 0.0])}
    simulated = {"a": torch.tensor([2.5, 1.9, -2.0, -5.0]), "b": torch.tensor([0.5, -1.0])}
    local = Pruning(0.5).residual(simulated, observed)
    torch.testing.assert_close(local["a"], torch.tensor([-0.5, 0.0, 0.0, -3.0]))
    torch.testing.assert_close(local["b"], torch.tensor([0.5, -1.0]))
    together = Pruning(0.5, globally=True).residual(simulated, observed)
    torch.testing.assert_close(together["b"], torch.tensor([0.0, 0.0]))


def test_clipping_is_compared_by_direction_only_where_it_clipped() -> None:
    tensors = update()
    doubled = {k: 2 * t for k, t in tensors.items()}
    assert norm(Clipping(0.05).residual(doubled, Clipping(0.05).transform(tensors))) < 1e-15
    assert norm(Clipping(1e3).residual(doubled, Clipping(1e3).transform(tensors))) == pytest.approx(norm(tensors))
    opposite = {k: -t for k, t in tensors.items()}
    assert norm(Clipping(0.05).residual(opposite, Clipping(0.05).transform(tensors))) == pytest.approx(0.05)


def test_sign_residual_does_not_shrink_with_the_update() -> None:
    simulated, observed = {"a": torch.tensor([1.0, -1.0, 2.0])}, {"a": torch.tensor([1.0, 1.0, -1.0])}
    small = {"a": 1e-6 * simulated["a"]}
    torch.testing.assert_close(Sign().residual(small, observed), Sign().residual(simulated, observed))
    assert Sign().residual(simulated, observed)["a"][0] == 0


@pytest.mark.parametrize(
    "defense", [half_precision(), bfloat16(), int8(), *NOISY[:2], compose(bfloat16(), gaussian_noise(1e-2))]
)
def test_the_deviation_is_that_of_the_error(defense: UpdateDefense) -> None:
    tensors = {"a": torch.randn(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}
    sent = defense.transform(tensors, torch.Generator().manual_seed(4))
    score = (sent["a"] - tensors["a"]) / defense.deviation(sent)["a"]
    assert float(score.square().mean()) == pytest.approx(1.0, rel=0.1)


def test_the_deviation_says_what_is_lost() -> None:
    tensors = update()
    pruned = prune(0.9).transform(tensors)
    deviation = prune(0.9).deviation(pruned)
    assert all(torch.equal(deviation[k] == 0, p != 0) for k, p in pruned.items())
    assert all((d == 0).all() for d in clip(0.1).deviation(tensors).values())
    assert all(torch.isinf(d).all() for d in sign().deviation(tensors).values())
    assert all((d == 0).all() for d in FedSGD().deviation(tensors).values())
    twice = gaussian_noise(3.0).wrap(gaussian_noise(4.0).wrap(FedSGD())).deviation(tensors)
    assert all(torch.equal(d, torch.full_like(d, 5.0)) for d in twice.values())


EXACT_CELLS = [Rounding(torch.float16), Rounding(torch.bfloat16), Quantization(8), Quantization(2), Pruning(0.6)]


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.float32, 12, elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=True)),
    st.sampled_from(
        [Rounding(torch.float16), Rounding(torch.bfloat16), Quantization(8), Quantization(2), Pruning(0.6)]
    ),
)
def test_any_update_explains_itself(values: np.ndarray, defense: UpdateDefense) -> None:
    tensors = {"a": torch.from_numpy(values).double()}
    residual = defense.residual(tensors, defense.transform(tensors))["a"]
    assert residual.abs().max() <= 1e-9 * tensors["a"].abs().max()


# Derivatives


@forward_mode
def test_straight_through_is_exact_and_differentiates_as_its_source() -> None:
    x = torch.tensor([0.1, 0.7, -2.3], dtype=torch.float64)

    def f(v: Tensor) -> Tensor:
        return (straight_through(v.detach().sign(), v) ** 3).sum()

    assert torch.equal(straight_through(x.sign(), x), x.sign())
    torch.testing.assert_close(grad(f)(x), 3 * x.sign() ** 2)
    torch.testing.assert_close(grad(lambda v: grad(f)(v).sum())(x), 6 * x.sign())
    torch.testing.assert_close(vmap(grad(f))(x[:, None])[:, 0], 3 * x.sign() ** 2)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], grad(f)(x).sum())


@forward_mode
@pytest.mark.parametrize("defense", DETERMINISTIC)
@pytest.mark.parametrize("training", [FedSGD(), FedAvg(0.1, epochs=2)])
def test_maps_differentiate_and_vmap_as_a_loop(defense: UpdateDefense, training: FedSGD | FedAvg) -> None:
    model, batch = setting()
    defended = defense.wrap(training).known()
    params = parameters(model)
    observed = dict(defense.wrap(training)(model, batch).tensors)
    y = torch.softmax(torch.ones(3, 4, dtype=torch.float64), -1)

    def distance(x: Tensor) -> Tensor:
        sent = defended.tensors(model, params, x, y)
        r = defended.residual(defended.undefended.tensors(model, params, x, y), observed)
        return sum(t.square().sum() for t in (*sent.values(), *r.values()))  # type: ignore[return-value]

    xs = torch.stack([batch.inputs, batch.inputs.flip(0)])
    together, second = vmap(grad(distance))(xs), grad(lambda x: grad(distance)(x).square().sum())(xs[0])
    alone = xs[1].clone().requires_grad_()
    torch.testing.assert_close(together[1], torch.autograd.grad(distance(alone), alone)[0], rtol=1e-9, atol=1e-13)
    assert together.abs().max() > 0
    assert torch.isfinite(second).all()
    assert torch.isfinite(torch.func.jvp(grad(distance), (xs[0],), (xs[1],))[1]).all()


# The map and the wall


@pytest.mark.parametrize("defense", DETERMINISTIC)
@pytest.mark.parametrize("training", [FedSGD(), FedAvg(0.1, epochs=3, batch_size=2, shuffle=2)])
def test_client_map_is_attacker_map(defense: UpdateDefense, training: FedSGD | FedAvg) -> None:
    model, batch = setting()
    client = defense.wrap(training)
    sent = client(model, batch)
    attacker = client.known(order=True)
    simulated = attacker.tensors(model, parameters(model), batch.inputs, batch.labels)
    assert sent.kind is training.kind
    assert all(torch.equal(simulated[k], t) for k, t in sent.tensors.items())
    distorted = attacker.distort(attacker.undefended.tensors(model, parameters(model), batch.inputs, batch.labels))
    assert all(torch.equal(distorted[k], t) for k, t in sent.tensors.items())


def test_only_the_client_has_the_noise() -> None:
    model, batch = setting()
    client = gaussian_noise(0.1).wrap(FedSGD(), seed=5)
    clean, sent = FedSGD()(model, batch).tensors, client(model, batch).tensors
    attacker = client.known()
    assert attacker.seed is None
    believed = attacker(model, batch).tensors
    for name, t in clean.items():
        assert torch.equal(believed[name], t)
        assert not torch.equal(sent[name], t)
        assert torch.equal(client(model, batch).tensors[name], sent[name])
        assert not torch.equal(client.reseed(6)(model, batch).tensors[name], sent[name])


def test_nested_defenses_draw_different_noise_and_explain_in_order() -> None:
    model, batch = setting()
    nested = gaussian_noise(0.1).wrap(gaussian_noise(0.1).wrap(FedSGD())).reseed(3)
    assert isinstance(nested.inner, Defended)
    assert nested.inner.seed != nested.seed
    assert nested.undefended == FedSGD()
    assert nested.known() == Defended(Defended(FedSGD(), GaussianNoise(0.1), None), GaussianNoise(0.1), None)
    rounded = half_precision().wrap(clip(0.01).wrap(FedSGD()))
    true = FedSGD()(model, batch).tensors
    residual = rounded.residual(true, rounded(model, batch).tensors)
    assert norm(residual) < 1e-15


@pytest.mark.parametrize("granted", [False, True])
def test_the_threat_model_withholds_the_defense_and_the_seeds(granted: bool) -> None:
    model, batch = setting()
    client = gaussian_noise(0.1).wrap(FedAvg(0.1, batch_size=2, shuffle=4), seed=5)
    knows = Knowledge.TRAINING | (Knowledge.DEFENSE | Knowledge.ORDER if granted else Knowledge.NOTHING)
    seen = ThreatModel(knows).observe(model, client(model, batch), space=TensorSpace((6,)), training=client).training
    if granted:
        assert seen == Defended(FedAvg(0.1, batch_size=2, shuffle=4), GaussianNoise(0.1), None)
    else:
        assert seen == FedAvg(0.1, batch_size=2)


def test_a_defended_map_reports_its_inner_loss_and_kind() -> None:
    defended = sign().wrap(FedAvg(0.1))
    assert defended.kind is UpdateKind.WEIGHT_DELTA
    assert defended.loss == FedAvg(0.1).loss
    assert dataclasses.replace(defended, seed=3) == defended.reseed(3)


@pytest.mark.parametrize(
    ("factory", "value"),
    [
        (gaussian_noise, -1.0),
        (gaussian_noise, float("nan")),
        (laplacian_noise, float("inf")),
        (Rounding, torch.float64),
        (Quantization, 1),
        (prune, 1.0),
        (top_k, 0.0),
        (clip, 0.0),
        (Composition, ()),
    ],
)
def test_refuses_unusable_options(factory: type, value: object) -> None:
    with pytest.raises(InvalidInput, match=r"give|use"):
        factory(value)
