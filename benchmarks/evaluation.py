"""What evaluation spares: times in one run, and ratios.

    python benchmarks/evaluation.py

CPU seconds of one thread, the least of three runs where a thing can be done again.
"""

import time
from collections.abc import Callable

import torch

from qbench.data.corpora import load_text
from qbench.data.library import Library
from qbench.data.windows import evaluation_windows
from qbench.evaluate import stock
from qbench.evaluate.baseline import tail_of
from qbench.evaluate.decoding import decoded
from qbench.evaluate.harness import Ask, Harness
from qbench.evaluate.logits import block_by_block, noted_hidden, whole
from qbench.evaluate.perplexity import window_losses
from qbench.models.load import ModelRef


def seconds(what: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        clock = time.process_time()
        what()
        found.append(time.process_time() - clock)
    return min(found)


def row(name: str, ours: float, other: float) -> None:
    print(f"| {name} | {ours:.2f} | {other:.2f} | {other / ours:.1f} |")


def tasks() -> None:
    from lm_eval.tasks import TaskManager

    ours = seconds(lambda: stock.check_names(("mmlu",)) or stock.leaves("mmlu"), times=1)
    row("finding MMLU's 57 tasks; lm-eval's whole index", ours, seconds(TaskManager, times=1))


def windows() -> None:
    ref = ModelRef("zoo/micro-llama")
    model, tokenizer = ref.load(), ref.tokenizer()
    text = evaluation_windows(load_text("stdlib_docs", "test"), tokenizer, 512, 24)
    with noted_hidden(model) as noted:
        list(whole(model, text.tokens, 4))
    hidden, tail = torch.cat(noted), tail_of(model)
    plain = seconds(lambda: window_losses(whole(model, text.tokens, 4), text))
    compared = seconds(
        lambda: window_losses(whole(model, text.tokens, 4), text, lambda p, ids: tail(ids, hidden[p]))
    )

    def twice() -> None:
        logits = [x for *_, x in whole(model, text.tokens, 4)]
        window_losses(whole(model, text.tokens, 4), text, lambda part, ids: logits[part.start // 4])

    row("perplexity with divergence; with the floating-point model run again", compared, seconds(twice))
    row("perplexity; with divergence from a baseline", plain, compared)
    streamed = seconds(lambda: window_losses(block_by_block(model, text.tokens, 4, "cpu"), text))
    row("all blocks at once; one block after another", plain, streamed)
    few = text[torch.arange(8)]
    row(
        "8 windows at once; token by token through the cache",
        seconds(lambda: window_losses(whole(model, few.tokens, 8), few)),
        seconds(lambda: window_losses(decoded(model, few.tokens, 8), few), times=1),
    )
    half = ModelRef("zoo/micro-llama", dtype="bfloat16").load()
    row(
        "perplexity in bfloat16; in float32",
        seconds(lambda: window_losses(whole(half, text.tokens, 4), text)),
        plain,
    )
    vocabulary = text.tokens.numel() * model.config.vocab_size
    print(
        f"\nkept of a window: {hidden.numel() / len(text)} numbers, for {vocabulary / len(text):.0f} logits"
    )


def tokens() -> None:
    ref = ModelRef("zoo/nano-llama")
    model, tokenizer = ref.load(), ref.tokenizer()
    clocks = []
    for _ in range(2):
        clock = time.process_time()
        Harness(model, tokenizer, 32).accuracy("stdlib_recall", Library(), Ask())
        clocks.append(time.process_time() - clock)
    row("a task of 200 questions again; the first time", clocks[1], clocks[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| what | s | other way, s | ratio |\n|---|---|---|---|")
    tasks()
    windows()
    tokens()
