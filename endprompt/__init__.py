"""Context-window extension of LLaMA-family models from short rows (EndPrompt, arXiv 2605.14589)."""

from endprompt.errors import BadInput, Failure

__version__ = "0.1.0"
RECOMMENDED = "pose_matched"  # the method of init, the README and the demo
__all__ = ["RECOMMENDED", "BadInput", "Failure"]
