"""llama.cpp, through llama-cpp-python: a GGUF file, with the quantized types and kernels that are its own."""

import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.deploy.bench.backend import Backend, Engine, Run, Subject
from qbench.deploy.operators import Bits
from qbench.quant.storage import FLOAT_BITS

_CACHE = 16.0  # bits of its keys and values by default


class LlamaCpp(Backend):
    name = "llamacpp"
    runs_recipe = True
    about = "llama.cpp, a GGUF file"

    def why_not(self, subject: Subject) -> str:
        if find_spec("llama_cpp") is None:
            return "not installed; pip install 'qbench[llamacpp]', which compiles it"
        if torch.device(subject.device).type != "cpu":
            return f"it runs on the CPU here, the device is {subject.device}; set device=cpu"
        if subject.gguf is None:
            return "it runs a GGUF file, and there is none; export one (qbench export --to gguf) and name it with gguf="
        return ""

    def remark(self, subject: Subject) -> str:
        return (
            "" if subject.gguf is None else f"runs {subject.gguf.name}, whose types may not be the recipe's"
        )

    def open(self, subject: Subject) -> Engine:
        assert subject.gguf is not None, "why_not was asked"
        return LlamaCppEngine.load(subject.gguf)


@dataclass(eq=False)
class LlamaCppEngine(Engine):
    """A file in memory; a run makes a context of its size, outside of the time that counts.

    Attributes:
        library: The module of functions of llama.cpp.
    """

    library: Any
    model: Any
    n_threads: int

    @classmethod
    def load(cls, path: Path) -> "LlamaCppEngine":
        import llama_cpp

        llama_cpp.llama_log_set(_silent(), None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0  # by default a build for GPUs does not run on the processor
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise OSError(
                f"llama.cpp cannot load {str(path)!r}; export it again, or check that the file is whole"
            )
        return cls(llama_cpp, model, torch.get_num_threads())

    @property
    def weight_bytes(self) -> int:
        return int(self.library.llama_model_size(self.model))

    @property
    def bits(self) -> Bits:
        """One width for all of the file: its types differ from layer to layer."""
        each = 8 * self.weight_bytes / int(self.library.llama_model_n_params(self.model))
        if each >= FLOAT_BITS:
            return Bits(each, 32.0, _CACHE, head=each, code=each, floating=32.0)
        # Beside quantized types it rounds inputs to 8 bits, and multiplies integers.
        return Bits(each, 8.0, _CACHE, head=each, code=min(each, 8.0), floating=32.0)

    def run(self, prompts: Tensor, new_tokens: int) -> Run:
        lib, (batch, length) = self.library, prompts.shape
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = batch * (length + new_tokens)
        parameters.n_batch = batch * length
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.kv_unified = True
        context = lib.llama_init_from_model(self.model, parameters)
        if not context:
            raise MemoryError(f"llama.cpp has no room for {parameters.n_ctx} tokens; lower batch= or prompt=")
        tokens = lib.llama_batch_init(batch * length, 0, 1)
        try:
            return self._timed(context, tokens, prompts, new_tokens)
        finally:
            lib.llama_batch_free(tokens)
            lib.llama_free(context)

    def _timed(self, context: Any, tokens: Any, prompts: Tensor, new_tokens: int) -> Run:
        length = prompts.shape[1]
        start = time.perf_counter()
        last = self._step(context, tokens, prompts.tolist(), 0)
        first = time.perf_counter()
        for i in range(new_tokens - 1):
            last = self._step(context, tokens, [[token] for token in last], length + i)
        return Run(first - start, time.perf_counter() - first)

    def _step(self, context: Any, tokens: Any, rows: list[list[int]], position: int) -> list[int]:
        """Read some tokens of each sequence; the most likely next one of each."""
        lib, n, ends = self.library, 0, []
        for sequence, row in enumerate(rows):
            for i, token in enumerate(row):
                tokens.token[n], tokens.pos[n] = token, position + i
                tokens.n_seq_id[n], tokens.seq_id[n][0] = 1, sequence
                tokens.logits[n] = i == len(row) - 1
                n += 1
            ends.append(n - 1)
        tokens.n_tokens = n
        if (code := lib.llama_decode(context, tokens)) != 0:
            raise ValueError(
                f"llama.cpp could not read {n} tokens (llama_decode returned {code}); is the file of this model?"
            )
        vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        return [_most_likely(lib.llama_get_logits_ith(context, end), vocab) for end in ends]

    def close(self) -> None:
        self.library.llama_model_free(self.model)


@cache
def _silent() -> Any:
    """A callback that drops what the library prints; kept, since the library goes on calling it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _most_likely(logits: Any, n: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(logits, (n,)).argmax())
