"""Whether a scheme fits a model, before its weights are loaded."""

from typing import Any

from qbench.errors import Unsuitable
from qbench.models.attention import check_kv, irreplaceable
from qbench.models.family import Family, family_of
from qbench.quant.scheme import Scheme, fits
from qbench.quant.spec import QuantSpec


def check_fit(model: Any, scheme: Scheme) -> None:
    """Refuse a model (a skeleton will do) that is not described, or that the scheme does not fit.

    Raises:
        NotImplementedError: If the architecture is not described.
        Unsuitable: If a group size does not divide an input width; names the layer and the width.
        ValueError: If an override is for no layer of the model.
    """
    family = family_of(model)
    blocks = model.get_submodule(family.blocks)
    layers = [(index, name) for index, block in enumerate(blocks) for name in family.linears(block)]
    for pattern, _ in scheme.overrides:
        if not any(fits(pattern, index, name) for index, name in layers):
            raise ValueError(
                f"scheme.overrides: {pattern!r} fits no layer; layers are called {layers[0][0]}.{layers[0][1]} to "
                f"{layers[-1][0]}.{layers[-1][1]}"
            )
    check_kv(family, scheme.kv, scheme.bmm)
    _check_attention(model, family, scheme)
    for index, name in layers:
        layer, width = scheme.layer(index, name), blocks[index].get_submodule(name).in_features
        _check_groups("group_size", layer.weight, name, width)
        _check_groups("act_group_size", layer.activation, name, width)


def _check_attention(model: Any, family: Family, scheme: Scheme) -> None:
    inside = scheme.kv is not None or scheme.bmm is not None
    if inside and family.attention == "registry" and (other := irreplaceable(model)):
        raise Unsuitable("quantization inside attention needs model.attn=sdpa", f"model.attn is {other}")


def _check_groups(key: str, spec: QuantSpec | None, name: str, width: int) -> None:
    if spec is not None and spec.group_size and width % spec.group_size:
        raise Unsuitable(
            f"{key}={spec.group_size} does not divide the {width} inputs of {name}",
            f"choose a divisor of {width}, or {'group_size=-1 for one group per row' if key == 'group_size' else 'none'}",
        )
