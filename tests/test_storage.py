"""What layers take when they are stored, counted piece by piece."""

import itertools

import pytest
import torch

from qbench.quant.spec import QuantSpec
from qbench.quant.storage import layer_bits

ROWS, COLUMNS = 24, 64
SPECS = {
    "row": (QuantSpec(3), 1),
    "symmetric": (QuantSpec(4, symmetric=True), 1),
    "group": (QuantSpec(3, granularity="group", group_size=16), 4),
    "real zero": (QuantSpec(4, granularity="group", group_size=16, real_zero=True), 4),
}


def dense(spec: QuantSpec, groups: int) -> int:
    zero = 0 if spec.symmetric else 16 if spec.real_zero else spec.bits
    return sum(16 + zero for _ in itertools.product(range(ROWS), range(groups)))


@pytest.mark.parametrize(("spec", "groups"), SPECS.values(), ids=SPECS)
def test_kept_channels_replace_codes_and_leave_scales(spec, groups):
    kept = torch.zeros(COLUMNS, dtype=torch.bool)
    kept[[1, 7, 40]] = True
    codes = sum(0 if kept[j] else spec.bits for _, j in itertools.product(range(ROWS), range(COLUMNS)))
    values = sum(16 for _, j in itertools.product(range(ROWS), range(COLUMNS)) if kept[j])
    indices = sum(16 for j in range(COLUMNS) if kept[j])
    expected = codes + values + indices + dense(spec, groups)
    assert layer_bits(spec, ROWS, COLUMNS, kept) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("spec", "groups"), SPECS.values(), ids=SPECS)
def test_kept_weights_come_on_top_of_all_codes(spec, groups):
    kept = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) < 0.02
    sparse = sum(16 + 16 for v in kept.flatten().tolist() if v) + sum(32 for _ in range(ROWS))
    codes = spec.bits * ROWS * COLUMNS
    expected = codes + sparse + dense(spec, groups)
    assert layer_bits(spec, ROWS, COLUMNS, kept) == pytest.approx(expected, rel=1e-12)


def test_a_layer_in_floating_point_keeps_nothing_besides():
    assert layer_bits(None, ROWS, COLUMNS, torch.ones(COLUMNS, dtype=torch.bool)) == 16 * ROWS * COLUMNS
