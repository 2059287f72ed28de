"""The recursion is exact where every layer is determined, and says which one is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.exact.one_example import RecursionResult, fit_layers, invert_layers
from gradleak.exact.outer_product import read_outer_product
from gradleak.models import lenet, resnet18


def example(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def gradient(model: nn.Module, x: Tensor, label: int = 3) -> dict[str, Tensor]:
    loss = F.cross_entropy(model(x), torch.tensor([label]))
    return dict(
        zip([n for n, _ in model.named_parameters()], torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )


def invert(
    model: nn.Module, x: Tensor, *, scale: float = 1.0, polish: bool = True, quick: bool = False
) -> RecursionResult:
    grads = {k: scale * g for k, g in gradient(model, x).items()}
    return invert_layers(model, dict(model.named_parameters()), grads, tuple(x.shape[1:]), polish=polish, quick=quick)


def error(result: RecursionResult, x: Tensor) -> float:
    assert result.input is not None, result.stopped_at
    return float((result.input - x[0].double()).square().mean())


class Functions(nn.Module):
    """Functional calls, scaling of the input, BatchNorm in evaluation mode, a shape taken from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 10, 3, padding=1)
        self.c2 = nn.Conv2d(10, 12, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(12).eval()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.c1(x * 2 - 1))
        x = F.leaky_relu(self.norm(self.c2(x)), 0.1)
        return self.head(x.view(x.size(0), -1))


def relu_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 64, 10),
    )  # fmt: skip


DETERMINED = {
    "functional with BatchNorm": (Functions, (2, 8, 8)),
    "linear layers and ReLU": (lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), (20,)),
    "convolutions and ReLU": (relu_network, (3, 8, 8)),
    "groups and dilation": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1, groups=2), nn.Softplus(),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4), nn.ELU(), nn.Flatten(), nn.Linear(16 * 64, 10),
        ),
        (4, 8, 8),
    ),
    "pooling before the activation": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding="same"), nn.AvgPool2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(16 * 16, 10)
        ),
        (1, 8, 8),
    ),
    "odd size, stride 2": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 24, 4, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24 * 16, 10)
        ),
        (2, 9, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DETERMINED)
def test_exact_from_float64_gradients(name: str) -> None:
    make, shape = DETERMINED[name]
    x = example(shape)
    result = invert(seeded(make).double(), x)
    assert error(result, x) < 1e-24
    assert result.residual < 1e-12
    assert all(layer.determined for layer in result.layers)


@pytest.mark.parametrize("polish", [False, True])
def test_exact_without_polish_and_to_the_noise_floor_with_it(polish: bool) -> None:
    x = example((3, 16, 16), torch.float32)
    result = invert(lenet(image_size=16, seed=1), x, polish=polish)
    mse = error(result, x)
    assert mse < (1e-10 if polish else 1e-7)
    if polish:
        # The estimate rests on the residual and the rank alone, and it is right within an order of magnitude.
        assert 0.1 < mse / result.spread < 10


def test_label_and_scale_do_not_matter() -> None:
    x = example((3, 16, 16))
    model = lenet(image_size=16, seed=1).double()
    plain, scaled = invert(model, x), invert(model, x, scale=-0.01)
    assert plain.label == scaled.label == 3
    assert error(scaled, x) < 1e-22


def test_undetermined_layer_is_named_with_its_rank_and_a_start_remains() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 9, 10))
    ).double()
    result = invert(model, example((3, 8, 8)))
    assert result.input is None
    assert result.start is not None
    assert result.start.shape == (3, 8, 8)
    (layer,) = result.layers
    # 36 forward equations; 4 · 9 gradient equations for each of 3 channels of 64 values.
    assert (layer.unknowns, layer.forward, layer.gradient, layer.rank_bound) == (192, 36, 108, 144)
    assert "'0'" in str(result.stopped_at) or "0:" in str(result.stopped_at)


def small(*between: nn.Module, features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(1, 16, 3), *between, nn.Flatten(), nn.Linear(features, 10))


@pytest.mark.parametrize(
    ("between", "features"),
    [
        ((nn.MaxPool2d(2), nn.Tanh()), 144),
        ((nn.ReLU(), nn.MaxPool2d(2)), 144),
        ((nn.MaxPool2d(3, stride=2, padding=1), nn.LeakyReLU()), 144),
        ((nn.BatchNorm2d(16), nn.Hardtanh(-0.4, 0.5), nn.MaxPool2d(2)), 144),
        ((nn.AdaptiveMaxPool2d((4, 3)), nn.ReLU6(), nn.AdaptiveAvgPool2d((8, 3))), 384),
        ((nn.Hardsigmoid(), nn.MaxPool2d(2, ceil_mode=True)), 144),
    ],
    ids=["pool, tanh", "ReLU, pool", "overlapping", "two bounds", "adaptive", "slope between bounds"],
)
def test_kinks(between: tuple[nn.Module, ...], features: int) -> None:
    x = example((1, 8, 8))
    result = invert(seeded(small(*between, features=features), 1).double().eval(), x)
    assert result.input is not None, result.stopped_at
    assert error(result, x) < 1e-15  # PyTorch knows a sixth, the slope of Hardsigmoid, in float32 only.


@pytest.mark.parametrize(
    ("make", "shape", "word"),
    [
        (small(nn.Sigmoid(), nn.AvgPool2d(2), features=144), (1, 8, 8), "144 of the 576"),
        (small(nn.Hardswish(), features=576), (1, 8, 8), "Hardswish"),
        (small(nn.ReLU(), nn.BatchNorm2d(16).eval(), nn.MaxPool2d(2), features=144), (1, 8, 8), "keeps 144 of the 576"),
        (small(nn.GELU(), nn.MaxPool2d(2), features=144), (1, 8, 8), "keeps 144 of the 576"),
        (lambda: nn.Sequential(nn.MaxPool2d(2), small(features=64)()), (1, 8, 8), "the model's input is not"),
        (lambda: resnet18(width=4, seed=0).eval(), (3, 16, 16), "pool"),
    ],
    ids=["average pooling", "Hardswish", "two kinks", "a fold", "pooling the input", "global pooling"],
)
def test_what_stops_the_recursion_is_said(make: Callable[[], nn.Module], shape: tuple[int, ...], word: str) -> None:
    result = invert(seeded(make).double(), example(shape))
    assert result.input is None
    assert word in str(result.stopped_at)


def test_features_are_exact_even_where_the_recursion_stops() -> None:
    model = resnet18(width=4, seed=0).eval().double()
    x = example((3, 16, 16))
    seen: list[Tensor] = []
    hook = model.linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    hook.remove()
    assert torch.allclose(invert(model, x).features, seen[0][0], rtol=1e-12, atol=0)


def test_a_batch_of_two_is_refused() -> None:
    model = lenet(image_size=16, seed=0).double()
    x = torch.cat([example((3, 16, 16)), example((3, 16, 16), seed=1)])
    grads = torch.autograd.grad(F.cross_entropy(model(x), torch.tensor([1, 2])), list(model.parameters()))
    named = dict(zip(dict(model.named_parameters()), grads, strict=True))
    with pytest.raises(NotApplicable, match="no outer product"):
        invert_layers(model, dict(model.named_parameters()), named, (3, 16, 16))


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Mish])
def test_functions_that_fall_before_they_rise(act: type[nn.Module]) -> None:
    """Where few inputs lie on the falling side, Gauss–Newton steps find them; where many do, it is said."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), act(), nn.Flatten(), nn.Linear(768, 10)))
    x = example((1, 8, 8), torch.float32)
    for scale, known in ((1.0, True), (50.0, False)):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled[0].weight.mul_(scale)  # type: ignore[index, operator, union-attr]
        result = invert(scaled, x)
        assert (result.input is not None) == known, (scale, result.stopped_at)
        assert error(result, x) < 1e-9 if known else "falls before it rises" in str(result.stopped_at)


def test_softmax_fixes_the_scale_of_a_last_layer_without_bias() -> None:
    for bias in (False, True):
        model = seeded(
            lambda bias=bias: nn.Sequential(
                nn.Conv2d(1, 4, 3, bias=bias), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 5, bias=False)
            )
        )
        result = invert(model, example((1, 8, 8), torch.float32))
        assert result.input is not None, result.stopped_at
        assert error(result, example((1, 8, 8), torch.float32)) < 1e-9
        assert result.label is not None


def test_a_last_layer_without_bias_under_another_loss_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 5, bias=False)))
    x = example((1, 8, 8), torch.float32)
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    named = dict(zip(dict(model.named_parameters()), grads, strict=True))
    with pytest.raises(NotApplicable, match="not that of one example's cross-entropy"):
        invert_layers(model, dict(model.named_parameters()), named, (1, 8, 8))


def test_outer_product_measures_the_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    h, d = torch.rand(50, generator=draw), torch.randn(10, generator=draw)
    read = read_outer_product(torch.outer(d, h), d)
    assert torch.allclose(read.features, h.double(), rtol=1e-7)
    assert 1e-9 < read.noise < 1e-7


def test_a_walk_ends_near_the_noise_floor_and_is_honest_about_it() -> None:
    x = example((3, 16, 16), torch.float32)
    model = lenet(image_size=16, seed=1)
    quick, polished = invert(model, x, quick=True), invert(model, x)
    assert (quick.steps, len(quick.layers)) == (0, 3)
    assert polished.steps > 0
    mse, floor = error(quick, x), error(polished, x)
    assert mse < 1e-10
    assert mse < 100 * floor
    assert mse / 20 < quick.spread < 100 * mse


@pytest.mark.parametrize("inputs", [12, 40], ids=["more outputs", "fewer outputs"])
def test_linear_layer_without_bias(inputs: int) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(inputs, 16, bias=False), nn.Tanh(), nn.Linear(16, 5)))
    x = example((inputs,), torch.float32)
    result = invert(model, x, quick=True)
    assert result.steps == 0
    assert error(result, x) < 1e-10


def test_an_update_that_is_not_explained_takes_further_steps() -> None:
    x = example((3, 16, 16), torch.float32)
    model = lenet(image_size=16, seed=1)
    seen = gradient(model, x)
    name = next(n for n in seen if n.endswith("weight"))
    seen[name] = seen[name] * 1.01
    result = invert_layers(model, dict(model.named_parameters()), seen, (3, 16, 16))
    assert result.residual > 1e-4
    assert result.steps > 0


def test_equations_that_depend_on_each_other_are_not_counted_as_determined() -> None:
    """A 1 x 1 convolution whose 16 outputs span two of three channels: enough equations, too low a rank."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 64, 10)))
    with torch.no_grad():
        weight = model[0].weight  # type: ignore[index]
        weight[:, 2] = weight[:, 0] + weight[:, 1]
    result = invert(model.double(), example((3, 8, 8)), quick=True)
    assert result.layers[0].rank_bound == result.layers[0].unknowns == 192
    assert result.input is None
    assert "some direction does not show" in str(result.stopped_at)


def test_averages_that_lose_a_direction_are_not_undone() -> None:
    """Averages of 3 x 3 lose a direction on a plane of 5 x 5, and none on 4 x 4."""
    for size, lost in ((5, True), (4, False)):
        model = seeded(
            lambda size=size: nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(3, 1, 1), nn.Tanh(), nn.Flatten(),
                nn.Linear(8 * size**2, 10),
            )
        )  # fmt: skip
        result = invert(model.double(), example((2, size, size)))
        assert (result.input is None) == lost
        assert ("hides some direction" in str(result.stopped_at)) == lost


def test_it_ends_when_it_is_told_to() -> None:
    model = lenet(image_size=16, seed=1)
    x = example((3, 16, 16), torch.float32)
    with pytest.raises(NotApplicable, match="time ended"):
        invert_layers(model, dict(model.named_parameters()), gradient(model, x), (3, 16, 16), going=lambda: False)


def test_a_network_of_zeros_shows_nothing_and_ends_in_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x = example((1, 4, 4))
    params, seen = dict(model.named_parameters()), gradient(model, x, 1)
    for result in (
        invert_layers(model, params, seen, (1, 4, 4)),
        fit_layers(model, params, seen, torch.zeros(1, 4, 4), going=lambda *_: True),
    ):
        assert result.input is None
        assert result.stopped_at is not None
