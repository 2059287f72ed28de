"""Rank bounds against Jacobians computed in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from gradleak.models import lenet, resnet20
from gradleak.structure.ranks import rank_bound
from gradleak.training import FedSGD, parameters


def jacobian_rank(model: nn.Module, shape: tuple[int, ...], size: int) -> int:
    params = parameters(model)
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(size, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (size,), generator=generator)

    def flat(inputs: Tensor) -> Tensor:
        return torch.cat([v.flatten() for v in FedSGD().tensors(model, params, inputs, labels).values()])

    jacobian = jacrev(flat)(x).reshape(-1, x.numel())
    jacobian = jacobian / jacobian.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-11))


def test_the_papers_lenet() -> None:
    model = lenet(width=12, seed=0)
    bound = rank_bound(model, parameters(model), (3, 32, 32), 2)
    assert (bound.equations, bound.unknowns, bound.rank) == (9672, 6144, 6060)
    assert not bound.determined
    assert "6,060 of 6,144" in bound.reason
    wide = rank_bound(lenet(width=24, seed=0), parameters(lenet(width=24, seed=0)), (3, 32, 32), 4)
    assert (wide.effective, wide.unknowns) == (22392, 12288)
    assert wide.determined


@pytest.mark.parametrize(("width", "size"), [(2, 1), (2, 2), (2, 4), (3, 3), (6, 1)])
def test_bound_holds_and_is_met_on_small_lenets(width: int, size: int) -> None:
    model = lenet(width=width, classes=5, in_channels=1, image_size=8, seed=1).double()
    bound = rank_bound(model, parameters(model), (1, 8, 8), size)
    rank = jacobian_rank(model, (1, 8, 8), size)
    assert rank <= bound.rank
    if size > 1 and not bound.determined:
        assert rank >= 0.9 * bound.rank


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_a_branch_is_no_cut() -> None:
    model = Residual().double()
    for size in (1, 3, 8):
        bound = rank_bound(model, parameters(model), (12,), size)
        assert jacobian_rank(model, (12,), size) <= bound.rank
    # The skip connection by-passes b, so only the inputs of a and of the head are cuts.
    assert bound.layer in ("", "a", "fc")


def test_the_model_is_left_as_it_was() -> None:
    model = resnet20(seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rank_bound(model, parameters(model), (3, 32, 32), 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
