"""miniserve: a compact LLM serving engine for agents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniserve.llm import LLM
    from miniserve.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import miniserve` itself takes no time."""
    if name not in __all__:
        raise AttributeError(f"module 'miniserve' has no attribute {name!r}")
    return getattr(import_module("miniserve.llm" if name == "LLM" else "miniserve.sampling_params"), name)
