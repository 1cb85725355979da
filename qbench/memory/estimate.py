"""How much memory a job will need, from the model's sizes alone, so that it can be refused before it starts.

What is counted, in a phase's largest moment, is tensors; to activations and workspace a share is added for what the C
library cannot use again. The figures are compared with measured peaks in `tests/test_memory.py`. Not counted are tasks
whose prompts are longer together than a batch of windows, and mapped files, whose pages the system takes back.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from qbench.calib.block import paused_bytes
from qbench.memory.sizes import Sizes, sizes_of
from qbench.models.family import Family
from qbench.quant.factor import BLOCKS, WIDTH

# Bytes of Python with its libraries: measured 400 MB, and 150 MB more with those of the tracker and the tasks.
_PROCESS = 600 * 10**6
_CUDA_CONTEXT = 500 * 10**6  # bytes on the device, with the libraries' workspaces
_SLACK = 1.15
_WIDE = 8  # bytes of float64
_FLOAT = 4

Phase = Literal["calib", "eval"]


@dataclass(frozen=True)
class Work:
    """What of a job decides how much memory it takes.

    Attributes:
        streamed: Blocks come from disk, one at work and the next one; evaluation goes block by block too.
        eval_streamed: Evaluation has one block at a time on the device, and all hidden states wait on the CPU.
        needs_data, needs_float_path, runs_model: As of the algorithm.
        n_samples, seq_len, batch_size: Of calibration.
        eval_windows: Of all texts together.
        compared: Predictions are compared with the floating-point model's.
        copies: How many copies of the model there are, the one that is kept for the next job included.
        keeps_inputs: The first block's inputs are kept for the next job.
        spill_above: Bytes above which a stream's hidden states are in a file; `None` for never.
    """

    dtype: torch.dtype
    device: str = "cpu"
    streamed: bool = False
    eval_streamed: bool = False
    needs_data: bool = False
    needs_float_path: bool = False
    runs_model: bool = False
    n_samples: int = 0
    seq_len: int = 0
    batch_size: int = 1
    eval_windows: int = 0
    eval_seq_len: int = 0
    eval_batch_size: int = 1
    compared: bool = False
    copies: int = 1
    keeps_inputs: bool = False
    spill_above: int | None = None


@dataclass(frozen=True)
class Need:
    """Bytes that are held at once in one place.

    Attributes:
        phase: In which the most is held.
        activations: Hidden states between blocks, and what a batch leaves inside one.
        workspace: Statistics, factors and copies of weights; the logits.
        process: Held whatever the job is.
    """

    phase: Phase
    weights: int
    activations: int
    workspace: int
    process: int

    @property
    def parts(self) -> dict[str, int]:
        return {
            "weights": self.weights, "activations": self.activations, "workspace": self.workspace,
            "process": self.process,
        }  # fmt: skip

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a job is expected to hold.

    Attributes:
        device: `None` where the device is the host.
    """

    sizes: Sizes
    work: Work
    host: Need
    device: Need | None


def estimate(skeleton: Any, family: Family, work: Work) -> Estimate:
    """The memory that a job needs.

    Args:
        skeleton: The model, on the `meta` device.
    """
    return estimated(sizes_of(skeleton, family), work)


def estimated(sizes: Sizes, work: Work) -> Estimate:
    """The memory that a job needs, of a model of these sizes."""
    on_device = torch.device(work.device).type != "cpu"
    host, device = _calibration(sizes, work), _evaluation(sizes, work)
    needs = [_largest(a, b) for a, b in zip(host, device, strict=True)]
    if on_device:
        return Estimate(sizes, work, *needs)
    merged = [_merged(*phase) for phase in (host, device)]
    return Estimate(sizes, work, _largest(*merged), None)


def _largest(a: Need, b: Need) -> Need:
    return a if a.total >= b.total else b


def _merged(host: Need, device: Need) -> Need:
    """What both take where they are one: weights are not there twice."""
    return Need(
        host.phase, host.weights, host.activations + device.activations, host.workspace + device.workspace, host.process
    )  # fmt: skip


def _calibration(sizes: Sizes, work: Work) -> tuple[Need, Need]:
    """While blocks are quantized: what waits on the host, and what works on the device."""
    item, read = work.dtype.itemsize, work.needs_data
    stream = _unless_spilled(work.n_samples * work.seq_len * sizes.hidden * item, work)
    # What enters a block and what leaves it, the same of the floating-point model, and what is kept.
    n_streams = 2 + 2 * work.needs_float_path + work.keeps_inputs if read else 0
    inside = _paused(sizes, work) + _forward(sizes, work.batch_size, work.seq_len, item) if read else 0
    one = sizes.block * item * (2 if work.streamed else 1)
    host = Need("calib", _host_weights(sizes, work), _slack(n_streams * stream), 0, _PROCESS)
    weights = (sizes.outside + sizes.blocks) * item if work.runs_model else one
    return host, Need("calib", weights, _slack(inside), _slack(_workspace(sizes, work)), _CUDA_CONTEXT)


def _evaluation(sizes: Sizes, work: Work) -> tuple[Need, Need]:
    """The same while the model is evaluated."""
    item, streamed = work.dtype.itemsize, work.eval_streamed or work.streamed
    stream = work.eval_windows * work.eval_seq_len * sizes.hidden * item
    # The reference's are kept, and are made from a list of batches where the model runs as a whole.
    n_streams = int(streamed) + 2 * work.compared
    tail = sizes.outside * item * work.compared  # a copy of the head, whose own may be edited
    # Freed blocks below some 32 MiB, which the batches that paused in a block are, stay with the C library.
    freed = _paused(sizes, work) if work.needs_data and torch.device(work.device).type == "cpu" else 0
    waiting = _unless_spilled(stream, work) * n_streams + freed
    host = Need("eval", _host_weights(sizes, work) + tail, _slack(waiting), 0, _PROCESS)
    n_tokens = work.eval_batch_size * work.eval_seq_len
    inside = _forward(sizes, work.eval_batch_size, work.eval_seq_len, item)
    weights = max(sizes.outside, sizes.block) if streamed else sizes.outside + sizes.blocks
    logits = _slack(n_tokens * sizes.vocab * _bytes_of_a_logit(item, work.compared))
    return host, Need("eval", weights * item + tail, _slack(inside), logits, _CUDA_CONTEXT)


def _host_weights(sizes: Sizes, work: Work) -> int:
    # A step that runs the model needs it whole, wherever it comes from.
    blocks = 2 * sizes.block if work.streamed and not work.runs_model else sizes.blocks
    return (sizes.outside + blocks) * work.dtype.itemsize * work.copies


def _unless_spilled(n_bytes: int, work: Work) -> int:
    return n_bytes if work.spill_above is None or n_bytes <= work.spill_above else 0


def _paused(sizes: Sizes, work: Work) -> int:
    widest = max((n for kind in sizes.links for _, n in kind), default=0)
    return paused_bytes(work.n_samples * work.seq_len, sizes.hidden, widest, work.dtype.itemsize)


def _forward(sizes: Sizes, batch_size: int, seq_len: int, item: int) -> int:
    """What a batch holds inside a block.

    Attention has the residual, queries, keys and values; a gated MLP its gate, that activated, its other half, and their
    product. Scores are in the model's type, and in float32 for the softmax.
    """
    widest = max((max(shape) for kind in sizes.links for shape in kind), default=sizes.hidden)
    scores = sizes.heads * seq_len * seq_len * (item + _FLOAT)
    return batch_size * (seq_len * 4 * (sizes.hidden + widest) * item + scores)


def _workspace(sizes: Sizes, work: Work) -> int:
    """What rounding a block takes beside its weights, for the most demanding kind of block.

    Without data, some seven copies of a link's weights in float32: the weight, itself without what is kept, its grid's
    two, the column-wise copy, the codes, the result. With data also a float32 Gram matrix `(in, in)` for each link, and for
    one link at a time the more of what GPTQ takes (the inverse factor in float64, and blocks) and of what those take that
    have copies of the Gram matrix (four in float32: QuIP in another basis, errors of outputs its upper half). What learns
    by gradients (it needs the float path) has for each weight a variable, its gradient and two moments, and three copies
    that the graph holds; what runs the model the same of a block, and the logits with their gradients.
    """
    per_kind = []
    for kind in sizes.links:
        copies = 7 * _FLOAT * max((rows * n for rows, n in kind), default=0)
        grams, widest = _FLOAT * sum(n * n for _, n in kind), max((n for _, n in kind), default=0)
        factor = _WIDE * (widest**2 + BLOCKS * min(widest, WIDTH) ** 2)
        solved = max(factor, 4 * _FLOAT * widest**2)
        per_kind.append(copies + (grams + solved if work.needs_data else 0))
    learned = 7 * _FLOAT * sizes.block if work.needs_float_path or work.runs_model else 0
    n_tokens = work.batch_size * work.seq_len
    kept = n_tokens * (sizes.n_blocks * sizes.hidden * work.dtype.itemsize + 4 * _FLOAT * sizes.vocab)
    return max(*per_kind, learned) + (kept if work.runs_model else 0)


def _bytes_of_a_logit(item: int, compared: bool) -> int:
    own = item + (_FLOAT if item < _FLOAT else 0)  # as the model makes it, and in float32
    # The other model's, and both again without the last position; or what cross entropy makes.
    return own * 2 + 2 * _FLOAT if compared else own + _FLOAT


def _slack(n_bytes: int) -> int:
    return round(n_bytes * _SLACK)
