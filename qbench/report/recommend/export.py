"""A recommendation as a file: the recipe in full, the command that quantizes with it, and all that it rests on."""

import json
from pathlib import Path
from typing import Any

from qbench.report.recommend.candidates import Candidate
from qbench.report.recommend.decision import QUANTITIES, Decision, Limits
from qbench.report.recommend.halving import Settled
from qbench.report.recommend.telling import why_dropped


def write(settled: Settled, limits: Limits, folder: Path, model: str, command: str | None) -> Path:
    """Write `recommendation-<model>.json` into `folder`.

    Args:
        command: That quantizes with the recipe; `None` where none was found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"recommendation-{model}.json"
    text = json.dumps(content(settled, limits, command), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def content(settled: Settled, limits: Limits, command: str | None) -> dict[str, Any]:
    found, decision = settled.found, settled.decision
    record = decision.chosen.record
    return {
        "model": record["identity"]["model"],
        "limits": {quantity: limits.of(quantity) for quantity in QUANTITIES},
        "prefer": decision.preference,
        "meets_limits": decision.meets,
        "binding": [
            {"limit": b.quantity, "allowed": b.most, "needed": b.needed} for b in decision.binding
        ],
        "recipe": {key: record["labels"][key] for key in ("algo", "scheme", "calib", "seed")},
        "command": command,
        "fingerprint": record["fingerprint"],
        "confidence": decision.share,
        "within_ppl_limit": decision.surely_meets,
        "judged_on": {"metrics": found.metrics, "protocol": found.protocol, "windows": found.n_windows},
        "algorithm": record["identity"]["algorithm"],
        "scheme": record["identity"]["scheme"],
        "calibration": _calibration(record),
        "evaluation": record["identity"]["evaluation"],
        "metrics": _metrics(record["metrics"]),
        "versions": record["environment"]["versions"],
        "git_commit": record["environment"].get("git_commit"),
        "device": record.get("device"),
        **_numbers(decision.chosen),
        "ppl_increase_95": decision.increase,
        "runner_up": decision.runner_up.title if decision.runner_up else None,
        "candidates": _candidates(decision),
        "dropped": [
            _about(one.candidate) | {"windows": one.n_windows, "why_not": why_dropped(one)}
            for one in settled.dropped
        ],
        "left_out": settled.left_out,
    }  # fmt: skip


def _calibration(record: dict[str, Any]) -> dict[str, Any] | None:
    """The set, and the digest of the tokens that were drawn from it."""
    if (calib := record["identity"]["calib"]) is None:
        return None
    drawn = {
        key.partition("/")[2]: about
        for key, about in record.get("data", {}).items()
        if key.startswith("calib/")
    }
    return calib | {"drawn": drawn}


def _metrics(metrics: dict[str, float]) -> dict[str, Any]:
    """Value and standard error, which is null where there is none."""
    return {
        name: {"value": value, "stderr": metrics.get(f"{name}_stderr")}
        for name, value in metrics.items()
        if not name.endswith("_stderr")
    }


def _candidates(decision: Decision) -> list[dict[str, Any]]:
    reasons = {id(candidate): reason for candidate, reason in decision.reasons}
    shares = dict(zip(map(id, decision.candidates), decision.shares, strict=True))
    return [_about(c) | {"chosen": shares[id(c)], "why_not": reasons.get(id(c))} for c in decision.order]


def _about(candidate: Candidate) -> dict[str, Any]:
    fingerprints = [record["fingerprint"] for record in candidate.records]
    return {"recipe": candidate.title, **_numbers(candidate), "records": fingerprints}


def _numbers(candidate: Candidate) -> dict[str, Any]:
    return {"bytes": candidate.bytes, "seconds": candidate.seconds, "ppl_increase": candidate.increase}
