"""llama.cpp's own arithmetic, through llama-cpp-python: rounding to its types, logits and tokens of a GGUF file."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbench.deploy.bench.llamacpp import LlamaCppEngine
from qbench.errors import UsageError
from qbench.models.manifest import verify_if_listed

NO_LLAMACPP = "llama.cpp is not installed; pip install 'qbench[llamacpp]', which compiles it"
_F32 = 0  # GGML_TYPE_F32


def has_llamacpp() -> bool:
    return find_spec("llama_cpp") is not None


def ggml_quantized(weight: NDArray[np.float32], kind: int, sizes: tuple[int, int]) -> NDArray[np.uint8]:
    """A weight `(out, in)` as llama.cpp rounds it to one of its types, `(out, bytes)`.

    Args:
        kind: The type's number (`GGMLQuantizationType`).
        sizes: Of its blocks: weights and bytes.
    """
    rows, columns = weight.shape
    if columns % sizes[0]:
        raise ValueError(f"rows have {columns} weights, and llama.cpp rounds blocks of {sizes[0]}")
    data = np.empty((rows, columns // sizes[0] * sizes[1]), np.uint8)
    written = _quantize_chunk()(kind, weight.ctypes.data, data.ctypes.data, 0, rows, columns, None)
    if written != data.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of a weight that takes {data.nbytes}")
    return data


def gguf_logits(path: Path, tokens: Tensor) -> Tensor:
    """What a file says to windows of tokens `(n_windows, seq_len)`: float32 `(n_windows, seq_len, vocab)`.

    Keys and values stay in float32, so that what differs from the simulated model is of the file, and of llama.cpp's
    products: it rounds their inputs to 8 bits where the weight is of a quantized type.
    """
    with _opened(path) as engine:
        return torch.stack([_window(engine, row.tolist()) for row in tokens])


def gguf_tokens(path: Path, text: str) -> list[int]:
    """The tokens that llama.cpp makes of a text, with those that it adds to each."""
    with _opened(path) as engine:
        lib, data = engine.library, text.encode()
        vocab = lib.llama_model_get_vocab(engine.model)
        most = len(data) + 2
        found = (ctypes.c_int32 * most)()
        n = lib.llama_tokenize(vocab, data, len(data), found, most, True, False)
        if n < 0:
            raise RuntimeError(f"llama.cpp makes {-n} tokens of {len(data)} bytes")
        return list(found[:n])


@contextmanager
def _opened(path: Path) -> Iterator[LlamaCppEngine]:
    if not has_llamacpp():
        raise UsageError(NO_LLAMACPP)
    verify_if_listed(path.parent)
    engine = LlamaCppEngine.load(path)
    try:
        yield engine
    finally:
        engine.close()


def _window(engine: LlamaCppEngine, row: list[int]) -> Tensor:
    lib, n = engine.library, len(row)
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = n
    parameters.n_threads = parameters.n_threads_batch = engine.n_threads
    parameters.type_k = parameters.type_v = _F32
    parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(engine.model, parameters)
    if not context:
        raise MemoryError(f"llama.cpp has no room for {n} tokens; give shorter windows")
    batch = lib.llama_batch_init(n, 0, 1)
    try:
        for i, token in enumerate(row):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = n
        if (code := lib.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama.cpp could not read {n} tokens (llama_decode returned {code})")
        vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(engine.model))
        return torch.from_numpy(np.ctypeslib.as_array(lib.llama_get_logits(context), (n, vocab)).copy())
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)


@cache
def _quantize_chunk() -> Any:
    """`ggml_quantize_chunk`, which llama-cpp-python has no function of its own for."""
    from llama_cpp.llama_cpp import ctypes_function

    size, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = [ctypes.c_int, pointer, pointer, size, size, size, pointer]

    return ctypes_function("ggml_quantize_chunk", arguments, ctypes.c_size_t)(lambda: None)
