"""What is quantized while a model runs, block by block: the inputs of its layers, keys and values.

Grids that come from calibration data are returned by name, so that they can be kept, and put in place again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qbench.calib.block import Block
from qbench.calib.observers import observer_for
from qbench.models.attention import observe_kv, quantize_attention
from qbench.models.family import Link
from qbench.models.hooks import quantize_input
from qbench.quant.grid import QParams, choose_qparams
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

Fixed = dict[
    str, Tensor
]  # by "<layer>|scale", "<layer>|zero", "<layer>|kept"; keys and values as layers of these names


@torch.no_grad()
def fixed_parts(block: Block) -> Fixed:
    """The grids of layer inputs, keys and values that calibration data decide, and the channels that are kept.

    Raises:
        ValueError: If an expert's input has a fixed grid and no token was routed to it.
    """
    fixed: Fixed = {}
    for name, ends in _static_ranges(block).items():
        spec = block.activation_spec(name)
        assert spec is not None
        fixed |= _named(name, choose_qparams(ends, spec))
    for name in block.linears:
        if block.activation_spec(name) is not None and (kept := block.kept_channels(name)) is not None:
            fixed[f"{name}|kept"] = kept
    return fixed


@torch.no_grad()
def fixed_attention(block: Block) -> Fixed:
    """The grids of keys and values that calibration data decide, with layer inputs quantized already."""
    kv = block.scheme.kv
    if kv is None or kv.dynamic:
        return {}
    assert block.inputs is not None
    length = block.inputs.hidden.shape[1]
    keys, values = observer_for(kv.key, length)(), observer_for(kv.value, length)()
    with observe_kv(block.layer, kv, keys.update, values.update):
        block.inputs.through(block.layer, block.kwargs, block.device)
    key, value = choose_qparams(keys.value, kv.key), choose_qparams(values.value, kv.value)
    return _named("keys", key) | _named("values", value)


def quantize_inputs(index: int, scheme: Scheme, linears: Mapping[str, nn.Linear], fixed: Fixed) -> None:
    """From now on, quantize what enters a block's linear layers: on a grid of each row's own, or on a fixed one."""
    for name, linear in linears.items():
        spec = scheme.layer(index, name).activation
        if spec is not None:
            quantize_input(
                linear, spec, None if spec.dynamic else _grid(fixed, name), fixed.get(f"{name}|kept")
            )


def quantize_products(layer: nn.Module, scheme: Scheme, fixed: Fixed) -> None:
    """From now on, quantize keys, values and the operands of attention's products in a block."""
    if scheme.kv is not None or scheme.bmm is not None:
        quantize_attention(layer, scheme.kv, scheme.bmm, _grid(fixed, "keys"), _grid(fixed, "values"))


def _grid(fixed: Fixed, name: str) -> QParams | None:
    if f"{name}|scale" not in fixed:
        return None
    return QParams(fixed[f"{name}|scale"], fixed[f"{name}|zero"])


def _named(name: str, grid: QParams) -> Fixed:
    return {f"{name}|scale": grid.scale, f"{name}|zero": grid.zero}


def _static_ranges(block: Block) -> dict[str, Tensor]:
    """By layer: the range of its input on the calibration data, where that is what its grid is to be made from."""
    gone = {*block.unseen, *block.missed}
    unseen = sorted(n for n in gone if (s := block.activation_spec(n)) is not None and not s.dynamic)
    if unseen:
        raise ValueError(
            f"block {block.index}: no calibration token was routed to {', '.join(unseen[:3])} "
            f"({len(unseen)} layers), whose inputs have a fixed range; set calib.experts=all, or act_dynamic=true"
        )
    alike: dict[
        tuple[QuantSpec, str], list[Link]
    ] = {}  # layers with channels of their own to keep come alone
    for link in block.links:
        for name in link.sinks:
            spec, kept = block.activation_spec(name), block.kept_channels(name)
            if spec is not None and not spec.dynamic:
                alike.setdefault((spec, "" if kept is None else name), []).append(Link(None, (name,)))
    ranges: dict[str, Tensor] = {}
    for (spec, alone), links in alike.items():
        assert block.inputs is not None, "a static range without calibration data"
        kept = block.kept_channels(alone) if alone else None
        kind = observer_for(spec, block.inputs.hidden.shape[1], kept)
        ranges |= {link.sinks[0]: value for link, (value,) in block.observe(kind, links=links).items()}
    return ranges
