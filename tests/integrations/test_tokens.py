from __future__ import annotations

import pytest
import torch

from gradleak.errors import InvalidInput
from gradleak.spaces import TokenSpace


@pytest.fixture
def table() -> torch.Tensor:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    table[0] = 0  # [PAD] of a fresh table
    return table


def test_decodes_what_it_encodes_at_any_scale(table: torch.Tensor) -> None:
    space = TokenSpace(table, 5)
    ids = torch.randint(1, 50, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    assert space.shape == (5, 8)
    assert space.encode(ids).shape == (3, 2, 5, 8)
    assert torch.equal(space.decode(space.encode(ids)), ids)
    assert torch.equal(space.decode(space.encode(ids).double() * 1e-6), ids)


def test_zero_rows_and_excluded_tokens_never_win(table: torch.Tensor) -> None:
    space = TokenSpace(table, 1, excluded=(7,))
    anything = torch.randn(500, 1, 8, generator=torch.Generator().manual_seed(2))
    hostile = torch.cat([anything, torch.zeros(1, 1, 8), torch.full((1, 1, 8), torch.nan), table[7][None, None]])
    decoded = space.decode(hostile)
    assert int(decoded.min()) > 0
    assert 7 not in decoded
    assert 7 in TokenSpace(table, 1).decode(hostile)


def test_errors(table: torch.Tensor) -> None:
    for wrong in (table[0], table[None]):
        with pytest.raises(InvalidInput, match="embedding table"):
            TokenSpace(wrong, 5)
    with pytest.raises(InvalidInput, match="positive length"):
        TokenSpace(table, 0)
    with pytest.raises(InvalidInput, match="decode to"):
        TokenSpace(table * 0, 5)
    with pytest.raises(InvalidInput, match="decode to"):
        TokenSpace(table * torch.nan, 5)
