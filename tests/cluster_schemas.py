"""Schemas of the files in cluster/, read from the packages that the programs' authors publish.  They are not
installed: `make` lays the wheels into .venv/schema-wheels, and nothing of them runs but SkyPilot's list of
schemas.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

WHEELS = Path(sys.prefix) / "schema-wheels"


def missing() -> str | None:
    """Why nothing can be validated here, or None."""
    if not importlib.util.find_spec("jsonschema"):
        return "jsonschema is not installed (the dev extra)"
    absent = [name for name in ("kubernetes", "kubeflow_training", "skypilot") if not _wheels(name)]
    return f"no wheel of {', '.join(absent)} in {WHEELS} (make test)" if absent else None


def _wheels(name: str) -> list[Path]:
    return sorted(WHEELS.glob(f"{name}-*.whl"))


# -- Kubernetes and Kubeflow ---------------------------------------------------------------------------------


@functools.cache
def _models() -> dict[str, tuple[zipfile.ZipFile, str]]:
    """By a model's name in small letters: the wheel and the file that hold its class."""
    found = {}
    for name in ("kubernetes", "kubeflow_training"):
        wheel = zipfile.ZipFile(_wheels(name)[-1])
        for path in wheel.namelist():
            if "/models/" in path:
                found[Path(path).stem.replace("_", "")] = (wheel, path)
    return found


def _type(name: str, needed: set[str]) -> dict:
    plain = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "datetime": "string"}
    if inner := re.fullmatch(r"list\[(.*)\]", name):
        return {"type": "array", "items": _type(inner[1], needed)}
    if inner := re.fullmatch(r"dict\(str, (.*)\)", name):
        return {"type": "object", "additionalProperties": _type(inner[1], needed)}
    if name in plain:
        return {"type": plain[name]}
    if name in ("object", "Quantity"):  # a number or a word
        return {}
    needed.add(name)
    return {"$ref": f"#/$defs/{name}"}


def _model(name: str, needed: set[str]) -> dict:
    """The schema of a generated class, which says its keys, their types and, by what its setters refuse,
    which must be there.  Keys that it does not know are refused."""
    own = re.sub(r"^K8sIoApi[A-Z][a-z]+(?=V\d)", "", name)  # as Kubeflow calls what Kubernetes calls V2...
    wheel, path = _models()[own.lower()]
    source = wheel.read(path).decode()
    told = {
        what: ast.literal_eval(re.search(rf"^    {what} = (\{{.*?\}})", source, re.S | re.M)[1])
        for what in ("openapi_types", "attribute_map")
    }
    keys = told["attribute_map"]
    required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", source)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {keys[one]: _type(kind, needed) for one, kind in told["openapi_types"].items()},
        "required": sorted({keys[one] for one in required}),
    }


def model(name: str) -> dict:
    """The JSON schema of Kubernetes' or Kubeflow's model ``name``, with those that it is made of."""
    made: dict[str, dict] = {}
    needed = {name}
    while waiting := needed - made.keys():
        for one in waiting:
            made[one] = _model(one, needed)
    return {"$ref": f"#/$defs/{name}", "$defs": made}


# -- SkyPilot ------------------------------------------------------------------------------------------------


class _Empty(types.ModuleType):
    """A module of SkyPilot that lists what is of no matter here, as clouds and storage: nothing."""

    def __getattr__(self, name: str):
        if name == "__version__":
            return "0"
        if name.startswith("__") or f"{self.__name__}.{name}" in _REAL:
            raise AttributeError(name)
        return mock.MagicMock()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sky" and name not in _REAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Empty(spec.name)
        module.__path__ = [f"{_wheels('skypilot')[-1]}/{spec.name.replace('.', '/')}"]
        return module

    def exec_module(self, module):
        pass


_REAL = (
    "sky.utils.schemas",
    "sky.utils.kubernetes_enums",
    "sky.skylet.constants",
    "sky.setup_files.dependencies",
)


@functools.cache
def skypilot() -> dict[str, dict]:
    """SkyPilot's schemas of a task file and of its resources."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        schemas = importlib.import_module("sky.utils.schemas")
        return {"task": schemas.get_task_schema(), "resources": schemas.get_resources_schema()}
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sky"]:
            del sys.modules[name]
