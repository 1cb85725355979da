"""Forward passes that stop before chosen layers and go on later, so that a layer can be changed in between.

Rounding a block's layers one after another, each on inputs that have met the rounding before it, would need a forward
pass for each. Here every batch runs in a coroutine of its own (a greenlet: the pauses lie deep inside the model's code),
stops in front of each chosen layer, and is resumed when that layer has been dealt with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from qbench.calib.causal import forward_only


class Stages:
    """`forward` on every batch, in steps: a step ends when no batch stands before its place any more.

    Every forward pass must meet `places` in this order; it may pass some by (experts that no token is routed to).
    Nothing is differentiable.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], batches: Sequence[Tensor], places: Sequence[nn.Module]
    ) -> None:
        self._main = getcurrent()
        self._batches = list(batches)
        self._running = [greenlet(forward) for _ in batches]
        self._places = list(places)
        self._step = -1
        # Where each batch stands, and what it is about to put in; at last, what its forward pass returns.
        self._at: list[tuple[int, Tensor | None]] = [(-1, None) for _ in batches]
        self._handles = [
            place.register_forward_pre_hook(partial(self._pause, index)) for index, place in enumerate(places)
        ]

    def until_next(self) -> Iterator[Tensor]:
        """Let each batch go on to the next place; yields what it is about to put in, of those that meet it.

        Raises:
            RuntimeError: If a forward pass meets a place after a later one, or ends without meeting the first.
        """
        self._step += 1
        for index in range(len(self._running)):
            if self._at[index][0] < self._step:
                self._at[index] = self._resume(index)
            place, x = self._at[index]
            if place == self._step:
                assert x is not None
                yield x

    def finish(self) -> list[Tensor]:
        """Let each batch run to its end; returns what the forward passes return."""
        while behind := [i for i, running in enumerate(self._running) if not running.dead]:
            for index in behind:
                self._at[index] = self._resume(index)
        return [made for _, made in self._at if made is not None]

    def close(self) -> None:
        """End the passes that were left before their end, which frees their activations."""
        for running in self._running:
            with suppress(GreenletExit):
                running.throw()
        for handle in self._handles:
            handle.remove()

    def _pause(self, place: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if getcurrent() is not self._main:
            self._main.switch((place, args[0]))

    def _resume(self, index: int) -> tuple[int, Tensor]:
        running, before = self._running[index], self._at[index][0]
        with (
            forward_only()
        ):  # modes belong to the thread: they hold inside, and not for whoever is called between
            made = running.switch() if running else running.switch(self._batches[index])
        place, x = (len(self._places), made) if running.dead else made
        if place <= before or (before < 0 and place == len(self._places)):
            raise RuntimeError("a forward pass met the layers in another order than they are listed")
        return place, x
