from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import gradleak.models as models
from gradleak.errors import InvalidInput, UnknownName
from gradleak.training import FedSGD, parameters
from gradleak.types import Batch

FACTORIES = [getattr(models, name) for name in models.__all__]
SMALL = {"lenet": {}, "dlg_resnet": {"depth": 8, "width": 4}, "resnet18": {"width": 4}, "resnet20": {"width": 4},
         "resnet32": {"width": 4}, "perceptron": {"width": 24},
         "vision_transformer": {"image_size": 32, "patch": 8, "width": 24, "depth": 2, "heads": 2}}  # fmt: skip


def small(factory, **options):
    return factory(**SMALL[factory.__name__], classes=7, seed=0, **options)


def image(seed=0, n=2, channels=3, size=32):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factory", FACTORIES, ids=models.__all__)
class TestEveryFamily:
    def test_maps_images_to_logits(self, factory):
        assert small(factory).eval()(image()).shape == (2, 7)

    def test_seed_decides_and_leaves_the_global_generator_alone(self, factory):
        before = torch.get_rng_state()
        first, second = small(factory).state_dict(), small(factory).state_dict()
        other = factory(**SMALL[factory.__name__], classes=7, seed=1).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert any(not torch.equal(first[k], other[k]) for k in first)

    def test_without_seed_the_global_generator_decides(self, factory):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = factory(**SMALL[factory.__name__]).state_dict()
            second = factory(**SMALL[factory.__name__]).state_dict()
            torch.manual_seed(5)
            again = factory(**SMALL[factory.__name__]).state_dict()
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert any(not torch.equal(first[k], second[k]) for k in first)

    def test_accepts_a_generator(self, factory):
        make = lambda: factory(**SMALL[factory.__name__], classes=7, seed=torch.Generator().manual_seed(0))  # noqa: E731
        assert all(torch.equal(a, b) for a, b in zip(make().parameters(), small(factory).parameters(), strict=True))

    def test_every_tensor_is_real_and_finite(self, factory):
        for init in ("default", "dlg", "he"):
            for name, tensor in small(factory, init=init).state_dict().items():
                assert tensor.device.type == "cpu", name
                assert torch.isfinite(tensor).all(), name

    def test_dlg_initialization_is_uniform_on_a_half(self, factory):
        model = small(factory, init="dlg")
        values = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert values.abs().max() <= 0.5
        assert abs(float(values.var()) - 1 / 12) < 0.01
        assert abs(float(values.mean())) < 0.03

    def test_fx_traces_to_the_same_function(self, factory):
        model = small(factory).eval()
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(image()), model(image()), rtol=0, atol=0)

    def test_vmap_over_candidates_equals_a_loop(self, factory):
        model = small(factory).double().eval()
        inputs, labels = torch.stack([image(1), image(2)]).double(), torch.tensor([[0, 1], [2, 3]])
        training = FedSGD()
        together = vmap(lambda x, y: training.tensors(model, parameters(model), x, y))(inputs, labels)
        for row in range(2):
            alone = training(model, Batch(inputs[row], labels[row])).tensors
            for name, value in alone.items():
                torch.testing.assert_close(together[name][row], value, rtol=1e-9, atol=1e-12)

    def test_update_can_be_differentiated_again(self, factory):
        model = small(factory).double().eval()

        def distance(x):
            gradient = FedSGD().tensors(model, parameters(model), x, torch.tensor([1]))
            return (next(iter(gradient.values())) ** 2).sum().log()  # the first layer: the farthest from the loss

        x, direction = image(3, 1).double(), image(4, 1).double() - 0.5
        slope = (grad(distance)(x) * direction).sum()
        step = 1e-6
        measured = (distance(x + step * direction) - distance(x - step * direction)) / (2 * step)
        torch.testing.assert_close(slope, measured, rtol=1e-5, atol=1e-7)

    def test_no_module_works_in_place(self, factory):
        assert not any(getattr(m, "inplace", False) for m in factory(**SMALL[factory.__name__]).modules())

    @pytest.mark.parametrize("option", ["classes", "in_channels", "width"])
    def test_refuses_sizes_below_one(self, factory, option):
        with pytest.raises(InvalidInput, match=option if option != "width" else "width"):
            factory(**{option: 0})

    def test_suggests_names(self, factory):
        with pytest.raises(UnknownName, match="'dlg'"):
            factory(init="dgl")
        with pytest.raises(UnknownName, match="'sigmoid'"):
            factory(activation="sigmod")


def test_lenet_is_the_authors():
    model = models.lenet(seed=0)
    assert {k: tuple(p.shape) for k, p in model.named_parameters()} == {
        "body.0.weight": (12, 3, 5, 5), "body.0.bias": (12,), "body.2.weight": (12, 12, 5, 5), "body.2.bias": (12,),
        "body.4.weight": (12, 12, 5, 5), "body.4.bias": (12,), "fc.0.weight": (100, 768), "fc.0.bias": (100,),
    }  # fmt: skip
    p, x = parameters(model), image()
    for layer, stride in ((0, 2), (2, 2), (4, 1)):
        x = torch.sigmoid(F.conv2d(x, p[f"body.{layer}.weight"], p[f"body.{layer}.bias"], stride=stride, padding=2))
    torch.testing.assert_close(model(image()), F.linear(x.flatten(1), p["fc.0.weight"], p["fc.0.bias"]))


@pytest.mark.parametrize("size", [1, 5, 16, 28, 33, (20, 31), 64])
def test_lenet_fits_any_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = models.lenet(image_size=size, in_channels=1, classes=10, seed=0)
    assert model(torch.rand(2, 1, height, width)).shape == (2, 10)


def test_default_initialization_has_pytorchs_bounds():
    model = models.lenet(init="default", seed=0)
    for module in (model.body[0], model.body[2], model.fc[0]):
        bound = module.weight[0].numel() ** -0.5
        for values in (module.weight, module.bias):
            assert 0.7 * bound < float(values.detach().abs().max()) <= bound


def test_he_initialization_keeps_the_variance():
    model = models.resnet18(init="he", seed=0)
    weight = model.layer3[1].conv2.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.01)
    assert torch.equal(model.bn1.weight, torch.ones(64))
    assert torch.equal(model.linear.bias, torch.zeros(100))


@pytest.mark.parametrize(("factory", "million"), [(models.resnet20, 0.27), (models.resnet32, 0.46)])
def test_parameter_counts_of_he_et_al_table_6(factory, million):
    count = sum(p.numel() for p in factory(classes=10, seed=0).parameters())
    assert round(count / 1e6, 2) == million


def test_resnet18_has_the_published_parameter_count():
    # torchvision's 11,689,512 for 1,000 classes, less the 7×7 stem's 9,408 weights, plus the 3×3 stem's 1,728.
    assert sum(p.numel() for p in models.resnet18(classes=1000, seed=0).parameters()) == 11_689_512 - 9_408 + 1_728


def test_convolutions_have_biases_only_without_normalization():
    assert models.resnet20(seed=0).conv1.bias is None
    assert models.resnet20(norm="none", seed=0).conv1.bias is not None


def test_group_normalization_does_not_mix_examples():
    model, x = models.resnet18(width=16, norm="group", seed=0).train(), image()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_dlg_resnet_removes_strides_and_relu():
    model = models.dlg_resnet(seed=0)
    assert {m.stride for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {(1, 1)}
    assert not any(isinstance(m, torch.nn.ReLU) for m in model.modules())
    assert model.layer3(torch.rand(1, 32, 32, 32)).shape == (1, 64, 32, 32)


def test_dlg_resnet_18_has_the_layers_of_the_authors_code():
    with torch.device("meta"):
        model = models.dlg_resnet(depth=18, classes=10, image_size=8, seed=0)
    assert model.layer4[1].conv2.weight.shape == (512, 512, 3, 3)
    assert model.layer2[0].shortcut[0].weight.shape == (128, 64, 1, 1)
    assert model.linear.weight.shape == (10, 512 * 2 * 2)


@pytest.mark.parametrize("size", [2, 28, (20, 31)])
def test_dlg_resnet_fits_any_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = models.dlg_resnet(depth=8, width=4, image_size=size, seed=0).eval()
    assert model(torch.rand(1, 3, height, width)).shape == (1, 100)


@pytest.mark.parametrize("depth", [2, 19, 21])
def test_dlg_resnet_refuses_other_depths(depth):
    with pytest.raises(InvalidInput, match="6n \\+ 2"):
        models.dlg_resnet(depth=depth)


def test_option_a_shortcut_pads_and_subsamples():
    model = models.resnet20(width=4, seed=0).eval()
    x = torch.rand(1, 4, 8, 8)
    y = model.layer2[0].shortcut(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


def test_resnet_forward_is_a_function_of_its_parameters():
    model = small(models.resnet18).eval()
    doubled = {k: 2 * v for k, v in parameters(model).items() if k.startswith("linear")}
    torch.testing.assert_close(functional_call(model, doubled, (image(),)), 2 * model(image()))
