from __future__ import annotations

import pytest
import torch

from gradleak.errors import InvalidInput
from gradleak.spaces import ImageSpace, InputSpace, TensorSpace, TokenSpace

WORDS = ("[PAD]", "the", "cat", "sat", "on", "mat")
TABLE = torch.cat([torch.zeros(1, 4), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))])
SPACES = [
    ImageSpace((3, 4, 5)),
    ImageSpace((3, 4, 5), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5)),
    TensorSpace((7,)),
    TokenSpace(TABLE, 3, words=WORDS),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(space: InputSpace, n: int = 3) -> torch.Tensor:
    """Return decoded inputs of the space."""
    if isinstance(space, TokenSpace):
        return torch.randint(1, 6, (n, 3), generator=generator())
    return torch.rand(n, *space.shape, generator=generator(), dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.kind)
class TestEverySpace:
    def test_starts_are_model_inputs_of_the_stated_spread(self, space: InputSpace) -> None:
        start = space.start(50, generator(), 0.3)
        assert (start.shape, start.dtype) == ((50, *space.shape), torch.float64)
        assert float(start.std()) == pytest.approx(0.3, rel=0.2)
        assert torch.equal(start, space.start(50, generator(), 0.3))
        assert not torch.equal(start, space.start(50, generator(1), 0.3))

    def test_the_neutral_point_is_a_valid_model_input(self, space: InputSpace) -> None:
        space.check(space.neutral()[None])

    def test_encoding_undoes_decoding(self, space: InputSpace) -> None:
        inputs = some(space)
        space.check(space.encode(inputs))
        assert torch.allclose(space.decode(space.encode(inputs)).double(), inputs.double())

    def test_the_truth_is_right_in_any_order(self, space: InputSpace) -> None:
        truth = space.prepare(some(space))
        order = torch.tensor([2, 0, 1])
        assert space.assign(truth[order], truth).tolist() == [1, 2, 0]
        assert space.errors(truth, truth).tolist() == [0, 0, 0]
        values = {m.name: float(m(truth, truth)[0]) for m in space.metrics}
        level, words = space.closeness(values)
        assert level >= 3
        assert words.endswith(".")
        assert set(space.quoted) <= set(values)
        assert bool(space.better(truth, truth).all())

    def test_a_null_guess_is_never_better_than_itself(self, space: InputSpace) -> None:
        truth = space.prepare(some(space))
        for null in space.null_guesses(truth):
            assert not bool(space.better(null.inputs, truth).any()), null.description

    def test_nothing_known_is_level_0(self, space: InputSpace) -> None:
        assert space.closeness({})[0] == 0

    def test_other_shapes_are_refused(self, space: InputSpace) -> None:
        with pytest.raises(InvalidInput):
            space.check(torch.zeros(2, 9, 9))


def test_the_unit_of_model_inputs() -> None:
    assert [space.unit for space in SPACES] == [1.0, 2.0, None, None]


def test_mid_gray_says_least_of_an_image() -> None:
    assert torch.allclose(SPACES[1].decode(SPACES[1].neutral()), torch.tensor(0.5, dtype=torch.float64))
    assert not bool(SPACES[2].neutral().any())


def test_normalization_in_words() -> None:
    assert SPACES[1].normalization == "normalized with mean 0.5, 0.4, 0.3 and std 0.2, 0.25, 0.5"
    assert SPACES[0].normalization == SPACES[2].normalization == ""


def test_sentences_are_read_as_words() -> None:
    space = SPACES[3]
    assert space.texts(torch.tensor([[1, 2, 3], [1, -1, 5]])) == (("the", "cat", "sat"), ("the", "", "mat"))
    assert TokenSpace(TABLE, 3).texts(torch.tensor([[1, 2, 3]])) == (("1", "2", "3"),)
    assert SPACES[0].texts(torch.zeros(1, 3, 4, 5)) is None


def test_public_examples_make_a_null_guess() -> None:
    truth = some(SPACES[0])
    public = torch.rand(9, 3, 4, 5, generator=generator(4))
    guesses = SPACES[0].null_guesses(truth, public)
    assert guesses[-1].description == "the mean of 9 public images"
    assert torch.allclose(guesses[-1].inputs, public.double().mean(0).expand(3, 3, 4, 5))
    assert not bool(SPACES[0].better(guesses[-1].inputs, truth, public).any())
    with pytest.raises(InvalidInput, match="public images"):
        SPACES[0].null_guesses(truth, public[:, :2])


def test_spaces_are_told_apart_in_records_by_their_kind() -> None:
    kinds = {space.kind: (space.noun, space.display) for space in SPACES}
    assert kinds == {"image": ("image", "pictures"), "tensor": ("example", "numbers"), "tokens": ("sentence", "text")}
