"""qbench's GPTQ and AWQ as `algo=gptq` and `algo=awq` have them, with the path of a request (see measure.py)."""

from hydra.utils import instantiate
from measure import answer, load_model, measured, read_request
from omegaconf import OmegaConf

from qbench.engine import quantize
from qbench.quant.scheme import Scheme
from qbench.sweep.shipped import CONF


def main() -> None:
    request = read_request()
    config = OmegaConf.load(CONF / "algo" / f"{request['method']}.yaml")
    algorithm, scheme = instantiate(config, _convert_="all"), Scheme.parse("w4a16g128")
    model = load_model(request["model"], request["dtype"])
    _, figures = measured(
        lambda: quantize(model, algorithm, scheme, request["tokens"], batch_size=request["batch_size"]),
        request["core"],
    )
    answer(request, figures, model.state_dict(), ["qbench"], **OmegaConf.to_container(config))


if __name__ == "__main__":
    main()
