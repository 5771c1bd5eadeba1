"""The native cell of a recurrent drafter against its definition."""

import pytest
import torch

from stepladder.kernels.cpu.recurrent import RecurrentCell
from tests.kernels.native_checks import DTYPES, close, wide


def random_cell(hidden: int, inner: int, dtype: torch.dtype) -> RecurrentCell:
    g = torch.Generator().manual_seed(hidden)
    shapes = (inner, 2 * hidden), (inner, 2 * hidden), (hidden, 2 * hidden), (hidden, inner)
    return RecurrentCell.of(*((torch.randn(shape, generator=g) * shape[1] ** -0.5).to(dtype) for shape in shapes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner", "rows"), [(32, 24, 1), (37, 41, 3), (256, 512, 9)])
def test_the_cell_is_its_definition(hidden: int, inner: int, rows: int, dtype: torch.dtype) -> None:
    cell, g = random_cell(hidden, inner, dtype), torch.Generator().manual_seed(rows)
    state, embedded = 3 * torch.randn(rows, hidden, generator=g), torch.randn(rows, hidden, generator=g)
    exact = RecurrentCell(wide(cell.gated), wide(cell.out))
    eps = torch.finfo(torch.float32).eps
    both = [x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() for x in (state, embedded)]
    x = torch.cat(both, -1)
    want = exact.out.defined(torch.cat((exact.gated.defined(x), x), -1))
    close(cell(state, embedded), want, 4e-6, least=1.0)
    for row in range(rows):
        alone = cell(state[row : row + 1], embedded[row : row + 1])
        assert torch.equal(alone[0], cell(state, embedded)[row]), "a row's bits are its own"
