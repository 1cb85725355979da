"""Models by hub id, by local folder in the hub's layout, or embedded (`zoo/micro-llama`).

Weights come from safetensors only, and remote code runs only when it was asked for. transformers is imported
where it is used: it takes seconds, for which a command whose jobs are all recorded should not wait.
"""

import hashlib
import math
import re
import time
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from qbench.data.library import unreachable
from qbench.errors import first_line
from qbench.models.checkpoint import Checkpoint, checkpoint_info, lacking, open_checkpoint, refuse_quantized
from qbench.models.disk import open_model
from qbench.models.experts import unpack
from qbench.models.family import family_of
from qbench.models.manifest import verify_if_listed
from qbench.models.outliers import norm_links, plant_outliers
from qbench.models.snapshot import snapshot
from qbench.zoo import WEIGHTS

Offload = Literal["auto", "memory", "disk"]

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
        attn: The attention implementation; results differ visibly between them in half precision. `auto` leaves it to
            transformers: sdpa where the architecture has it.
        outliers: Make a few channels of every norm's output this many times larger, and the weights that
            read them smaller, so that the function stays (`qbench.models.outliers`); a power of two is exact.
        offload: Whether the decoder blocks stay on disk and come into memory one at a time (`disk`), all are in memory
            (`memory`), or what fits (`auto`); no part of a job's identity.
    """

    id: str
    revision: str | None = None
    dtype: str = "float32"
    attn: str = "sdpa"
    trust_remote_code: bool = False
    outliers: float | None = None
    offload: Offload = "auto"

    def __post_init__(self) -> None:
        if self.outliers is not None and not 1 < self.outliers < math.inf:
            raise ValueError(
                f"model.outliers is {self.outliers}, it must be a factor above 1, for example 64, or null for none"
            )
        if self.folder is not None:
            self._check_folder(self.folder)

    def _check_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            known = sorted(f"zoo/{path.name}" for path in WEIGHTS.glob("*") if path.is_dir())
            raise ValueError(
                f"model folder {str(folder)!r} does not exist; give a folder in the hub's layout, a hub id such "
                f"as facebook/opt-125m, or one of {', '.join(known)}"
            )
        pickled = list(folder.glob("*.bin"))
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"model folder {str(folder)!r} needs config.json and *.safetensors, it holds "
                f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"
                + (
                    "; pickled weights (*.bin) are not read, docs/models.md says how to convert them"
                    * bool(pickled)
                )
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
        """Short name for tables: the last part of the id, and what was planted."""
        return self._base_name + ("" if self.outliers is None else f"+outliers{self.outliers:g}")

    @property
    def _base_name(self) -> str:
        return self.id.rstrip("/").split("/")[-1]

    def identity(self) -> dict[str, Any]:
        """What distinguishes this model's numbers from another's; a folder counts by its content."""
        id_ = self.id if self.folder is None else self._base_name
        planted = {} if self.outliers is None else {"outliers": float(self.outliers)}
        return {
            "id": id_, "revision": self.revision, "dtype": self.dtype, "attn": self._chosen, "content": self.content,
            **planted,
        }  # fmt: skip

    @cached_property
    def _chosen(self) -> str:
        """The attention that `auto` means; one computation has one identity."""
        if self.attn != "auto":
            return self.attn
        try:
            return str(self._shell.config._attn_implementation)
        except (OSError, ValueError, NotImplementedError):  # it cannot run, which its check will say
            return self.attn

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

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype of most of the checkpoint's numbers; of a hub model that of its config, without fetching weights."""
        from transformers import AutoConfig

        if self.folder is not None:
            return checkpoint_info(self.folder).dtype
        return str(AutoConfig.from_pretrained(**self._source).dtype or "float32").removeprefix("torch.")

    @property
    def _source(self) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": str(self.folder or self.id),
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            # Without it the hub's libraries try again and again where there is no hub to be reached.
            "local_files_only": self.folder is None and bool(unreachable()),
        }

    def open(self, scratch: Path) -> Any:
        """The same model with its decoder blocks on disk; edited ones are kept in the folder `scratch`.

        Raises:
            OSError: If a file is missing, damaged or cut off; names it.
        """
        shell = self._shell
        folder = self.folder or snapshot(
            self.id, self.revision, local_files_only=self._source["local_files_only"]
        )
        verify_if_listed(folder)
        self._check_depth(open_checkpoint(folder), shell)
        model = open_model(
            shell.config,
            type(shell),
            folder,
            family_of(shell).blocks,
            getattr(torch, self.dtype),
            scratch,
            unpack,
        )
        if self.outliers is not None:
            plant_outliers(model, self.outliers)
        return model.eval().requires_grad_(False)

    def _check_depth(self, checkpoint: Checkpoint, shell: Any) -> None:
        """Raises OSError if the checkpoint has more blocks than the model: they would be left out without a word."""
        path = family_of(shell).blocks
        n_blocks = len(shell.get_submodule(path)) + (
            getattr(shell.config, "num_nextn_predict_layers", None) or 0
        )
        last = path.rpartition(".")[2]
        numbers = re.findall(rf"(?:^|\.){last}\.(\d+)\.", "\n".join(checkpoint.tensors), re.M)
        if numbers and (most := max(map(int, numbers)) + 1) > n_blocks:
            raise OSError(
                f"the weights in {checkpoint.folder} have {most} blocks, the model of its config.json has {n_blocks}; "
                "config and weights are not of the same checkpoint"
            )

    @property
    def _shell(self) -> Any:
        """The model without weights, built once for all that only look at it."""
        return _shell_of(replace(self, outliers=None, offload="auto"))

    @property
    def _attention(self) -> str | None:
        """As transformers is told: nothing lets it choose."""
        return None if self.attn == "auto" else self.attn

    def load(self) -> Any:
        """The model on the CPU, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        if self.folder is not None:
            verify_if_listed(self.folder)
            self._check_depth(open_checkpoint(self.folder), self._shell)
        model, found = AutoModelForCausalLM.from_pretrained(
            **self._source,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self._attention,
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := sorted(found["missing_keys"]):
            raise lacking(self.folder or self.id, missing)
        unpack(model)
        if self.outliers is not None:
            plant_outliers(model, self.outliers)
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
        if self.folder is not None and not any((self.folder / name).is_file() for name in names):
            raise ValueError(
                f"model folder {str(self.folder)!r} has no tokenizer ({', '.join(names)}); put the files of the model's "
                "tokenizer there"
            )
        return AutoTokenizer.from_pretrained(**self._source)

    def skeleton(self) -> Any:
        """The model without weights, on the `meta` device: names and shapes only.

        Raises:
            OSError: If there is no such model.
            NotImplementedError: If `outliers` cannot be planted in it.
        """
        model = self._shell
        if self.outliers is not None:
            norm_links(model)
        return model


@lru_cache(maxsize=8)
def _shell_of(ref: ModelRef) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(**ref._source)
    except OSError as error:
        why = unreachable() if ref.folder is None else ""
        raise OSError(
            f"model {ref.id!r} was found neither locally nor on the hub ({why or first_line(error)}); "
            + (
                "fetch it where there is a network, `qbench data fetch`, "
                if why
                else "check model.id, log in for a gated model, "
            )
            + "or give a local folder"
        ) from error
    refuse_quantized(config, f"model {ref.id!r}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=ref.trust_remote_code, attn_implementation=ref._attention
        )
    unpack(model)
    return model


@cache
def fastest_dtype() -> str:
    """`bfloat16` where this CPU multiplies matrices of it faster than of float32, which few do; measured once."""
    best = {}
    for dtype in ("float32", "bfloat16"):
        a = torch.ones(256, 1024, dtype=getattr(torch, dtype))
        b = torch.ones(1024, 1024, dtype=getattr(torch, dtype))
        times = []
        for _ in range(5):
            clock = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - clock)
        best[dtype] = min(times)
    return min(best, key=lambda dtype: best[dtype])
