"""Making the Auto classes of Transformers know a mixture, without importing Transformers before the user does.

Transformers finds the class of a config by the name that CONFIG_MAPPING_NAMES has for its model_type, in the module
`transformers.models.<model_type>`. Both lead here to this package, whose names are loaded when they are first used; the
class of the model is registered when its config is loaded (api.py).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .constants import MODEL_TYPE

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
HOME = f"transformers.models.{MODEL_TYPE.replace('-', '_')}"
CONFIG_CLASS = "DyLoRAMoEConfig"


def register_with_transformers() -> None:
    """Register the config now if Transformers has been imported, and otherwise as soon as it is."""
    if CONFIGURATIONS in sys.modules:
        _register(sys.modules[CONFIGURATIONS])
    else:
        sys.meta_path.insert(0, _Afterwards())


def _register(configurations: ModuleType) -> None:
    sys.modules[HOME] = sys.modules[__package__]
    configurations.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG_CLASS
    import logging  # here: Transformers has loaded it, and importing this package by itself is light

    # PEFT imports bitsandbytes next, which warns on some CPUs of a kernel that it lacks, and that is not used.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _Afterwards:
    """Registers the config once Transformers has imported its configurations: a finder of `sys.meta_path`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
