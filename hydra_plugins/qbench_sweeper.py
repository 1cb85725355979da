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
        studies: The named studies whose axes are among them, for the cells that they exclude.
    """

    def __init__(self, arguments: list[str], studies: list[str]) -> None:
        self._arguments = [str(a) for a in arguments]
        self._studies = [str(s) for s in studies]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        from qbench.sweep.grid import expand
        from qbench.sweep.session import run_cells
        from qbench.sweep.study import load

        assert self.hydra_context is not None
        assert self.config is not None
        exclude = [rule for study in self._studies for rule in load(study).exclude]
        grid = expand([*self._arguments, *arguments], self.hydra_context.config_loader, self.config)
        sys.exit(run_cells(grid, is_sweep=True, exclude=exclude))  # Hydra hands nobody what a sweep returns
