"""On the machine: verifies a part that pack made and puts it into the folder ENDPROMPT_GPU; with the last
one, joins and installs.
"""

import sys
import time
from pathlib import Path

import parts

from endprompt import BadInput


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        print("endprompt: unpack: name one part, for example .gpu/1", file=sys.stderr)
        raise SystemExit(2)
    began, home = time.monotonic(), parts.default_home()
    try:
        missing = parts.unpack(Path(argv[0]), home)
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(
        f"{home}: {argv[0]} is there after {time.monotonic() - began:.1f} s; "
        + (f"missing: {', '.join(map(str, missing))}" if missing else "all parts are, and ready")
    )


if __name__ == "__main__":
    main(sys.argv[1:])
