"""The model card of an export: recipe, calibration, metrics with errors, parity, versions, how to make it again."""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qbench.deploy.formats.format import Format
from qbench.job import Job
from qbench.run import command, environment

if TYPE_CHECKING:
    from qbench.export.run import Export

_FIRST = ("ppl/", "bpb/", "kl/", "agreement/", "acc/", "bits_per_weight", "bits_per_linear_weight")


def card(job: Job, record: Mapping[str, Any] | None, made: Format, done: "Export") -> str:
    """The text of `README.md`, with the hub's header."""
    fingerprint = job.fingerprint
    parts = [
        _header(job),
        f"# {job.model.name}, {job.algo}, {job.scheme.label}",
        f"Quantized and compared by qbench; written as {made.title}. Fingerprint of the recipe: `{fingerprint}`.",
        "## Recipe",
        _table([("model", f"{job.model.id}{f' @ {job.model.revision}' if job.model.revision else ''}"),
                ("algorithm", f"`{json.dumps(job.algorithm.identity(), sort_keys=True, default=str)}`"),
                ("scheme", f"`{job.scheme}`"), ("calibration", _calibration(job)),
                ("dtype of what is not quantized", str(made.source.dtype).removeprefix("torch."))]),
        "## What was measured",
        _metrics(record) if record else "There is no record of this recipe: it was quantized for this export alone.",
        "## This checkpoint",
        _this(done),
        *(f"* {note}" for note in done.notes),
        "## To load it",
        made.loading,
        "## To make it again",
        f"```bash\n{_commands(job, record, made)}\n```",
        _versions(record),
        *([f"Packed with {', '.join(f'{name} {version(name)}' for name in made.packages)}."] if made.packages else []),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _header(job: Job) -> str:
    base = [] if job.model.folder is not None else [f"base_model: {job.model.id}"]
    return "\n".join(["---", *base, "library_name: transformers", "tags:", "- quantized", "- qbench", "---"])


def _calibration(job: Job) -> str:
    if job.calib is None:
        return "none is needed"
    c = job.calib
    return f"{c.label}: {c.n_samples} samples of {c.seq_len} tokens, seed {c.seed}"


def _metrics(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    shown = [n for first in _FIRST for n in metrics if n.startswith(first) and not n.endswith("_stderr")]
    rows = []
    for name in shown:
        error = metrics.get(f"{name}_stderr")
        rows.append((name, f"{metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")))
    return _table(rows, ("metric", "value (± standard error)"))


def _this(done: "Export") -> str:
    lines = [
        f"* Tensors take {done.bytes / 1e6:,.2f} MB, {done.expected_bytes / 1e6:,.2f} MB without padding. "
        f"That is {done.bits:.3f} bits per weight; {done.honest_bits:.3f} with what is not quantized in 16 bits."
    ]
    if done.parity is None:
        return "\n".join([*lines, f"* Not compared with what was evaluated: {done.not_compared}."])
    p = done.parity
    e = p.evaluated
    lines.append(
        f"* Loaded again and compared with what was evaluated, on {p.n_windows} windows of {p.seq_len} tokens of {p.text}: "
        + (
            "logits are equal to the bit"
            if p.is_exact
            else f"logits differ by {e.largest:.3g} at most, {e.mean:.3g} in the mean; KL {e.kl:.3g} nats"
        )
        + f"; the same likeliest token for {e.agreement:.2%}; perplexity {p.ppl_loaded:.4f}, "
        f"evaluated {p.ppl_evaluated:.4f}."
    )
    if (engine := p.engine) is not None:
        lines.append(
            f"* In llama.cpp: KL {engine.evaluated.kl:.3g} nats, the same likeliest token for "
            f"{engine.evaluated.agreement:.2%}; perplexity {engine.ppl:.4f}."
        )
    elif done.not_compared:
        lines.append(f"* Not tried in the engine itself: {done.not_compared}.")
    return "\n".join(lines)


def _commands(job: Job, record: Mapping[str, Any] | None, made: Format) -> str:
    """Those that evaluate and export it; without a record, that of this export, which names its settings."""
    if record is None:
        return command()
    dtype = str(made.source.dtype).removeprefix("torch.")
    more = "" if dtype == job.model.dtype else f" dtype={dtype}"
    return f"{record['environment']['command']}\nqbench export {job.fingerprint} --to {made.name}{more}"


def _versions(record: Mapping[str, Any] | None) -> str:
    found = record["environment"] if record else environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    commit = f"; qbench at {found['git_commit']}" if found.get("git_commit") else ""
    return f"Versions: {versions}{commit}."


def _table(rows: Iterable[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
