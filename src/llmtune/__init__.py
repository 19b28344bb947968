"""llmtune: fine-tune causal language models from one layered YAML config, with training that can be checked."""

__version__ = "0.1.0"
