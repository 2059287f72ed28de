from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import gradleak as gl
from gradleak.errors import InvalidModel
from gradleak.training import FedSGD, batch_statistics, check_reproducible, parameters
from gradleak.types import Batch


def test_batch_statistics_compute_what_training_mode_computes() -> None:
    model = gl.models.resnet18(width=4, classes=5, seed=0).train()
    same = batch_statistics(model.eval())
    model.train()
    with pytest.raises(InvalidModel, match="batch_statistics"):
        check_reproducible(model)
    check_reproducible(same)
    batch = Batch(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 4]))
    before = {k: b.clone() for k, b in model.named_buffers()}
    ours, theirs = FedSGD()(same, batch).tensors, FedSGD()(model, batch).tensors
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
    assert before
    assert not dict(same.named_buffers())
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (torch.jit.script, "the Python module that was scripted"),
        (torch.nn.DataParallel, "its attribute module"),
        (torch.compile, "its attribute _orig_mod"),
        (lambda m: torch.nn.Sequential(torch.nn.Identity(), torch.compile(m)), "its attribute _orig_mod"),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_give_instead(
    wrap: Callable[[torch.nn.Module], torch.nn.Module], remedy: str
) -> None:
    with pytest.raises(InvalidModel, match=remedy):
        parameters(wrap(torch.nn.Linear(2, 2)))
