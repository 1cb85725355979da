"""What a table or a figure is to show, as studies state it; light, since the command line reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args

TableKind = Literal["results", "retention", "wins", "spearman", "pearson", "variance", "parts", "matrix"]
FigureKind = Literal["pareto", "storage", "radar", "matrix", "curves", "wins", "spearman"]
Where = Mapping[str, tuple[str, ...]]


_ALL_READ = frozenset(("title", "kind", "metrics", "where"))
_ROWS = frozenset(("rows", "columns", "published"))


def _many(value: Any) -> tuple[str, ...]:
    return tuple(str(one) for one in (value if isinstance(value, list) else [value]))


class _FromYaml:
    """Reads the fields of a dataclass from a mapping; a single value stands for a list of one.

    Attributes:
        reads: By kind: what is read beside the title, the kind and the metrics and records that are chosen.
    """

    kind: str
    reads: ClassVar[Mapping[str, frozenset[str]]]

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Self:
        """Read what a study states.

        Raises:
            ValueError: If it has a key or a kind that there is not, a key that its kind does not read, or no value for it.
        """
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        if unknown := set(about) - set(known):
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; there are {', '.join(known)}")
        if empty := [key for key, value in about.items() if value is None]:
            raise ValueError(f"{', '.join(empty)} has no value; give one, [] for none, or leave the key out")
        values: dict[str, Any] = {}
        for key, value in about.items():
            if key == "where":
                values[key] = {name: _many(one) for name, one in value.items()}
            else:
                values[key] = _many(value) if str(known[key].type).startswith("tuple") else value
        spec = cls(**values)
        kind = spec.kind
        if useless := [key for key in about if key not in {*_ALL_READ, *cls.reads[kind]}]:
            raise ValueError(
                f"{', '.join(useless)} is nothing that kind {kind} reads; it reads "
                f"{', '.join(key for key in known if key in {*_ALL_READ, *cls.reads[kind]})}"
            )
        return spec


@dataclass(frozen=True)
class TableSpec(_FromYaml):
    """One table of a study.

    Attributes:
        kind: `results`: metrics of recipes. `retention`: the share of accuracy above chance that is kept. `wins`: how
            often one beats another. `spearman`: how alike two metrics rank recipes. `pearson`: perplexity against tasks.
            `variance`: what makes results differ. `parts`: a task by lengths and positions. `matrix`: calibration sets
            by evaluation texts.
        rows, columns: Labels (`model`, `algo`, `scheme`, `wbits`, `calib`, ...) or keys of the config (`calib.n_samples`)
            down, and across beside the metric. Seeds are draws of one row unless `seed` is among them.
        metrics: Patterns of metrics' names without protocol, as in `ppl/*`.
        where: Patterns that a record's label or key must match, any of each. The floating-point model always belongs.
        within: Rows alike in these are compared with one another: the best of them is marked, and what ties with it.
        published: The published table, as `<source> :: <table>`.
        factor: Of `wins`: the label whose values are compared.
    """

    title: str
    kind: TableKind = "results"
    rows: tuple[str, ...] = ("model", "scheme", "algo")
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("ppl/*", "acc/*")
    where: Where = field(default_factory=dict)
    within: tuple[str, ...] = ("model", "scheme")
    published: tuple[str, ...] = ()
    factor: str = "algo"
    reads: ClassVar[Mapping[str, frozenset[str]]] = {
        "results": _ROWS | {"within"}, "retention": _ROWS, "wins": _ROWS | {"factor"}, "spearman": _ROWS - {"columns"},
        "pearson": _ROWS - {"columns"}, "variance": frozenset(("published",)), "parts": frozenset(), "matrix": frozenset(),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.kind not in get_args(TableKind):
            raise ValueError(f"kind {self.kind} is unknown; there are {', '.join(get_args(TableKind))}")

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels and keys that it names and reads."""
        read = self.reads[self.kind]
        named = {"rows": self.rows, "columns": self.columns, "within": self.within, "factor": (self.factor,)}
        return (*self.where, *(key for name, keys in named.items() if name in read for key in keys))


@dataclass(frozen=True)
class FigureSpec(_FromYaml):
    """One figure of a study.

    Attributes:
        kind: `pareto`: a metric against a cost. `storage`: models of several sizes at several bits. `radar`: retention.
            `matrix`: calibration sets by evaluation texts. `curves`: a metric against bits. `wins`, `spearman`: those
            tables.
        x: The cost that a front or a curve is drawn against, a metric (`model_mb`, `calib_time_s`) or
            `<phase>_ms@<device>`, which is the roofline's (`decode_ms@h100`). Where it is not said: `model_mb` of a front,
            `bits_per_linear_weight` of a curve.
        metrics, where, factor: As of a table. A figure is drawn for each metric.
    """

    title: str
    kind: FigureKind
    x: str = ""
    metrics: tuple[str, ...] = ("ppl/*", "acc/*")
    where: Where = field(default_factory=dict)
    factor: str = "algo"
    reads: ClassVar[Mapping[str, frozenset[str]]] = {
        "pareto": frozenset(("x",)), "storage": frozenset(), "radar": frozenset(), "matrix": frozenset(),
        "curves": frozenset(("x",)), "wins": frozenset(("factor",)), "spearman": frozenset(),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.kind not in get_args(FigureKind):
            raise ValueError(f"kind {self.kind} is unknown; there are {', '.join(get_args(FigureKind))}")

    @property
    def cost(self) -> str:
        return self.x or ("bits_per_linear_weight" if self.kind == "curves" else "model_mb")

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels and keys that it names and reads."""
        return (*self.where, *((self.factor,) if self.kind == "wins" else ()))
