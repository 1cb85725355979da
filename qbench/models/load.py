"""Models by hub id, by local folder in the hub's layout, or embedded (`zoo/micro-llama`).

Weights come from safetensors only, and remote code runs only when it was asked for. transformers is imported
where it is used: it takes seconds, for which a command whose jobs are all recorded should not wait.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qbench.errors import Unsuitable, first_line
from qbench.models.family import family_of
from qbench.quant.scheme import Scheme
from qbench.zoo import WEIGHTS

_SAMPLE = 1 << 20  # bytes read at each of _PLACES places of a weight file
_PLACES = 64
_WEIGHED = {".json", ".model", ".txt", ".safetensors", ".jinja"}


@dataclass(frozen=True)
class ModelRef:
    """A model that can be loaded.

    Attributes:
        id: Hub id, local folder, or `zoo/<name>`.
        revision: Hub commit, tag or branch; pin a commit where results must be reproducible.
        dtype: Of weights and arithmetic.
        attn: The attention implementation; results differ visibly between them in half precision.
    """

    id: str
    revision: str | None = None
    dtype: str = "float32"
    attn: str = "sdpa"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.folder is not None:
            self._check_folder(self.folder)

    def _check_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            known = sorted(f"zoo/{path.name}" for path in WEIGHTS.glob("*") if path.is_dir())
            raise ValueError(
                f"model folder {str(folder)!r} does not exist; give a folder in the hub's layout, a hub id such "
                f"as facebook/opt-125m, or one of {', '.join(known)}"
            )
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"model folder {str(folder)!r} needs config.json and *.safetensors, it holds "
                f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"
            )

    @property
    def folder(self) -> Path | None:
        """The local folder, or `None` for a hub id."""
        if self.id.startswith("zoo/"):
            return WEIGHTS / self.id.removeprefix("zoo/")
        path = Path(self.id).expanduser()
        is_path = self.id.startswith((".", "/", "~")) or self.id.count("/") > 1 or "\\" in self.id
        return path if is_path or path.is_dir() else None

    @property
    def name(self) -> str:
        """Short name for tables: the last part of the id."""
        return self.id.rstrip("/").split("/")[-1]

    def identity(self) -> dict[str, Any]:
        """What distinguishes this model's numbers from another's; a folder counts by its content."""
        id_ = self.id if self.folder is None else self.name
        return {
            "id": id_, "revision": self.revision, "dtype": self.dtype, "attn": self.attn, "content": self.content,
        }  # fmt: skip

    @cached_property
    def content(self) -> str | None:
        """Digest of a local folder: of its small files (config, tokenizer), and of its weight files.

        A weight file of up to 64 MiB is read whole. A larger one is read at 64 places spread over it, which
        meet nearly every tensor: telling two checkpoints apart should not cost reading them.
        """
        if self.folder is None:
            return None
        digest = hashlib.sha256()
        for path in sorted(p for p in self.folder.iterdir() if p.suffix in _WEIGHED):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                if path.suffix != ".safetensors" or size <= _SAMPLE * _PLACES:
                    digest.update(file.read())
                    continue
                for place in range(_PLACES):
                    file.seek((size - _SAMPLE) * place // (_PLACES - 1))
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()[:16]

    @property
    def _source(self) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": str(self.folder or self.id),
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }

    def load(self) -> Any:
        """The model on the CPU, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            **self._source,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attn,
            use_safetensors=True,
        )
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**self._source)

    def skeleton(self) -> Any:
        """The model without weights, on the `meta` device: names and shapes only."""
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(**self._source)
        except OSError as error:
            raise OSError(
                f"model {self.id!r} was found neither locally nor on the hub ({first_line(error)}); "
                "check model.id, log in for a gated model, or give a local folder"
            ) from error
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)


def check_fit(model: Any, scheme: Scheme) -> None:
    """Refuse a model (a skeleton will do) that is not described, or whose layers the groups do not divide.

    Raises:
        NotImplementedError: If the architecture is not described.
        Unsuitable: If a group size does not divide an input width; names the layer and the width.
    """
    family = family_of(model)
    size = scheme.weight.group_size if scheme.weight else None
    for name, linear in model.get_submodule(family.blocks)[0].named_modules():
        if size and name in family.linears and linear.in_features % size:
            raise Unsuitable(
                f"group_size={size} does not divide the {linear.in_features} inputs of {name}",
                f"choose a divisor of {linear.in_features}, or group_size=-1 for one group per row",
            )
