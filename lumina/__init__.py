"""LuminaAI: train dense, Mixture-of-Experts, Mixture-of-Depths and hybrid language models.

    import lumina

    run = lumina.Trainer("debug", data="x.txt", **{"train.steps": 300}).fit()
    print(lumina.load(run).generate("Once"))

The names below are imported when they are first used, so that `import lumina` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "Trainer", "UserError", "load", "open_run", "plan"]

if TYPE_CHECKING:
    from lumina.api import Trainer, load
    from lumina.byhand import open_run
    from lumina.errors import UserError
    from lumina.planning import plan
    from lumina.run.folder import Run

_HOME = {
    "Trainer": "api",
    "load": "api",
    "open_run": "byhand",
    "Run": "run.folder",
    "UserError": "errors",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"lumina.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lumina' has no attribute {name!r}")
