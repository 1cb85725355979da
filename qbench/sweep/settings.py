"""The config of one job, checked: from plain values to the objects of the house."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import ValidationError

from qbench.algorithms.base import Algorithm
from qbench.algorithms.fp import FloatingPoint
from qbench.data.calibration import CalibrationSet
from qbench.data.library import Library
from qbench.engine import needs_data
from qbench.errors import Unsuitable
from qbench.evaluate.judge import Judge
from qbench.evaluate.plan import EvalPlan
from qbench.evaluate.stock import Shots
from qbench.evaluate.talk import Talk
from qbench.job import Job
from qbench.models.load import ModelRef, fastest_dtype
from qbench.quant.scheme import Scheme
from qbench.sweep.schema import (
    CalibSettings,
    DataSettings,
    EvalSettings,
    JobSettings,
    JudgeSettings,
    LauncherSettings,
    ModelSettings,
    Plain,
    SchemeSettings,
    Settings,
    Strict,
    TrackerSettings,
)
from qbench.sweep.steps import in_full, title

_SCHEME_KEYS = [name for name in signature(Scheme.of).parameters if name in Plain.model_fields]


def _scheme(asked: Plain, layers: "SchemeSettings") -> Scheme:
    """The scheme that the keys describe together.

    Raises:
        Unsuitable, ValueError: If they contradict each other.
    """
    return Scheme.of(**{name: getattr(asked, name) for name in _SCHEME_KEYS}, overrides=layers.overrides)


@dataclass
class Jobs:
    """Builds the jobs of many configs; what configs share (the same object, from one composer) is built once."""

    _parts: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)
    _plain: dict[tuple[Any, ...], Plain] = field(default_factory=dict)
    _schemes: dict[Plain, Scheme] = field(default_factory=dict)

    def settings(self, config: dict[str, Any]) -> Settings:
        """Check a composed config.

        Raises:
            ValueError: With one line that names the key and what it should be.
        """
        return _read(
            Settings, "", config | {name: self._section(name, config) for name in _SECTIONS if name in config}
        )

    def job(self, config: dict[str, Any]) -> Job:
        """Build the job of a config.

        Raises:
            Unsuitable: If valid choices do not go together.
            ValueError: If a value is out of range, or a key unknown.
        """
        asked = self._checked_plain(config)
        model, calib, evaluation, judge, data = (
            self._section(name, config) for name in ("model", "calib", "eval", "judge", "data")
        )
        name = title(asked.algo_name, config["algo"])
        algorithm = self._once("algorithm", config["algo"], partial(build_algorithm, name))
        is_float = isinstance(algorithm, FloatingPoint)
        if algorithm.kind != "round":
            raise Unsuitable(f"algo={name} rounds nothing", "end it with a rounder, such as algo.round=rtn")
        scheme = Scheme() if is_float else self._scheme(asked, config["scheme"])
        if scheme.is_float and not is_float:
            raise Unsuitable(f"algo={name} has nothing to quantize at w16a16", "set wbits, abits or kvbits")
        tokens = None
        if needs_data(algorithm, scheme):
            tokens = self._once(f"seed {asked.seed}", calib, partial(calibration, seed=asked.seed))
        return Job(
            self._once(asked.device, model, partial(_model, device=asked.device)), name, algorithm, scheme,
            tokens, self._evaluations(evaluation, judge, data.library), asked.device, data.library, config,
        )  # fmt: skip

    def _checked_plain(self, config: dict[str, Any]) -> Plain:
        try:
            key = tuple([config[name] for name in Plain.model_fields])
            if (known := self._plain.get(key)) is not None:
                return known
        except (
            KeyError,
            TypeError,
        ):  # a key is missing, or has a value of the wrong kind: let the check say so
            key = ()
        self.settings(config)  # a section that no job reads, or a key that nobody knows, is refused as well
        found = self._plain[key] = _read(
            Plain, "", {k: v for k, v in config.items() if k in Plain.model_fields}
        )
        return found

    def _scheme(self, asked: Plain, section: Any) -> Scheme:
        layers = self._section("scheme", {"scheme": section})
        if layers.overrides:
            return _scheme(asked, layers)
        if asked not in self._schemes:
            self._schemes[asked] = _scheme(asked, layers)
        return self._schemes[asked]

    def _evaluations(self, asked: EvalSettings, judge: JudgeSettings, library: Library) -> EvalPlan:
        # The sections are kept by _once, so that their ids stay their own.
        name = f"evaluation {id(judge)} {library}"
        return self._once(name, asked, lambda _: _evaluation(asked, judge, library))

    def _section(self, name: str, config: dict[str, Any]) -> Any:
        return self._once(name, config[name], _SECTIONS[name])

    def _once(self, name: str, part: Any, build: Callable[[Any], Any]) -> Any:
        key = (name, id(part))
        if (known := self._parts.get(key)) is None:
            known = self._parts[key] = part, build(part)  # the part is kept, so that its id stays its own
        return known[1]


def floating_point(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the unquantized model with the same evaluation."""
    return config | {"algo_name": "fp", "algo": _FLOATING_POINT}


_FLOATING_POINT = {"_target_": f"{FloatingPoint.__module__}.{FloatingPoint.__name__}"}

Read = TypeVar("Read", bound=Strict)


def _read(kind: type[Read], name: str, config: dict[str, Any]) -> Read:
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]) if part != "")
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"{key}={first['input']!r}: {problem}") from error


_SECTIONS: dict[str, Callable[[Any], Strict]] = {
    name: partial(_read, kind, name)
    for name, kind in (
        ("model", ModelSettings), ("calib", CalibSettings), ("eval", EvalSettings), ("judge", JudgeSettings),
        ("data", DataSettings),
        ("scheme", SchemeSettings),
        ("tracker", TrackerSettings), ("launcher", LauncherSettings), ("job", JobSettings),
    )
}  # fmt: skip


def _model(asked: ModelSettings, device: str) -> ModelRef:
    model = asked.model_dump()
    if model["dtype"] == "auto":  # CPUs are exact and no slower in float32; accelerators want half precision
        model["dtype"] = "float32" if device == "cpu" else "bfloat16"
    if model["dtype"] == "fastest":
        model["dtype"] = fastest_dtype() if device == "cpu" else "bfloat16"
    if model["dtype"] == "checkpoint":
        model["dtype"] = ModelRef(**model | {"dtype": "float32"}).stored_dtype
    return ModelRef(**model)


def calibration(asked: CalibSettings, seed: int) -> CalibrationSet:
    """The calibration set of a section."""
    return CalibrationSet(**asked.model_dump() | {"mix": tuple((asked.mix or {}).items())}, seed=seed)


def _evaluation(asked: EvalSettings, judge: JudgeSettings, library: Library) -> EvalPlan:
    plain = asked.model_dump(include={
        "ppl", "tasks", "seq_len", "max_windows", "stride", "limit", "batch_size", "task_batch_size", "against_fp", "split",
        "decode_ppl", "decode_windows", "streamed", "device_map",
    })  # fmt: skip
    plan = EvalPlan(
        **plain, shots=Shots(tuple((asked.shots or {}).items()), asked.shots_split),
        talk=_talk(asked, judge), unsafe=asked.allow_code_execution,
    )  # fmt: skip
    return plan.resolved(library, skip=asked.skip_missing)


def _talk(asked: EvalSettings, judge: JudgeSettings) -> Talk | None:
    if not asked.dialogue:
        return None
    if (judge.base_url is None) != (judge.model is None):
        raise ValueError("a judge needs both judge.base_url and judge.model")
    by = Judge(judge.base_url, judge.model, judge.timeout) if judge.base_url and judge.model else None
    return Talk(asked.dialogue, asked.max_new_tokens, asked.limit, asked.plain_dialogue, by)


def build_algorithm(name: str, config: dict[str, Any]) -> Algorithm:
    """Instantiate an algorithm's config.

    Raises:
        ValueError: If a hyperparameter is unknown or refused.
    """
    try:
        return instantiate(in_full(config), _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, Unsuitable):
            raise cause from error
        kind = (
            "a hyperparameter has a value of the wrong type: "
            if "not supported between" in str(cause)
            else ""
        )
        raise ValueError(f"algo={name}: {kind}{' '.join(str(cause).split())}") from error
