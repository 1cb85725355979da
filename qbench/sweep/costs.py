"""How long jobs will take, from what recorded ones took."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qbench.job import Job, canonical, canonical_json, skeleton

Key = tuple[Any, ...]


@dataclass
class Costs:
    """Seconds per parameter (and calibration token) of every phase, in tiers from alike to roughly alike.

    A job's time is that of recorded jobs of the same model and settings where there are any, otherwise of other
    models scaled by their parameters, otherwise also by calibration tokens, otherwise of any algorithm.
    """

    _rates: dict[Key, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def learn(cls, records: Iterable[dict[str, Any]]) -> "Costs":
        costs = cls()
        for record in records:
            metrics, identity = record["metrics"], record["identity"]
            if record["status"] != "done" or not metrics.get("bits_per_weight"):
                continue
            parameters = metrics["model_mb"] * 8e6 / metrics["bits_per_weight"]
            tokens = _tokens(identity["calib"])
            where, evaluation = _kind(record["device"]), canonical_json(identity["evaluation"])
            model, algo = identity["model"]["id"], record["labels"]["algo"]
            costs._add(_eval_keys(where, model, evaluation), metrics["eval_time_s"] / parameters)
            costs._add(
                _calib_keys(where, model, algo, tokens),
                metrics["calib_time_s"] / (parameters * max(tokens, 1)),
            )
        return costs

    def seconds(self, job: Job, where: str) -> float | None:
        """The expected time of a job on the device called `where`; `None` if nothing like it was recorded."""
        parameters = sum(p.numel() for p in skeleton(job.model).parameters())
        tokens = _tokens(job.calib.identity() if job.calib else None)
        model, where = str(job.model.identity()["id"]), _kind(where)
        evaluation = self._find(_eval_keys(where, model, canonical(job.evaluation)))
        calib = self._find(_calib_keys(where, model, job.algo, tokens))
        if evaluation is None or calib is None:
            return None
        return parameters * (evaluation + calib * max(tokens, 1))

    def _add(self, keys: list[Key], rate: float) -> None:
        for key in keys:
            total, count = self._rates.get(key, (0.0, 0))
            self._rates[key] = total + rate, count + 1

    def _find(self, keys: list[Key]) -> float | None:
        for key in keys:
            if key in self._rates:
                total, count = self._rates[key]
                return total / count
        return None


def _eval_keys(where: str, model: str, evaluation: str) -> list[Key]:
    return [("eval", where, model, evaluation), ("eval", where, evaluation)]


def _calib_keys(where: str, model: str, algo: str, tokens: int) -> list[Key]:
    keys: list[Key] = [
        ("calib", where, model, algo, tokens),
        ("calib", where, algo, tokens),
        ("calib", where, algo, tokens > 0),
    ]
    return [*keys, ("calib", where, tokens > 0)]


def _kind(device: str) -> str:
    """`x86_64 CPU, 2 threads` -> `x86_64 CPU`: how many threads a worker gets is not known yet."""
    return device.partition(",")[0]


def _tokens(calib: dict[str, Any] | None) -> int:
    return calib["n_samples"] * calib["seq_len"] if calib else 0
