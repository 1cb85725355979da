"""The output error of a rounded weight from its input's Gram matrix, and searches by it."""

import pytest
import torch

from qbench.algorithms.awq import AWQScale
from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.dgq import DGQ
from qbench.quant import output_error as module
from qbench.quant.grid import fake_quantize, group_sum, grouped
from qbench.quant.output_error import gram_blocks, group_error, output_error, row_chunks
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .test_gptq import SIZE, problem

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 257])
def test_the_error_of_a_row_is_that_of_its_output(n):
    generator = torch.Generator().manual_seed(n)
    x, delta = (torch.randn(k, n, generator=generator, dtype=torch.float64) for k in (50, 7))
    expected = (x @ delta.T).square().sum(0) / 50
    error = output_error(delta, x.T @ x / 50)
    # A sum of n² products, whose magnitudes add up to |δ| |G| |δ|ᵀ.
    size = (delta.abs() @ (x.T @ x / 50).abs() * delta.abs()).sum(-1)
    assert ((error - expected).abs() <= 4 * n * EPS * size).all()


SPECS = [
    QuantSpec(3),
    QuantSpec(3, granularity="group", group_size=SIZE),
    QuantSpec(3, granularity="block", group_size=SIZE),
    QuantSpec(3, granularity="tensor"),
    QuantSpec(3, granularity="group", group_size=SIZE, scale_bits=4, scale_group=8),
    Scheme.of(wbits=4, weight_format="nvfp4").weight,
    Scheme.of(wbits=4, weight_format="nf4", group_size=SIZE).weight,
]


@pytest.mark.parametrize("spec", SPECS[:4], ids=lambda s: s.granularity)
def test_the_error_of_a_group_is_that_of_its_share_of_the_output(spec):
    w, x = problem()
    delta = fake_quantize(w, spec) - w
    size = spec.group_size or 48
    shares = torch.stack(
        [(x[:, i : i + size] @ delta[:, i : i + size].T).square().sum(0) for i in range(0, 48, size)], 1
    )[..., None]
    expected = shares.sum((0, 1)).view(1, 1) if spec.granularity == "tensor" else group_sum(shares, spec)
    ours = group_error(grouped(delta, spec), gram_blocks(x.T @ x, size), spec)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_that_share_a_scale_stay_together(spec, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 48 * 3)
    w, _ = problem()
    parts = [fake_quantize(w[rows], spec) for rows in row_chunks(w, spec)]
    assert torch.equal(torch.cat(parts), fake_quantize(w, spec))
    if spec.granularity in ("row", "group") and spec.scale_bits == 16 and spec.scale_format == "float16":
        assert max(map(len, parts)) == 3


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("search", ["scale", "clip", "dgq"])
def test_searches_do_not_depend_on_how_many_rows_are_looked_at_together(spec, search, monkeypatch):
    w, x = problem()
    gram = x.T @ x / len(x)

    def found():
        if search == "scale":
            return AWQScale().search([(w, spec)], gram, x.abs().mean(0))
        return torch.cat(
            [p.flatten() for p in (AWQClip().clip if search == "clip" else DGQ().grid)(w, gram, spec)]
        )

    if search == "dgq" and (spec.granularity != "group" or spec.scale_bits < 16 or spec.format != "int"):
        pytest.skip("no grid of DGQ's")
    whole = found()
    monkeypatch.setattr(module, "CHUNK", 1)
    torch.testing.assert_close(found(), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clipping_lowers_the_output_error_on_every_grid(spec):
    w, x = problem()
    w[::3, ::5] *= 3
    clipped = fake_quantize(w, spec, AWQClip().clip(w, x.T @ x / len(x), spec))
    errors = [(x @ (q - w).T).square().sum() for q in (clipped, fake_quantize(w, spec))]
    assert errors[0] < errors[1]
