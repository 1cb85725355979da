"""SliM-LLM against loops over everything that it tries; groups of several widths against each by itself."""

import pytest
import torch

from qbench.algorithms.autoround import AutoRound
from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.omniquant import OmniQuant
from qbench.algorithms.rtn import RTN
from qbench.algorithms.sba import SBA, Divergence, Ladder
from qbench.algorithms.slimllm import SQC
from qbench.calib.block import Block
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.mixed import choose_mixed, of_width, quantize_mixed
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from qbench.quant.storage import INDEX_BITS, WIDTH_BITS, layer_bits

from .reference import slimllm as reference
from .test_gptq import SIZE, N, problem
from .test_laws import Listen, ListenBehind

WIDTHS = torch.tensor([3, 1, 2])


def spec_of(bits: int, **more) -> QuantSpec:
    return QuantSpec(bits, granularity="group", group_size=SIZE, **more)


def block_with(llama, tokens, scheme: Scheme, *steps) -> Block:
    """The first block of a model after some steps, and nothing rounded."""
    listener = Listen()
    quantize(llama, Pipeline((*steps, listener)), scheme, tokens)
    return listener.heard[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_several_widths_are_as_each_by_itself(symmetric):
    w, _ = problem()
    spec = spec_of(2, symmetric=symmetric)
    parts = [
        fake_quantize(part, of_width(spec, b))
        for part, b in zip(w.split(SIZE, 1), WIDTHS.tolist(), strict=True)
    ]
    ours = quantize_mixed(w, spec, WIDTHS)
    assert torch.equal(ours, torch.cat(parts, 1))
    assert torch.equal(ours, quantize_mixed(w, spec, WIDTHS, choose_mixed(w, spec, WIDTHS)))
    assert len(ours[0].unflatten(0, (-1, SIZE))[1].unique()) == 2
    assert torch.equal(quantize_mixed(w, spec, None), fake_quantize(w, spec))


def test_what_is_kept_of_a_range_is_trained_in_groups_of_several_widths():
    w, _ = problem()
    keep = torch.full((len(w), 3, 1), 0.9, dtype=w.dtype, requires_grad=True)
    narrowed = choose_mixed(w, spec_of(2), WIDTHS, (keep, keep))
    for g, bits in enumerate(WIDTHS.tolist()):
        alone = choose_qparams(w.split(SIZE, 1)[g], spec_of(bits), (0.9, 0.9))
        torch.testing.assert_close(narrowed.scale[:, g : g + 1], alone.scale)
    quantize_mixed(w, spec_of(2), WIDTHS, narrowed).square().sum().backward()
    moved = keep.grad.abs().sum((0, 2))
    assert (moved[[0, 2]] > 0).all()
    assert moved[1] == 0, "the levels of one bit are where they fit best"


def test_bits_of_groups_of_several_widths_are_counted_one_by_one():
    rows, columns = 20, N
    scales, codes = 16 * rows * 3, rows * SIZE * (3 + 1 + 2)
    zeros = rows * (3 + 16 + 2)  # one bit has a real number for a zero-point
    stored = codes + scales + zeros + 3 * WIDTH_BITS
    assert layer_bits(spec_of(2), rows, columns, None, WIDTHS) == pytest.approx(stored)
    kept = torch.zeros(columns, dtype=torch.bool)
    kept[[0, SIZE]] = True  # one column of 3 bits and one of 1
    more = 2 * (INDEX_BITS + 16 * rows) - rows * (3 + 1)
    assert layer_bits(spec_of(2), rows, columns, kept, WIDTHS) == pytest.approx(stored + more)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [8, SIZE])
@pytest.mark.parametrize("seed", range(3))
def test_bits_go_where_the_output_diverges_least(bits, size, seed, llama, tokens):
    """Inputs are those of the attention's output projection, whose groups are made to differ."""
    scheme = Scheme.of(wbits=bits, group_size=size)
    name = "self_attn.o_proj"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        factors = torch.rand(N // size, generator=generator).mul(6).exp().repeat_interleave(size)
        llama.get_submodule(f"model.layers.0.{name}").weight.mul_(factors)
    seen = []
    layer = llama.get_submodule(f"model.layers.0.{name}")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        llama(tokens, use_cache=False)
    handle.remove()
    naive = reference.allocation(layer.weight.detach(), seen[0], bits, size, SBA().damp)
    block = block_with(llama, tokens, scheme, SBA())
    ours = block.group_bits.get(name, torch.full((N // size,), bits))
    assert ours.tolist() == naive
    assert ours.sum() == bits * (N // size), "codes take as many bits as before"


def test_divergence_is_that_of_the_whole_output():
    """Summed up group by group, it is that of the weight put together."""
    w, x = problem()
    lower, same, upper = (fake_quantize(w, spec_of(b)).unflatten(1, (-1, SIZE)) for b in (1, 2, 3))
    order, bias = torch.tensor([1, 2, 0]), torch.randn(len(w), dtype=w.dtype)
    observer = Divergence(Ladder(w / 50, bias, lower / 50, same / 50, upper / 50, order))
    for batch in x.split(64):
        observer.update(batch)
    log_target = (x @ w.T / 50 + bias).log_softmax(1)
    for rung, mixed in enumerate((same, torch.stack((upper[:, 0], lower[:, 1], same[:, 2]), 1))):
        log_p = (x @ mixed.flatten(1).T / 50 + bias).log_softmax(1)
        whole = (log_p.exp() * (log_p - log_target)).sum(1).mean()
        torch.testing.assert_close(observer.value[rung], whole, rtol=1e-9, atol=0)


def test_a_group_that_matters_more_has_more_bits(llama, tokens):
    with torch.no_grad():
        for name in ("input_layernorm", "post_attention_layernorm"):
            gain = llama.get_submodule(f"model.layers.0.{name}").weight
            gain.fill_(0.1)[:SIZE] = 10.0
    block = block_with(llama, tokens, Scheme.of(wbits=2, group_size=SIZE), SBA())
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        assert block.group_bits[name][0] == 3
        assert block.report["widened_groups"][name] == 1


def test_bits_are_given_and_taken_among_what_is_not_kept(llama, tokens):
    scheme, listener = Scheme.of(wbits=2, group_size=SIZE), Listen()
    kept = torch.zeros(N, dtype=torch.bool)
    kept[:SIZE] = True

    class Hold(Listen):
        kind = "select"

        def process(self, block):
            block.kept["self_attn.q_proj"] = kept

    quantize(llama, Pipeline((Hold(), SBA(), listener)), scheme, tokens)
    bits = listener.heard[0].group_bits.get("self_attn.q_proj", torch.tensor([2, 2, 2]))
    assert bits[0] <= 2, "a group that is kept as a whole has no salience"


@pytest.mark.parametrize("widths", [[2, 2, 2], [3, 1, 2], [2, 4, 3]])
@pytest.mark.parametrize("salient_weight", [1.0, 20.0])
def test_weighted_grids_inside_gptq_equal_the_naive_algorithm(widths, salient_weight):
    w, x = problem()
    w[::5, 3] *= 6  # some weights of a group are salient
    algorithm = SQC(salient_weight=salient_weight, n_tau=4)
    gptq = GPTQ(act_order=False, static_groups=False)
    gram = x.T @ x / len(x)
    ours = gptq.round(w, gram, spec_of(2), group_bits=torch.tensor(widths), choose=algorithm.grid)
    naive = reference.rounded(w, x, widths, SIZE, gptq.damp, salient_weight, algorithm.threshold, 4)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


def test_salient_weights_are_rounded_better_where_they_weigh_more():
    w, _ = problem()
    w[:, 3] *= 4
    spread = torch.ones(SIZE, dtype=w.dtype)
    group, spec = w[:, :SIZE], QuantSpec(2)
    salient = SQC().salient(group.square())
    assert 0 < salient.float().mean() < 0.1
    errors = []
    for weight in (1.0, 1000.0):
        grid = SQC(salient_weight=weight).grid(group, spread, spec)
        errors.append((fake_quantize(group, spec, grid) - group)[salient].abs().pow(2.4).sum())
    assert errors[1] < errors[0]


def test_no_weight_is_salient_among_equals():
    assert not SQC().salient(torch.ones(4, SIZE)).any()


def test_without_a_search_it_is_gptq(llama, tokens):
    """τ of 1 alone: the grid that holds every weight, as GPTQ without static groups has it."""
    scheme = Scheme.of(wbits=2, group_size=SIZE)
    twin = type(llama)(llama.config).double()
    twin.load_state_dict(llama.state_dict())
    quantize(llama, Pipeline((SBA(), SQC(reach=1e-12, n_tau=1))), scheme, tokens)
    quantize(twin, Pipeline((SBA(), GPTQ(act_order=False, static_groups=False))), scheme, tokens)
    for ours, theirs in zip(llama.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_learned_clipping_leaves_each_group_its_bits(llama, tokens):
    """SliM-LLM+."""
    scheme, listener = Scheme.of(wbits=2, group_size=SIZE), ListenBehind()
    quantize(llama, Pipeline((SBA(), OmniQuant(epochs=2, let=False), RTN(), listener)), scheme, tokens)
    differ = 0
    for block in listener.heard:
        for name, bits in block.group_bits.items():
            w = block.linear(name).weight
            assert torch.allclose(
                quantize_mixed(w, block.weight_spec(name), bits, block.grids[name]), w, atol=1e-12
            )
            for group, b in zip(w.split(SIZE, 1), bits.tolist(), strict=True):
                assert max(len(row.unique()) for row in group) <= 2**b
                differ += b != 2
    assert differ


@pytest.mark.parametrize("text", ["w2a16", "w1a16g16", "w8a16g16"])
def test_a_scheme_without_groups_or_neighbouring_widths_is_refused(text):
    with pytest.raises(Unsuitable, match="SliM-LLM's allocation"):
        SBA().check(Scheme.parse(text))


def test_formats_have_no_neighbouring_width():
    with pytest.raises(Unsuitable, match="weight_format=int"):
        SBA().check(Scheme.of(wbits=4, weight_format="mxfp4"))


@pytest.mark.parametrize("steps", [(SBA(), AWQClip(), RTN()), (SBA(), AutoRound())])
def test_an_allocation_is_refused_before_a_step_that_has_one_width(steps):
    with pytest.raises(Unsuitable, match="one width"):
        Pipeline(steps)
