"""docs/guide.md as a newcomer follows it: every block of commands, in its order, on the tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, tiny_documents, write_jsonl

GUIDE = (REPOSITORY / "docs/guide.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.S | re.M)
NAMES = ("MODEL", "TEXT", "TARGET", "TOKENS", "MEMORY")


def test_the_guide_says_first_what_one_has():
    assert re.findall(r"^(\w+)=", BLOCKS[0], re.M) == [*NAMES]
    assert max(map(len, GUIDE.splitlines())) <= 110


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_every_command_of_the_guide(base, tmp_path):
    write_jsonl(tmp_path / "text.jsonl", tiny_documents(160, 60))
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    values = dict(zip(NAMES, (base, "text.jsonl", 2048, 16384, 24), strict=True))
    given = "\n".join(f"{name}={value}" for name, value in values.items())
    fewer = "sed -i 's/samples: 100/samples: 4/' my.yaml"
    script = "\n".join(["set -euxo pipefail", given, BLOCKS[1], fewer, *BLOCKS[2:]])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for name in (
        "runs/my/pose_matched/coverage.png",
        "runs/my/pose_matched/model/config.json",
        "runs/my/pose_matched/eval/distance/2048.json",
        "runs/my/base/eval/passkey/2048.json",
        "report.html",
        "served/README.md",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
