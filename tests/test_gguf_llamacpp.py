"""What llama.cpp makes of a GGUF file is what transformers makes of the model; skipped where it is not installed.

The embedded model on text: `pytest -m slow -s tests/test_gguf_llamacpp.py` prints a line for each type.
"""

import inspect
from itertools import pairwise

import pytest
import torch
from tokenizers import pre_tokenizers

from qbench.deploy.formats.gguf import ENGINE_INPUTS
from qbench.deploy.formats.gguf_types import KINDS, rounded, unpacked
from qbench.deploy.formats.gguf_vocabulary import _PROBES, _ways
from qbench.deploy.llamacpp import gguf_logits, gguf_tokens
from qbench.models.load import ModelRef
from qbench.models.manifest import MANIFEST
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from tests.gguf_files import MODELS, SIZE, byte_level, exported, random_model, sentence_piece

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'qbench[llamacpp]'")
pytestmark = pytest.mark.slow

EPS = 2.0**-23
TEXTS = (inspect.getsource(inspect), inspect.getsource(pytest), *_PROBES)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_floating_point_give_equal_logits(tmp_path, tokenizer, name):
    """Whatever the architecture: names, rows of queries and keys, rotary embeddings, biases, sizes."""
    kind, changed = MODELS[name]
    made = exported(tmp_path / "out", random_model(kind, changed), tokenizer, Scheme())
    ids = torch.randint(0, 512, (2, 60), generator=torch.Generator().manual_seed(2))
    wanted = made.model(ids).logits
    # Sums of up to `intermediate_size` products, in another order, a block after another.
    bound = EPS * SIZE["intermediate_size"] * SIZE["num_hidden_layers"] * wanted.abs().max()
    assert (gguf_logits(made.file, ids) - wanted).abs().max() <= bound
    if "rope_parameters" in changed:
        plain = random_model(kind, {})
        assert (plain(ids).logits - wanted).abs().max() > 100 * bound, (
            "the rotary embedding decides nothing here"
        )


@pytest.mark.parametrize("name", [name for name, _ in _ways()])
def test_llama_cpp_makes_the_tokens_of_a_byte_level_tokenizer(tmp_path, name):
    way, whole = next((way, whole) for (known, whole), way in _ways().items() if known == name)
    check_tokens(tmp_path, byte_level(way, whole, texts=TEXTS))


def test_llama_cpp_makes_the_tokens_of_sentence_piece(tmp_path):
    check_tokens(tmp_path, sentence_piece(TEXTS))


def check_tokens(tmp_path, tokenizer):
    made = exported(tmp_path / "out", random_model("llama", {}), tokenizer, Scheme())
    for text in TEXTS:
        assert gguf_tokens(made.file, text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.needs_llamacpp], ids=lambda k: k.name
)
def test_llama_cpp_rounds_closer_the_more_bits_a_type_has(kind):
    w = torch.randn(16, 512, generator=torch.Generator().manual_seed(4))
    assert rounded(kind, w).nbytes * 8 == kind.bits * w.numel()
    same = [k for k in KINDS.values() if k.block == kind.block and k.needs_llamacpp]
    errors = [(unpacked(k, rounded(k, w)) - w).norm() for k in sorted(same, key=lambda k: k.bits)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[0] < 0.5 * w.norm()


SCHEMES = {
    "q8_0": ("gguf", Scheme.of(8, group_size=32, weight_symmetric=True)),
    "q4_0": ("gguf", Scheme.of(4, group_size=32, weight_symmetric=True)),
    "q4_1": ("gguf", Scheme.of(4, group_size=128)),
    "q5_0": ("gguf", Scheme.of(5, group_size=128, weight_symmetric=True)),
    "q5_1": ("gguf", Scheme.of(5, group_size=128)),
    "mxfp4": ("gguf", Scheme.of(4, weight_format="mxfp4")),
    **{k: (f"gguf-{k}", Scheme.of(4, group_size=128)) for k in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_llama_cpp_departs_no_further_than_inputs_of_8_bits_do(tmp_path, name):
    """Weights are equal; llama.cpp rounds the inputs that they are multiplied with, which the recipe does not."""
    to, scheme = SCHEMES[name]
    ref = ModelRef("zoo/micro-llama")
    tokenizer, model = ref.tokenizer(), ref.load()
    ids = torch.tensor(tokenizer(inspect.getsource(inspect))["input_ids"][: 8 * 256]).reshape(8, 256)
    made = exported(tmp_path / "out", model, tokenizer, scheme, to)
    evaluated = model(ids).logits.double().log_softmax(-1)
    read, _ = made.format.reader(made.folder, None)
    assert torch.equal(read(ids), made.store()(ids).logits)
    stored = made.model(ids).logits.double().log_softmax(-1)
    size = 256 if name.endswith("_k") else ENGINE_INPUTS.group_size
    with_inputs = rounded_inputs(made, size)(ids).logits.double().log_softmax(-1)
    found = gguf_logits(made.file, ids).double().log_softmax(-1)
    print(
        f"\n{name}: perplexity {perplexity(evaluated, ids):.3f} simulated, {perplexity(found, ids):.3f} in llama.cpp; "
        f"KL {kl(evaluated, found):.1e}, of the stored weights {kl(stored, found):.1e}, of inputs alone "
        f"{kl(stored, with_inputs):.1e}; top-1 agreement {agreement(evaluated, found):.4f}"
    )
    # llama.cpp rounds scales of inputs to float16, and sums in another order: another draw of the same error.
    assert kl(stored, found) <= 2 * kl(stored, with_inputs)
    assert agreement(stored, found) >= 1 - 2 * (1 - agreement(stored, with_inputs))
    if to == "gguf":
        assert kl(evaluated, stored) <= 0.1 * kl(stored, with_inputs)  # scales in float16


def rounded_inputs(made, size):
    for name in made.weights:
        linear = made.model.get_submodule(name)
        spec = QuantSpec(8, True, "group", size if linear.in_features % size == 0 else 32)
        linear.register_forward_pre_hook(lambda _, args, spec=spec: (fake_quantize(args[0], spec),))
    return made.model


def kl(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(p, q):
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


def perplexity(logs, ids):
    return float((-logs[:, :-1].gather(-1, ids[:, 1:, None])).mean().exp())


def test_a_file_that_is_cut_off_does_not_load(tmp_path, tokenizer):
    made = exported(tmp_path / "out", random_model("llama", {}), tokenizer, Scheme.of(4))
    made.file.write_bytes(made.file.read_bytes()[:-1000])
    with pytest.raises(OSError, match="it was cut off or replaced"):
        gguf_logits(made.file, torch.zeros(1, 4, dtype=torch.long))
    (made.folder / MANIFEST).unlink()
    with pytest.raises(OSError, match=r"llama.cpp cannot load .*model.gguf"):
        gguf_logits(made.file, torch.zeros(1, 4, dtype=torch.long))
