"""Models that vmap, a cast or a second derivative cannot take: a loop, their own number type, or one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak as gl
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.training import batch_statistics
from gradleak.types import Verdict

STEPS, CHANNELS = 5, 3


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.head = kind(CHANNELS, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(STEPS * CHANNELS, 24), nn.Linear(24, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)))

    def hidden(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


class Branching(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        return hidden if hidden.sum().item() > -1e9 else -hidden


class Counting(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().hidden(x)


class Single(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x.float())


class Random(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        return F.dropout(super().hidden(x))


class Numpy(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(torch.from_numpy(np.asarray(x.numpy())))


class Once(Plain):
    """Distances have a first derivative only."""

    def hidden(self, x: Tensor) -> Tensor:
        units = super().hidden(x).view(-1, 4, 6)
        return torch.cdist(units, units.flip(1) + 1, p=3).repeat(1, 1, 2).flatten(1)[:, :24]


def observe(model: nn.Module, n: int = 1, shape: tuple[int, ...] = (STEPS, CHANNELS)) -> tuple[Tensor, gl.Observation]:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -0.6, 0.6, generator=generator)
    x = torch.rand(n, *shape, generator=generator)
    client = gl.Client(model, gl.Batch(x, torch.arange(n) % 4))
    seen = gl.ThreatModel().observe(
        model, client.send(), space=gl.TensorSpace(shape), training=client.training, batch_size=n
    )
    return x, seen


ATTACKS = {
    "dlg": lambda: gl.attacks.dlg(iterations=25),
    "dlg, restarts": lambda: gl.attacks.dlg(iterations=25, restarts=3),
    "idlg": lambda: gl.attacks.idlg(iterations=25),
    "inverting_gradients": lambda: gl.attacks.inverting_gradients(iterations=25, restarts=2),
}


@pytest.mark.parametrize(
    ("kind", "attack"),
    [*((nn.LSTM, attack) for attack in ATTACKS), (nn.GRU, "dlg, restarts"), (nn.RNN, "inverting_gradients")],
)
def test_recurrent_layers_are_searched_to_the_end_and_traced(kind: type[nn.Module], attack: str) -> None:
    _, seen = observe(Recurrent(kind))
    found = ATTACKS[attack]().reconstruct(seen)
    assert found.trace is not None
    assert len(found.trace.objectives) > 5
    assert found.objective < 0.9 * found.trace.objectives[0]


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("make", [Branching, Counting, Single])
def test_what_vmap_cannot_take_is_solved_in_a_loop(make: type[Plain], restarts: int) -> None:
    x, seen = observe(make())
    before = seen.model.calls.clone()
    found = gl.attacks.idlg(iterations=400, restarts=restarts).reconstruct(seen)
    assert float((found.inputs - x).square().mean()) < 1e-8
    assert torch.equal(seen.model.calls, before)


def test_a_model_of_one_number_type_is_searched_in_it() -> None:
    _, seen = observe(Single())
    found = gl.attacks.idlg(iterations=10).reconstruct(seen)
    assert found.inputs.dtype == torch.float32
    assert any("float64" in n and "float32" in n for n in found.notes)
    assert found.certificate is not None
    assert found.certificate.verdict is Verdict.UNPROVED


def test_the_automatic_choice_ends_with_a_search_of_a_model_of_one_number_type() -> None:
    x, seen = observe(Single())
    found = gl.attacks.auto(iterations=400).reconstruct(seen)
    assert float((found.inputs - x).square().mean()) < 1e-6


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (Random, InvalidModel, "differ from run to run.*evaluation mode"),
        (Numpy, NotApplicable, "numpy.*use an attack that solves"),
        (Once, NotApplicable, "_cdist_backward.*use an attack that solves"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(
    make: type[Plain], error: type[Exception], sentence: str, attack: str
) -> None:
    _, seen = observe(make())
    state = torch.get_rng_state()
    with pytest.raises(error, match=sentence) as caught:
        ATTACKS[attack]().reconstruct(seen)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", ATTACKS)
def test_batch_statistics_are_searched_at_the_stated_batch_size(attack: str) -> None:
    layers = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Sigmoid(), nn.Linear(24, 4)
    _, seen = observe(batch_statistics(nn.Sequential(*layers)), 4, (16,))
    found = ATTACKS[attack]().reconstruct(seen)
    assert found.trace is not None
    assert found.objective < 0.9 * found.trace.objectives[0]
    alone = gl.ThreatModel().observe(seen.model, seen.update, space=seen.space, training=seen.training, batch_size=1)
    with pytest.raises(NotApplicable, match="more than 1 value per channel"):
        ATTACKS[attack]().reconstruct(alone)


class Hard(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(super().forward(x).argmax(1), 4).float()


def test_what_has_no_gradient_is_refused_where_the_client_trains() -> None:
    batch = gl.Batch(torch.rand(1, STEPS, CHANNELS), torch.tensor([1]))
    with pytest.raises(InvalidModel, match="does not depend on any trainable parameter"):
        gl.Client(Hard(), batch).send()
    with pytest.raises(InvalidModel, match="lazy layer"):
        gl.Client(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), batch).send()
