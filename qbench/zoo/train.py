"""Train the embedded models: `python -m qbench.zoo.train micro-llama`.

Seeded, and resumable after a kill: the batch of a step depends on the seed and the step alone, and a
checkpoint holds weights, optimizer and step. Reproduces the shipped weights up to the arithmetic of
the CPU and the text of the standard library (both are recorded in `training.json`).
"""

import argparse
import json
import math
import platform
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from qbench.zoo import WEIGHTS, stdlib

VOCAB = 3072
SEQ_LEN = 512
END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        docs_share: Share of training windows drawn from `stdlib_docs`; the rest is `stdlib_code`.
        warmup: Steps over which the learning rate rises before its cosine decay to a tenth.
    """

    steps: int
    batch_size: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 200
    docs_share: float = 0.3
    seed: int = 0


RECIPES = {
    "micro-llama": Recipe(steps=3500),
    "nano-llama": Recipe(steps=1500, lr=4e-3),
    "micro-opt": Recipe(steps=1500),
}


def config_of(name: str) -> PreTrainedConfig:
    """The architecture of an embedded model; input widths are multiples of 128."""
    common: dict[str, Any] = dict(
        vocab_size=VOCAB, max_position_embeddings=SEQ_LEN, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    llama: dict[str, Any] = common | dict(
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    if name == "micro-llama":
        return LlamaConfig(hidden_size=256, intermediate_size=640, num_hidden_layers=6, **llama)
    if name == "nano-llama":
        return LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, **llama)
    if name == "micro-opt":
        return OPTConfig(
            hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=3, num_attention_heads=4,
            dropout=0.0, **common,
        )  # fmt: skip
    raise ValueError(f"unknown embedded model {name!r}; there are {', '.join(RECIPES)}")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB` entries on equal amounts of both corpora's train text."""
    docs, code = (stdlib.load(name, "train").text for name in stdlib.NAMES)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (docs + code[: len(docs)]).split("\n\n"),
        VOCAB,
        min_frequency=2,
        special_tokens=[END],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        bos_token=END, eos_token=END, pad_token=END, model_max_length=SEQ_LEN,
    )  # fmt: skip


def tokens_of(corpus: stdlib.Corpus, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The whole corpus as one row of tokens, an end-of-text token after every module."""
    rows = tokenizer([text + END for _, text in corpus.documents], verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


def batch(streams: tuple[Tensor, Tensor], recipe: Recipe, step: int) -> Tensor:
    """The windows of one step, `(batch_size, SEQ_LEN + 1)`; a function of the seed and the step alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    n_docs = int((torch.rand(recipe.batch_size, generator=generator) < recipe.docs_share).sum())
    rows = []
    for i in range(recipe.batch_size):
        stream = streams[0] if i < n_docs else streams[1]
        start = int(torch.randint(len(stream) - SEQ_LEN, (1,), generator=generator))
        rows.append(stream[start : start + SEQ_LEN + 1])
    return torch.stack(rows)


def learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def loss_of(model: nn.Module, windows: Tensor, autocast: Any) -> Tensor:
    with autocast:
        logits = model(windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, stream: Tensor, autocast: Any) -> float:
    """Mean negative log-likelihood per token over (at most 64) windows of calibration text."""
    n = min(64, (len(stream) - 1) // SEQ_LEN)
    losses = [
        loss_of(model, stream[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1][None], autocast).item() for i in range(n)
    ]
    return sum(losses) / n


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def train(
    name: str,
    work: Path,
    out: Path,
    *,
    steps: int | None = None,
    compiled: bool = False,
    log_every: int = 100,
    stop_after: int | None = None,
) -> None:
    """Train one model, or take up its training where `work` holds a checkpoint; save it under `out`.

    Args:
        steps: Instead of the recipe's.
        compiled: Fuse the model with `torch.compile`.
        log_every: Steps between checkpoints.
        stop_after: Return after this step, its checkpoint written, as if killed.
    """
    recipe = RECIPES[name] if steps is None else Recipe(**asdict(RECIPES[name]) | {"steps": steps})
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").exists():
        train_tokenizer().save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    corpora = {n: stdlib.load(n, "train") for n in stdlib.NAMES}
    streams = tuple(tokens_of(c, tokenizer) for c in corpora.values())
    checks = {n: tokens_of(stdlib.load(n, "calibration"), tokenizer) for n in stdlib.NAMES}

    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    optimizer = optimizer_of(model, recipe)
    use_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    autocast = torch.autocast("cpu", torch.bfloat16) if use_bf16 else nullcontext()

    loss_fn = torch.compile(loss_of) if compiled else loss_of

    checkpoint, first, seconds = work / f"{name}.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        print(f"{name}: resumed at step {first}", flush=True)

    clock = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = loss_fn(model, batch(streams, recipe, step), autocast)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
            seconds += time.monotonic() - clock
            clock = time.monotonic()
            checked = (step + 1) % (5 * log_every) == 0 or step + 1 == recipe.steps
            nll = {n: round(held_out(model, s, autocast), 4) for n, s in checks.items()} if checked else {}
            print(f"{name} step {step + 1} loss {loss.item():.3f} held out {nll} {seconds:.0f} s", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"seconds": seconds}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if step + 1 == stop_after:
            return

    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    history = {
        "recipe": asdict(recipe), "tokens": recipe.steps * recipe.batch_size * SEQ_LEN, "seconds": round(seconds),
        "autocast": "bfloat16" if use_bf16 else "float32", "compiled": compiled, "torch": torch.__version__,
        "python": platform.python_version(), "corpora": {n: c.sha256 for n, c in corpora.items()},
        "held_out_nll": nll,
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(history, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qbench.zoo.train", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)}; all if none"
    )
    parser.add_argument("--work", type=Path, default=Path("zoo-training"), help="checkpoints are kept here")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that receives the trained models")
    parser.add_argument("--steps", type=int, help="instead of the recipe's number of steps")
    parser.add_argument(
        "--compile", action="store_true", help="fuse with torch.compile; needs a C++ compiler"
    )
    args = parser.parse_args()
    for name in args.names:
        config_of(name)
        train(name, args.work, args.out, steps=args.steps, compiled=args.compile)


if __name__ == "__main__":
    main()
