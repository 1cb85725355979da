"""Learnable clipping against finite differences and brute force."""

import pytest
import torch

from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.lwc import START, Clip
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.spec import QuantSpec

from .reference import omniquant as reference
from .test_gptq import problem


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("logits", [(4.0, 4.0), (1.0, 0.5)])
def test_the_gradient_is_that_of_rounding_as_a_constant(bits, logits):
    """Central differences err by a share of step², and by the rounding of the error over the step."""
    w, x = problem(bits)
    spec = QuantSpec(bits)
    clip = Clip.of(w, spec, None, None)
    for ours, start in zip(clip.logits, logits, strict=True):
        ours.fill_(start).requires_grad_()
    (x @ (clip.quantize(w) - w).T).square().sum().backward()
    for row, weight in enumerate(w):
        expected = reference.slopes(weight, x, bits, logits, 1e-4)
        ours = [float(t.grad[row]) for t in clip.logits]
        assert ours == pytest.approx(
            expected, rel=1e-6, abs=1e-11 * float((x @ weight).square().sum()) / 1e-4
        )


def test_descent_finds_ranges_nearly_as_good_as_the_best_of_all():
    """Straight-through gradients lead to a good range, not always to the best: on average within a fifth of it."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(128, 64, generator=generator, dtype=torch.float64)
    bits, spec = 2, QuantSpec(2)

    def errors(weight):
        return (x @ (weight - w).T).square().sum(0)

    clip = Clip.of(w, spec, None, None)
    optimizer = torch.optim.Adam([t.requires_grad_() for t in clip.logits], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        errors(clip.quantize(w)).sum().backward()
        optimizer.step()
    learned = errors(clip.quantize(w).detach()).mean()
    best = sum(reference.least_error(row, x, bits, 25) for row in w) / len(w)
    assert learned <= 1.2 * best
    assert learned < 0.8 * errors(fake_quantize(w, spec)).mean()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["row", "group", "block", "tensor"])
def test_training_starts_from_nearly_the_whole_range(granularity, symmetric):
    w, _ = problem()
    size = 8 if granularity in ("group", "block") else None
    spec = QuantSpec(3, symmetric=symmetric, granularity=granularity, group_size=size)
    ours, whole = Clip.of(w, spec, None, None).grid(w), choose_qparams(w, spec)
    fraction = torch.sigmoid(torch.tensor(START, dtype=w.dtype))
    torch.testing.assert_close(ours.scale, whole.scale * fraction, rtol=1e-12, atol=0)
    assert torch.equal(ours.zero, whole.zero)


def test_training_starts_from_the_grid_that_was_chosen_before():
    w, x = problem(2)
    spec = QuantSpec(2, granularity="group", group_size=8)
    chosen = AWQClip().clip(w, x.T @ x / len(x), spec)
    ours, whole = Clip.of(w, spec, chosen, None).grid(w), choose_qparams(w, spec)
    narrowed = chosen.scale < 0.98 * whole.scale
    assert narrowed.any()
    torch.testing.assert_close(ours.scale[narrowed], chosen.scale[narrowed], rtol=1e-12, atol=0)
    assert torch.equal(ours.zero, chosen.zero)


def test_without_training_the_grid_is_that_of_rounding_to_nearest():
    w, _ = problem()
    spec = QuantSpec(3, granularity="group", group_size=8)
    assert torch.equal(Clip.of(w, spec, None, None, torch.inf).quantize(w), fake_quantize(w, spec))


def test_rows_of_a_block_share_their_scale_after_training():
    w, _ = problem()
    w = w[: len(w) // 2 * 2 - 1]  # the last block is short
    clip = Clip.of(w, QuantSpec(3, granularity="block", group_size=2), None, None)
    for logits in clip.logits:
        logits.normal_(generator=torch.Generator().manual_seed(0))
    scale = clip.grid(w).scale
    assert torch.equal(scale[:-1:2], scale[1::2])
    assert len(scale) == len(w)


def test_what_is_kept_has_no_part_in_the_range():
    w, _ = problem()
    kept = torch.zeros(w.shape[1], dtype=torch.bool)
    kept[3] = True
    w[:, 3] = 100.0
    clip = Clip.of(w, QuantSpec(4), None, kept)
    assert torch.equal(clip.quantize(w)[:, 3], w[:, 3])
    assert (clip.grid(w).scale < 1).all()
