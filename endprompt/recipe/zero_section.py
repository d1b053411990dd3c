"""The names inside the sections of a DeepSpeed file, and the values that each of them takes.

DeepSpeed says of a name that it does not know, or of a value, what pydantic says, and only once the weights
are loaded.  What it knows is read from its files; to import it takes seconds, of every command.
"""

import ast
import difflib
import functools
import importlib.util
import math
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

Wrong = Callable[[str, str], NoReturn]  # (name, why it is refused)
FILES = (
    "runtime/zero/config.py",
    "runtime/zero/offload_config.py",
    "runtime/zero/leaf_module_config.py",
    "runtime/precision_config.py",
    "comm/config.py",
)
ZERO, BF16, FP16 = "DeepSpeedZeroConfig", "DeepSpeedBF16Config", "DeepSpeedFP16Config"
# What the Trainer fills in.  It ends with an error on "auto" anywhere else.
FILLED = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "bf16.enabled",
    "fp16.enabled",
)
DEVICES, DATA_TYPES = ("none", "cpu", "nvme"), ("fp16", "bf16", "fp32")
OFFLOADS = ("offload_optimizer", "offload_param")


class Option(NamedTuple):
    """type: as DeepSpeed's file writes it, or a name of ``SECTIONS``; nullable: whether null may stand for
    nothing; bounds: {"ge": 0} and the like, as pydantic's; instead: the name to write in its place, if there
    is one.
    """

    type: str
    nullable: bool = False
    bounds: dict[str, float] = {}
    instead: str | None = None


FLAG, SOME = Option("bool"), Option("int", bounds={"gt": 0})
# DeepSpeed reads these name by name, and passes over others.
SECTIONS = {
    "a file": {
        "wall_clock_breakdown": Option("bool", nullable=True),
        "memory_breakdown": Option("bool", nullable=True),
        "dump_state": Option("bool", nullable=True),
        "zero_allow_untested_optimizer": Option("bool", nullable=True),
        "zero_force_ds_cpu_optimizer": Option("bool", nullable=True),
        "steps_per_print": Option("int", nullable=True, bounds={"gt": 0}),
        "communication_data_type": Option("data type", nullable=True),
        "aio": Option("aio", nullable=True),
        "checkpoint": Option("checkpoint"),
        "comms_logger": Option("CommsLoggerConfig"),
        "flops_profiler": Option("flops_profiler"),
    },
    "aio": {
        **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), SOME),
        **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), FLAG),
    },
    "checkpoint": {
        "tag_validation": Option("tag_validation"),
        "parallel_write": Option("parallel_write"),
        **dict.fromkeys(("load_universal", "use_node_local_storage"), FLAG),
    },
    "parallel_write": {"pipeline_stage": FLAG},
    "flops_profiler": {
        **dict.fromkeys(("enabled", "detailed"), FLAG),
        "recompute_fwd_factor": Option("float", bounds={"ge": 0}),
        "module_depth": Option("int", bounds={"ge": -1}),
        "output_file": Option("str", nullable=True),
        **dict.fromkeys(("profile_step", "top_modules"), SOME),
    },
}
WORDS = {
    "OffloadDeviceEnum": DEVICES,
    "data type": DATA_TYPES,
    "tag_validation": ("Ignore", "Warn", "Fail"),
}


@functools.cache
def sections() -> dict[str, dict[str, Option]]:
    """``SECTIONS``, and the classes of the DeepSpeed that is installed; without it they are not there, and
    what they say is not checked: nothing trains with it then.
    """
    package = importlib.util.find_spec("deepspeed")
    found = dict(SECTIONS)
    if package is None or package.origin is None:
        return found
    for path in (Path(package.origin).parent / name for name in FILES):
        if path.is_file():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and "Enum" not in node.name:
                    found[node.name] = dict(_fields(node))
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Option]]:
    """(name, what it takes) of the fields of a class of pydantic's.  Of a field with an alias, the alias: the
    Trainer and this program look for no other.
    """
    for line in node.body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        name, kind = line.target.id, ast.unparse(line.annotation)
        nullable = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]") if nullable else kind
        said = {
            keyword.arg: keyword.value
            for keyword in getattr(line.value, "keywords", [])
            if isinstance(line.value, ast.Call) and keyword.arg
        }
        bounds = {key: float(ast.literal_eval(said[key])) for key in ("ge", "gt", "le", "lt") if key in said}
        option = Option(kind, nullable, bounds, _replaced(said.get("json_schema_extra")))
        alias = ast.literal_eval(said["alias"]) if "alias" in said else None
        if alias:
            yield alias, option
        yield name, option._replace(instead=alias) if alias else option


def _replaced(extra: ast.expr | None) -> str | None:
    """The name that DeepSpeed's own note on a deprecated field gives; None if it is not deprecated."""
    if not isinstance(extra, ast.Dict):
        return None
    said = {
        key.value: value.value
        for key, value in zip(extra.keys, extra.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }
    new = str(said.get("new_param", "another name"))
    alias = f"stage3_{new}" if new.startswith("gather_16bit") else new
    return alias if said.get("deprecated") else None


def check(kind: str, section: Any, where: str, wrong: Wrong) -> None:
    """Raises BadInput, by ``wrong``, unless ``section`` is a mapping of what DeepSpeed's ``kind`` takes.

    where: its dotted name with a dot behind it; empty for the file itself.
    """
    known = sections().get(kind)
    if known is None:
        return
    for name, value in section.items():
        option, full = known.get(name), f"{where}{name}"
        if option is None:
            near = difflib.get_close_matches(str(name), [key for key in known if not known[key].instead], 1)
            mend = f", or write {near[0]}" if near else ""
            wrong(full, f"is unknown to DeepSpeed; remove it{mend}")
        if option.instead:
            wrong(full, f"is another name of {option.instead}; write that")
        if value == "auto" and full not in FILLED:
            wrong(full, 'is "auto", and nothing fills it in; give a value, or remove it')
        if value == "auto" or value is None and option.nullable:
            continue
        if option.type in sections():
            if not isinstance(value, dict):
                names = ", ".join(sections()[option.type])
                wrong(full, f"must be a mapping of {names} (given: {reprlib.repr(value)})")
            check(option.type, value, f"{full}.", wrong)
        elif wanted := _unlike(option, value):
            more = ' or "auto"' if full in FILLED else ""
            wrong(full, f"must be {wanted}{more} (given: {reprlib.repr(value)})")


def _unlike(option: Option, value: Any) -> str | None:
    """What is wanted in place of ``value``, None if it will do, or its type is not one that is known here."""
    if words := WORDS.get(option.type):
        given = value.lower() if isinstance(value, str) and option.type != "OffloadDeviceEnum" else value
        fitting = isinstance(given, str) and given in [
            word if option.type == "OffloadDeviceEnum" else word.lower() for word in words
        ]
        return None if fitting else f"one of {', '.join(words)}"
    if option.type == "bool":
        return None if isinstance(value, bool) else "true or false"
    if option.type in ("int", "float"):
        number = type(value) in (int, float) and math.isfinite(value)
        if number and (option.type == "float" or value == int(value)) and _within(option.bounds, value):
            return None
        return ("a whole number" if option.type == "int" else "a number") + _said(option.bounds)
    if option.type in ("str", "Path"):
        return None if isinstance(value, str) and value else "text"
    if option.type in ("list", "List[str]"):
        texts = value if isinstance(value, list) else [value] if option.type == "List[str]" else [None]
        return None if all(isinstance(one, str) for one in texts) else "a list of names"
    return None


def _within(bounds: dict[str, float], value: float) -> bool:
    return (
        bounds.get("ge", -math.inf) <= value <= bounds.get("le", math.inf)
        and bounds.get("gt", -math.inf) < value < bounds.get("lt", math.inf)
    )  # fmt: skip


def _said(bounds: dict[str, float]) -> str:
    words = {"ge": "from {:g} on", "gt": "above {:g}", "le": "up to {:g}", "lt": "below {:g}"}
    return "".join(f" {words[key].format(value)}" for key, value in bounds.items())


def check_zero(zero: dict[str, Any], wrong: Wrong) -> None:
    """``check`` of ``zero_optimization``, whose stage is known to be one, and of what its values mean beside
    each other.
    """
    if zero.get("zenflow") is not None:
        why = "makes steps of earlier gradients, and was not tried here; remove it"
        wrong("zero_optimization.zenflow", why)
    if zero.get("compute_grad_norm") is False:
        why = "is false, and the guard against gradients that are no numbers reads the norm; remove it"
        wrong("zero_optimization.compute_grad_norm", why)
    for name in OFFLOADS:
        if zero.get(name) is not None:
            _check_offload(name, zero[name], zero.get("stage", 0), wrong)
    check(ZERO, {key: value for key, value in zero.items() if key != "stage"}, "zero_optimization.", wrong)


def _check_offload(name: str, section: Any, stage: int, wrong: Wrong) -> None:
    """``check_zero`` of a section ``name`` that says where something is kept."""
    full = f"zero_optimization.{name}"
    if not isinstance(section, dict):
        wrong(full, f'must be a mapping, such as {{"device": "cpu"}} (given: {reprlib.repr(section)})')
    device, least = section.get("device"), 3 if name == "offload_param" else 1
    if device not in DEVICES:
        given = f" (given: {reprlib.repr(device)})" if "device" in section else ", and is missing"
        wrong(f"{full}.device", f"must be one of {', '.join(DEVICES)}{given}")
    if device == "none":
        return
    if stage < least:
        wrong(full, f"does nothing at stage {stage}; take stage {least}, or remove it")
    if device == "nvme" and not section.get("nvme_path"):
        wrong(f"{full}.nvme_path", "is missing; name a folder on the NVMe device")
    if stage < 3 and section.get("ratio", 1) != 1:
        wrong(f"{full}.ratio", f"is of stage 3, and this is stage {stage}; remove it")
