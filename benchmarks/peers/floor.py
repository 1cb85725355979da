"""How long the arithmetic takes that no implementation can leave out, at the machine's measured matmul speed.

    python floor.py CONFIG METHOD N_SAMPLES SEQ_LEN CORE      prints JSON

Counted, per decoder block: one forward pass over the calibration tokens (linear layers, and the causal half of the
attention products), the Gram matrices of its four inputs (one triangle), and then

* GPTQ: Cholesky factor, inverse and the inverse's factor of each Gram matrix, and one rank-one update per column of each
  weight;
* AWQ: the output error `tr(Δ G Δᵀ)` of 20 scales for each layer that has any, and of 10 ranges for each group
  of the layers that are clipped, by one group's block of the Gram matrix.

Without search for cheaper mathematics: sampling tokens, or not searching at all, would beat it.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

GROUP = 128


def matmul_peak(size: int = 2048, repeats: int = 8) -> float:
    """Multiplications and additions a second of a square float32 product, one thread, the best of several.

    By processor time, so that other work on the machine lengthens nothing.
    """
    torch.set_num_threads(1)
    a, b = torch.randn(size, size), torch.randn(size, size)
    out, best = torch.empty(size, size), float("inf")
    for _ in range(repeats):
        clock = time.process_time()
        torch.mm(a, b, out=out)
        best = min(best, time.process_time() - clock)
    return 2 * size**3 / best


def operations(config: dict[str, Any], method: str, n_samples: int, seq_len: int) -> float:
    """Multiplications and additions, of all blocks."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    kv = dim * config["num_key_value_heads"]
    # (inputs, outputs of the layers that share them, whether a scale can be moved, outputs of layers that are clipped)
    links = [
        (hidden, heads * dim + 2 * kv, True, kv),
        (heads * dim, hidden, kv == heads * dim, hidden),
        (hidden, 2 * inner, True, 2 * inner),
        (inner, hidden, True, hidden),
    ]
    tokens = n_samples * seq_len
    total = (
        2 * tokens * seq_len * heads * dim
    )  # two products, each 2 tokens x length x width, half of it masked
    for n, out, scalable, clipped in links:
        total += 2 * tokens * n * out + tokens * n * n
        if method == "gptq":
            total += (1 / 3 + 2 / 3 + 1 / 3) * n**3 + out * n * n
        else:
            total += 20 * scalable * 2 * out * n * n + 10 * 2 * clipped * n * GROUP
    return float(total * config["num_hidden_layers"])


def main() -> None:
    config, method = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    n_samples, seq_len, core = map(int, sys.argv[3:])
    os.sched_setaffinity(0, {core})
    peak, count = matmul_peak(), operations(config, method, n_samples, seq_len)
    print(json.dumps({"gflops": peak / 1e9, "gflop": count / 1e9, "seconds": count / peak}))


if __name__ == "__main__":
    main()
