"""`qbench export`: a recipe as a checkpoint that others load."""

import re
from pathlib import Path
from typing import Any

from qbench.cli.reports import console
from qbench.errors import UsageError

_OWN = ("to", "out", "dtype")


def export(arguments: list[str]) -> int:
    """`qbench export <fingerprint | labels | algo=… scheme=… model=…> --to <format> [out=<folder>] [dtype=…] [results=…]`,
    or `qbench export verify <folder>`

    Formats:
      compressed-tensors    packed integers, FP8, MX, NVFP4: vLLM, SGLang, transformers
      gptq, awq             the layouts of those names, which most engines load
      gguf, gguf-q4_0, …    llama.cpp: the type that is nearest to the scheme, or the one that is named
      hf                    floating-point weights on their grids: any library, any recipe, nothing smaller

    A recipe is named by its fingerprint's beginning, by labels (gptq/w4a16g128), or by settings as of a job. Its model is
    quantized again, which must give what the record says; every layer is packed, unpacked and compared; then the files
    are loaded back, and their logits compared with those of the model that was evaluated, on real text. Beyond rounding,
    nothing is exported. With the weights go tokenizer, configs, a model card and a manifest of checksums; `verify`
    compares a folder with its manifest.
    """
    if arguments[:1] == ["verify"]:
        return _verify(arguments[1:])
    words, own, rest = _read(arguments)
    from qbench.export.run import NotTheSame, prepared
    from qbench.export.run import export as write
    from qbench.sweep.recipe import asked_for

    out = console()
    if not words and not rest:
        raise UsageError(
            "name the recipe to export: a fingerprint, labels such as gptq/w4a16g128, or settings such as algo=gptq "
            "scheme=w4a16g128; `qbench tables` lists what is recorded"
        )
    asked = asked_for(words[0] if words else "", rest)
    to = "-".join(filter(None, (own["to"], own.get("dtype"))))
    folder = Path(own["out"]).expanduser() if "out" in own else _folder(asked, to)
    try:
        asked.job.check()
        made = prepared(asked.job, own["to"], own.get("dtype"))
        with _Told(out) as told:
            done = write(asked.job, asked.shown, made, folder, told.reporter)
    except (ValueError, NotImplementedError, OSError, MemoryError, NotTheSame) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if asked.record is None:
        _say(out, "no record    this recipe was never evaluated: run it first to know how good it is")
    for line in _lines(done, asked):
        _say(out, line)
    return 0


def _read(arguments: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Words, this command's own settings, and the rest.

    Raises:
        UsageError: If no format is named, or an option is unknown.
    """
    left, plain = iter(arguments), list[str]()
    for argument in left:
        name = argument.removeprefix("--")
        is_option = argument != name and name.partition("=")[0] in _OWN
        plain.append((name if "=" in name else f"{name}={next(left, '')}") if is_option else argument)
    own = {k: v for k, _, v in (a.partition("=") for a in plain) if k in _OWN}
    words = [a for a in plain if "=" not in a]
    rest = [a for a in plain if "=" in a and a.partition("=")[0] not in own]
    if options := [word for word in words if word.startswith("-")]:
        raise UsageError(f"there is no option {options[0]} here; see `qbench export --help`")
    if len(words) > 1:
        raise UsageError(f"one recipe is exported at a time, found {' and '.join(words)}")
    if not own.get("to"):
        raise UsageError("say what to export to: --to compressed-tensors, gptq, awq, gguf or hf")
    return words, own, rest


def _folder(asked: Any, to: str) -> Path:
    """Beside the records, named after the recipe."""
    job = asked.job
    name = "-".join((job.model.name, job.algo, job.scheme.label, to))
    return Path(asked.store.root) / "exports" / re.sub(r"[^A-Za-z0-9._+-]+", "_", name)


def _verify(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("name the folder: `qbench export verify <folder>`")
    from qbench.models.manifest import verify

    folder = Path(arguments[0]).expanduser()
    try:
        files = verify(folder)
    except OSError as error:
        raise UsageError(str(error)) from error
    print(
        f"{folder}: {len(files)} files, {sum(f['bytes'] for f in files.values()) / 1e6:,.2f} MB, as exported"
    )
    return 0


class _Told:
    """A line for each phase, and for blocks as they are done, while an export runs."""

    def __init__(self, out: Any) -> None:
        self._out, self._status = out, out.status("checking")

    def __enter__(self) -> "_Told":
        from qbench.measure import Reporter

        names = {
            "load": "loading the model",
            "calib": "quantizing",
            "compare": "loading it back and comparing",
        }

        def phase(name: str) -> None:
            self._status.update(names[name])
            if not self._out.is_terminal:  # where nothing can be written over
                _say(self._out, names[name])

        self.reporter = Reporter(
            phase=phase,
            block=lambda done, total: self._status.update(f"quantizing: block {done} of {total}"),
            memory=lambda line: _say(self._out, line),
        )
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()


def _lines(done: Any, asked: Any) -> list[str]:
    lines = [
        f"written      {done.folder}",
        f"size         {done.bytes / 1e6:,.2f} MB of tensors, {done.expected_bytes / 1e6:,.2f} MB without padding; "
        f"{done.bits:.2f} bits per weight, {done.honest_bits:.2f} with what is not quantized in 16 bits",
    ]
    if (p := done.parity) is None:
        lines.append(f"not compared {done.not_compared}")
    else:
        e = p.evaluated
        found = (
            "logits equal to the bit"
            if p.is_exact
            else f"logits differ by {e.largest:.3g} at most, {e.mean:.3g} in the mean, KL {e.kl:.2g} nats"
        )
        lines += [
            f"compared     with what was evaluated, {p.n_windows} windows of {p.seq_len} tokens of {p.text}: {found}",
            f"             the same likeliest token for {e.agreement:.2%}; perplexity {p.ppl_loaded:.4f}, "
            f"evaluated {p.ppl_evaluated:.4f}",
        ]
        if (engine := p.engine) is not None:
            lines.append(
                f"llama.cpp    KL {engine.evaluated.kl:.2g} nats, the same likeliest token for "
                f"{engine.evaluated.agreement:.2%}; perplexity {engine.ppl:.4f}"
            )
        elif done.not_compared:
            lines.append(f"not tried    {done.not_compared}")
    lines += [f"note         {note}" for note in done.notes]
    if done.bits > done.honest_bits * 1.1:
        lines.append("smaller      dtype=bfloat16 stores scales and what is not quantized in 16 bits")
    if asked.record is not None:
        where = f" gguf={done.folder / 'model.gguf'}" if (done.folder / "model.gguf").is_file() else ""
        lines.append(f"next         qbench bench {asked.job.fingerprint[:8]}{where}")
    return [*lines, f"intact?      qbench export verify {done.folder}"]


def _say(out: Any, line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)
