"""What the floating-point model says, once for each model, text or task, and protocol, for all jobs that compare.

    results/baselines/<key>.json, <key>.safetensors

Predictions are not kept, which would take a vocabulary for every token: the output of the last block is, from which the
rest of the model makes them again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.evaluate.dispatch import undispatch
from qbench.evaluate.logits import Tail
from qbench.evaluate.result import NOTHING, Evaluation, mean

_KEPT_UP_TO = 2 << 30  # bytes in memory; what is more is read again


@dataclass(frozen=True)
class Baseline:
    """Of one text or task.

    Attributes:
        hidden: What the last block put out, `(n_windows, seq_len, hidden)`; `None` for a task.
        seconds: That it took.
    """

    evaluation: Evaluation
    hidden: Tensor | None = None
    seconds: float = 0.0

    @property
    def n_bytes(self) -> int:
        return 0 if self.hidden is None else self.hidden.numel() * self.hidden.element_size()


@dataclass
class Baselines:
    """Those of one results folder; the ones that were asked for last are kept in memory too.

    Attributes:
        folder: Where they are kept; `None` keeps them in memory alone.
        made: Those that this process had to compute.
    """

    folder: Path | None = None
    made: int = 0
    _kept: dict[str, Baseline] = field(default_factory=dict)

    def get(self, identity: Mapping[str, Any], make: Callable[[], Baseline]) -> Baseline:
        """The baseline of this identity; whoever comes first makes it, and others wait for it."""
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if key not in self._kept:
            self._kept[key] = self._shared(key, make) if self.folder else self._made(make)
            while len(self._kept) > 1 and sum(kept.n_bytes for kept in self._kept.values()) > _KEPT_UP_TO:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def _shared(self, key: str, make: Callable[[], Baseline]) -> Baseline:
        from filelock import FileLock

        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{key}.lock"):  # it goes with its process, should that be killed
            if (found := self._read(key)) is None:
                found = self._made(make)
                self._write(key, found)
        return found

    def _made(self, make: Callable[[], Baseline]) -> Baseline:
        self.made += 1
        clock = time.perf_counter()
        found = make()
        return Baseline(found.evaluation, found.hidden, time.perf_counter() - clock)

    def _read(self, key: str) -> Baseline | None:
        from safetensors.torch import load_file

        assert self.folder is not None
        about, tensors = self.folder / f"{key}.json", self.folder / f"{key}.safetensors"
        if not about.is_file():
            return None
        kept = json.loads(about.read_text())
        if kept["hidden"] and not tensors.is_file():  # somebody made room
            return None
        hidden = load_file(tensors)["hidden"] if kept["hidden"] else None
        return Baseline(Evaluation(kept["metrics"], kept["samples"]), hidden, kept["seconds"])

    def _write(self, key: str, found: Baseline) -> None:
        from safetensors.torch import save_file

        assert self.folder is not None
        if found.hidden is not None:
            draft = self.folder / f".{key}.{os.getpid()}.safetensors"
            save_file({"hidden": found.hidden.contiguous()}, draft)
            draft.replace(self.folder / f"{key}.safetensors")
        about = {
            "metrics": found.evaluation.metrics, "samples": found.evaluation.samples,
            "hidden": found.hidden is not None, "seconds": found.seconds,
        }  # fmt: skip
        draft = self.folder / f".{key}.{os.getpid()}.json"
        draft.write_text(json.dumps(about))
        draft.replace(self.folder / f"{key}.json")  # last: who finds it finds all


@dataclass(frozen=True)
class Reference:
    """What a quantized model is compared with: the baselines, and the floating-point model's way from hidden states to
    logits.
    """

    baselines: Mapping[str, Baseline]
    tail: Tail | None = None

    def logits(self, name: str) -> Callable[[slice, Tensor], Tensor]:
        """The floating-point model's logits of a batch of windows of `name`."""
        hidden, tail = self.baselines[name].hidden, self.tail
        assert hidden is not None, f"{name} has no windows"
        assert tail is not None, "windows are compared through the rest of the model"

        def of(part: slice, ids: Tensor) -> Tensor:
            return tail.to(ids.device)(ids, hidden[part].to(ids.device))

        return of


def flips(evaluation: Evaluation, baseline: Evaluation) -> Evaluation:
    """Which answers became wrong or right: `flips/<task>`, of which `right_to_wrong` and `wrong_to_right`.

    They are of each task's first metric that is 0 or 1 for each document; none where there is no such.
    """
    result, counted = NOTHING, set[str]()
    for metric in dict.fromkeys(s["metric"] for s in evaluation.samples):
        task = metric.partition("/")[2]
        now, before = (
            {s["item"]: s["value"] for s in side.samples if s["metric"] == metric}
            for side in (evaluation, baseline)
        )
        if task in counted or not {*now.values(), *before.values()} <= {0.0, 1.0}:
            continue
        assert now.keys() == before.keys(), f"{metric}: the floating-point model was asked other documents"
        counted.add(task)
        for kind, changes in (
            ("flips", (1.0, -1.0)),
            ("right_to_wrong", (-1.0,)),
            ("wrong_to_right", (1.0,)),
        ):
            rows = [{"item": i, "value": float(now[i] - before[i] in changes)} for i in now]
            found = mean(f"{kind}/{task}", rows)
            result += Evaluation(found.metrics, found.samples if kind == "flips" else [])
    return result


def tail_of(model: Any) -> Tail:
    """The floating-point model's, with weights of its own, since quantizing edits the model in place; on the CPU."""
    with torch.no_grad():
        tail = Tail(model, share=False)
        undispatch(tail.model)
        return tail.to(torch.device("cpu"))
