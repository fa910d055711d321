"""Loads the scripts of `experiments/` as modules."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "experiments"


def load_script(path):
    """The script at a path below ``experiments/``, as a module that is known by its name while it is used."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
