"""Command line to cells: the product of all axes.

A cell that cannot be composed (an unknown choice, a misspelt key) is kept with its problem, so that
the others can run.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qbench.errors import UsageError
from qbench.sweep.compose import Composer, plain
from qbench.sweep.explain import explain
from qbench.sweep.steps import choose_custom
from qbench.sweep.study import MULTIRUN, Part


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a composed config as plain values, or the problem with it.

    Attributes:
        name: What tells this cell from the others: the values of the swept keys.
        exclude: What its study leaves out: the cell is left out if it meets all of one.
    """

    name: str
    config: dict[str, Any] | None = None
    problem: str | None = None
    exclude: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Product:
    """The cells of a product of axes.

    Attributes:
        axes: The values of each argument, as overrides.
    """

    axes: list[list[str]]
    exclude: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return math.prod(map(len, self.axes))


@dataclass(frozen=True)
class Grid:
    """The cells that a command asks for, one product after another; iterating composes them."""

    products: list[Product]
    composer: Composer

    def __len__(self) -> int:
        return sum(map(len, self.products))

    def __iter__(self) -> Iterator[Cell]:
        for product in self.products:
            swept = [i for i, values in enumerate(product.axes) if len(values) > 1]
            for point in itertools.product(*product.axes):
                name = " ".join([point[i] for i in swept])
                try:
                    yield Cell(name, self.composer.config(point), exclude=product.exclude)
                except (HydraException, OmegaConfBaseException) as error:
                    yield Cell(name, problem=explain(error))


def held_back(arguments: list[str]) -> list[str]:
    """The arguments of a sweep with all that is ours packed into one for the sweeper.

    Hydra would apply them to one config before it calls the sweeper, where `algo.damp=0.05` beside
    `algo=rtn,gptq` is an error that ends the sweep; here it concerns the cells of one algorithm.
    """
    ours = [a for a in arguments if "=" in a and not a.lstrip("+~").startswith(("-", "hydra"))]
    quoted = ",".join("'" + a.replace("\\", "\\\\").replace("'", "\\'") + "'" for a in ours)
    kept = [a for a in arguments if a not in ours]
    return [*kept, f"hydra.sweeper.arguments=[{quoted}]"]


def expand(arguments: list[str], loader: Any, master: DictConfig) -> Grid:
    """Every combination of the swept values, in the order in which they were written.

    Raises:
        UsageError: If the arguments cannot be read, or leave no cell.
    """
    return unite([Part(arguments)], loader, master)


def unite(parts: Iterable[Part], loader: Any, master: DictConfig) -> Grid:
    """The combinations of each part, one part after another.

    Raises:
        UsageError: If arguments cannot be read, or leave no cell.
    """
    return Grid([_product(part, loader) for part in parts], Composer(loader, master))


def _product(part: Part, loader: Any) -> Product:
    arguments = choose_custom([a for a in part.arguments if a not in MULTIRUN])
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    except HydraException as error:
        raise UsageError(explain(error)) from error
    axes = [_values(override) for override in parsed]
    if not all(axes):
        raise UsageError(
            "the grid is empty: " + ", ".join(a for a, v in zip(arguments, axes, strict=True) if not v)
        )
    return Product(axes, part.exclude)


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def cell_of(name: str, config: DictConfig, algo: str) -> Cell:
    """A composed config as a cell; `algo` is the name of the chosen algorithm."""
    try:
        return Cell(name, plain(config, algo))
    except OmegaConfBaseException as error:
        return Cell(name, problem=explain(error))
