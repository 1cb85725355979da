"""OmniQuant: learn clipping and equivalent transformations by gradient descent, one block at a time.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", ICLR 2024,
arXiv:2308.13137, Equation 1: the block's output with everything quantized, on the quantized path, is brought near that
of the floating-point block on the floating-point path. The parts are in `qbench.algorithms.lwc` and `let`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.algorithms.learn import adam, constant, falling, fit, steps_of
from qbench.algorithms.let import Edit, Parameters, initial_edits, transformed
from qbench.algorithms.lwc import START, Clip
from qbench.calib.block import Block
from qbench.calib.stream import Stream
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class OmniQuant(Algorithm):
    """Choose grids, and rewrite weights without changing the function, so that any rounder behind does least harm.

    Grids that a step before has chosen are where the clipping starts.

    The paper has 20 epochs of steps on one sample each, at constant rates of 0.01 and 0.005, for 128 samples. Larger
    rates that fall to zero come within a few per cent of its losses in an eighth of the steps.

    Attributes:
        lwc: Learn clipping.
        let: Learn transformations; `None`: where the scheme has activation bits, as in the paper for LLaMA.
        epochs: Times each sample is met.
        batch_size: Samples for each step of the optimizer.
        lwc_lr, let_lr: Learning rates: of clipping's logits, and of log-scales and shifts.
        decay: Let the rates fall linearly to zero.
        alpha: Share of the activations' range in the first scales, as in SmoothQuant.
        aug_loss: Also stay near what the floating-point block makes of the quantized path's input; `None`: where
            weights have 2 bits or fewer, as in the authors' scripts.
        seed: Of the samples' order.
    """

    lwc: bool = True
    let: bool | None = None
    epochs: int = 10
    batch_size: int = 4
    lwc_lr: float = 0.2
    let_lr: float = 0.05
    decay: bool = True
    alpha: float = 0.5
    aug_loss: bool | None = None
    seed: int = 0

    kind: ClassVar[Kind] = "clip"
    uses: ClassVar[frozenset[Choice]] = frozenset({"scales"})
    needs_float_path: ClassVar[bool] = True
    uses_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lwc and self.let is False:
            raise ValueError("OmniQuant has both lwc and let unset; set one of them")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"OmniQuant has epochs={self.epochs} and batch_size={self.batch_size}; both must be at least 1"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"OmniQuant's alpha is {self.alpha}, it must be between 0 and 1")

    def check(self, scheme: Scheme) -> None:
        if self._clips_in(scheme) or self._transforms_in(scheme):
            return
        raise Unsuitable(
            "OmniQuant finds nothing to learn",
            f"clipping needs weights of 2 bits or more, transformations activation bits; the scheme is {scheme}",
        )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        clips = self._clips(block)
        edits = initial_edits(block, self.alpha) if self._transforms(block, bool(clips)) else []
        if not edits and not (clips and self.lwc):
            return
        own: Parameters = dict(block.layer.named_parameters())
        self._fit(block, own, edits, clips)
        for name, parameter in transformed({n: p.double() for n, p in own.items()}, edits).items():
            own[name].copy_(parameter)
        for name, clip in clips.items():
            if self.lwc or name in block.grids:
                block.grids[name] = clip.grid(own[f"{name}.weight"])

    def _fit(self, block: Block, own: Parameters, edits: list[Edit], clips: dict[str, Clip]) -> None:
        """Train, in place, what `edits` and `clips` are made of."""
        assert block.inputs is not None
        logits = [x for clip in clips.values() for x in clip.logits] if self.lwc else []
        steps = steps_of(self.epochs, block.inputs, self.batch_size)
        fit(
            block, "omniquant", lambda: _quantized(own, edits, clips),
            adam((logits, self.lwc_lr), ([x for edit in edits for x in edit.trained], self.let_lr)),
            inputs=block.inputs, targets=self._targets(block), steps=steps, batch_size=self.batch_size,
            seed=self.seed, schedule=falling(steps) if self.decay else constant,
        )  # fmt: skip

    def _clips_in(self, scheme: Scheme) -> bool:
        return self.lwc and any(spec.bits > 1 for spec in scheme.weights)

    def _transforms_in(self, scheme: Scheme) -> bool:
        return bool(scheme.activations) if self.let is None else self.let

    def _transforms(self, block: Block, has_grids: bool) -> bool:
        """Whether there is something in this block that transformations can help: the scheme may leave out blocks."""
        inputs = any(block.activation_spec(name) is not None for name in block.linears)
        return inputs if self.let is None else self.let and (inputs or has_grids)

    def _clips(self, block: Block) -> dict[str, Clip]:
        most = START if self.lwc else torch.inf
        specs = {name: block.weight_spec(name) for name in block.linears}
        return {
            name: Clip.of(
                block.linear(name).weight,
                spec,
                block.grids.get(name),
                block.kept.get(name),
                most,
                block.group_bits.get(name),
            )
            for name, spec in specs.items()
            if spec is not None
        }

    def _targets(self, block: Block) -> Stream:
        """What the outputs are to be near to.

        The sum of the squared distances to two targets is twice that to their mean, and a constant.
        """
        assert block.float_outputs is not None
        assert block.inputs is not None
        low = any(spec.bits <= 2 for spec in block.scheme.weights)
        if not (low if self.aug_loss is None else self.aug_loss):
            return block.float_outputs
        return Stream((block.float_outputs.hidden + block.outputs().hidden) / 2, block.inputs.batch_size)


def _quantized(own: Parameters, edits: list[Edit], clips: dict[str, Clip]) -> Parameters:
    """The block's parameters, by name, as they would be deployed; differentiable."""
    changed = transformed(own, edits)
    for name, clip in clips.items():
        weight = f"{name}.weight"
        changed[weight] = clip.quantize(changed.get(weight, own[weight]))
    return changed
