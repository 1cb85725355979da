"""Tiny random models: every law must hold on CPU, offline, in seconds."""

import atexit
import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

# What the embedded corpora are kept in: not the cache of whoever runs the tests, and made once for all of them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qbench-cache-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many tests run at a time as there are cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "0")

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qbench import cli
from qbench.data.windows import Windows
from qbench.evaluate.logits import whole
from qbench.evaluate.perplexity import perplexity, window_losses
from qbench.evaluate.result import Evaluation

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

ROOT = Path(__file__).parents[1]

# Few tests that take minutes: a file goes to one worker whole, and one of these that came last would be waited for alone.
FIRST = (
    "test_readme",
    "test_sweep",
    "test_families",
    "test_studies_run",
    "test_laws",
    "test_export",
    "test_launchers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


SHARED_DATA = ROOT.parent / "shared" / "data"

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = COMMON | {"intermediate_size": 112, "num_key_value_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "llama-gqa-tied": LlamaConfig(**LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral-window": MistralConfig(**LLAMA | {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=12),
    "opt": OPTConfig(**COMMON, ffn_dim=112, word_embed_proj_dim=48),
    "opt-post-norm": OPTConfig(**COMMON, ffn_dim=112, word_embed_proj_dim=48, do_layer_norm_before=False),
}


def random_model(name: str) -> nn.Module:
    """A random model with outlier channels, in float64 so that laws hold to rounding error."""
    torch.manual_seed(0)
    config = copy.deepcopy(
        CONFIGS[name]
    )  # saving a model writes its dtype into it, which makes other random weights
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                p.copy_(0.5 + torch.rand_like(p) * 1.5)
                p.view(-1)[::13] *= 8.0
            elif "bias" in parameter_name:
                p.normal_(std=0.1)
    return model.requires_grad_(False)


def perplexity_of(
    model: nn.Module, tokens: torch.Tensor, seq_len: int, batch_size: int = 4, name: str = "text"
) -> Evaluation:
    """On consecutive windows of `tokens`, `(n,)`."""
    windows = Windows.consecutive(tokens, seq_len)
    return perplexity(name, window_losses(whole(model, windows.tokens, batch_size), windows), windows)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return random_model(request.param)


@pytest.fixture
def llama() -> nn.Module:
    return random_model("llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def shared_data() -> Path:
    """Real data sets that lie beside the repository on some machines."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data sets are not at {SHARED_DATA.relative_to(ROOT.parent)} beside the repository")
    return SHARED_DATA


@pytest.fixture
def qbench(tmp_path, monkeypatch):
    """Run the command in an empty folder; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["qbench", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables: making them takes seconds, copying them none."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"
