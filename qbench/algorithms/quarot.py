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
from qbench.models.family import family_of, head_dim_of
from qbench.models.rotate import fold_norms, rotate_online, rotate_residual, rotate_values
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

    def __post_init__(self) -> None:
        if self.rotation not in ("hadamard", "orthogonal"):
            raise ValueError(f"QuaRot's rotation is {self.rotation!r}, it must be 'hadamard' or 'orthogonal'")

    def prepare(self, model: Any, scheme: Scheme, tokens: Tensor | None) -> dict[str, Any]:
        """Rotate the whole model; reports what was rotated by what.

        Raises:
            NotImplementedError: If the residual stream cannot be rotated.
            ValueError: If an online rotation has no Hadamard matrix.
        """
        family, config = family_of(model), model.config
        generator = torch.Generator().manual_seed(self.seed)
        fold_norms(model)
        residual, how = random_rotation(config.hidden_size, self.rotation, generator)
        rotate_residual(model, residual)
        head_dim = head_dim_of(config)
        known = has_hadamard(head_dim)
        heads = hadamard(head_dim) if known else random_orthogonal(head_dim, generator)
        report = {"residual": how, "heads": "hadamard" if known else "orthogonal"}
        for block in model.get_submodule(family.blocks):
            rotate_values(block, family, heads)
            if self.online:
                attention, mlp = (block.get_submodule(name) for name in family.writers)
                report["attention_out"] = rotate_across_heads(attention, config.num_attention_heads)
                rotate_online(mlp)
        return {"quarot": report}

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
