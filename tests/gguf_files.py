"""Tiny models with tokenizers, exported to GGUF, for tests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qbench.algorithms.base import Algorithm
from qbench.algorithms.rtn import RTN
from qbench.deploy.formats import FORMATS
from qbench.deploy.formats.format import Source
from qbench.deploy.formats.gguf import GGUF, GGUF_FILE
from qbench.deploy.layers import layers_of
from qbench.deploy.writer import Writer
from qbench.engine import quantize
from qbench.models.family import family_of
from qbench.quant.scheme import Scheme

SIZE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **more}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 64}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", LLAMA3),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-yarn": ("llama", YARN),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", YARN),
    "qwen3": ("qwen3", {"head_dim": 64}),
}


def random_model(kind: str, changed: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | changed), dtype=dtype)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval().requires_grad_(False)


@dataclass
class Exported:
    """A file, and what it was made of.

    Attributes:
        weights: Of each quantized layer: as evaluated, and as stored.
    """

    folder: Path
    format: GGUF
    model: Any
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    bits: dict[str, float]

    @property
    def file(self) -> Path:
        return self.folder / GGUF_FILE

    def store(self) -> Any:
        """The model with its weights as they are stored; edits it."""
        for name, (_, stored) in self.weights.items():
            self.model.get_submodule(name).weight.copy_(stored)
        return self.model


def exported(
    folder: Path,
    model: Any,
    tokenizer: Any,
    scheme: Scheme,
    to: str = "gguf",
    algorithm: Algorithm | None = None,
    tokens: torch.Tensor | None = None,
) -> Exported:
    algorithm = algorithm or RTN()
    form: Any = FORMATS[to](Source(model, algorithm, scheme, model.dtype))
    form.check()
    form.check_tokenizer(tokenizer)
    family, weights, bits = family_of(model), {}, {}
    with Writer(folder) as writer:

        def deliver(finished: Any) -> None:
            layers = list(layers_of(finished, family.blocks, family.linears(finished.layer), scheme))
            form.block(writer, f"{family.blocks}.{finished.index}", finished.layer, layers, finished.fixed)
            for layer in layers:
                weights[layer.name] = layer.weight.detach().clone(), form.stored(layer)
                bits[layer.name] = form.stored_bits(layer)

        quantize(model, algorithm, scheme, tokens, deliver=deliver)
        form.finish(writer, model, tokenizer)
        writer.publish()
    return Exported(folder, form, model, weights, bits)


def byte_level(way: Any, whole: bool = False, size: int = 512, texts: tuple[str, ...] = ()) -> Any:
    """A byte-level tokenizer that cuts text in a certain way."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = way
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts or (__doc__ or "",), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def sentence_piece(texts: tuple[str, ...], size: int = 512, every: bool = True) -> Any:
    """A tokenizer as transformers makes one of SentencePiece's BPE; `every`: with all merges of its tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=60, show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    if every:
        made = dict.fromkeys("".join(pair) for pair in spec["model"]["merges"])
        spec["model"]["merges"] = [
            [token[:i], token[i:]]
            for token in made
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def told(path: Path) -> dict[str, Any]:
    """A file's metadata, by key."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
