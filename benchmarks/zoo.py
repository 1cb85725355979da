"""Print the table of docs/zoo.md: size, perplexity, bits per byte and accuracy of the embedded models, and of xz.

python benchmarks/zoo.py
"""

import lzma
import math

from qbench.data.corpora import load_text
from qbench.data.tokens import tokenize
from qbench.evaluate.harness import accuracy
from qbench.evaluate.perplexity import perplexity
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
            text = load_text(corpus, "test")
            tokens = tokenize(text, tokenizer)
            ppl = perplexity(model, corpus, tokens, seq_len=512).metrics[f"ppl/{corpus}"]
            per_byte = math.log2(ppl) * len(tokens) / len(text.text.encode())
            cells += [f"{ppl:.1f}", f"{per_byte:.2f}"]
        metrics = accuracy(model, tokenizer, ("stdlib_cloze", "stdlib_copy"), batch_size=32).metrics
        for task in ("stdlib_cloze", "stdlib_copy"):
            cells.append(f"{metrics[f'acc/{task}']:.2f} ± {metrics[f'acc/{task}_stderr']:.2f}")
        print("| " + " | ".join(cells) + " |")
    cells = ["`xz -9e`", ""]
    for corpus in stdlib.NAMES:
        raw = load_text(corpus, "test").text.encode()
        cells += ["", f"{8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw):.2f}"]
    print("| " + " | ".join([*cells, "", ""]) + " |")


if __name__ == "__main__":
    main()
