"""The experiment: Megalodon against a Llama on byte-level text."""

from typing import Any


def __getattr__(name: str) -> Any:
    """What the published scripts import from here, loaded when asked for: torch takes seconds."""
    if name in ("Llama", "MegalodonLM", "get_optimal_device", "model_summary"):
        from megalodon_enwik8 import published

        return getattr(published, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
