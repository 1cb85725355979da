"""Algorithms that go wrong, for tests of the sweep engine.

    qbench -m algo=rtn algo._target_=tests.faults.Faulty +algo.how=raise,hang,...

`once` is a folder: a fault that has left its mark there does not happen again.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qbench.algorithms.rtn import RTN
from qbench.calib.block import Block


@dataclass(frozen=True)
class Faulty(RTN):
    """Rounding to nearest with a fault in the second block.

    Attributes:
        how: What happens; `slow` takes a while and is no fault, `mixed` is that for four tags of five.
        once: Folder of marks; empty for a fault that happens every time.
        tag: Tells jobs apart that are otherwise the same.
        runs: File to which every run appends its tag.
    """

    how: Literal["none", "raise", "oom", "hang", "kill", "not-finite", "exit", "slow", "mixed"] = "none"
    once: str = ""
    tag: int = 0
    runs: str = ""

    def process(self, block: Block) -> None:
        super().process(block)
        if block.index != 1 or self.how == "none":
            return
        if self.runs:
            with Path(self.runs).open("a") as file:
                file.write(f"{self.tag}\n")
        if self.once:
            mark = Path(self.once) / f"{self.how}-{self.tag}"
            if mark.exists():
                return
            mark.touch()
        how = self.how
        if how == "mixed":
            how = {3: "kill", 7: "exit"}.get(self.tag % 10, "slow")
        if how == "raise":
            raise RuntimeError("out of luck")
        if how == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if how == "not-finite":
            block.linears["self_attn.q_proj"].weight[0, 0] = float("nan")
        if how == "kill":
            print("about to be killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(9)
        if how == "slow":
            time.sleep(0.4)
        while how == "hang":
            time.sleep(0.1)
