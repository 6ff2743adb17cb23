"""Generative models, one system a file; ``python -m models`` is the demo."""
