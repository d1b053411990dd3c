"""The paper's figures, their check, and the tables: every cell against results whose values are known."""

import csv
import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY
from matplotlib import image

from endprompt import methods
from endprompt.eval import names, plan, tables

PAPER = yaml.safe_load(tables.PAPER.read_text())
SHARED = REPOSITORY.parent / "shared/paper/tables.yaml"
METHODS = {"ET": "endprompt", "LCEG": "lceg", "LongLoRA": "longlora", "FullFT": "full_length", "PoSE": "pose", "ET(PoSE)": "endprompt_pose"}
TASKS = dict(zip(("niah_s1", "niah_s2", "niah_s3", "niah_m1", "niah_m2", "niah_m3", "niah_mv", "niah_mq"), names.RULER, strict=False)) | {
    "niah_mv": "niah_multivalue", "niah_mq": "niah_multiquery"}
BLOCKS = {"table1": "ruler_mean_4k_64k", "table2": "longbench", "table3": "ruler_ablations", "table4": "longbench_ablations", "table5": "short_text_after_sft",
          "table6": "ruler_4k", "table7": "ruler_8k", "table8": "ruler_16k", "table9": "ruler_32k"}


def transcribed():
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    return yaml.safe_load(SHARED.read_text())


# The paper's own figures

@pytest.mark.parametrize("name", BLOCKS)
def test_printed_figures_digit_for_digit(name):
    kept = TASKS if PAPER["tables"][name]["kind"] == "ruler" else {}
    expected = {METHODS.get(row, row): {kept.get(column, column): value for column, value in cells.items()} for row, cells in transcribed()[BLOCKS[name]].items()}
    assert PAPER["tables"][name]["rows"] == expected


def test_printed_figures_of_the_pictures():
    source, found = transcribed(), PAPER["figures"]
    assert {row: (cells["longbench"], cells["ruler"]) for row, cells in found["figure2"]["rows"].items()} == {
        row: (source["end_prompts"]["longbench_avg"][row], source["end_prompts"]["ruler_avg"][row]) for row in ("EP_1", "EP_2", "EP_3")}
    assert found["figure3"]["rows"] == {METHODS[row]: {"longbench": source["pose_compatibility"]["longbench_avg"][row], "ruler": value}
                                        for row, value in source["pose_compatibility"]["ruler_avg"].items()}
    for size, block in (("64k", "efficiency_64k"), ("32k", "efficiency_32k_read_off_plot")):
        for row, value in source[block]["memory_gb"].items():
            assert found["figure4"]["rows"][f"{METHODS[row]} {size}"] == {"memory_gb": value, "hours": source[block]["hours"][row]}


def test_averages_that_do_not_follow_from_their_columns():
    found = tables.check(PAPER)
    assert {(one["table"], one["row"]): one["follows"] for one in found if not one["holds"]} == {
        ("table2", "lceg"): 33.16, ("table2", "longlora"): 32.16, ("table2", "full_length"): 34.16}
    assert len(found) == 46 and next(one for one in found if (one["table"], one["row"]) == ("table2", "endprompt"))["follows"] == 38.30


def test_a_wrong_average_is_found():
    spoiled = yaml.safe_load(tables.PAPER.read_text())
    spoiled["tables"]["table6"]["rows"]["lceg"]["avg"] += 0.02
    assert ("table6", "lceg") in {(one["table"], one["row"]) for one in tables.check(spoiled) if not one["holds"]}


def test_derived_64k_table():
    found = tables.derived(PAPER)
    assert {row: cells["avg"] for row, cells in found.items()} == {"endprompt": 43.65, "lceg": 53.25, "longlora": 54.80, "full_length": 49.65}
    assert all(0 <= value <= 100 for cells in found.values() for value in cells.values())
    expected = {METHODS[row]: {TASKS.get(column, column): value for column, value in cells.items()} for row, cells in transcribed()["derived_ruler_64k"].items()}
    assert found == expected


# Ours

def write(run, task, length, score, half=1.0, samples=500):
    path = run / "eval" / task / f"{length or 'any'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"length": length, "score": score, "low": score - half, "high": score + half, "samples": samples}
    path.write_text(json.dumps({"question": {"model": "m"}, "date": "2026-01-01", "scores": scores}))


@pytest.fixture
def runs(tmp_path):
    """endprompt: all of RULER at 4096 (task i scores 50 + i) but one task missing at 8192; all of LongBench (10 each); training on a GPU."""
    run = tmp_path / "runs/llama3-8b-64k/endprompt"
    for number, task in enumerate(names.RULER):
        write(run, f"ruler_{task}", 4096, 50.0 + number)
        if task != "fwe":
            write(run, f"ruler_{task}", 8192, 40.0)
    for task in names.LONGBENCH:
        write(run, f"longbench_{task}", 32768, 10.0, 0.0, 200)
    write(run, "mmlu", None, 55.0, 0.4, 14042)
    (run / "train.json").write_text(json.dumps({"device": "8 x GPU", "final_peak_memory_gib": 30.0, "seconds": 7200.0}))
    other = tmp_path / "runs/ablations/EP_2/llama3-8b-64k/endprompt"
    for task in names.LONGBENCH:
        write(other, f"longbench_{task}", 32768, 20.0, 0.0, 200)
    return tmp_path / "runs"


def cells_of(folder, name):
    with (folder / f"{name}.csv").open() as file:
        return {(row["row"], row["column"]): row for row in csv.DictReader(file)}


def test_cells(runs, tmp_path):
    out = tmp_path / "results"
    tables.make(PAPER, runs, "llama3-8b-64k", out)
    found = cells_of(out, "table6")
    single = found["endprompt", "niah_single_2"]
    assert single | {"ours": "51.00", "half_interval": "1.00", "samples": "500", "paper": "100.00", "difference": "-49.00"} == single
    assert (found["endprompt", "avg"]["ours"], found["endprompt", "avg"]["half_interval"], found["endprompt", "avg"]["paper"]) == ("56.00", "0.28", "90.92")
    assert found["lceg", "vt"] | {"ours": "not run", "paper": "95.96", "difference": ""} == found["lceg", "vt"]
    found = cells_of(out, "table7")
    assert found["endprompt", "vt"]["ours"] == "40.00" and found["endprompt", "fwe"]["ours"] == found["endprompt", "avg"]["ours"] == "not run"
    assert all(row["ours"] == "not run" for row in cells_of(out, "table1").values())  # lengths are missing
    found = cells_of(out, "table2")
    assert found["endprompt", "avg"] | {"ours": "10.00", "paper": "38.30", "difference": "-28.30"} == found["endprompt", "avg"]
    assert cells_of(out, "table5")["endprompt", "mmlu"]["ours"] == "55.00" and cells_of(out, "table5")["endprompt", "avg"]["ours"] == "not run"
    assert cells_of(out, "figure2")["EP_2", "longbench"]["ours"] == "20.00" and cells_of(out, "figure2")["EP_3", "longbench"]["ours"] == "not run"
    found = cells_of(out, "figure4")
    assert (found["endprompt 64k", "memory_gb"]["ours"], found["endprompt 64k", "hours"]["ours"], found["full_length 64k", "hours"]["ours"]) == ("32.21", "2.00", "not run")
    text = (out / "table6.md").read_text()
    assert "| endprompt | 50.00 ±1.00 \\| 100.00 \\| -50.00 |" in text and "at least 500 samples" in text
    assert "36.61*" in (out / "table2.md").read_text() and "does not follow from its columns" in (out / "table2.md").read_text()
    assert "Derived, not printed" in (out / "derived_64k.md").read_text() and "43 of 46 follow" in (out / "paper-check.md").read_text()
    for name in ("table2", "table4", "figure2", "figure3", "figure4", "ruler-lengths"):
        assert image.imread(out / f"{name}.png").std() > 0.03, name


def test_markdown_says_what_the_csv_says(runs, tmp_path):
    out = tmp_path / "results"
    for file, _ in tables.make(PAPER, runs, "llama3-8b-64k", out):
        if not file.endswith(".csv"):
            continue
        lines = [line for line in (out / file.replace(".csv", ".md")).read_text().splitlines() if line.startswith("| ")]
        columns = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
        shown = {}
        for line in lines[1:]:
            row, *cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            shown |= {(row, column): cell.split(" / ") for column, cell in zip(columns, cells, strict=True) if cell != "-"}
        found = cells_of(out, file.removesuffix(".csv"))
        assert set(shown) == set(found)
        for key, (mine, theirs, difference) in shown.items():
            row = found[key]
            assert (mine.split(" ±")[0], theirs.rstrip("*"), difference.lstrip("+")) == (row["ours"], row["paper"] or "-", row["difference"] or "-")


def test_nothing_run_is_nothing_shown(tmp_path):
    (tmp_path / "runs").mkdir()
    tables.make(PAPER, tmp_path / "runs", "llama3-8b-64k", tmp_path / "results")
    for name in [*PAPER["tables"], "derived_64k", *PAPER["figures"]]:
        assert {row["ours"] for row in cells_of(tmp_path / "results", name).values()} == {"not run"}


def test_ablations_of_another_recipe_are_not_shown(runs, tmp_path):
    """Figure 2's EP_2 of Llama-3 is none of the tiny model."""
    out = tmp_path / "results"
    tables.make(PAPER, runs, "tiny", out)
    assert cells_of(out, "figure2")["EP_2", "longbench"]["ours"] == "not run" and "compares two models" in (out / "table6.md").read_text()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"scores": {"score": "high"}}'])
def test_damaged_results(runs, tmp_path, capsys, text):
    (runs / "llama3-8b-64k/endprompt/eval/ruler_vt/4096.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        tables.main(["--runs", str(runs), "--out", str(tmp_path / "results")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "ruler_vt/4096.json is no result" in err


def test_no_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tables.main(["--runs", str(tmp_path / "nowhere"), "--out", str(tmp_path / "results")])
    assert stopped.value.code == 2 and "--runs: there is no folder" in capsys.readouterr().err and not (tmp_path / "results").exists()


# The plan and the one command

def planned(capsys, *arguments):
    plan.main(["--recipe", str(REPOSITORY / "recipes/llama3-8b-64k.yaml"), *arguments])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_hours_are_those_of_the_recipes_header(tmp_path, capsys):
    """14.3 h for a short-row method and 27 h for full_length, on 8 A800 at 40 % MFU."""
    found = planned(capsys, "--methods", "endprompt", "full_length", "base", "--out", str(tmp_path))
    assert found["llama3-8b-64k", "endprompt"][0] == "missing" and float(found["llama3-8b-64k", "endprompt"][1]) / 8 == pytest.approx(14.3, abs=0.05)
    assert float(found["llama3-8b-64k", "full_length"][1]) / 8 == pytest.approx(27, abs=0.5) and found["llama3-8b-64k", "base"][:3] == ["to", "evaluate", "0.00"]
    faster = planned(capsys, "--methods", "endprompt", "--out", str(tmp_path), "--gpu", "H100", "--mfu", "0.5")
    assert float(faster["llama3-8b-64k", "endprompt"][1]) == pytest.approx(float(found["llama3-8b-64k", "endprompt"][1]) * 312 * 0.4 / (989 * 0.5), rel=1e-3)


def test_states(tmp_path, capsys):
    run = tmp_path / "llama3-8b-64k/endprompt"
    (run / "model").mkdir(parents=True)
    assert planned(capsys, "--methods", "endprompt", "--out", str(tmp_path))["llama3-8b-64k", "endprompt"][0] == "trained"
    write(run, "passkey", 4096, 50.0)
    assert planned(capsys, "--methods", "endprompt", "--out", str(tmp_path))["llama3-8b-64k", "endprompt"][:4] == ["evaluated", "1", "of", "5"]
    for length in (8192, 16384, 32768, 65536):
        write(run, "passkey", length, 50.0)
    assert planned(capsys, "--methods", "endprompt", "--out", str(tmp_path))["llama3-8b-64k", "endprompt"][0] == "evaluated"


def run_all(tmp_path, *arguments, **environment):
    return subprocess.run(["bash", str(REPOSITORY / "eval/run_all.sh"), *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), **environment})


def test_dry_run_writes_nothing(tmp_path):
    done = run_all(tmp_path, "--dry-run", "--methods", "base", "short", "--lengths", 256, 512, "--samples", 5)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["tiny", "base"], ["tiny", "short"]] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, complaint", [
    (["--bogus", "x"], "bash eval/run_all.sh [--recipe R]"), (["--methods"], "bash eval/run_all.sh [--recipe R]"), (["--methods", "nope"], "invalid choice"),
    (["--recipe", "nowhere.yaml"], "there is no file nowhere.yaml"), (["--tables", "all"], "ablations belong to llama3-8b-64k"), (["--samples", "0"], "eval.samples"),
    (["--model", "short=./nowhere"], "write METHOD=DIR"),
])
def test_bad_arguments(tmp_path, arguments, complaint):
    done = run_all(tmp_path, *arguments)
    assert done.returncode == 2 and complaint in done.stderr and not list(tmp_path.iterdir()), done.stderr


def test_one_command(tmp_path, base):
    """From a model that is there to the tables, in a minute; again, it finds everything done."""
    arguments = ["--methods", "base", "short", "--model", f"short={base}", "--lengths", 128, "--samples", 2, "--set", "eval.tasks=[passkey]"]
    done = run_all(tmp_path, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "results/index.md" in done.stdout and "RULER was not run" in (tmp_path / "results/index.md").read_text()
    found = json.loads((tmp_path / "runs/tiny/short/eval/passkey/128.json").read_text())
    assert found["scores"]["samples"] == 2 and "| short |" in (tmp_path / "results/comparison.md").read_text()
    before = (tmp_path / "runs/tiny/short/eval/passkey/128.json").read_bytes()
    assert run_all(tmp_path, *arguments, OMP_NUM_THREADS="1").returncode == 0 and (tmp_path / "runs/tiny/short/eval/passkey/128.json").read_bytes() == before
    assert set(methods.METHODS) >= {"base", "short"}
