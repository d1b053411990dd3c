"""Puts result files of one machine into its one file: those of endprompt.eval.efficiency by their shape,
those of the benchmarks here by their name.

    # a GPU's: all that benchmarks/gpu.sh left in its folder
    python benchmarks/gather.py benchmarks/results/MACHINE.json RESULT.json ...

What is there already under the same name is replaced; the files must come from one kind of device.
"""

import argparse
import json
import sys
from pathlib import Path

from endprompt import BadInput, shards


def devices(found: dict) -> set[str]:
    """The kinds of device of a machine's results; a processor's number of threads is left out."""
    parts = [
        *(value for key, value in found.items() if key != "efficiency"),
        *(found.get("efficiency") or {}).values(),
    ]
    return {part["device"].partition(",")[0] for part in parts if part.get("device")}


def collected(there: dict, results: dict[str, dict]) -> dict:
    """``there`` with ``results`` (by file name) put into it.  Raises BadInput for a file of another kind, or
    of another device.
    """
    found = {**there, "efficiency": dict(there.get("efficiency") or {})}
    for name, result in results.items():
        if "entries" in result and "shape" in result:
            found["efficiency"][result["shape"]] = result
        elif result and all(isinstance(value, dict) and "device" in value for value in result.values()):
            found |= result
        else:
            raise BadInput(f"gather: {name} is no result of a benchmark")
        if len(kinds := devices(found)) > 1:
            raise BadInput(
                f"gather: {name} is of another device than what is there ({' and '.join(sorted(kinds))}); one"
                " file a machine"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("into", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        there = json.loads(arguments.into.read_text()) if arguments.into.exists() else {}
        found = collected(there, {str(path): json.loads(path.read_text()) for path in arguments.results})
        arguments.into.parent.mkdir(parents=True, exist_ok=True)
        shards.write_json(arguments.into, found)
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, ValueError) as error:
        print(f"endprompt: gather: a result cannot be read: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{arguments.into}: {', '.join(sorted(set(found) - {'efficiency'} | set(found['efficiency'])))}")


if __name__ == "__main__":
    main()
