"""Hands `qbench -m` to qbench's own planner; Hydra finds sweepers in this namespace package.

Light on purpose: Hydra imports it to list plugins, also for `--help` and completion.
"""

import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class QbenchSweeper(Sweeper):
    """Expands the grid and hands it to qbench's planner and launchers.

    Args:
        arguments: The command's own arguments, which `qbench.sweep.grid.held_back` kept from Hydra.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = [str(a) for a in arguments]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        from qbench.sweep.grid import unite
        from qbench.sweep.session import run_cells
        from qbench.sweep.study import parts

        assert self.hydra_context is not None
        assert self.config is not None
        asked = parts(["-m", *self._arguments, *arguments])
        grid = unite(asked, self.hydra_context.config_loader, self.config)
        sys.exit(run_cells(grid, is_sweep=True))  # Hydra hands nobody what a sweep returns
