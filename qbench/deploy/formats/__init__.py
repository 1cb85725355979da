"""The formats that a recipe can be exported to, by the name of `qbench export --to`."""

from qbench.deploy.formats.awq import AWQLayout
from qbench.deploy.formats.compressed import CompressedTensors
from qbench.deploy.formats.format import Format
from qbench.deploy.formats.gguf import GGUFS
from qbench.deploy.formats.gptq import GPTQLayout
from qbench.deploy.formats.hf import HuggingFace

__all__ = ["FORMATS", "Format"]

_KINDS: tuple[type[Format], ...] = (CompressedTensors, GPTQLayout, AWQLayout, HuggingFace, *GGUFS)

FORMATS = {kind.name: kind for kind in _KINDS}
