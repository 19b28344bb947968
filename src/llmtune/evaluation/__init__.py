"""Measure a model: held-out loss, exact answers and generated text."""
