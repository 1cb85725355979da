"""A model cut into units whose bits are chosen apart: blocks, components, components of one block, or layers."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from qbench.models.family import Link, family_of
from qbench.quant.scheme import Scheme
from qbench.quant.storage import layer_bits

Cut = Literal["block", "component", "block,component", "layer"]
CUTS: tuple[Cut, ...] = get_args(Cut)


@dataclass(frozen=True)
class Unit:
    """Linear layers that are given bits together.

    Attributes:
        patterns: What `scheme.overrides` calls them.
        layers: `(block, name, rows, columns)` of each.
    """

    name: str
    patterns: tuple[str, ...]
    layers: tuple[tuple[int, str, int, int], ...]

    @property
    def n_weights(self) -> int:
        return sum(rows * columns for *_, rows, columns in self.layers)

    def stored_bits(self, scheme: Scheme) -> float:
        """What the scheme takes for these layers' weights, scales and zero-points included."""
        return sum(
            layer_bits(scheme.layer(block, name).weight, rows, columns)
            for block, name, rows, columns in self.layers
        )

    def overrides(self, text: str) -> dict[str, str]:
        """`scheme.overrides` that give these layers what a shorthand says."""
        return dict.fromkeys(self.patterns, text)


def component_of(link: Link) -> str:
    """What the layers of a link are called together: `qkv`, `o`, `gate+up`, `down`; `out`, `fc1`, `fc2`."""
    short = [name.rpartition(".")[2].removesuffix("_proj") for name in link.sinks]
    return ("" if all(len(part) == 1 for part in short) else "+").join(short)


def units_of(model: Any, cut: Cut) -> tuple[Unit, ...]:
    """The units of a model (a skeleton will do); together they hold each linear layer of its blocks once.

    Components are the groups of layers that share an input.

    Raises:
        NotImplementedError: If the architecture is not described.
    """
    family = family_of(model)
    blocks = list(model.get_submodule(family.blocks))
    members: dict[str, list[tuple[int, str]]] = {}
    patterns: dict[str, dict[str, None]] = {}
    for index in range(len(blocks)):
        for link in family.inputs(blocks[index]):
            for layer in link.sinks:
                unit, pattern = _names(cut, index, link, layer)
                members.setdefault(unit, []).append((index, layer))
                patterns.setdefault(unit, {})[pattern] = None

    def shape(index: int, layer: str) -> tuple[int, int]:
        rows, columns = blocks[index].get_submodule(layer).weight.shape
        return rows, columns

    return tuple(
        Unit(name, tuple(patterns[name]), tuple((i, layer, *shape(i, layer)) for i, layer in found))
        for name, found in members.items()
    )


def _names(cut: Cut, index: int, link: Link, layer: str) -> tuple[str, str]:
    """The unit that a layer belongs to, and a pattern for it."""
    names = {
        "block": (f"{index}", f"{index}.*"),
        "component": (component_of(link), layer),
        "block,component": (f"{index}.{component_of(link)}", f"{index}.{layer}"),
        "layer": (f"{index}.{layer}", f"{index}.{layer}"),
    }
    return names[cut]
