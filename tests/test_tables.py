"""The paper's figures as printed, recomputed, and beside ours; the plan of runs; and the one command around
it.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction

import pytest
import yaml
from conftest import REPOSITORY, run_main
from matplotlib import image
from safetensors.torch import load_file, save_file

from endprompt import BadInput, methods
from endprompt.evaluation import figures, longbench_scores, question, results, run, scored_model
from endprompt.evaluation.results import Estimate, Missing
from endprompt.planning import estimate
from endprompt.recipe import schema, task_names
from endprompt.recipe.experiment import Experiment
from endprompt.reports import paper, plan, plan_jobs, recipe_page, tables

SOURCE = REPOSITORY.parent / "shared/paper/tables.yaml"
METHODS = {
    "ET": "endprompt",
    "LCEG": "lceg",
    "LongLoRA": "longlora",
    "FullFT": "full_length",
    "PoSE": "pose",
    "ET(PoSE)": "endprompt_pose",
}
TASKS = {
    "niah_s1": "niah_single_1",
    "niah_s2": "niah_single_2",
    "niah_s3": "niah_single_3",
    "niah_m1": "niah_multikey_1",
    "niah_m2": "niah_multikey_2",
    "niah_m3": "niah_multikey_3",
    "niah_mv": "niah_multivalue",
    "niah_mq": "niah_multiquery",
}
BLOCKS = {
    "table_1": "ruler_mean_4k_64k",
    "table_2": "longbench",
    "table_3": "ruler_ablations",
    "table_4": "longbench_ablations",
    "table_5": "short_text_after_sft",
    "table_6": "ruler_4k",
    "table_7": "ruler_8k",
    "table_8": "ruler_16k",
    "table_9": "ruler_32k",
    "table_derived_64k": "derived_ruler_64k",
}
TURNED = {
    "figure_2": "end_prompts",
    "figure_3": "pose_compatibility",
    "figure_4_64k": "efficiency_64k",
    "figure_4_32k": "efficiency_32k_read_off_plot",
}  # {column: {row: figure}}
LENGTHS = (4096, 8192, 16384, 32768, 65536)


# What is printed


def named(block):
    return {
        METHODS.get(row, row): {TASKS.get(column, column): value for column, value in cells.items()}
        for row, cells in block.items()
    }


def turned(block):
    found = {}
    for column, cells in block.items():
        for row, value in cells.items():
            found.setdefault(METHODS.get(row, row), {})[
                "speedup" if column.startswith("speedup") else column
            ] = value
    return found


def test_printed_figures_are_the_papers_digit_for_digit():
    if not SOURCE.exists():
        pytest.skip(f"{SOURCE} is not on this machine")
    source = yaml.load(SOURCE.read_text(), yaml.BaseLoader)  # all values as the text they are
    expected = {
        **{name: named(source[block]) for name, block in BLOCKS.items()},
        **{name: turned(source[block]) for name, block in TURNED.items()},
    }
    assert {name: table.printed for name, table in paper.tables().items()} == expected
    used = {*BLOCKS.values(), *TURNED.values(), "base_model", "extension", "derived_longbench_task_weighted"}
    assert source.keys() == used
    for row, value in source["derived_longbench_task_weighted"].items():
        average = next(
            average for average in paper.averages(paper.tables()["table_2"]) if average.row == METHODS[row]
        )
        assert f"{float(average.recomputed):.2f}" == value


def test_every_row_has_its_columns_and_its_run():
    for table in paper.tables().values():
        assert table.source and table.title and table.rows.keys() == table.printed.keys()
        for row, cells in table.printed.items():
            assert set(cells) <= set(table.parts) and table.rows[row].method in methods.METHODS
            assert (REPOSITORY / f"recipes/{table.rows[row].recipe}.yaml").exists()
            schema.load(
                REPOSITORY / f"recipes/{table.rows[row].recipe}.yaml",
                [*table.rows[row].overrides, *paper.load()["evaluate"]],
            )
            assert set(table.read_off_plot.get(row, [])) <= set(cells)
        assert all(set(tasks) <= set(task_names.TASKS) for tasks in table.parts.values())
        assert not table.columns.startswith("ruler") or table.lengths
    folders = {(run.suffix, run.recipe, run.method) for run in paper.runs().values()}
    assert len(folders) == len(paper.runs()), "two runs of one folder"


def test_which_averages_follow():
    every = [
        average
        for table in paper.tables().values()
        for average in paper.averages(table)
        if table.name != "table_derived_64k"
    ]
    assert len(every) == 46
    assert [(average.table, average.row) for average in every if not average.follows] == [
        ("table_2", "lceg"),
        ("table_2", "longlora"),
        ("table_2", "full_length"),
    ]
    found = {average.row: average.recomputed for average in paper.averages(paper.tables()["table_2"])}
    # Weights 3, 3, 3, 3, 2, 2 of 16.
    three, two = (
        sum(map(Fraction, figures)) for figures in (("32.03", "30.81", "26.04", "68.04"), ("4.54", "66.48"))
    )
    assert found["endprompt"] == (3 * three + 2 * two) / 16 == Fraction("38.30")


def test_a_wrong_average_is_found():
    table = paper.tables()["table_6"]
    changed = {**table.printed, "endprompt": {**table.printed["endprompt"], "avg": "90.94"}}
    average = paper.averages(
        paper.Table(table.name, table.title, table.source, table.columns, changed, table.rows, table.lengths)
    )[0]
    assert not average.follows and float(average.recomputed) == pytest.approx(90.9169, abs=1e-4)


def test_the_table_at_64k_is_derived():
    derived = paper.tables()["table_derived_64k"].printed
    cells = [float(value) for row in derived.values() for column, value in row.items() if column != "avg"]
    assert len(cells) == 52 and min(cells) >= 0 and max(cells) <= 100
    assert {row: cells["avg"] for row, cells in derived.items()} == {
        "endprompt": "43.65",
        "lceg": "53.25",
        "longlora": "54.80",
        "full_length": "49.65",
    }
    assert min(derived, key=lambda row: float(derived[row]["avg"])) == "endprompt"
    assert derived["endprompt"]["niah_multikey_3"] == "5.80"  # 5 x 62.92 - 96.80 - 92.00 - 67.00 - 53.00


def test_rows_that_differ_by_a_constant():
    assert paper.shifted_rows() == [
        ("table_2", "lceg", "table_2", "longlora", "-1.00"),
        ("table_2", "lceg", "table_2", "full_length", "+1.00"),
        ("table_2", "lceg", "table_4", "llama-2-7b", "-2.00"),
    ]


@pytest.mark.parametrize(
    "name, row, column, value, complaint",
    [
        (
            "table_3",
            "main",
            "niah_single",
            "94.83",
            "Table 3, main, niah_single: 94.83, but 94.73 by Table 1",
        ),
        ("table_4", "main", "code", "66.40", "Table 4, main, code: 66.40, but 66.48 by Table 2"),
        ("table_3", "main", "avg", "77.03", "Table 3, main, avg: 77.03, but 76.03 by Table 1"),
        (
            "figure_3",
            "endprompt",
            "ruler_avg",
            "76.02",
            "Figure 3, endprompt, ruler_avg: 76.02, but 76.03 in Table 1",
        ),
        (
            "figure_4_64k",
            "lceg",
            "hours",
            "30.0",
            "Figure 4, lceg: 30.0 h read off the plot are not 1.77 times 14.5 h",
        ),
        ("table_derived_64k", "lceg", "vt", "-0.20", "derived 64K, lceg, vt: -0.20 is outside"),
    ],
)
def test_figures_that_contradict_one_another_are_found(monkeypatch, name, row, column, value, complaint):
    assert paper.disagreements() == []
    changed = dict(paper.tables())
    table = changed[name]
    printed = {**table.printed, row: {**table.printed[row], column: value}}
    changed[name] = paper.Table(
        table.name, table.title, table.source, table.columns, printed, table.rows, table.lengths
    )
    monkeypatch.setattr(paper, "tables", lambda: changed)
    assert any(item.startswith(complaint) for item in paper.disagreements()), paper.disagreements()


def test_report_says_it_all():
    text = paper.report()
    assert "46 printed averages, of which 3 do not follow" in text and text.count("**no**") == 3
    assert (
        "| Table 2 | lceg | 36.61 | 33.157 | **no** |" in text
        and "| Table 2 | endprompt | 38.30 | 38.300 | yes |" in text
    )
    assert (
        "longlora 54.80, lceg 53.25, full_length 49.65, endprompt 43.65" in text
        and "Table 4, llama-2-7b = Table 2, lceg - 2.00" in text
    )


def test_categories_are_longbenchs():
    assert {column: len(tasks) for column, tasks in paper.COLUMNS["longbench"].items()} == {
        "single_doc_qa": 3,
        "multi_doc_qa": 3,
        "summarization": 3,
        "few_shot": 3,
        "synthetic": 2,
        "code": 2,
        "avg": 16,
    }
    assert set(longbench_scores.CATEGORIES) == set(paper.COLUMNS["longbench"]) - {"avg"}


# Ours beside it, from made-up results


def write(
    run_folder,
    task,
    length,
    score,
    half=2.0,
    samples=500,
    model="m",
    date="2026-01-01T00:00:00+00:00",
    folder="eval",
    **question,
):
    path = run_folder / folder / task / f"{length or 'any'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if task.startswith("ruler_"):
        question.setdefault("generator", "2024, linear search")
    scores = {
        "length": length,
        "metric": "some",
        "score": score,
        "low": score - half,
        "high": score + 2 * half,
        "samples": samples,
    }
    if task == "passkey":
        scores |= {
            "cells": [
                {"depth": 0.0, "correct": round(score / 10), "total": 10},
                {"depth": 1.0, "correct": 10, "total": 10},
            ]
        }
    if task in task_names.SHORT_TEXT:
        scores |= {"few_shots": 5}
    path.write_text(
        json.dumps(
            {
                "question": {
                    "task": task,
                    "length": length,
                    "model": {"name_or_path": model, "fingerprint": model},
                    **question,
                },
                "recipe": run_folder.parent.name,
                "method": run_folder.name,
                "scores": scores,
                "commit": "c" * 40,
                "device": "a device",
                "date": date,
                "versions": {},
            }
        )
    )
    return path


def score_of(task, length):
    """A known score for each RULER task and length."""
    return 50 + task_names.RULER.index(task) + LENGTHS.index(length)


@pytest.fixture
def runs(tmp_path):
    """endprompt whole; lceg without vt at 65536; full_length at 4096 only and with 20 samples; SFT models of
    endprompt; a tiny recipe.
    """
    folder = tmp_path / "runs"
    for task in task_names.RULER:
        for length in LENGTHS:
            write(folder / "llama3-8b-64k/endprompt", f"ruler_{task}", length, score_of(task, length))
            if (task, length) != ("vt", 65536):
                write(folder / "llama3-8b-64k/lceg", f"ruler_{task}", length, score_of(task, length) + 1)
        write(folder / "llama3-8b-64k/full_length", f"ruler_{task}", 4096, 40, samples=20)
    for number, task in enumerate(task_names.LONGBENCH):
        write(
            folder / "llama3-8b-64k/endprompt",
            f"longbench_{task}",
            32768,
            10 + number,
            samples=longbench_scores.TASKS[task].samples,
        )
    for number, task in enumerate(task_names.SHORT_TEXT):
        write(
            folder / "llama3-8b-64k/endprompt",
            task,
            None,
            40 + number,
            samples=results.SHORT_TEXT_SAMPLES[task],
            folder="eval-sft-01234567",
        )
    for number, method in enumerate(("base", "short", "endprompt", "full_length")):
        for length in (256, 512):
            write(folder / "tiny" / method, "passkey", length, 10.0 * number, samples=100)
            write(folder / "tiny" / method, "perplexity", length, 3.0 + number, 0.1, samples=32)
        if method != "base":
            training(folder / "tiny" / method, 60 + 10 * number, 0.5 + 0.1 * number, "CPU: some, 1 thread(s)")
    return folder


def training(run_folder, seconds, gib, device="NVIDIA A800 x 8", **more):
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "train.json").write_text(
        json.dumps(
            {
                "seconds": seconds,
                "final_peak_memory_gib": gib,
                "device": device,
                "world_size": 8,
                "tokens": 10,
                "commit": "d" * 40,
                "resumed_from": None,
                **more,
            }
        )
    )


def filled(runs, name, **models):
    return tables.fill(paper.tables()[name], tables.Runs(runs, models))


def shown(table, column, row):
    return tables.render(table.cells[column][row].fields())


def test_cells_at_one_length(runs):
    table = filled(runs, "table_6")
    assert shown(table, "niah_single_1", "endprompt") == "50.00 [48.00, 54.00] \\| 100.00 \\| -50.00"
    assert shown(table, "qa_2", "endprompt") == "62.00 [60.00, 66.00] \\| 47.20 \\| +14.80"
    # Mean of 50 .. 62; the interval of a mean of 13 that have -2 and +4: 2 / sqrt(13) and 4 / sqrt(13).
    assert shown(table, "avg", "endprompt") == "56.00 [55.45, 57.11] \\| 90.92 \\| -34.92"
    assert shown(table, "avg", "full_length") == "40.00 [39.45, 41.11] \\| 82.99 \\| -42.99"
    assert shown(table, "vt", "longlora") == "not run \\| 93.76 \\| -"


def test_cells_over_lengths(runs):
    table = filled(runs, "table_1")
    assert (
        shown(table, "cwe", "endprompt") == "61.00 [60.11, 62.79] \\| 42.82 \\| +18.18"
    )  # 59 .. 63, +-2 / sqrt(5)
    assert shown(table, "avg", "endprompt") == "58.00 [57.75, 58.50] \\| 76.03 \\| -18.03"
    assert (
        shown(table, "cwe", "lceg").startswith("62.00 ")
        and shown(table, "vt", "lceg") == "not run \\| 68.18 \\| -"
        and shown(table, "avg", "lceg") == "not run \\| 72.24 \\| -"
    )
    assert "lceg: not run, for 1 of 65 results are missing: ruler_vt at 65536." in table.notes
    assert any(
        note.startswith(
            "full_length: not run, for 52 of 65 results are missing: ruler_niah_single_1 at 8192,"
        )
        for note in table.notes
    )
    assert (
        shown(filled(runs, "table_derived_64k"), "fwe", "endprompt")
        == "64.00 [62.00, 68.00] \\| 68.78 \\| -4.78"
    )


def test_cells_of_groups(runs):
    table = filled(runs, "table_3")
    assert shown(table, "niah_single", "main").startswith("53.00 [") and shown(
        table, "qa", "main"
    ).startswith("63.50 [")
    assert table.cells["avg"]["main"].difference == pytest.approx(58 - 76.03)
    assert isinstance(table.cells["avg"]["tokens-2.0b"].ours, Missing)
    table = filled(runs, "table_2")
    assert shown(table, "single_doc_qa", "endprompt").startswith("11.00 [") and shown(
        table, "code", "endprompt"
    ).startswith("24.50 [")
    assert (
        shown(table, "avg", "endprompt").startswith("17.50 [")
        and shown(table, "avg", "lceg") == "not run \\| 36.61† \\| -"
    )
    assert any(
        note.startswith("† The printed average does not follow")
        and "lceg 33.16, longlora 32.16, full_length 34.16" in note
        for note in table.notes
    )
    table = filled(runs, "figure_2")
    assert table.cells["ruler_avg"]["EP_1"].ours.score == pytest.approx(58) and table.cells["longbench_avg"][
        "EP_1"
    ].ours.score == pytest.approx(17.5)
    assert table.cells["ruler_avg"]["EP_2"].paper == "76.45"


def test_fine_tuned_models(runs):
    table = filled(runs, "table_5")
    assert shown(table, "gsm8k", "endprompt") == "41.00 [39.00, 45.00] \\| 44.66 \\| -3.66" and table.cells[
        "avg"
    ]["endprompt"].ours.score == pytest.approx(41.5)
    assert isinstance(table.cells["mmlu"]["pose"].ours, Missing) and any(
        "hellaswag 5-shot" in note for note in table.notes
    )
    own = results.evaluation_folder(
        runs / "llama3-8b-64k/endprompt", str(runs / "llama3-8b-64k/endprompt/sft")
    ).name
    for task in task_names.SHORT_TEXT:
        write(runs / "llama3-8b-64k/endprompt", task, None, 70, folder=own)
    assert filled(runs, "table_5").cells["avg"]["endprompt"].ours.score == pytest.approx(70), (
        "the folder at this path comes first"
    )


def test_ablations_have_folders_of_their_own(runs):
    for task in task_names.RULER:
        for length in LENGTHS:
            write(runs / "EP_2/llama3-8b-64k/endprompt", f"ruler_{task}", length, 77)
            write(runs / "mistral-7b-64k/endprompt", f"ruler_{task}", length, 66)
    assert shown(filled(runs, "figure_2"), "ruler_avg", "EP_2") == "77.00 [76.75, 77.50] \\| 76.45 \\| +0.55"
    assert filled(runs, "table_3").cells["vt"]["mistral-7b-v0.3"].ours.score == pytest.approx(66)


def test_notes_say_where_ours_comes_from(runs):
    notes = "\n".join(filled(runs, "table_6").notes)
    assert (
        f"endprompt: {runs / 'llama3-8b-64k/endprompt/eval'}, 500 samples a task and length; RULER's"
        " generator and scorers: 2024, linear search; commit cccccccccccc; on a device; at 2026-01-01."
        in notes
    )
    assert (
        f"full_length: {runs / 'llama3-8b-64k/full_length/eval'}, 20 samples a task and length, **fewer than"
        " 500** in 13 of 13 results" in notes
    )
    assert "fewer" not in "\n".join(filled(runs, "table_2").notes)
    assert any(
        note.startswith("None of it was run here. It takes the results of ")
        for note in filled(runs / "tiny", "table_6").notes
    )


def test_results_of_another_model_are_left_out(runs):
    folder = runs / "llama3-8b-64k/endprompt"
    write(folder, "ruler_vt", 4096, 99, model="new", date="2026-02-02T00:00:00+00:00")
    table = filled(runs, "table_6")
    assert table.cells["vt"]["endprompt"].ours.score == 99 and isinstance(
        table.cells["cwe"]["endprompt"].ours, Missing
    )
    assert any("results of another model in that folder left out" in note for note in table.notes)


def test_a_model_that_is_named_stands_in(runs, tmp_path):
    own = results.evaluation_folder(runs / "llama3-8b-64k/endprompt", str(tmp_path / "mine")).name
    write(runs / "llama3-8b-64k/endprompt", "ruler_vt", 4096, 12, folder=own)
    assert filled(runs, "table_6", endprompt=str(tmp_path / "mine")).cells["vt"]["endprompt"].ours.score == 12
    other = filled(runs, "table_6", endprompt=str(tmp_path / "other"))
    assert all(isinstance(cells["endprompt"].ours, Missing) for cells in other.cells.values())


def test_a_model_that_was_not_scored_is_no_reason_to_show_the_run_s_own(runs, tmp_path, capsys):
    """As with a name that was mistyped."""
    mine = str(tmp_path / "mine")
    out = ["--runs", runs, "--out", tmp_path / "results"]
    code, said, err = call(tables.main, *out, "--model", f"endprompt={mine}", capsys=capsys)
    assert (code, said, err.count("\n")) == (2, "", 1) and not (tmp_path / "results").exists()
    assert f"endprompt evaluate RECIPE endprompt --model {mine}" in err
    own = results.evaluation_folder(runs / "tiny/endprompt", mine).name
    write(runs / "tiny/endprompt", "passkey", 256, 77, folder=own)
    page = recipe_page.Page("tiny", runs, {"endprompt": mine})
    assert page.methods["endprompt"].mean([("passkey", 256)]).score == 77
    assert page.methods["endprompt"].lengths("perplexity") == [] and "endprompt" not in page.trained
    # Another recipe's runs are there beside it, and said to be their own.
    code, _, err = call(tables.main, *out, "--model", f"endprompt={mine}", capsys=capsys)
    assert code == 0, err
    said = f"endprompt: {mine} was not scored for this recipe; these are the run's own results."
    for name, there in (("table_6", True), ("recipe_llama3-8b-64k", True), ("recipe_tiny", False)):
        assert (said in (tmp_path / "results" / f"{name}.md").read_text()) == there, name


def test_a_recipe_of_which_another_model_alone_was_scored(runs, tmp_path, capsys):
    """It is no recipe with a page; results of that model are shown where it is named."""
    mine = str(tmp_path / "mine")
    folder = results.evaluation_folder(tmp_path / "runs/small/pose", mine).name
    write(runs / "small/pose", "passkey", 256, 77, folder=folder)
    write(runs / "tiny/pose", "passkey", 256, 5, folder="eval-old")
    out = ["--runs", runs, "--out", tmp_path / "results"]
    assert call(tables.main, *out, capsys=capsys)[0] == 0
    assert not (tmp_path / "results/recipe_small.md").exists()
    assert "pose" not in (tmp_path / "results/recipe_tiny.csv").read_text()
    assert call(tables.main, *out, "--model", f"pose={mine}", capsys=capsys)[0] == 0
    assert "77.00" in (tmp_path / "results/recipe_small.csv").read_text()


def test_the_folder_of_a_hub_id_is_one_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "one/org/there").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    found = {"org/model": [], "org/there": [], "./org/there": []}
    for folder in ("one", "two"):
        monkeypatch.chdir(tmp_path / folder)
        for model, names in found.items():
            names.append(results.evaluation_folder(tmp_path / "run", model).name)
    assert found["org/model"][0] == found["org/model"][1] != found["org/there"][0]
    assert found["org/there"][0] == found["./org/there"][0]  # a folder, where it is one
    assert found["./org/there"][0] != found["./org/there"][1]
    # What was put there while it was a folder is found once it is gone.
    monkeypatch.chdir(tmp_path / "one")
    write(tmp_path / "run", "passkey", 256, 7.0, folder=found["org/there"][0])
    (tmp_path / "one/org/there").rmdir()
    assert results.read_run(tmp_path / "run", "org/there").mean([("passkey", 256)]).score == 7


def test_folder_and_form_are_those_that_evaluate_writes(tmp_path, recipe_file, monkeypatch):
    class Scorer:
        def __init__(self, *_):
            pass

        def score(self, task, length):
            return {"length": length, "metric": task, "score": 5.0, "low": 4.0, "high": 6.0, "samples": 3}, []

    monkeypatch.setattr(scored_model, "load", lambda *_: (None, None, {"name_or_path": "x"}))
    monkeypatch.setattr(run, "Scorer", Scorer)
    monkeypatch.setattr(run.engine, "table", lambda network: None)
    monkeypatch.setattr(run, "Questions", lambda *_: lambda task, length, identity: {"model": identity})
    recipe = schema.load(recipe_file(), ["eval.tasks=[perplexity]", "eval.perplexity_corpus=x"])
    experiment = Experiment.of(recipe, "base", tmp_path / "run")
    run.evaluate(experiment, str(tmp_path / "model"))
    run.evaluate(experiment)
    for model in (None, str(tmp_path / "model")):
        found = results.read(results.evaluation_folder(experiment.run, model))
        assert found.mean([("perplexity", 64)]) == Estimate(5.0, 4.0, 6.0, 3)


def test_memory_and_time(runs):
    training(runs / "llama3-8b-64k/endprompt", 36000, 30)
    training(runs / "llama3-8b-64k/full_length", 54000, 60, "CPU: some, 2 thread(s)")
    training(runs / "llama3-8b-64k/lceg", 54000, 60, resumed_from="checkpoint-200")
    table = filled(runs, "figure_4_64k")
    assert (
        shown(table, "memory_gb", "endprompt") == "32.21 \\| 36.52 \\| -4.31"
        and shown(table, "hours", "endprompt") == "10.00 \\| 14.5‡ \\| -4.50"
    )
    assert (
        shown(table, "speedup", "full_length") == "1.50 \\| 1.41 \\| +0.09"
        and "endprompt" not in table.cells["speedup"]
    )
    assert (
        shown(table, "hours", "lceg") == "not run \\| 25.7‡ \\| -"
        and shown(table, "memory_gb", "longlora") == "not run \\| 55‡ \\| -"
    )
    notes = "\n".join(table.notes)
    assert (
        "**on CPU**: resident memory of a process" in notes
        and "resumed from checkpoint-200, so its hours are not known" in notes
        and "8 x A800" in notes
    )
    assert "speedup" not in filled(runs, "figure_4_32k").cells


# The files


def call(main, *arguments, capsys):
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def read_markdown(path):
    """{column of the paper: {row: cell}} of a written table."""
    rows = [
        [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        for line in path.read_text().splitlines()
        if line.startswith("|")
    ]
    return {
        row[0]: {name: cell.replace("\0", "\\|") for name, cell in zip(rows[0][1:], row[1:], strict=True)}
        for row in rows[2:]
    }


def test_all_is_written_and_csv_equals_markdown(runs, tmp_path, capsys):
    out = tmp_path / "results"
    code, printed, err = call(tables.main, "--runs", runs, "--out", out, capsys=capsys)
    assert code == 0 and not err and "index.md" in printed
    for name, about in paper.tables().items():
        cells = read_markdown(out / f"{name}.md")
        lines = list(csv.DictReader((out / f"{name}.csv").open()))
        assert {(line["column"], line["row"]) for line in lines} == {
            (column, row) for row, printed in about.printed.items() for column in printed
        }
        for line in lines:
            assert line["paper"] == about.printed[line["row"]][line["column"]] and line["table"] == name
            fields = tuple(line[key] for key in tables.FIELDS[3:])
            assert cells[line["column"]][line["row"]] == tables.render(fields)
            if line["ours"] != "not run":
                assert float(line["difference"]) == pytest.approx(
                    float(line["ours"]) - float(line["paper"]), abs=0.0101
                )
    text = (out / "table_derived_64k.md").read_text()
    assert (
        text.startswith("# RULER at 64K (derived, not printed)")
        and "Derived, not printed: 5 x Table 1" in text
        and "endprompt is last" in text
    )
    index = (out / "index.md").read_text()
    for path in out.iterdir():
        assert path.name == "index.md" or f"]({path.name})" in index, path
    assert "Made by `python -m endprompt.reports.tables --runs" in index and "torch" in index
    pages = {path.name for path in out.glob("recipe_*.md")}
    assert pages == {"recipe_tiny.md", "recipe_llama3-8b-64k.md"}


@pytest.mark.slow
def test_pictures_show_something(runs, tmp_path):
    tables.write(tables.Runs(runs, {}), tmp_path / "results", None, "x")
    tables.write(
        tables.Runs(runs / "tiny", {}), tmp_path / "nothing", [], "x"
    )  # no results: the paper's side alone
    found = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert found >= {
        "ruler_by_length.png",
        "table_2.png",
        "table_5.png",
        "figure_2.png",
        "figure_3.png",
        "figure_4.png",
        "recipe_tiny_passkey.png",
        "recipe_tiny_passkey_lines.png",
        "recipe_tiny_perplexity.png",
        "recipe_tiny_training.png",
        "recipe_llama3-8b-64k_ruler.png",
        "recipe_llama3-8b-64k_longbench.png",
    }
    for path in [*(tmp_path / "results").glob("*.png"), *(tmp_path / "nothing").glob("*.png")]:
        pixels = image.imread(path)
        assert (
            pixels.shape[0] > 300
            and pixels.shape[1] > 500
            and pixels[..., :3].std() > 0.05
            and path.stat().st_size > 10000
        ), path


def test_pictures_draw_the_numbers(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    draw = matplotlib.axes.Axes.bar

    def bar(axis, across, heights, *rest, **options):
        drawn.append((options["label"], list(heights)))
        return draw(axis, across, heights, *rest, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "bar", bar)
    figures.bars(
        ["a", "b"],
        {"one": [{"mean": 4, "low": 3, "high": 6}, None]},
        tmp_path / "bars.png",
        paper={"one": [5, 6], "two": [None, 7]},
    )
    assert drawn == [("one", [4]), ("one (paper)", [5, 6]), ("two (paper)", [7])]
    drawn.clear()
    figures.costs(
        [("memory", "GB", ["x", "y"], {"ours": [None, 2.0], "paper": [3.0, 4.0]})], tmp_path / "costs.png"
    )
    assert drawn == [("ours", [2.0]), ("paper", [3.0, 4.0])]


def test_nothing_run_copies_nothing(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    assert call(tables.main, "--runs", tmp_path / "runs", "--out", tmp_path / "out", capsys=capsys)[0] == 0
    lines = [line for path in (tmp_path / "out").glob("*.csv") for line in csv.DictReader(path.open())]
    assert len(lines) > 400 and all(
        line["ours"] == "not run" and not line["difference"] and line["paper"] for line in lines
    )
    assert "| not run |" in (tmp_path / "out/index.md").read_text()


def test_tiny_has_passkey_and_perplexity_in_place_of_ruler(runs):
    page = recipe_page.Page("tiny", runs, {})
    text = page.markdown()
    assert (
        "## In place of RULER: passkey and perplexity" in text and "RULER was not run for this recipe" in text
    )
    assert "| method | passkey 256 | passkey 512 | perplexity 256 | perplexity 512 |" in text
    assert (
        "| full_length | 30.00 [28.00, 34.00] | 30.00 [28.00, 34.00] | 6.00 [5.90, 6.20] | 6.00 [5.90,"
        " 6.20] |" in text
    )
    assert (
        "(resident, of a process)" in text
        and "| short | 0.60 | 70 | 10 | 8 ranks on CPU: some, 1 thread(s) |" in text
    )
    assert "**fewer than 500 or than the benchmark has** in 2 of 4 results" in text
    lines = list(csv.DictReader(page.as_csv().splitlines()))
    assert (
        len(lines) == 16
        and list(lines[0].values()) == ["base", "passkey", "passkey", "256", "0.00", "-2.00", "4.00", "100"]
        and tuple(lines[0]) == recipe_page.FIELDS
    )


def test_perplexity_of_other_words_is_marked(runs):
    folder = runs / "tiny/short"
    write(folder, "perplexity", 256, 4.0, 0.1, samples=32, longest=256, data="a")
    write(folder, "perplexity", 512, 4.0, 0.1, samples=32, longest=256, data="a")
    page = recipe_page.Page("tiny", runs, {})
    assert "of the same held-out tokens at every length" in page.markdown()
    write(folder, "perplexity", 512, 4.0, 0.1, samples=32, longest=512, data="b")
    text = recipe_page.Page("tiny", runs, {}).markdown()
    assert "Perplexity: **not of the same held-out tokens** (below) at every length" in text
    assert (
        "- perplexity is not of the same words everywhere: short at 256 (greatest length 256); short" in text
    )


def test_page_with_a_part_of_ruler(runs):
    for length in (1024, 2048):
        write(runs / "smollm2-135m-64k/endprompt", "ruler_vt", length, 25, samples=10)
    text = recipe_page.Page("smollm2-135m-64k", runs, {}).markdown()
    assert (
        "| endprompt, vt | 25.00 [23.00, 29.00] | 25.00 [23.00, 29.00] |" in text
        and "| **endprompt, mean of the 13 tasks** | not run | not run |" in text
    )
    assert "No mean over RULER: niah_single_1, " in text and "2024, linear search" in text
    text = recipe_page.Page("llama3-8b-64k", runs, {}).markdown()
    assert "| **endprompt, mean of the 13 tasks** | 56.00 [55.45, 57.11] | 57.00 [56.45, 58.11] |" in text
    assert "| **avg** | 17.50 [17.00, 18.50] | not run | not run |" in text


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda path: path.write_text("{"), "is no result file"),
        (lambda path: path.write_text("[]"), "is no result file"),
        (
            lambda path: path.write_text(
                json.dumps({"question": {"model": "m"}, "date": "x", "scores": {"length": 1}})
            ),
            "is no result file (no 'score'); delete it and evaluate again",
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"score": 58', '"score": NaN')),
            "score, low, high and samples are numbers",
        ),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is no result file"),
    ],
)
def test_a_damaged_result_is_one_message_and_nothing_is_written(runs, tmp_path, capsys, spoil, complaint):
    path = runs / "llama3-8b-64k/endprompt/eval/ruler_vt/4096.json"
    assert '"score": 58' in path.read_text()
    spoil(path)
    code, out, err = call(tables.main, "--runs", runs, "--out", tmp_path / "results", capsys=capsys)
    assert (
        code == 2
        and not out
        and err.count("\n") == 1
        and str(path) in err
        and complaint in err
        and not (tmp_path / "results").exists()
    )


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--runs", "nowhere"], "there is no folder nowhere"),
        (["--recipe", "unknown"], "holds no evaluated method"),
        (["--out", "file"], "is a file, not a folder"),
        (["--model", "endprompt"], "write it as METHOD=DIR"),
        (["--model", "nope=x"], "there is none named 'nope'"),
    ],
)
def test_bad_arguments_of_tables(runs, tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = call(tables.main, "--runs", runs, *arguments, capsys=capsys)
    assert (
        code == 2
        and not out
        and err.count("\n") == 1
        and complaint in err
        and not (tmp_path / "results").exists()
    )


def test_damaged_training_summary(runs, tmp_path):
    (runs / "llama3-8b-64k/lceg/train.json").write_text("{}")
    with pytest.raises(BadInput, match="train.json is no training summary"):
        tables.write(tables.Runs(runs, {}), tmp_path / "results", [], "x")


# The plan

RECIPE = REPOSITORY / "recipes/llama3-8b-64k.yaml"
PER_HOUR = 312e12 * 0.4 * 3600  # an A800 at 40 %


@pytest.mark.parametrize(
    "recipe, method, hours",
    [  # the recipes' headers say 14.3, 27, 11.9, 13.7, 20, 14.3, 14.7
        ("llama3-8b-64k", "endprompt", 14.3),
        ("llama3-8b-64k", "full_length", 26.9),
        ("llama2-7b-64k", "endprompt", 11.9),
        ("mistral-7b-64k", "pose", 13.7),
        ("llama3-8b-32k", "full_length", 19.7),
        ("llama3.1-8b-512k", "endprompt", 14.3),
        ("qwen3-8b-128k", "endprompt", 14.7),
    ],
)
def test_hours_of_training_are_those_of_the_recipes_headers(tmp_path, recipe, method, hours):
    item = plan.inspect(
        plan_jobs.Job("run", REPOSITORY / f"recipes/{recipe}.yaml", method, tmp_path), PER_HOUR
    )
    assert item.state == "missing" and item.train_hours / 8 == pytest.approx(hours, abs=0.05)


def test_hours_follow_their_formula(tmp_path):
    from endprompt.training.trainer import flops_per_token

    recipe = schema.load(
        RECIPE,
        [
            "eval.tasks=[passkey,longbench_lcc,longbench_qasper,mmlu]",
            "eval.lengths=[4096,8192]",
            "eval.samples=300",
        ],
    )
    about = estimate.shape(recipe)
    expected = (
        sum(300 * length * flops_per_token(about, length) / 3 for length in (4096, 8192))
        + (300 + 200) * 32768 * flops_per_token(about, 32768) / 3
    )
    assert plan.prefill_flops(recipe, about) == pytest.approx(expected)
    # 7.5e9 weights in matrix products (the embedding's look-up is none) at 6 each, and attention.
    assert flops_per_token(about, 8192) == pytest.approx(51.5e9, rel=1e-3)
    base, longlora, short = (Experiment.of(recipe, name) for name in ("base", "longlora", "short"))
    assert plan.training_flops(base, about, 8) == 0
    assert plan.training_flops(longlora, about, 8) < plan.training_flops(short, about, 8)
    assert estimate.shape(schema.load(RECIPE, ["model.name_or_path=someone/unknown-model"])) is None
    unknown = plan.inspect(
        plan_jobs.Job("run", RECIPE, "short", tmp_path, ("model.name_or_path=someone/unknown-model",)),
        PER_HOUR,
    )
    assert unknown.train_hours is None and not unknown.done


def test_known_shapes_are_those_of_the_files():
    """The base that is local has its shape read, not looked up."""
    about = estimate.shape(schema.load(REPOSITORY / "recipes/tiny.yaml"))
    assert (about.hidden_size, about.num_hidden_layers, about.vocab_size) == (128, 3, 896)


@pytest.fixture
def tiny(tmp_path, recipe_file, tokenizer):
    """A small recipe, with its results written as `endprompt evaluate` would ask for them."""
    path = recipe_file("tiny")

    def job(method="endprompt", kind="run", model=None):
        return plan_jobs.Job(kind, path, method, tmp_path / "runs", model=model)

    def answer(method, length, fingerprint, **other):
        recipe = schema.load(path)
        asked = {
            **question.Questions(recipe, tokenizer)("passkey", length, {"fingerprint": fingerprint}),
            **other,
        }
        file = tmp_path / "runs/tiny" / method / f"eval/passkey/{length}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"question": asked}))

    return job, answer, tmp_path / "runs/tiny"


def test_states(tiny):
    job, answer, folder = tiny

    def state(method="endprompt"):
        item = plan.inspect(job(method), PER_HOUR)
        return item.state, item.done

    assert state() == ("missing", False) and state("base") == ("not evaluated", False)
    model = folder / "endprompt/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert state() == ("trained", False)
    answer("endprompt", 64, question.fingerprint(model))
    assert state() == ("1 of 2 results", False)
    answer("endprompt", 128, question.fingerprint(model))
    assert state() == ("evaluated", True)
    assert plan.inspect(job(), PER_HOUR).train_hours == 0 == plan.inspect(job(), PER_HOUR).evaluate_hours
    answer("endprompt", 128, question.fingerprint(model), samples=999)
    assert state() == ("1 of 2 results", False), "another question is no answer"
    answer("endprompt", 128, "another model")
    assert state() == ("1 of 2 results", False), "another model's score is no answer"


@pytest.mark.parametrize("method", ["base", "interpolation"])
def test_results_of_another_base_or_rope_are_no_answers(tiny, recipe_file, base, monkeypatch, method):
    """Nothing was trained, so the base's weights, its RoPE and its sharpness are the model."""
    job, _, folder = tiny
    path = recipe_file("tiny", eval={"lengths": [96, 128]})

    def state(*overrides):
        asked = plan_jobs.Job("run", path, method, job().out, overrides)
        return plan.inspect(asked, PER_HOUR).state

    assert state() == "not evaluated"
    code, _, error = run_main("evaluate", path, method, "--out", job().out)
    assert code == 0, error
    assert state() == "evaluated"
    sharper = state("rope.sharpen=1.0")
    assert sharper == "not evaluated"
    if method == "interpolation":
        assert state("rope.type=yarn") == state("lengths.target=1024") == "not evaluated"
    other = shutil.copytree(base, folder / "another")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert state(f"model.name_or_path={other}") == "not evaluated"
    moved = shutil.copytree(base, folder / "moved")
    assert state(f"model.name_or_path={moved}") == "evaluated"


def test_rows_that_do_not_fit_a_step_are_found_before_anything_runs(tmp_path):
    with pytest.raises(BadInput, match="make per_device_train_batch_size"):
        plan.inspect(
            plan_jobs.Job("run", REPOSITORY / "recipes/llama3-8b-128k.yaml", "full_length", tmp_path),
            PER_HOUR,
        )


def test_all_tables_are_planned(tmp_path):
    every = plan_jobs.jobs(RECIPE, list(plan_jobs.METHODS), tmp_path, ("eval.seed=1",), {}, True)
    made = {(job.folder, job.kind) for job in every}
    assert len(made) == len(every), "nothing twice"
    for table in paper.tables().values():
        for row in table.rows.values():
            folder = row.folder(tmp_path)
            if table.after:
                assert (folder, "sft") in made and (folder, "evaluate") in made
            else:
                assert (folder, "run") in made or table.columns == "cost" and (folder, "train") in made, (
                    table.name,
                    folder,
                )
    order = [(job.kind, job.folder) for job in every]
    assert all(
        order.index(("run", folder)) < order.index(("sft", folder)) < order.index(("evaluate", folder))
        for kind, folder in order
        if kind == "sft"
    )
    job = next(job for job in every if job.out.name == "tokens-0.5b")
    recipe = schema.load(job.recipe, list(job.overrides))
    assert recipe.data.tokens == 500_000_000 and recipe.eval.samples == 500 and recipe.eval.seed == 1
    assert set(task_names.GROUPS["ruler"] + task_names.GROUPS["longbench"]) < set(recipe.eval.tasks)
    recipe = schema.load(RECIPE, list(next(job for job in every if job.out.name == "EP_3").overrides))
    assert Experiment.of(recipe, "endprompt").options.end_prompts == ["EP_3"]
    tuned = [job for job in every if job.kind == "evaluate"]
    assert len(tuned) == 6 and all("eval.tasks=[mmlu,gsm8k,hellaswag]" in job.overrides for job in tuned)
    allowed = plan_jobs.jobs(RECIPE, ["endprompt"], tmp_path, ("eval.run_unsafe_code=true",), {}, True)
    assert "eval.tasks=[mmlu,gsm8k,hellaswag,humaneval]" in allowed[-1].overrides


def test_plan_is_printed(tmp_path, capsys):
    code, out, err = call(
        plan.main, "--recipe", RECIPE, "--methods", "endprompt", "--out", tmp_path / "runs", capsys=capsys
    )
    assert code == 0 and not err and not (tmp_path / "runs").exists()
    assert (
        "114.6" in out
        and "A800 at 312 TFLOP/s (dense bf16) x MFU 40%; training on 8 GPUs takes 14.3 h" in out
        and "Left out: generating answers" in out
    )
    _, out, _ = call(
        plan.main,
        "--recipe",
        RECIPE,
        "--methods",
        "endprompt",
        "--out",
        tmp_path / "runs",
        "--gpu",
        "H100",
        "--gpus",
        "4",
        "--mfu",
        "0.5",
        capsys=capsys,
    )
    assert "H100 at 989 TFLOP/s (dense bf16) x MFU 50%; training on 4 GPUs takes 7.23 h" in out


def test_steps_are_for_a_shell(tmp_path, capsys):
    code, out, _ = call(
        plan.main,
        "--steps",
        "--methods",
        "base",
        "short",
        "--out",
        tmp_path / "a b",
        "--samples",
        "3",
        "--lengths",
        "256",
        "512",
        "--model",
        "short=some model",
        "--set",
        "data.end_prompts=['a b', c]",
        "--recipe",
        REPOSITORY / "recipes/tiny.yaml",
        capsys=capsys,
    )
    settings = ["data.end_prompts=['a b', c]", "eval.samples=3", "eval.lengths=[256,512]"]
    recipe, root = str(REPOSITORY / "recipes/tiny.yaml"), str(tmp_path / "a b")
    assert code == 0 and [line.split(plan_jobs.SEPARATOR) for line in out.splitlines()] == [
        ["run", recipe, "base", root, "", f"{root}/tiny/logs/base.log", f"{root}/tiny/base", *settings],
        [
            "evaluate",
            recipe,
            "short",
            root,
            "some model",
            f"{root}/tiny/logs/short-evaluate.log",
            f"{root}/tiny/short",
            *settings,
        ],
    ]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--gpu", "Voodoo"], "--gpu Voodoo: its peak is not known; use one of"),
        (["--mfu", "0"], "--mfu 0.0: a share of the peak"),
        (["--gpus", "0"], "at least one is needed"),
        (["--methods", "nope"], "there is none named 'nope'"),
        (["--recipe", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--tables", "all"], "belong to the recipe llama3-8b-64k"),
        (["--model", "pose=x", "--methods", "base"], "pose is not among --methods base"),
        (["--samples", "0"], "eval.samples"),
        (["--set", "eval.sample=3"], "unknown key eval.sample"),
        (["--steps", "--set", "data.end_prompts=['a\n\nb']"], "has a line break"),
    ],
)
def test_bad_arguments_of_plan(tmp_path, capsys, arguments, complaint):
    code, out, err = call(
        plan.main, "--recipe", REPOSITORY / "recipes/tiny.yaml", "--out", tmp_path, *arguments, capsys=capsys
    )
    assert code == 2 and not out and err.count("\n") == 1 and complaint in err


# The script


@pytest.fixture
def script(tmp_path):
    """Runs eval/run_all.sh with a Python that notes what it is asked; the plan alone is made by the real
    one.
    """
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/bash\nif [ "$2" = endprompt.reports.plan ]; then exec {sys.executable} "$@"; fi\n'
        'case "$3" in gpus) echo 0; exit;; path) echo nowhere; exit;; esac\n'
        f'{{ printf "%s" "$OUT"; printf "|%s" "$@"; echo; }} >>{tmp_path}/calls\n'
        'cat >/dev/null\ncase "$*" in *FAIL*) echo broken; exit 3;; *WRONG*) exit 2;; esac\n'
    )  # it reads all of its input, as a launcher may
    fake.chmod(0o755)

    def start(*arguments, **environment):
        done = subprocess.run(
            ["bash", str(REPOSITORY / "eval/run_all.sh"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHON": str(fake), **environment},
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, [call.split("|") for call in calls]

    return start


def test_script_trains_evaluates_and_makes_the_tables(script, tmp_path):
    done, calls = script(
        "--methods",
        "base",
        "short",
        "pose",
        "--model",
        "pose=my model",
        "--samples",
        "5",
        "--set",
        "data.tokens=9",
        "--out",
        "my runs",
        "--results",
        "my results",
    )
    assert done.returncode == 0, done.stderr
    recipe, settings = (
        str(REPOSITORY / "recipes/tiny.yaml"),
        ["--set", "data.tokens=9", "--set", "eval.samples=5"],
    )
    assert [call[1:] for call in calls[:6]] == [
        ["-m", "endprompt", stage, recipe, method, "--out", "my runs", *settings]
        for method in ("base", "short")
        for stage in ("prepare", "train", "evaluate")
    ]
    assert calls[6][1:] == [
        "-m",
        "endprompt",
        "evaluate",
        recipe,
        "pose",
        "--out",
        "my runs",
        "--model",
        "my model",
        *settings,
    ]
    assert calls[7][1:] == [
        "-m",
        "endprompt.reports.tables",
        "--runs",
        "my runs",
        "--out",
        "my results",
        "--command",
        (
            "bash eval/run_all.sh --methods base short pose --model pose=my\\ model --samples 5 --set"
            " data.tokens=9 --out my\\ runs --results my\\ results"
        ),
        "--model",
        "pose=my model",
    ]
    assert (
        len(calls) == 8
        and (tmp_path / "my runs/tiny/logs/short.log").exists()
        and (tmp_path / "my runs/tiny/logs/pose-evaluate.log").exists()
    )
    assert done.stdout.splitlines()[0].startswith("run      my runs/tiny/base ")


@pytest.mark.slow
def test_script_follows_the_plan_of_all_tables(script, tmp_path):
    folder = tmp_path / "runs/llama3-8b-64k/endprompt_pose"
    (folder / "model").mkdir(parents=True)
    done, calls = script(
        "--recipe", str(RECIPE), "--methods", "endprompt", "--tables", "all", STAGES="train", NPROC="4"
    )
    assert done.returncode == 0, done.stderr
    asked = [call for call in calls if call[1:3] == ["-m", "endprompt"]]
    assert ["runs/tokens-2.0b", "llama3-8b-64k.yaml"] in [
        [call[0], os.path.basename(call[4])] for call in asked if "data.tokens=2.0e9" in call
    ]
    tuned = [call for call in calls if "trl.scripts.sft" in call]
    assert len(tuned) == 6 and tuned[0][1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=4",
        "-m",
        "trl.scripts.sft",
        "--config",
        "recipes/sft.yaml",
        "--model_name_or_path",
        f"{folder}/model",
        "--output_dir",
        f"{folder}/sft",
    ]
    assert [call[3] for call in asked if "eval.tasks=[mmlu,gsm8k,hellaswag]" in call] == ["evaluate"] * 6
    # The 32K figure needs no evaluation: it is prepared and trained whatever STAGES says.
    assert [
        call[3] for call in asked if os.path.basename(call[4]) == "llama3-8b-32k.yaml" and call[5] == "lceg"
    ] == ["prepare", "train"]


@pytest.mark.slow
def test_script_stops_at_a_failure_and_names_its_log(script):
    done, calls = script(
        "--methods", "short", "pose", "--set", "model.revision=FAIL", OUT="elsewhere", STAGES="evaluate"
    )
    assert done.returncode == 3 and len(calls) == 1 and "broken" in done.stderr
    assert (
        "run_all.sh: run short failed; its log is elsewhere/tiny/logs/short.log; the same command goes on"
        " from there" in done.stderr
    )


@pytest.mark.slow
def test_script_ends_with_2_on_bad_input(script):
    done, calls = script("--methods", "short", "--set", "model.revision=WRONG", OUT="elsewhere")
    assert done.returncode == 2 and len(calls) == 1
    assert "run_all.sh: run short failed; its log is elsewhere/tiny/logs/short.log\n" in done.stderr


def test_dry_run_prints_and_writes_nothing(script, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done, calls = script(
        "--dry-run",
        "--gpu",
        "H100",
        "--mfu",
        "0.3",
        "--lengths",
        "256",
        "512",
        "--methods",
        "base",
        "endprompt",
    )
    assert done.returncode == 0 and not calls and sorted(tmp_path.rglob("*")) == before
    assert (
        "runs/tiny/endprompt" in done.stdout
        and "missing" in done.stdout
        and "H100 at 989 TFLOP/s (dense bf16) x MFU 30%" in done.stdout
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["tiny.yaml"],
        ["--recipe"],
        ["--recipe", "--dry-run"],
        ["--methods"],
        ["--methods", "--dry-run"],
        ["--set"],
        ["-h"],
    ],
)
def test_script_says_how_it_is_called(script, tmp_path, arguments):
    done, calls = script(*arguments)
    assert (
        done.returncode == 2
        and "bash eval/run_all.sh [--recipe FILE]" in done.stderr
        and not calls
        and not (tmp_path / "runs").exists()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--methods", "nope"],
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (["--samples", "many"], ["--tables", "some"], ["--recipe", "nowhere.yaml"])
        ),
    ],
)
def test_script_passes_on_what_the_plan_refuses(script, tmp_path, arguments):
    done, calls = script(*arguments)
    assert done.returncode == 2 and done.stderr and not calls and not (tmp_path / "runs").exists()


def test_the_plan_says_what_a_gpu_must_hold(tmp_path):
    """As `endprompt plan` does: rows of 64K take more than rows of 8K, and sixteen GPUs share states that
    eight did.
    """

    def memory(method, gpus=8, *overrides):
        return plan.inspect(
            plan_jobs.Job("run", REPOSITORY / "recipes/llama3-8b-64k.yaml", method, tmp_path, overrides),
            PER_HOUR,
            gpus,
        ).memory

    assert (
        30e9 < memory("endprompt") < 50e9 < memory("full_length") < 80e9
        and memory("endprompt", 16) < memory("endprompt") - 7e9
    )
    assert memory("base") is None and memory("full_length", 8, "train.sequence_parallel=2") is None
    planned = plan.inspect(
        plan_jobs.Job("run", REPOSITORY / "recipes/llama3-8b-64k.yaml", "endprompt", tmp_path), PER_HOUR
    )
    shown = plan.table([planned], "A800", 312e12, 8, 0.4).splitlines()
    assert "GB a GPU" in shown[0] and f"{planned.memory / 1e9:.1f}" in shown[1]
