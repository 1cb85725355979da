"""A model larger than the memory it may take: a random Llama on disk, GPTQ w4g128 and perplexity, block by block.

    python benchmarks/size.py run <folder> [blocks, 48 by default]      one job; prints peak memory and time by block
    python benchmarks/size.py double <folder>                           the same with half of the blocks beside it
    python benchmarks/size.py kill <folder> [blocks, 6 by default]      killed half-way and gone on, against undisturbed

The checkpoint is written once under <folder>, in bfloat16 and in shards of one block (hidden 1536, intermediate 4096, 12
heads, 32,000 words: 48 blocks are 2.9 GB). `run` and `double` are the `qbench` command with `model.offload=disk`,
everything in one process; its peak is the kernel's `ru_maxrss`. `kill` calls the engine, and compares the finished blocks
to the bit.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qbench.zoo import WEIGHTS

SIZES = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "num_key_value_heads": 12}
CALIBRATION = {"n_samples": 8, "seq_len": 512}
WINDOWS, WINDOW = 8, 512


def checkpoint(folder: Path, n_blocks: int) -> Path:
    """Write the model, if it is not there, a block at a time."""
    path = folder / f"random-llama-{n_blocks}"
    if (path / "model.safetensors.index.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **SIZES, vocab_size=32_000, num_hidden_layers=n_blocks, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(path)
    for file in (WEIGHTS / "micro-llama").glob("tokenizer*"):
        shutil.copy(file, path)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator, index = torch.Generator().manual_seed(0), {}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: weight(n, shapes[n], generator) for n in names}, path / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return path


def weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def run(folder: Path, n_blocks: int) -> dict[str, Any]:
    """One job by the command; its figures."""
    path, results = checkpoint(folder, n_blocks), folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    command = [
        sys.executable, "-m", "qbench", "model=hf", f"model.id={path}", "model.dtype=checkpoint", "model.offload=disk",
        "algo=gptq", "wbits=4", "group_size=128", *(f"calib.{k}={v}" for k, v in CALIBRATION.items()),
        "calib.batch_size=2", "eval.ppl=[stdlib_docs]", "eval.tasks=[]", f"eval.seq_len={WINDOW}",
        f"eval.max_windows={WINDOWS}", "eval.batch_size=1", "tracker=none", "launcher=inline", f"results={results}",
    ]  # fmt: skip
    clock = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    record = json.loads(next(results.glob("records/*/record.json")).read_text())
    if record["status"] != "done":
        raise SystemExit(record["reason"])
    return {
        "blocks": n_blocks, "checkpoint": size(path), "activations": activations(path), "wall": time.perf_counter() - clock,
        "peak": usage.ru_maxrss * 1024, "seconds": record["block_seconds"], "metrics": record["metrics"],
    }  # fmt: skip


def activations(path: Path) -> int:
    """Bytes of activations as the job states them before it starts: hidden states, and what batches leave in a block."""
    from qbench.memory.estimate import Work, estimate
    from qbench.models.family import family_of
    from qbench.models.load import ModelRef

    shell = ModelRef(str(path), dtype="bfloat16").skeleton()
    work = Work(
        torch.bfloat16, streamed=True, eval_streamed=True, needs_data=True, **CALIBRATION, batch_size=2,
        eval_windows=WINDOWS, eval_seq_len=WINDOW,
    )  # fmt: skip
    return estimate(shell, family_of(shell), work).host.activations


def show(figures: dict[str, Any]) -> None:
    bound = 0.35 * figures["checkpoint"] + figures["activations"]
    first, last = (sum(part) / len(part) for part in halves(figures["seconds"]))
    m = figures["metrics"]
    print(
        f"| {figures['blocks']} | {figures['checkpoint'] / 1e9:.2f} | {figures['activations'] / 1e6:.0f} | "
        f"{figures['peak'] / 1e6:.0f} | {bound / 1e6:.0f} | "
        f"{m['peak_mem_calib_mb']:.0f} | {m['peak_mem_eval_mb']:.0f} | {first:.1f} | {last:.1f} | {m['calib_time_s']:.0f} | "
        f"{m['eval_time_s']:.0f} | {figures['wall']:.0f} |",
        flush=True,
    )


def halves(seconds: list[float]) -> tuple[list[float], list[float]]:
    middle = len(seconds) // 2
    return seconds[:middle], seconds[middle:]


def work(path: Path, folder: Path) -> None:
    """Quantize by the engine alone, noting progress in `folder`, and say what the finished blocks are."""
    from qbench.algorithms.gptq import GPTQ
    from qbench.engine import quantize
    from qbench.models.load import ModelRef
    from qbench.progress import Progress
    from qbench.quant.scheme import Scheme

    tokens = torch.randint(0, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    model = ModelRef(str(path), dtype="bfloat16", offload="disk").open(folder / "blocks")
    result = quantize(
        model, GPTQ(), Scheme.parse("w4a16g128"), tokens, progress=Progress(folder),
        on_block=lambda done, total: print(f"{done}/{total}", flush=True),
    )  # fmt: skip
    digest = hashlib.sha256()
    for file in sorted((folder / "blocks").glob("finished_*")):
        for name, x in sorted(load_file(file).items()):  # the order in a file's header is not fixed
            digest.update(name.encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
    print(json.dumps({"resumed_at": result.resumed_at, "sha256": digest.hexdigest()}))


def kill(folder: Path, n_blocks: int) -> None:
    path, told = checkpoint(folder, n_blocks), {}
    for name in ("undisturbed", "killed"):
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        command = [sys.executable, __file__, "work", str(path), str(place)]
        if name == "killed":
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"{n_blocks // 2}/"):
                    time.sleep(2)  # into the next block
                    process.send_signal(signal.SIGKILL)
            process.wait()
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        told[name] = json.loads(out.splitlines()[-1])
        print(f"{name}: went on at block {told[name]['resumed_at']}, {told[name]['sha256'][:16]}", flush=True)
    same = told["undisturbed"]["sha256"] == told["killed"]["sha256"]
    print(f"finished blocks {'equal to the bit' if same else 'DIFFER'}")


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    if what == "work":
        work(Path(folder), Path(rest[0]))
    elif what == "kill":
        kill(Path(folder), int(rest[0]) if rest else 6)
    else:
        n_blocks = int(rest[0]) if rest else 48
        print("| blocks | checkpoint GB | activations MB | peak MB | bound MB | calib peak MB | eval peak MB | "
              "s a block, first half | "
              "second half | calib s | eval s | wall s |\n" + "|---" * 12 + "|")  # fmt: skip
        for n in (n_blocks // 2, n_blocks) if what == "double" else (n_blocks,):
            show(run(Path(folder), n))


if __name__ == "__main__":
    main()
