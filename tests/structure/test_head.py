"""The head is found by running the model, and the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.models import lenet, resnet20
from gradleak.structure.head import features_and_logits, find_head
from gradleak.training import parameters


class Twisted(nn.Module):
    """Declares its layers in the reverse order of use and ends with an identity."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.zz_last = nn.Linear(6, 4, bias=bias)
        self.aa_first = nn.Linear(5, 6)
        self.tail = nn.Dropout(0.5)
        self.unused = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.zz_last(torch.relu(self.aa_first(x))))


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x))


class InPlace(Activated):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).mul_(2)


class Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.classify = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.conv(x).mean((2, 3), keepdim=True)).flatten(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 5)
        self.decode = nn.Linear(5, 5)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_by_use_not_by_name_or_order(bias: bool) -> None:
    model = Twisted(bias).eval()
    head = find_head(model, parameters(model), (5,))
    assert head is not None
    assert (head.module, head.weight_name) == ("zz_last", "zz_last.weight")
    assert head.bias_name == ("zz_last.bias" if bias else None)
    assert (head.classes, head.width, head.shared) == (4, 6, False)
    x = torch.rand(3, 5)
    features, logits = features_and_logits(model, parameters(model), x, head)
    assert torch.allclose(head.logits(features), logits, atol=1e-6)
    assert torch.equal(logits, model(x))


@pytest.mark.parametrize("model", [Activated(), InPlace()])
def test_an_output_that_is_not_linear_has_no_head(model: nn.Module) -> None:
    assert find_head(model, parameters(model), (5,)) is None


def test_pointwise_convolution_is_a_head() -> None:
    model = Pointwise()
    head = find_head(model, parameters(model), (1, 6, 6))
    assert head is not None
    assert head.weight.shape == (4, 3)
    features, logits = features_and_logits(model, parameters(model), torch.rand(2, 1, 6, 6), head)
    assert torch.allclose(head.logits(features), logits, atol=1e-6)


def test_shared_weight_is_reported() -> None:
    model = Tied()
    head = find_head(model, parameters(model), (5,))
    assert head is not None
    assert head.shared


def test_frozen_head_is_no_head_of_the_update() -> None:
    model = Twisted().eval()
    model.zz_last.weight.requires_grad_(False)
    assert find_head(model, parameters(model), (5,)) is None


def test_frozen_bias_still_counts_in_the_function() -> None:
    model = Twisted().eval()
    model.zz_last.bias.requires_grad_(False)
    head = find_head(model, parameters(model), (5,))
    assert head is not None
    assert head.bias_name is None
    assert head.bias is not None
    features, logits = features_and_logits(model, parameters(model), torch.rand(2, 5), head)
    assert torch.allclose(head.logits(features), logits, atol=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(mode: bool) -> None:
    model = resnet20(classes=7, seed=0).train(mode)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    head = find_head(model, parameters(model), (3, 32, 32))
    assert head is not None
    assert head.classes == 7
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training is mode
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_model_fails() -> None:
    model = lenet(seed=0)
    with pytest.raises(NotApplicable, match="does not run"):
        find_head(model, parameters(model), (3, 7, 9))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
