"""The grid of one tensor: its code words, and what shares a scale. No torch here: the planner has thousands."""

from dataclasses import dataclass
from typing import Literal

from qbench.errors import Unsuitable

Granularity = Literal["tensor", "row", "group", "block"]
Format = Literal["int", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4"]
ScaleFormat = Literal["float16", "e8m0", "e4m3"]
SymmetricMode = Literal["full", "restricted", "gptq"]
RangeChoice = Literal["minmax", "average", "percentile", "mse"]

FORMAT_BITS: dict[Format, int] = {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4, "nf4": 4}
SCALE_BITS: dict[ScaleFormat, int] = {"float16": 16, "e8m0": 8, "e4m3": 8}
ZERO_BITS = 16  # of a zero-point that is a real number


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one tensor.

    Attributes:
        bits: Width of a code: 1 to 8 for integers, that of the format otherwise.
        symmetric: Whether the zero-point is fixed. Floating-point formats and nf4 always are.
        granularity: What shares one scale: the whole `"tensor"`; one `"row"`, i.e. all elements along
            the last axis (per-channel for a weight, per-token for an activation); a `"group"` of
            `group_size` neighbours along the last axis; a `"block"` of `group_size` rows and columns.
        group_size: Elements per group; set exactly when `granularity` is `"group"` or `"block"`.
        format: `"int"`, a small floating-point format by its exponent and mantissa bits, or `"nf4"`.
        scale_format: How a scale is stored. `"e8m0"` are powers of two (MX formats). `"e4m3"` scales count in
            units of a second scale, in float32, of the whole tensor, or of the row where `outer_row` is set (NVFP4).
        outer_row: Whether that second scale belongs to a row: an activation's, which must not depend on its batch.
        symmetric_mode: Of symmetric integers. `"full"`: codes −2^(b−1) … 2^(b−1)−1 and scale max|x| / (2^(b−1)−1);
            `"restricted"` leaves out the lowest code; `"gptq"`: scale 2 max|x| / (2^b−1), zero-point 2^(b−1).
        real_zero: Keep the zero-point of an asymmetric grid as a real number (HQQ, SpQR).
        zero_in_range: Widen an asymmetric range to contain zero. Unset, ranges are as in LLMC and llm-awq, whose
            integer zero-points are clamped, so that ranges far from zero collapse: for parity. HQQ wants it unset
            with `real_zero`, which is never clamped.
        scale_bits: Width of scales (and zero-points) that are quantized in their turn, in runs of `scale_group`
            output rows; 16 leaves them as they are (SpQR: 3 and 16; QLoRA: 8 and 256).
        scale_group: See `scale_bits`.
        dynamic: Whether an activation's range is its own; otherwise it comes from calibration data.
        range: How a static range is chosen from calibration data.

    Raises:
        Unsuitable, ValueError: If the fields contradict each other or the width is not supported.
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = "row"
    group_size: int | None = None
    format: Format = "int"
    scale_format: ScaleFormat = "float16"
    outer_row: bool = False
    symmetric_mode: SymmetricMode = "full"
    real_zero: bool = False
    zero_in_range: bool = True
    scale_bits: int = 16
    scale_group: int = 16
    dynamic: bool = True
    range: RangeChoice = "minmax"

    def __post_init__(self) -> None:
        if self.format == "int" and not 1 <= self.bits <= 8:
            raise Unsuitable(
                f"integer grids have 1 to 8 bits, {self.bits} were asked for",
                "use 16 to leave a tensor in floating point",
            )
        if self.bits == 1 and self.symmetric:
            raise Unsuitable("a symmetric grid of 1 bit has no positive level", "use an asymmetric one")
        if self.format != "int" and self.bits != FORMAT_BITS[self.format]:
            raise Unsuitable(
                f"{self.format} has {FORMAT_BITS[self.format]} bits, {self.bits} were asked for",
                "let the format and the bits agree",
            )
        if self.format != "int" and not self.symmetric:
            raise Unsuitable(f"{self.format} grids are symmetric", "set symmetric")
        if (self.granularity in ("group", "block")) != (self.group_size is not None):
            raise ValueError(
                "group_size must be set exactly when granularity is 'group' or 'block', got "
                f"granularity={self.granularity!r} and group_size={self.group_size}"
            )
        if not 2 <= self.scale_bits <= 16:
            raise ValueError(f"scale_bits is {self.scale_bits}, it must be between 2 and 16")
        if self.scale_bits < 16 and self.granularity == "tensor":
            raise Unsuitable(
                "scales are quantized in runs of rows", "a single scale has none; set scale_bits=16"
            )
        if self.scale_format != "float16" and (not self.symmetric or self.scale_bits < 16):
            raise Unsuitable(
                f"scales in {self.scale_format} belong to symmetric grids, and are not quantized again",
                "set symmetric, and scale_bits=16",
            )

    @property
    def qmin(self) -> int:
        """The lowest code of an integer grid."""
        if not self.symmetric or self.symmetric_mode == "gptq":
            return 0
        return -(2 ** (self.bits - 1)) + (self.symmetric_mode == "restricted")

    @property
    def qmax(self) -> int:
        """The highest code of an integer grid."""
        if not self.symmetric or self.symmetric_mode == "gptq":
            return 2**self.bits - 1
        return int(2 ** (self.bits - 1)) - 1

    @property
    def spans_rows(self) -> bool:
        """Whether rows share a scale, or what scales are stored with."""
        second = self.scale_bits < 16 or (self.scale_format == "e4m3" and not self.outer_row)
        return second or self.granularity in ("tensor", "block")

    def n_scales(self, rows: int, columns: int) -> int:
        """How many scales a `(rows, columns)` tensor has, second ones not counted."""
        size = self.group_size or 1
        return {
            "tensor": 1,
            "row": rows,
            "group": rows * columns // size,
            "block": -(-rows // size) * -(-columns // size),
        }[self.granularity]

    def bits_per_element(self, rows: int, columns: int) -> float:
        """Stored bits per element of a `(rows, columns)` tensor: codes, scales and zero-points, second scales too."""
        groups = self.n_scales(rows, columns)
        scale = float(SCALE_BITS[self.scale_format])
        real = self.real_zero or self.bits == 1
        zero = 0.0 if self.symmetric else float(ZERO_BITS if real else self.bits)
        outer = 32.0 * (rows if self.outer_row else 1) if self.scale_format == "e4m3" else 0.0
        if (
            self.scale_bits < 16
        ):  # a run has a float16 scale and zero-point of its own; integer zeros are codes already
            run = self.scale_bits + 2 * 16 / self.scale_group
            scale, zero = run, run if zero and real else zero
        return self.bits + (groups * (scale + zero) + outer) / (rows * columns)
