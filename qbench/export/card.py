"""The model card of an export: recipe, calibration, metrics with errors, parity, versions, how to make it again."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qbench.deploy.formats.format import Format
from qbench.job import Job
from qbench.run import environment

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
        "## To make it again",
        f"```bash\n{_command(record)}\nqbench export {fingerprint} --to {made.name}\n```",
        _versions(record),
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
        f"* Tensors take {done.bytes / 1e6:,.2f} MB; {done.expected_bytes / 1e6:,.2f} MB were expected of the recipe's bits."
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


def _command(record: Mapping[str, Any] | None) -> str:
    return (
        str(record["environment"].get("command", ""))
        if record
        else "# no record: the export itself quantizes"
    )


def _versions(record: Mapping[str, Any] | None) -> str:
    found = record["environment"] if record else environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    commit = f"; qbench at {found['git_commit']}" if found.get("git_commit") else ""
    return f"Versions: {versions}{commit}."


def _table(rows: Iterable[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
