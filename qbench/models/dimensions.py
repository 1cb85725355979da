"""What is known of a model without its weights: its sizes, and which layers are never quantized.

From its config, or where that is not at hand, from the catalogue's dimensions.
"""

from dataclasses import dataclass
from typing import Any

import torch

from qbench.data.library import unreachable
from qbench.errors import first_line
from qbench.models.catalogue import entries
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.models.shape import sizes_of
from qbench.models.sizes import Shape


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model.

    Attributes:
        kept: Linear layers that no algorithm quantizes, routers aside, by their name in a block.
        source: Where the sizes are from.
    """

    shape: Shape
    kept: frozenset[str]
    source: str


def dimensions_of(model: ModelRef) -> Dimensions:
    """Read the sizes of a model; no weights are read.

    Raises:
        OSError: If its config is neither here nor on the hub, and the catalogue does not have its dimensions.
        NotImplementedError: If something in the model is not understood; says what.
    """
    config, source = _config(model)
    skeleton = skeleton_of(config, model.trust_remote_code)
    shape = sizes_of(skeleton)
    return Dimensions(shape, kept_in(skeleton, shape), source)


def skeleton_of(config: Any, trust_remote_code: bool = False) -> Any:
    """A model on the `meta` device, its experts as transformers has them: to take them apart takes long."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Every architecture has this attention, and it needs no library that this machine may lack.
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    return model.eval()


def kept_in(skeleton: Any, shape: Shape) -> frozenset[str]:
    """Linear layers that stay in floating point in whatever scheme: those of which the family says so.

    Raises:
        NotImplementedError: If none of the model's layers can be quantized.
    """
    family, found = family_of(skeleton), set[str]()
    for block in shape.blocks:
        quantized = set(family.linears(skeleton.get_submodule(family.blocks)[block.at[0]]))
        found |= {
            x.name for x in block.linears if x.role not in ("router", "expert") and x.name not in quantized
        }
    return frozenset(found)


def _config(model: ModelRef) -> tuple[Any, str]:
    from transformers import AutoConfig

    source = str(model.folder or model.id)
    alone = model.folder is None and bool(unreachable())
    try:
        config = AutoConfig.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code, local_files_only=alone
        )
        return config, f"config of {source}"
    except OSError as error:
        why = (unreachable() if alone else "") or first_line(error)
        entry = next((each for each in entries().values() if each.id == model.id and each.config), None)
        if entry is None:
            raise OSError(
                f"the config of {model.id!r} is neither on this machine nor to be had from the hub ({why}), and the "
                "catalogue does not have its dimensions; fetch it where there is a network, or give a folder: "
                "model=hf model.id=<folder>"
            ) from error
        return AutoConfig.for_model(entry.family, **entry.dimensions), "dimensions of the catalogue"
