"""A model under an evaluation plan."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qbench.data.corpora import load_text, short
from qbench.data.library import Library
from qbench.data.windows import Windows, evaluation_windows
from qbench.evaluate import harness, stock
from qbench.evaluate.baseline import Baseline, Baselines, Reference, flips, tail_of
from qbench.evaluate.decoding import decoded
from qbench.evaluate.harness import Ask, Harness
from qbench.evaluate.logits import (
    Batch,
    block_by_block,
    from_hidden,
    hopping,
    last_hidden,
    noted_hidden,
    whole,
)
from qbench.evaluate.perplexity import against_itself, perplexity, window_losses
from qbench.evaluate.plan import EvalPlan
from qbench.evaluate.result import NOTHING, Evaluation


@dataclass(frozen=True)
class Evaluator:
    """Runs a plan on a model.

    Attributes:
        device: Where the model works; it is there, unless it is
        streamed: kept on the CPU, and one block at a time goes to the device.
        folder: Where it may leave what it generates; `None` for nowhere.
    """

    plan: EvalPlan
    model: Any
    tokenizer: Any
    library: Library = field(default_factory=Library)
    device: str = "cpu"
    streamed: bool = False
    folder: Path | None = None

    def reference(self, identity: Mapping[str, Any], baselines: Baselines) -> Reference | None:
        """What the untouched model says, for `run`; `None` where nothing is compared.

        Args:
            identity: Of the model.
        """
        plan = self.plan
        if not plan.against_fp:
            return None
        found = {}
        versions = {name: version(name) for name in ("torch", "transformers", "lm_eval")}
        common = {"model": identity, "device": torch.device(self.device).type, "versions": versions}
        for name in plan.ppl:
            about = common | {
                "text": name, "sha256": load_text(name, plan.split, self.library).sha256,
                "seq_len": plan.seq_len, "stride": plan.stride, "max_windows": plan.max_windows,
            }  # fmt: skip
            found[short(name)] = baselines.get(about, partial(self._text_baseline, name))
        for name in plan.tasks:
            about = common | {
                "task": name, "ours": stock.REVISION, "limit": plan.limit, "shots": repr(plan.shots),
                "data": harness.origin(name, self.library, plan.shots),
            }  # fmt: skip
            found[name] = baselines.get(about, partial(self._task_baseline, name))
        return Reference(found, tail_of(self.model) if plan.ppl else None)

    def _text_baseline(self, name: str) -> Baseline:
        windows, size = self._windows(name), self.plan.batch_size
        if self.streamed:
            hidden = last_hidden(self.model, windows.tokens, size, torch.device(self.device))
            batches = from_hidden(self.model, hidden, windows.tokens, size, self.device)
            return Baseline(perplexity(short(name), window_losses(batches, windows), windows), hidden)
        with noted_hidden(self.model) as noted:
            losses = window_losses(whole(self.model, windows.tokens, size), windows)
        return Baseline(perplexity(short(name), losses, windows), torch.cat(noted))

    def _task_baseline(self, name: str) -> Baseline:
        with self._working():
            return Baseline(self._harness().accuracy(name, self.library, self._ask))

    def run(self, reference: Reference | None = None) -> Evaluation:
        """Evaluate the model.

        Raises:
            ValueError: If predictions are compared and there is no `reference`.
        """
        if self.plan.against_fp and reference is None:
            raise ValueError(
                "eval.against_fp needs the floating-point model's side; pass Evaluator.reference's"
            )
        result = NOTHING
        for name in self.plan.ppl:
            windows = self._windows(name)
            other = reference.logits(short(name)) if reference else None
            losses = window_losses(self._logits(windows), windows, other)
            result += perplexity(short(name), losses, windows)
        with self._working():
            asked = self._harness() if self.plan.tasks else None
            for name in self.plan.tasks:
                assert asked is not None, "there are tasks"
                found = asked.accuracy(name, self.library, self._ask)
                result += found
                if reference:
                    result += flips(found, reference.baselines[name].evaluation)
            return harness.drops(result) + self._rest()

    def run_float(self, reference: Reference) -> tuple[Evaluation, float]:
        """The floating-point model's own evaluation, from its baselines, and the seconds that they took."""
        result, seconds = NOTHING, 0.0
        for name, baseline in reference.baselines.items():
            found = baseline.evaluation
            result += found
            result += flips(found, found) if baseline.hidden is None else against_itself(name, found)
            seconds += baseline.seconds
        with self._working():
            return harness.drops(result) + self._rest(), seconds

    def _rest(self) -> Evaluation:
        """What is not compared with the floating-point model."""
        plan, result = self.plan, NOTHING
        for name in plan.decode_ppl:
            text = load_text(name, plan.split, self.library)
            windows = evaluation_windows(text, self.tokenizer, plan.seq_len, plan.decode_windows)
            losses = window_losses(decoded(self.model, windows.tokens, plan.batch_size), windows)
            result += perplexity(short(name), losses, windows, "decode_ppl")
        if plan.talk is not None:
            result += plan.talk.run(self.model, self.tokenizer, self.library, self.folder)
        return result

    def _logits(self, windows: Windows) -> Iterator[Batch]:
        if self.streamed:
            return block_by_block(self.model, windows.tokens, self.plan.batch_size, self.device)
        return whole(self.model, windows.tokens, self.plan.batch_size)

    def _working(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts the model can be called as it is."""
        return hopping(self.model, self.device) if self.streamed else contextlib.nullcontext()

    def _windows(self, name: str) -> Windows:
        return self.plan.windows(name, self.tokenizer, self.library)

    def _harness(self) -> Harness:
        return Harness(self.model, self.tokenizer, self.plan.task_batch_size)

    @property
    def _ask(self) -> Ask:
        return Ask(self.plan.limit, self.plan.shots, self.plan.unsafe)
