"""All methods: whatever the files of this folder register."""

import importlib
import pkgutil

from endprompt import methods
from endprompt.methods.base import METHODS, Method, get, register

# As tables and pictures list them; what is not named here comes after, by its name.
ORDER = (
    "base interpolation short endprompt endprompt_random pose endprompt_pose full_length lceg longlora"
    " pose_sharp pose_recall pose_matched randpos cream longrecipe e2llm perturbed self_distil longrope2"
    " drope"
).split()

for _module in pkgutil.iter_modules(methods.__path__, "endprompt.methods."):
    importlib.import_module(_module.name)

_known = dict(METHODS)
METHODS.clear()
METHODS.update({name: _known.pop(name) for name in ORDER})
METHODS.update(sorted(_known.items()))
UNTRAINED = [name for name, method in METHODS.items() if not method.trained]

__all__ = ["METHODS", "UNTRAINED", "Method", "get", "register"]
