"""cnnjax: a convolutional network in JAX that tells pneumonia from normal on chest radiographs.

The names in `__all__` are the public library; `docs/api.md` shows how to use them. They are
imported on first use, so `import cnnjax` alone does not start JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnnjax import recipes as recipes
    from cnnjax.config import (
        AugmentConfig,
        Config,
        DataConfig,
        DeviceConfig,
        ModelConfig,
        OperatingConfig,
        TrainConfig,
    )
    from cnnjax.data.decode import DecodeError, decode
    from cnnjax.errors import InputError, TrainingError
    from cnnjax.evaluation.predict import Predictor
    from cnnjax.metrics import Evaluation, evaluate
    from cnnjax.operating import OperatingPoint, SoftmaxPoint
    from cnnjax.run.result import Result
    from cnnjax.train import fit

__version__ = "0.4.0"

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DecodeError",
    "DeviceConfig",
    "Evaluation",
    "InputError",
    "ModelConfig",
    "OperatingConfig",
    "OperatingPoint",
    "Predictor",
    "Result",
    "SoftmaxPoint",
    "TrainConfig",
    "TrainingError",
    "decode",
    "evaluate",
    "fit",
]

_HOMES = {
    "cnnjax.data.decode": ("DecodeError", "decode"),
    "cnnjax.errors": ("InputError", "TrainingError"),
    "cnnjax.metrics": ("Evaluation", "evaluate"),
    "cnnjax.operating": ("OperatingPoint", "SoftmaxPoint"),
    "cnnjax.evaluation.predict": ("Predictor",),
    "cnnjax.run.result": ("Result",),
    "cnnjax.train": ("fit",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return import_module("cnnjax.recipes")
    if name not in __all__:
        raise AttributeError(f"module 'cnnjax' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF.get(name, "cnnjax.config")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
