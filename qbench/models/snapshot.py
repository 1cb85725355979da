"""A hub model as a local folder: its safetensors and what lies beside them, and plain words where it cannot be had."""

import json
from pathlib import Path

from qbench.errors import first_line
from qbench.models.checkpoint import INDEX, WHOLE

_BESIDE_WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def snapshot(id_: str, revision: str | None = None, *, local_files_only: bool = False) -> Path:
    """The folder of a hub model, fetched where it is not in the cache: its safetensors and what lies beside them.

    Raises:
        OSError: If the model is gated, missing, or not in the cache while the hub cannot be reached; one line.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def fetched(patterns: list[str]) -> Path:
        # `*` matches slashes too, and folders hold other formats of the same weights.
        return Path(
            snapshot_download(
                id_, revision=revision, local_files_only=local_files_only, allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
        )  # fmt: skip

    try:
        folder = fetched([*_BESIDE_WEIGHTS, WHOLE])
        if not (folder / WHOLE).exists() and (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            folder = fetched([*_BESIDE_WEIGHTS, *sorted(set(weight_map.values()))])
    except (HfHubHTTPError, FileNotFoundError) as error:
        raise OSError(f"model {id_!r}: {_why_not(id_, revision, error)}") from error
    return folder


def _why_not(id_: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it; see https://huggingface.co/{id_}/commits/main"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return "the hub has no such model, or it is private; check model.id, or log in with `hf auth login`"
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return f"gated: accept the licence at https://huggingface.co/{id_} and log in with `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        return f"the hub refused ({first_line(error)}); try again later"
    return (
        f"it is not in the hub's local cache, and the hub was not reached ({first_line(error)}); fetch it with "
        f"`hf download {id_}` where there is a network, or give a local folder"
    )
