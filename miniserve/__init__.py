"""miniserve: a compact LLM serving engine for agents."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniserve.llm import LLM
    from miniserve.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import miniserve` itself takes no time."""
    if name == "LLM":
        from miniserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from miniserve.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'miniserve' has no attribute {name!r}")
