"""The config of one job, checked: from plain values to the objects of the house."""

from pathlib import Path
from typing import Any, Literal

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import BaseModel, ConfigDict, ValidationError

from qbench.algorithms.base import Algorithm
from qbench.algorithms.fp import FloatingPoint
from qbench.data.tokens import CalibrationSet
from qbench.engine import needs_data
from qbench.evaluate.plan import EvalPlan
from qbench.job import Job
from qbench.models.load import ModelRef
from qbench.quant.scheme import Scheme


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSettings(_Strict):
    id: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


class CalibSettings(_Strict):
    name: str
    n_samples: int
    seq_len: int
    propagate_error: bool = True


class EvalSettings(_Strict):
    ppl: list[str] = []
    tasks: list[str] = []
    seq_len: int = 2048
    max_windows: int | None = None
    limit: int | None = None
    batch_size: int = 4
    task_batch_size: int = 32


class DataSettings(_Strict):
    root: Path | None = None


class TrackerSettings(_Strict):
    uri: str | None = None
    experiment: str = "qbench"


class Settings(_Strict):
    """Every key of `conf/config.yaml`.

    Attributes:
        force: Run jobs again that have a record.
        baseline: Let a sweep also run the floating-point model that its jobs are compared with.
    """

    algo: dict[str, Any]
    algo_name: str
    model: ModelSettings
    calib: CalibSettings
    eval: EvalSettings
    data: DataSettings
    tracker: TrackerSettings
    wbits: int
    abits: int
    kvbits: int
    group_size: int | None
    weight_symmetric: bool
    act_symmetric: bool
    act_granularity: Literal["token", "tensor"]
    seed: int
    device: str
    results: Path
    force: bool
    baseline: bool

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Settings":
        """Check a composed config.

        Raises:
            ValueError: With one line that names the key and what it should be.
        """
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            problem = first["msg"][0].lower() + first["msg"][1:]
            raise ValueError(f"{key}={first['input']!r}: {problem}") from error

    def scheme(self) -> Scheme:
        return Scheme.of(
            self.wbits, self.abits, self.kvbits, self.group_size,
            weight_symmetric=self.weight_symmetric, act_symmetric=self.act_symmetric,
            act_granularity=self.act_granularity,
        )  # fmt: skip

    def job(self) -> Job:
        """Build the job.

        Raises:
            ValueError: If a value is out of range or does not go with another.
        """
        algorithm = build_algorithm(self.algo_name, self.algo)
        scheme = Scheme() if isinstance(algorithm, FloatingPoint) else self.scheme()
        calib = None
        if needs_data(algorithm, scheme):
            calib = CalibrationSet(**self.calib.model_dump(), seed=self.seed)
        evaluation = self.eval.model_dump() | {"ppl": tuple(self.eval.ppl), "tasks": tuple(self.eval.tasks)}
        if scheme.is_float and not isinstance(algorithm, FloatingPoint):
            raise ValueError(
                f"algo={self.algo_name} has nothing to quantize at w16a16; set wbits, abits or kvbits"
            )
        return Job(
            self._model(), self.algo_name, algorithm, scheme, calib, EvalPlan(**evaluation),
            self.device, self.data.root, self.model_dump(mode="json"),
        )  # fmt: skip

    def floating_point(self) -> Job:
        """The job of the unquantized model with the same evaluation."""
        algo = {"_target_": f"{FloatingPoint.__module__}.{FloatingPoint.__name__}"}
        return self.model_copy(update={"algo_name": "fp", "algo": algo}).job()

    def _model(self) -> ModelRef:
        model = self.model.model_dump()
        if (
            model["dtype"] == "auto"
        ):  # CPUs are exact and no slower in float32; accelerators want half precision
            model["dtype"] = "float32" if self.device == "cpu" else "bfloat16"
        return ModelRef(**model)


def build_algorithm(name: str, config: dict[str, Any]) -> Algorithm:
    """Instantiate an algorithm's config.

    Raises:
        ValueError: If a hyperparameter is unknown or refused.
    """
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        kind = (
            "a hyperparameter has a value of the wrong type: "
            if "not supported between" in str(cause)
            else ""
        )
        raise ValueError(f"algo={name}: {kind}{' '.join(str(cause).split())}") from error
