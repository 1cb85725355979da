"""A model that runs rotated and quantized, differentiable in the rotations, while these are learned.

Nothing of it is rotated for good: `qbench.models.rotate` does that, in float64, with what has been learned.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint

from qbench.models.attention import quantize_attention
from qbench.models.family import family_of
from qbench.models.hooks import quantize_input
from qbench.models.rotate import turn
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@contextmanager
def rotated(
    model: Any, scheme: Scheme, residual: Tensor, values: Sequence[Tensor], quantize_weights: bool
) -> Iterator[None]:
    """Meanwhile, `model` runs with what these rotations make of it, its activations quantized as the scheme has it.

    The residual stream is rotated behind the embeddings and back before the final norm, so that embeddings and head,
    which are not quantized, stay as they are. Blocks are computed again in the backward pass, and their rotated
    weights with them: only one block's are in memory. Ranges that are to come from calibration data are those of the
    batch; keys and values with such a range are left alone.

    Args:
        residual: `(hidden, hidden)`; may be changed in place between two runs.
        values: Of each block's values and attention output, `(head_dim, head_dim)`.
        quantize_weights: Round weights to nearest, too.
    """
    family = family_of(model)
    assert family.final_norm is not None, "its norms have been folded"
    blocks, final_norm = model.get_submodule(family.blocks), model.get_submodule(family.final_norm)
    kv = scheme.kv if scheme.kv and scheme.kv.dynamic else None
    with ExitStack() as stack:
        for module, back in ((blocks[0], False), (final_norm, True)):
            hook = partial(_turn_input, r=residual, back=back)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        for index, (block, value) in enumerate(zip(blocks, values, strict=True)):
            readers = [name for _, names in family.readers(block) for name in names]
            linears, writers = family.linears(block), family.writers(block)
            for name in dict.fromkeys((*linears, *readers)):
                linear, layer = block.get_submodule(name), scheme.layer(index, name)
                inputs = residual if name in readers else value if name == family.attention_out else None
                outputs = residual if name in writers else value if name == family.value else None
                rows = family.value_rows(len(linear.weight)) if name == family.value else None
                spec = layer.weight if quantize_weights and name in linears else None
                stack.enter_context(_parametrized(linear, "weight", _Turned(inputs, outputs, spec, rows)))
                if getattr(linear, "bias", None) is not None:
                    stack.enter_context(_parametrized(linear, "bias", _Turned(None, outputs, None, rows)))
                if layer.activation is not None and name in linears:
                    stack.callback(quantize_input(linear, layer.activation).remove)
            quantize_attention(block, kv, scheme.bmm)
            stack.callback(quantize_attention, block, None, None)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            stack.callback(delattr, block, "forward")
        yield


def _turn_input(_: nn.Module, args: tuple[Tensor, ...], r: Tensor, back: bool) -> tuple[Tensor, ...]:
    return (_turn(args[0], r.mT if back else r), *args[1:])


class _Turned(nn.Module):
    """A weight `(out, in)`, or a bias `(out,)`, as the rotations of its layer's input and output make it."""

    def __init__(
        self, inputs: Tensor | None, outputs: Tensor | None, spec: QuantSpec | None, rows: Tensor | None
    ) -> None:
        super().__init__()
        self.rotations, self.spec, self.rows = (inputs, outputs), spec, rows

    def forward(self, w: Tensor) -> Tensor:
        inputs, outputs = self.rotations
        if inputs is not None:
            w = _turn(w, inputs)
        if outputs is not None:
            part = w if self.rows is None else w[self.rows]
            turned = _turn(part.mT, outputs).mT if w.ndim == 2 else _turn(part, outputs)
            w = turned if self.rows is None else w.index_put((self.rows,), turned)
        return w if self.spec is None else fake_quantize(w, self.spec)


def _turn(x: Tensor, r: Tensor) -> Tensor:
    return turn(x, r.to(x.device, x.dtype))


@contextmanager
def _parametrized(linear: nn.Module, name: str, by: nn.Module) -> Iterator[None]:
    register_parametrization(linear, name, by)
    try:
        yield
    finally:
        remove_parametrizations(linear, name, leave_parametrized=False)
