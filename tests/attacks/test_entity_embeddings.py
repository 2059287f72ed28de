from __future__ import annotations

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.errors import NotApplicable
from gradleak.spaces import Category, Number, TableSpace
from gradleak.structure.lookups import find_lookups

SPACE = TableSpace(
    (
        Number("age", "years", mean=40, std=10, decimals=0),
        Category("job", ("clerk", "nurse", "cook", "none"), one_hot=False),
        Number("hours", mean=40, std=12, decimals=0),
        Category("town", ("Rome", "Oslo", "Bonn"), one_hot=False),
    )
)
ROWS = torch.tensor([[30.0, 1, 38, 0], [41, 3, 20, 2], [52, 1, 60, 1]], dtype=torch.float64)


class Net(nn.Module):
    """Two numbers and two categories; ``shared`` looks both up in one table, the second behind the first."""

    def __init__(self, *, shared: bool = False, wide: bool = False, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList([nn.Embedding(7, 3)] if shared else [nn.Embedding(4, 3), nn.Embedding(3, 2)])
        self.norm = nn.BatchNorm1d(2).eval() if norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(8 if shared else 7, 64), nn.ReLU(), nn.Linear(64, 2))
        self.linear = nn.Linear(2, 2) if wide else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers, codes = x[:, ::2], x[:, 1::2].long()
        if len(self.tables) == 1:
            looked_up = self.tables[0](codes + torch.tensor([0, 4])).flatten(1)
        else:
            looked_up = torch.cat([table(codes[:, i]) for i, table in enumerate(self.tables)], 1)
        outputs = self.body(torch.cat([looked_up, self.norm(numbers)], 1))
        return outputs if self.linear is None else outputs + self.linear(numbers)


def attack(model: nn.Module, n: int, space: gl.InputSpace = SPACE, training: gl.LocalTraining | None = None):
    batch = gl.Batch(SPACE.encode(ROWS[:n]).float(), torch.tensor([1, 0, 1])[:n])
    client = gl.Client(model, batch, gl.FedSGD() if training is None else training)
    return gl.simulate(client, gl.attacks.entity_embeddings(), space=space).reconstruction


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("options", [{}, {"shared": True}, {"norm": True}], ids=["each", "shared", "normalized"])
def test_rows_are_read_and_proved(n: int, options: dict[str, bool]) -> None:
    model = Net(**options)
    if options.get("norm"):
        model.norm.running_mean = torch.tensor([0.3, -0.2])
        model.norm.running_var = torch.tensor([2.0, 0.5])
    found = attack(model.eval(), n)
    assert sorted(SPACE.texts(found.inputs)) == sorted(SPACE.texts(ROWS[:n]))
    assert found.certificate.verdict == "proved"
    assert "embeddings included" in found.certificate.reason


def test_a_space_that_knows_no_columns_will_do() -> None:
    found = attack(Net(), 1, gl.TensorSpace((4,)))
    assert torch.allclose(found.inputs, SPACE.encode(ROWS[:1]), atol=1e-5)


def test_the_categories_of_a_batch_are_named_in_words() -> None:
    found = attack(Net(), 3)
    texts = [f.text for f in found.findings if f.kind == "columns"]
    assert "names the 2 of 4 values of 'job' that the client used: nurse, none." in texts[0]
    assert "names the 3 of 3 values of 'town'" in "".join(texts) or len(texts) == 1


def test_embeddings_must_agree_with_what_is_behind_them() -> None:
    model, batch = Net(), gl.Batch(SPACE.encode(ROWS[:1]).float(), torch.tensor([1]))
    sent = gl.Client(model, batch).send()
    tampered = {k: t.roll(1, 0) if k.startswith("tables") else t for k, t in sent.tensors.items()}
    seen = gl.ThreatModel().observe(model, tampered, space=SPACE, training=gl.FedSGD(), batch_size=1)
    found = gl.attacks.entity_embeddings().reconstruct(seen)
    assert found.certificate.verdict == "unproved"


def test_columns_that_go_past_the_layer_are_refused_with_the_codes() -> None:
    with pytest.raises(NotApplicable, match="past the first linear layer") as refusal:
        attack(Net(wide=True), 1)
    assert [f.count for f in refusal.value.findings] == [1, 1]


def test_every_refusal_says_what_the_embeddings_name() -> None:
    batch = gl.Batch(SPACE.encode(ROWS[:1]).float(), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="entity_embeddings") as refusal:
        gl.simulate(gl.Client(Net(), batch), gl.attacks.linear_inversion(), space=SPACE)
    assert [f.kind for f in refusal.value.findings] == ["columns", "columns"]


def test_models_without_embeddings_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(NotApplicable, match="no column up"):
        attack(model, 1)


def test_auto_reads_them_first() -> None:
    batch = gl.Batch(SPACE.encode(ROWS[:2]).float(), torch.tensor([1, 0]))
    found = gl.simulate(gl.Client(Net(), batch), gl.attacks.auto(), space=SPACE).reconstruction
    assert (found.attack, found.certificate.verdict) == ("entity_embeddings", "proved")


def test_what_a_mixture_looks_like_is_no_row() -> None:
    model = Net()
    lookups = find_lookups(model, dict(model.named_parameters()), SPACE.neutral())
    rows = SPACE.encode(ROWS)
    decoded, distance = lookups.decode(lookups.encode(rows))
    assert torch.allclose(decoded, rows)
    assert float(distance.max()) < 1e-9
    mixed = lookups.encode(rows).mean(0, keepdim=True)
    assert float(lookups.decode(mixed)[1]) > 0.01


def test_a_wrapped_model_of_two_tensors_is_read() -> None:
    class Two(Net):
        def forward(self, numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            looked_up = torch.cat([table(codes[:, i]) for i, table in enumerate(self.tables)], 1)
            return self.body(torch.cat([looked_up, numbers], 1))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Two()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.model(rows[:, ::2], rows[:, 1::2].long())

    found = attack(One(), 1)
    assert SPACE.texts(found.inputs) == SPACE.texts(ROWS[:1])
    with pytest.raises(gl.errors.InvalidInput, match="one tensor of inputs"):
        gl.Batch((ROWS, ROWS), torch.zeros(3))  # type: ignore[arg-type]
