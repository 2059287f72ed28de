from __future__ import annotations

import pytest
import torch

import gradleak as gl
from gradleak.audit.build import build_record
from gradleak.audit.records import from_json, to_json
from gradleak.audit.scores import score
from gradleak.errors import InvalidInput
from gradleak.report import picture, render
from gradleak.spaces import Category, Number, TableSpace
from gradleak.types import Batch, Reconstruction

AGE = Number("age", "years", low=17, high=90, mean=40, std=10, decimals=0)
PAY = Number("pay", mean=2000.0, std=5.0)
JOB = Category("job", ("clerk", "nurse", "cook"))
TOWN = Category("town", ("Rome", "Oslo"), one_hot=False)
SPACE = TableSpace((AGE, JOB, PAY, TOWN))
ROWS = torch.tensor([[30.0, 1, 2003.25, 0], [41.0, 2, 1999.5, 1]], dtype=torch.float64)
INPUTS = torch.tensor([[-1.0, 0, 1, 0, 0.65, 0], [0.1, 0, 0, 1, -0.1, 1]], dtype=torch.float64)


def test_rows_and_model_inputs_are_the_same_thing() -> None:
    assert SPACE.shape == (6,)
    assert torch.allclose(SPACE.encode(ROWS), INPUTS)
    assert torch.allclose(SPACE.decode(INPUTS), ROWS)
    assert torch.allclose(SPACE.decode(INPUTS.float()[:, None]), ROWS[:, None], atol=1e-4)
    assert SPACE.encode(ROWS.float()).dtype == torch.float32


def test_rows_as_people_write_them() -> None:
    assert SPACE.names == ("age (years)", "job", "pay", "town")
    assert SPACE.texts(ROWS)[0] == ("30", "nurse", "2003.25", "Rome")
    nothing = SPACE.decode(torch.full((1, 6), torch.nan))
    assert SPACE.texts(nothing) == (("–", "–", "–", "–"),)
    assert Number("x", decimals=1).text(-0.01) == "0.0"


@pytest.mark.parametrize("dropped", JOB.values)
def test_a_group_may_leave_one_value_out(dropped: str) -> None:
    space = TableSpace((Category("job", JOB.values, dropped=dropped), AGE))
    rows = torch.tensor([[0.0, 30], [1, 40], [2, 50]], dtype=torch.float64)
    inputs = space.encode(rows)
    assert inputs.shape == (3, 3)
    assert int(inputs[:, :2].sum()) == 2
    assert torch.equal(space.decode(inputs), rows)
    assert space.plausible(inputs).all()
    assert not space.plausible(inputs.mean(0, keepdim=True)).any()
    assert not space.plausible(torch.tensor([[1.0, 1, 0]])).any()
    relaxed = space.relax(torch.zeros(1, 3))[0, :2]
    assert torch.allclose(relaxed, torch.full((2,), 1 / 3))


def test_a_mixture_is_no_row() -> None:
    assert SPACE.plausible(INPUTS).tolist() == [True, True]
    mean = INPUTS.mean(0, keepdim=True)
    shifted = INPUTS[:1].clone()
    shifted[0, 0] = -1.02  # 29.8 years
    beyond = INPUTS[:1].clone()
    beyond[0, 0] = 6.0  # 100 years
    several = INPUTS[:1].clone()
    several[0, 1:4] = 1.0
    for wrong in (mean, shifted, beyond, several):
        assert SPACE.plausible(wrong).tolist() == [False]
        assert SPACE.show(wrong)[1] is not None
    assert SPACE.show(INPUTS)[1] is None


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [(0, 9.0, "'age' has numbers outside 17 to 90"), (1, 1.0, "'job' has groups"), (5, 2.0, "'town' has codes")],
)
def test_other_inputs_are_refused_with_the_column(place: int, value: float, said: str) -> None:
    wrong = INPUTS.clone()
    wrong[0, place] = value
    with pytest.raises(InvalidInput, match=said):
        SPACE.check(wrong)


def test_a_search_may_take_any_values() -> None:
    relaxed = SPACE.relax(100 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    groups, age = relaxed[:, 1:4], relaxed[:, 0] * 10 + 40
    assert torch.allclose(groups.sum(1), torch.ones(50))
    assert bool(((age >= 17) & (age <= 90)).all())
    assert bool(SPACE.plausible(SPACE.encode(SPACE.decode(relaxed)), 60).all())


def test_cells_count_exactly_and_numbers_to_their_tolerance() -> None:
    guess = ROWS.clone()
    guess[0] = torch.tensor([30.4, 2, 2003.254, 0])
    assert SPACE.cells(guess, ROWS).tolist()[0] == [True, False, True, True]
    assert SPACE.errors(guess, ROWS).tolist() == [0.25, 0.0]
    assert SPACE.assign(guess.flip(0), ROWS).tolist() == [1, 0]
    loose = TableSpace((Number("age", tolerance=5.0),))
    assert loose.cells(torch.tensor([[34.0], [36.0]]), torch.tensor([[30.0], [30.0]])).tolist() == [[True], [False]]


def test_the_null_guess_is_the_commonest_row() -> None:
    public = torch.tensor([[20.0, 0, 1, 1], [30, 2, 5, 0], [90, 2, 9, 1]], dtype=torch.float64)
    null = SPACE.null_guesses(ROWS, public)[0]
    assert null.inputs[1].tolist() == [30, 2, 5, 1]
    assert (null.oracle, SPACE.null_guesses(ROWS)[0].oracle) == (False, True)


@pytest.mark.parametrize("columns", [(), (AGE, AGE)])
def test_columns_have_names_of_their_own(columns) -> None:
    with pytest.raises(InvalidInput, match="names that differ"):
        TableSpace(columns)


@pytest.mark.parametrize(
    "make",
    [lambda: Number("x", std=0.0), lambda: Category("x", ("a", "a")), lambda: Category("x", ("a",), dropped="b")],
)
def test_columns_that_make_no_sense_are_refused(make) -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        make()


def test_verdict_and_report_speak_of_rows_and_cells() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    client = gl.Client(model, Batch(INPUTS.float(), torch.tensor([0, 2])))
    threat = gl.ThreatModel()
    observation = threat.observe(model, client.send(), space=SPACE, training=client.training, batch_size=2)
    guess = ROWS.flip(0).clone()
    guess[0, 1] = 0.0
    found, truth = Reconstruction(guess, torch.tensor([2, 0]), 0.0), Batch(ROWS, torch.tensor([0, 2]))
    scores = score(found, truth, SPACE)
    assert [(c.name, c.found, c.n) for c in scores.columns] == [
        ("age (years)", 2, 2), ("job", 1, 2), ("pay", 2, 2), ("town", 2, 2)
    ]  # fmt: skip
    assert scores.successes == 1
    folder = build_record(observation, found, attack="auto", scores=scores, truth=truth)
    record = from_json(to_json(folder.record))
    assert record.verdict.headline == "1 of 2 private rows came back."
    assert "7 of 8 cells are right" in record.verdict.reason
    html = render(record, picture(record, folder.inputs, folder.truth))
    assert '<td>cook</td><td><span class="soft">clerk</span> ✗</td>' in html
    assert '<b class="found">41</b> ✓' in html
    assert '<tr><th scope="row">job</th><td>1 of 2</td>' in html


@pytest.mark.parametrize("n", [1, 2])
def test_rows_are_read_and_certified_in_their_words(n: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    client = gl.Client(model, Batch(INPUTS[:n].float(), torch.tensor([0, 2])[:n]))
    found = gl.simulate(client, gl.attacks.linear_inversion(), space=SPACE).reconstruction
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert sorted(SPACE.texts(found.inputs)) == sorted(SPACE.texts(ROWS[:n]))
