"""vLLM on a GPU: a checkpoint in transformers' layout, compressed or not."""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qbench.deploy.bench.backend import Backend, Engine, Run, Subject


class VLLM(Backend):
    name = "vllm"
    runs_recipe = True
    about = "vLLM on a GPU, a checkpoint"

    def why_not(self, subject: Subject) -> str:
        if find_spec("vllm") is None:
            return "not installed; pip install 'qbench[vllm]'"
        if not torch.cuda.is_available():
            return "it runs on a GPU, and this torch sees none"
        if subject.folder is None:
            return (
                "it runs a checkpoint, and there is none; export one (qbench export --to compressed-tensors) and name it "
                "with checkpoint="
            )
        return ""

    def open(self, subject: Subject) -> Engine:
        from vllm import LLM

        assert subject.folder is not None, "why_not was asked"
        # A prompt that is repeated must be read again.
        model = LLM(model=str(subject.folder), skip_tokenizer_init=True, enable_prefix_caching=False)
        return VLLMEngine(model, sum(path.stat().st_size for path in subject.folder.glob("*.safetensors")))


@dataclass(eq=False)
class VLLMEngine(Engine):
    """vLLM tells no step from the next, so that a prompt's time is that of a generation of one token."""

    model: Any
    checkpoint_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Of the checkpoint; how it is laid out on the device is vLLM's."""
        return self.checkpoint_bytes

    @property
    def bits(self) -> None:
        return None

    def run(self, prompts: Tensor, new_tokens: int) -> Run:
        first, whole = self._timed(prompts, 1), self._timed(prompts, new_tokens)
        if whole <= first:
            raise ValueError(f"vLLM made {new_tokens} tokens no slower than one; raise new_tokens=")
        return Run(first, whole - first)

    def _timed(self, prompts: Tensor, n: int) -> float:
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.model.generate([{"prompt_token_ids": row} for row in prompts.tolist()], asked, use_tqdm=False)
        return time.perf_counter() - start
