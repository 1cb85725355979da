"""How many calibration tokens the experts of a block are given."""

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qbench.calib.causal import forward_only
from qbench.calib.stream import Enough, Stream, called
from qbench.models.experts import counted, experts_in


def routed_tokens(
    inputs: Stream, layer: nn.Module, kwargs: dict[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """Tokens given to each expert, `(n_experts,)` int64, by the experts' path in the block; empty without experts.

    The passes end where the last experts would begin.
    """
    experts = experts_in(layer)
    if not experts:
        return {}
    waiting: set[nn.Module] = set()

    def stop(module: nn.Module, _: Any) -> None:
        waiting.discard(module)
        if not waiting:
            raise Enough

    with forward_only(), counted(layer) as counts, ExitStack() as stack:
        for module in experts.values():
            stack.callback(module.register_forward_pre_hook(stop).remove)
        for batch in inputs.batches():
            waiting.update(experts.values())
            with suppress(Enough):
                called(layer, batch.to(device), kwargs)
    return counts


def routing_report(counts: dict[str, Tensor], width: int, shown: int | None = None) -> dict[str, Any]:
    """What a record says of a block's experts.

    Args:
        width: With fewer tokens than inputs a Gram matrix is singular, and what is fitted to it owes much to the damping.
        shown: The tokens that every expert is calibrated on, if not those that were routed to it.

    Returns:
        By path of the experts: `routed`, and `tokens` that each is calibrated on; who has none (`unseen`), and who fewer
        than `width` (`few`); `missed` is for what rounding sends elsewhere.
    """
    routed = {path: found.tolist() for path, found in counts.items()}
    tokens = {path: found if shown is None else [shown] * len(found) for path, found in routed.items()}
    return {
        "routed": routed,
        "tokens": tokens,
        "unseen": {path: [i for i, n in enumerate(found) if not n] for path, found in tokens.items()},
        "few": {path: [i for i, n in enumerate(found) if 0 < n < width] for path, found in tokens.items()},
        "missed": [],
    }
