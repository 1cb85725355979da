"""Judge a quantized model; the same for all systems. Run by the Python that has qbench.

    python judge.py MODEL ORIGINAL QUANTIZED ANSWER

Writes one number per window of the test text of stdlib_docs. For micro-llama: the mean negative log-likelihood, on
windows of 512 tokens. For a random model, of which that says nothing: the mean Kullback-Leibler divergence of
the quantized model's predictions from the original's, on windows of 128 tokens.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qbench.data.corpora import load_text
from qbench.data.windows import Windows, evaluation_windows
from qbench.evaluate.logits import whole
from qbench.evaluate.perplexity import window_losses
from qbench.models.load import ModelRef


def nll(model: Any, windows: Windows) -> torch.Tensor:
    """Mean negative log-likelihood in nats of each window, `(n_windows,)`."""
    return window_losses(whole(model, windows.tokens, 4), windows).nll


def divergence(original: str, quantized: str, windows: torch.Tensor) -> torch.Tensor:
    """KL(original ‖ quantized) in nats, mean over the tokens of each window, `(n_windows,)`."""

    def predictions(folder: str) -> torch.Tensor:
        model = ModelRef(folder).load()
        with torch.inference_mode():
            return torch.cat([model(w[None], use_cache=False).logits.log_softmax(-1) for w in windows])

    p = predictions(original)
    return (p.exp() * (p - predictions(quantized))).sum(-1).double().mean(-1)


def main() -> None:
    name, original, quantized, file = sys.argv[1:]
    torch.set_num_threads(1)
    text, tokenizer = load_text("stdlib_docs", "test"), ModelRef("zoo/micro-llama").tokenizer()
    windows = partial(evaluation_windows, text, tokenizer)
    if name == "micro-llama":
        metric, values = "nll", nll(ModelRef(quantized).load(), windows(512, 128))
    else:
        metric, values = "kl", divergence(original, quantized, windows(128, 16).tokens)
    Path(file).write_text(json.dumps({"metric": metric, "values": values.tolist()}))


if __name__ == "__main__":
    main()
