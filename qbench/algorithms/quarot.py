"""QuaRot: rotate what is quantized, so that no channel is an outlier.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv:2404.00456, section 4:
the residual stream (stage 1a), the input of the MLP's last layer (1b), values and the output of attention (1c).
Queries and keys behind the rotary embedding (1d) are rotated where the scheme says so (`kv_rotate`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.models.blocks import each_block
from qbench.models.family import Family, family_of
from qbench.models.rotate import check_rotatable, fold_norms, rotate_online, rotate_residual, rotate_values
from qbench.quant.hadamard import hadamard, has_hadamard, random_hadamard, random_orthogonal
from qbench.quant.scheme import Scheme

Rotation = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True)
class QuaRot(Algorithm):
    """Rotate by Hadamard matrices: inside the weights where possible, otherwise activations at inference.

    Attributes:
        rotation: Of the residual stream (`rotate_mode`): a Hadamard matrix with random signs, or a random orthogonal
            one. Widths for which no Hadamard matrix is known get an orthogonal one, which the report tells.
        online: Rotate the inputs of attention's output layer and of the MLP's last layer at inference.
        seed: Of the random rotation.
    """

    rotation: Rotation = "hadamard"
    online: bool = True
    seed: int = 0

    kind: ClassVar[Kind] = "transform"
    needs_data: ClassVar[bool] = False
    folds_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rotation not in ("hadamard", "orthogonal"):
            raise ValueError(f"QuaRot's rotation is {self.rotation!r}, it must be 'hadamard' or 'orthogonal'")

    @property
    def beside(self) -> str:
        return "Hadamard matrices that inputs are multiplied by" if self.online else ""

    def check_model(self, skeleton: Any) -> None:
        check_rotatable(skeleton)

    def prepare(self, model: Any, scheme: Scheme, tokens: Tensor | None) -> dict[str, Any]:
        """Rotate the whole model; reports what was rotated by what.

        Raises:
            NotImplementedError: If the residual stream cannot be rotated.
            ValueError: If an online rotation has no Hadamard matrix.
        """
        family = family_of(model)
        generator = torch.Generator().manual_seed(self.seed)
        fold_norms(model)
        residual, how = random_rotation(model.config.hidden_size, self.rotation, generator)
        rotate_residual(model, residual)
        report: dict[str, Any] = {"residual": how}
        heads = self._heads_rotation(family, generator, report)
        for block in each_block(model, family.blocks):
            if heads is not None:
                rotate_values(block, family, heads)
            for name in family.writers(block) if self.online else ():
                layer: Any = block.get_submodule(name)
                if name == family.attention_out and family.heads is not None and heads is not None:
                    report["attention_out"] = rotate_across_heads(layer, family.heads.queries)
                else:
                    rotate_online(layer)
        return {"quarot": report}

    def _heads_rotation(
        self, family: Family, generator: torch.Generator, report: dict[str, Any]
    ) -> Tensor | None:
        """What values are rotated by, head by head; `None` where there are none, or they cannot be, as is reported."""
        if family.heads is None or family.value is None:
            report["heads"] = "none"
            return None
        size = family.heads.value_size
        known = has_hadamard(size)
        report["heads"] = "hadamard" if known else "orthogonal"
        return hadamard(size) if known else random_orthogonal(size, generator)

    def process(self, block: Block) -> None:
        """Nothing is left to do."""


def random_rotation(n: int, rotation: Rotation, generator: torch.Generator) -> tuple[Tensor, Rotation]:
    """A random rotation, float64 `(n, n)`, and its kind: orthogonal where no Hadamard matrix is known."""
    if rotation == "hadamard" and has_hadamard(n):
        return random_hadamard(n, generator), "hadamard"
    return random_orthogonal(n, generator), "orthogonal"


def rotate_across_heads(linear: nn.Linear, n_heads: int) -> str:
    """Rotate attention's output online, H ⊗ I, which with the rotation inside heads mixes all channels.

    Where no Hadamard matrix of as many rows as there are heads is known (14, 9), one of the whole width does the same.
    """
    across = has_hadamard(n_heads)
    rotate_online(linear, n_heads if across else None)
    return "heads" if across else "width"
