"""Forward passes that stop before chosen layers and go on later, so that a layer can be changed in between.

Rounding a block's layers one after another, each on inputs that have met the rounding before it, would need a forward
pass for each. Here every batch runs in a coroutine of its own (a greenlet: the pauses lie deep inside the model's code),
stops in front of each chosen layer, and is resumed when that layer has been dealt with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from qbench.calib.causal import forward_only


class Stages:
    """`forward` on every batch, in steps: a step ends when all batches stand before the next of `places`.

    Every forward pass must meet `places` in this order. Nothing is differentiable.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], batches: Sequence[Tensor], places: Sequence[nn.Module]
    ) -> None:
        self._main = getcurrent()
        self._batches = list(batches)
        self._running = [greenlet(forward) for _ in batches]
        self._places = list(places)

    def until_next(self) -> Iterator[Tensor]:
        """Let each batch go on to the next place; yields what it is about to put in.

        Raises:
            RuntimeError: If a forward pass ends without meeting the place.
        """

        def pause(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._main.switch(args[0])

        handle = self._places.pop(0).register_forward_pre_hook(pause)
        try:
            for index, running in enumerate(self._running):
                x = self._resume(index)
                if running.dead:
                    raise RuntimeError("a forward pass met the layers in another order than they are listed")
                yield x
        finally:
            handle.remove()

    def finish(self) -> list[Tensor]:
        """Let each batch run to its end; returns what the forward passes return."""
        return [self._resume(index) for index in range(len(self._running))]

    def close(self) -> None:
        """End the passes that were left before their end, which frees their activations."""
        for running in self._running:
            with suppress(GreenletExit):
                running.throw()

    def _resume(self, index: int) -> Any:
        running = self._running[index]
        with (
            forward_only()
        ):  # modes belong to the thread: they hold inside, and not for whoever is called between
            return running.switch() if running else running.switch(self._batches[index])
