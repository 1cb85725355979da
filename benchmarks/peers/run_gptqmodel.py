"""gptqmodel's GPTQ and AWQ. Run by the Python that has it, with the path of a request (see measure.py).

Asymmetric groups of 128. GPTQ with act-order and its defaults otherwise; AWQ with its defaults (scales against the
output of the module around the layers, then clipping). The call that is timed also packs the weights into integers.
"""

import os
from typing import Any

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # on two cores it chooses one, which its own loader refuses

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from measure import answer, measured, read_request
from torch import Tensor


def weights(model: Any, method: str) -> dict[str, Tensor]:
    """The weights as the quantized model uses them: unpacked."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if not isinstance(module, BaseQuantLinear):
            continue
        if method == "gptq":
            weight = module.dequantize_weight()
        else:
            weight = dequantize_gemm(
                module.qweight, module.qzeros, module.scales.float(), module.bits, module.group_size
            )
        state[f"{name}.weight"] = weight.T
    return state


def main() -> None:
    request = read_request()
    common = {"bits": 4, "group_size": 128, "sym": False, "offload_to_disk": False, "device": "cpu"}
    if request["method"] == "gptq":
        # The second version stores zero-points as they are; the first, the default, stores them less one.
        config, backend = QuantizeConfig(**common, desc_act=True, format=FORMAT.GPTQ_V2), BACKEND.AUTO
    else:
        # Its default kernel for AWQ needs CUDA; the one that does not takes no float32 (see DTYPE in ../peers.py).
        config, backend = QuantizeConfig(**common, method=METHOD.AWQ, format=FORMAT.GEMM), BACKEND.AWQ_TORCH
    model = GPTQModel.load(request["model"], config, dtype=getattr(torch, request["dtype"]))
    data = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in request["tokens"]
    ]
    _, figures = measured(
        lambda: model.quantize(data, batch_size=request["batch_size"], backend=backend), request["core"]
    )
    settings = {"order": "activation"} if request["method"] == "gptq" else {"clip": True}
    answer(
        request, figures, weights(model.model, request["method"]), ["gptqmodel"], symmetric=False, **settings
    )


if __name__ == "__main__":
    main()
