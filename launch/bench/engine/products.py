"""Matrix products of a CPU rank beside oneDNN's packed ones, and those of one row beside reading the weights."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepladder.kernels.cpu.native import Projection
from stepladder.launch.bench.engine.turns import medians
from stepladder.launch.report import Goal, Row, at_least

BANDS = {"1 to 32 rows": (range(1, 33), 1.0), "64 to 512 rows": (range(64, 513), 0.92)}  # with the goal in fp32
OF_BANDWIDTH = 0.85
NO_CACHE = 64 << 20  # bytes: weights beyond that come from memory each time

Shape = tuple[int, int]  # outputs, inputs
Times = dict[int, tuple[float, float]]  # by rows: seconds of ours and of oneDNN's


@torch.inference_mode()
def measure(
    shapes: Sequence[Shape], rows: Sequence[int], dtype: str, repeats: int
) -> tuple[dict[Shape, Times], list[Row]]:
    """Every shape with every number of rows; and what one row reads of weights that no cache holds, in bytes a second
    with those of a sum over as many bytes as its bound."""
    found, reads = {}, []
    for shape in shapes:
        weight = (torch.randn(shape) * 0.02).to(getattr(torch, dtype))
        own = Projection.of(weight)
        found[shape] = _times(own, one_dnn(weight), shape[1], rows, repeats)
        if weight.nbytes > NO_CACHE:
            reads.append(_one_row(own, f"{_name(shape, dtype)}, 1 row", repeats))
    return found, reads


def _times(
    own: Projection, packed: Callable[[Tensor], Tensor], inputs: int, rows: Sequence[int], repeats: int
) -> Times:
    times = {}
    for count in rows:
        x = torch.randn(count, inputs).to(own.panels.dtype)
        ours, theirs = medians([lambda x=x: own(x), lambda x=x: packed(x)], 3 * repeats)  # type: ignore[misc]
        times[count] = ours, theirs
    return times


def _one_row(own: Projection, case: str, repeats: int) -> Row:
    x = torch.randn(1, own.panels.shape[1]).to(own.panels.dtype)
    same = torch.ones(own.panels.nbytes // 4)
    speed, bound = (same.nbytes / 1e9 / seconds for seconds in medians([lambda: own(x), same.sum], 5 * repeats))
    return Row(case, "weights read", speed, "GB/s", bound=bound)


def rows(found: dict[Shape, Times], dtype: str) -> Iterator[Row]:
    """The worst of each band of rows, as a multiple of oneDNN's speed."""
    for shape, times in found.items():
        for band, (numbers, _) in BANDS.items():
            if ratios := [theirs / ours for count, (ours, theirs) in times.items() if count in numbers]:
                yield Row(f"{_name(shape, dtype)}, {band}", "slowest product beside oneDNN", min(ratios), "x")


def summary(rows: Sequence[Row], dtype: str) -> Iterator[tuple[str, Goal]]:
    """rows: of this dtype. oneDNN may have instructions for bf16 that ours have no use for, so that has no bar."""
    for band, (_, goal) in BANDS.items():
        if ratios := [row.value for row in rows if row.value and row.case.endswith(band)]:
            worst = min(ratios)
            held = at_least(worst, goal) if dtype == "float32" else Goal(worst, "no bar", True)
            yield f"products {dtype}, {band}: slowest beside oneDNN", held
    if shares := [row.value / row.bound for row in rows if row.value and row.bound]:
        yield f"products {dtype}, 1 row: share of the read bandwidth", at_least(min(shares), OF_BANDWIDTH)


def one_dnn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a weight [out, in] that oneDNN has laid out for itself; torch's plain one where it cannot."""
    known = torch.backends.mkldnn.is_available()
    if weight.dtype == torch.bfloat16:
        known = known and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not known:
        return lambda x: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # for batches of about so many
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _name(shape: Shape, dtype: str) -> str:
    return f"{shape[0]} x {shape[1]} {dtype}"
