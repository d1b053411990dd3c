"""Files that cannot be read: what is raised on them, and what is said of it."""

import struct

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

MEND = "mend its files, or name another model"
CONVERT = (
    "convert them once, where you trust them: AutoModelForCausalLM.from_pretrained(OLD,"
    " use_safetensors=False).save_pretrained(NEW)"
)
# What transformers raises on files that are missing, damaged, or not what they say: configs with wrong types,
# cut safetensors and GGUF files, weights in a format whose package is not installed.
UNREADABLE = (
    OSError,
    ImportError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
    SafetensorError,
    struct.error,
)


def reason(error: Exception) -> str:
    """Why transformers could not load something, in one line and in this program's own terms."""
    text = str(error).strip()
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it wants to run Python code of its own, which is not done unasked; read that code, and if you"
            " trust it set model.trust_remote_code=true"
        )
    if "use_safetensors" in text:
        return f"weights must be safetensors; {CONVERT}"
    first, *more = text.splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
