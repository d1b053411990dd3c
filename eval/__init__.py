"""Evaluation; importable as ``endprompt.eval``."""
