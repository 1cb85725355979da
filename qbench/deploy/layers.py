"""A quantized linear layer as it is to be deployed: codes, grid, and what its input meets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from qbench.engine import Finished
from qbench.quant.codes import codes_of
from qbench.quant.grid import QParams
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear layer, behind quantization.

    Attributes:
        name: Its path in the model.
        weight: `(out, in)`, on its grid; not a copy.
        spec: The weight's grid; `None` of a layer whose weight stays in floating point.
        grid: `(out, n_groups, 1)` each, or what broadcasts to it; `None` where the rounder's grid is no such one.
        activation: The grid of its input, and in `input_grid` the range where calibration data decided it.
        kept: What stays in floating point: input channels, `(in,)`, or weights, `(out, in)`.
        widths: The bits of each group, `(n_groups,)`, where they differ.
    """

    name: str
    weight: Tensor
    spec: QuantSpec | None
    grid: QParams | None = None
    activation: QuantSpec | None = None
    input_grid: QParams | None = None
    kept: Tensor | None = None
    widths: Tensor | None = None

    def codes(self) -> Tensor:
        """The weight's codes, int32 `(out, in)`.

        Raises:
            ValueError: If codes and one grid are not all of the weight.
        """
        if self.spec is None or self.grid is None or self.kept is not None or self.widths is not None:
            raise ValueError(f"{self.name} is not codes of one grid alone")
        return codes_of(self.weight.detach(), self.grid, self.spec)


def layers_of(
    finished: Finished, blocks: str, names: Sequence[str], scheme: Scheme
) -> Iterator[QuantizedLayer]:
    """The layers of a finished block; `blocks` is the path of the blocks, `names` are those of its linear layers."""
    for name in names:
        own, fixed = scheme.layer(finished.index, name), finished.fixed
        given = None
        if own.activation is not None and not own.activation.dynamic:
            given = QParams(fixed[f"{name}|scale"], fixed[f"{name}|zero"])
        yield QuantizedLayer(
            f"{blocks}.{finished.index}.{name}", finished.layer.get_parameter(f"{name}.weight"), own.weight,
            finished.grids.get(name), own.activation, given, finished.kept.get(name), finished.group_bits.get(name),
        )  # fmt: skip
