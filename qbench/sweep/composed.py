"""The config behind a sub-command's `key=value` arguments."""

from typing import Any

from qbench.errors import UsageError


def config_of(arguments: list[str]) -> dict[str, Any]:
    """The config that `key=value` arguments make over the defaults of `conf/config.yaml`, as plain values."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qbench.sweep.compose import plain
    from qbench.sweep.explain import explain
    from qbench.sweep.shipped import CONF

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=arguments, return_hydra_config=True)
            return plain(config, config.hydra.runtime.choices["algo"])
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error)) from error
