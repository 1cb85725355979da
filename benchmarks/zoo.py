"""Print the table of docs/zoo.md: size, perplexity, bits per byte and accuracy of the embedded models, and of xz.

python benchmarks/zoo.py
"""

import lzma

from qbench.data.corpora import load_text
from qbench.data.library import Library
from qbench.data.windows import evaluation_windows
from qbench.evaluate.harness import Ask, Harness
from qbench.evaluate.logits import whole
from qbench.evaluate.perplexity import perplexity, window_losses
from qbench.models.load import ModelRef
from qbench.zoo import stdlib

MODELS = ("micro-llama", "nano-llama", "micro-opt")


def main() -> None:
    print(
        "| | parameters | "
        + " | ".join(f"{n} ppl | {n} bits/byte" for n in stdlib.NAMES)
        + " | cloze | copy |"
    )
    print("|" + "---|" * 8)
    for name in MODELS:
        ref = ModelRef(f"zoo/{name}")
        model, tokenizer = ref.load(), ref.tokenizer()
        cells = [name, f"{sum(p.numel() for p in model.parameters()):,}"]
        for corpus in stdlib.NAMES:
            windows = evaluation_windows(load_text(corpus, "test"), tokenizer, 512)
            losses = window_losses(whole(model, windows.tokens, 4), windows)
            metrics = perplexity(corpus, losses, windows).metrics
            cells += [f"{metrics[f'ppl/{corpus}']:.1f}", f"{metrics[f'bpb/{corpus}']:.2f}"]
        for task in ("stdlib_cloze", "stdlib_copy"):
            metrics = Harness(model, tokenizer, 32).accuracy(task, Library(), Ask()).metrics
            cells.append(f"{metrics[f'acc/{task}']:.2f} ± {metrics[f'acc/{task}_stderr']:.2f}")
        print("| " + " | ".join(cells) + " |")
    cells = ["`xz -9e`", ""]
    for corpus in stdlib.NAMES:
        raw = load_text(corpus, "test").text.encode()
        cells += ["", f"{8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw):.2f}"]
    print("| " + " | ".join([*cells, "", ""]) + " |")


if __name__ == "__main__":
    main()
