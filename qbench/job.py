"""A job: what tells its numbers from another's, and whether it can run at all."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from typing import Any, ParamSpec

import torch

from qbench.algorithms.base import Algorithm
from qbench.data.calibration import CalibrationSet
from qbench.data.library import Library
from qbench.engine import REVISION as ENGINE
from qbench.errors import Unsuitable
from qbench.evaluate.plan import EvalPlan
from qbench.models.fit import check_fit
from qbench.models.load import ModelRef
from qbench.quant.scheme import Scheme

Check = ParamSpec("Check")


@dataclass(frozen=True)
class Job:
    """One cell of the grid: everything that can change a number, and where to run it.

    Attributes:
        algo: The algorithm's name on the command line, for tables.
        calib: `None` exactly where no calibration data is needed.
        settings: The config as plain values, for the record; not looked at.
    """

    model: ModelRef
    algo: str
    algorithm: Algorithm
    scheme: Scheme
    calib: CalibrationSet | None
    evaluation: EvalPlan
    device: str = "cpu"
    library: Library = field(default_factory=Library)
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    def identity(self) -> dict[str, Any]:
        """What tells this job's numbers from another's. Devices, paths, batch sizes and trackers do not count."""
        return {
            "model": self.model.identity(),
            "algorithm": self.algorithm.identity(),
            "scheme": str(self.scheme),
            "calib": self._with_files(self.calib) if self.calib else None,
            "evaluation": self._with_files(self.evaluation),
            "engine": ENGINE,
        }

    def _with_files(self, part: CalibrationSet | EvalPlan) -> dict[str, Any]:
        """A part's identity, with digests of what `data.files` puts in the place of data that it reads."""
        found = self.library.substitutes(part.needed()) if self.library.files else {}
        return part.identity() | ({"files": found} if found else {})

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of the identity; two jobs with one fingerprint are the same job."""
        # The canonical JSON of `identity()`, from the texts of its parts: a grid of many jobs has few parts.
        parts = {
            "model": canonical(self.model),
            "algorithm": canonical(self.algorithm),
            "scheme": json.dumps(str(self.scheme)),
            "calib": canonical(self.calib) if self.calib else "null",
            "evaluation": canonical(self.evaluation),
            "engine": str(ENGINE),
        }
        if self.library.files:
            parts["evaluation"] = canonical_json(self._with_files(self.evaluation))
            if self.calib:
                parts["calib"] = canonical_json(self._with_files(self.calib))
        text = "{" + ",".join(f'"{key}":{parts[key]}' for key in sorted(parts)) + "}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def labels(self) -> dict[str, Any]:
        """What tables group by."""
        w, a, kv = self.scheme.weight, self.scheme.activation, self.scheme.kv
        return {
            "model": self.model.name,
            "algo": self.algo,
            "scheme": self.scheme.label,
            "wbits": w.bits if w else 16,
            "abits": a.bits if a else 16,
            "kvbits": kv.bits if kv else 16,
            "group_size": w.group_size if w else None,
            "calib": self.calib.label if self.calib else None,
            "seed": self.calib.seed if self.calib else None,
        }

    @property
    def title(self) -> str:
        parts = (self.model.name, self.algo, self.scheme.label, self.calib.label if self.calib else "")
        return " ".join(part for part in parts if part)

    @property
    def needs_all(self) -> str:
        """Why all of the model has to be in memory; empty if it need not."""
        if self.algorithm.runs_model:
            return f"{self.algo} runs all of it to learn; set model.offload=memory"
        if self.calib is not None and self.calib.name == "self":
            return (
                "calib=self has all of it write the samples; choose another set, or set model.offload=memory"
            )
        return ""

    def check(self) -> None:
        """Refuse what cannot run, before weights are loaded.

        Raises:
            Unsuitable: If valid choices do not go together.
            ValueError, NotImplementedError, FileNotFoundError: Saying what was found and what to do.
        """
        self.algorithm.check(self.scheme)
        check_device(self.device)
        self.evaluation.check_device(self.device)
        if self.model.offload == "disk" and self.needs_all:
            raise Unsuitable("model.offload=disk has one block at a time in memory", self.needs_all)
        _check_fit(self.model, self.scheme)
        self.algorithm.check_model(skeleton(self.model))
        if (talk := self.evaluation.talk) is not None:
            _check_length(self.model, "eval.max_new_tokens", talk.max_new_tokens + 1)
        if self.evaluation.windows_are_read:
            _check_length(self.model, "eval.seq_len", self.evaluation.seq_len)
        _check_evaluation(self.model, self.evaluation, self.library)
        if self.calib is not None:
            _check_length(self.model, "calib.seq_len", self.calib.seq_len)
            _check_calibration(self.model, replace(self.calib, seed=0), self.library)


def canonical(part: Any) -> str:
    """The identity of a part of a job as canonical JSON."""
    try:
        return _cached_canonical(part)
    except TypeError:  # a hyperparameter that is a list cannot be hashed
        return _cached_canonical.__wrapped__(part)


@lru_cache(maxsize=1 << 16)
def _cached_canonical(part: Any) -> str:
    return canonical_json(part.identity())


def canonical_json(identity: dict[str, Any]) -> str:
    """The one text of an identity.

    Raises:
        ValueError: If a number in it is not finite.
    """
    try:
        return json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"a setting is not a finite number: {identity}") from error


# What jobs in one process share. Each is built once and never changed.
@cache
def skeleton(model: ModelRef) -> Any:
    return model.skeleton()


@cache
def tokenizer(model: ModelRef) -> Any:
    return model.tokenizer()


def _remembered(check: Callable[Check, None]) -> Callable[Check, None]:
    """A check that is made once for equal arguments, whether they pass or not: grids repeat them by the thousand."""

    @cache
    def outcome(*args: Any, **kwargs: Any) -> Exception | None:
        try:
            check(*args, **kwargs)
        except (ValueError, NotImplementedError, OSError) as error:
            return error.with_traceback(None)
        return None

    def again(*args: Check.args, **kwargs: Check.kwargs) -> None:
        if (error := outcome(*args, **kwargs)) is not None:  # type: ignore[arg-type]
            raise error.with_traceback(None)

    return again


@_remembered
def check_device(device: str) -> None:
    """Refuse a device that torch does not know or see.

    Raises:
        ValueError: Saying what there is.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device} is not a device of torch; use cpu, cuda or cuda:<number>"
        ) from error
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise ValueError(
            f"device={device} was asked for, this torch sees {count} CUDA devices; use device=cpu"
        )


@_remembered
def _check_fit(model: ModelRef, scheme: Scheme) -> None:
    check_fit(skeleton(model), scheme)


@_remembered
def _check_length(model: ModelRef, key: str, length: int) -> None:
    most = getattr(skeleton(model).config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise Unsuitable(f"{key} is {length}, {model.name} reads at most {most} tokens", f"lower {key}")


@_remembered
def _check_evaluation(model: ModelRef, evaluation: EvalPlan, library: Library) -> None:
    evaluation.check(tokenizer(model), library)


@_remembered
def _check_calibration(model: ModelRef, calib: CalibrationSet, library: Library) -> None:
    calib.check(tokenizer(model), library)
