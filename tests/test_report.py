"""`endprompt report`: one page of runs that were trained, of runs under way, of results alone; and in a
browser."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_main

from endprompt import BadInput
from endprompt.reports import run_data, run_report

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": None}
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def history(steps: int, prompt: bool) -> list[dict]:
    more = {"end_prompt_loss": 2.0} if prompt else {}
    return [
        {
            "loss": 3.0 - step / 100,
            "text_loss": 3.0 - step / 100,
            **more,
            "grad_norm": 1.0,
            "tokens_per_second": 1000.0 + step,
            "peak_memory_gib": 1.5,
            "step": step,
        }
        for step in range(8, steps + 1, 8)
    ]


def result(task: str, length: int, score: float) -> dict:
    scores = {"length": length, "score": score, "low": score - 5, "high": score + 5, "samples": 20}
    if task in ("passkey", "multikey"):
        scores["cells"] = [{"depth": depth / 2, "correct": depth, "total": 2} for depth in range(3)]
    if task == "distance":
        cells = [
            {"distance": away, "score": 50.0, "low": 40.0, "high": 60.0, "correct": 1, "total": 2}
            for away in (0, 100, 300)
        ]
        scores |= {"cells": cells, "coverage": {"source": "x", "supervised": None, "gap": [[200, 250]]}}
    return {
        "question": {"model": {"name_or_path": "x", "fingerprint": "f"}},
        "scores": scores,
        "date": "2026-01-01T00:00:00+00:00",
        "versions": VERSIONS,
        "commit": "abc",
        "device": "CPU",
    }


def made(folder: Path, name: str, method: str = "endprompt", steps: int = 32) -> Path:
    """A run's folder as the commands leave it, without weights."""
    run = folder / name / method
    run.mkdir(parents=True)
    said = {"steps": steps, "tokens": 4096, "seconds": 61.0, "world_size": 2}
    stamp = {"versions": VERSIONS, "commit": "abc", "device": "CPU: <b>&"}
    (run / "train.json").write_text(
        json.dumps({**said, "history": history(steps, method == "endprompt"), **stamp})
    )
    (run / "recipe.yaml").write_text(
        f"recipe: {name}\nmethod: {method}\nmodel: {{name_or_path: base}}\n"
        f"lengths: {{physical: 64, target: 512}}\ntrain: {{learning_rate: {steps}.0}}\n"
    )
    for task in ("passkey", "multikey", "perplexity", "distance"):
        for length in (64, 512):
            path = run / "eval" / task / f"{length}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result(task, length, 40.0 + length / 64)))
    return run


@pytest.fixture
def runs(tmp_path):
    return [made(tmp_path, "one"), made(tmp_path, "one", "pose_sharp", 64)]


def test_the_page_holds_all_of_it(runs, tmp_path):
    out = tmp_path / "pages" / "report.html"
    code, said, error = run_main("report", *runs, "--out", out)
    assert code == 0 and str(out) in said, error
    text = out.read_text()
    for part in ("endprompt", "pose_sharp", "n = 20", "train.learning_rate", "2.13.0"):
        assert part in text
    assert text.count("data:image/svg+xml;base64,") == 2 + 4 + 3  # losses, speed; by length; by place
    assert "<b>&" not in text and "CPU: &lt;b&gt;&amp;" in text  # what files say is text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)  # whole in itself
    assert "There are no shards" in text and "Nothing was evaluated" not in text
    # Of settings, those that differ come first: the method and the rate, not the lengths.
    first = text[text.index('id="settings"') : text.index("<details")]
    assert "train.learning_rate" in first and "lengths.target" not in first


def test_coverage_is_counted_from_shards(recipe_file, tmp_path):
    out = tmp_path / "out"
    assert run_main("prepare", recipe_file(), "endprompt", "--out", out, "--workers", 1)[0] == 0
    found = run_data.read([out / "small/endprompt"])[0]
    assert found.covered.of_all and found.covered.rows == 64 and 0 < found.covered.never < 1
    assert found.state["state"] == "prepared, not trained"
    page = run_report.page([found])
    assert "64 rows counted" in page and "Nothing was trained" in page
    # Shards that cannot be read are left out of the page.
    next((out / "small/endprompt/shards").glob("*.parquet")).write_bytes(b"nonsense")
    assert run_data.read([out / "small/endprompt"])[0].covered is None


def test_a_run_under_way_shows_what_its_checkpoint_logged(tmp_path):
    run = made(tmp_path, "one")
    shutil.rmtree(run / "eval")
    (run / "train.json").unlink()
    folder = run / "checkpoints" / "checkpoint-16"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": [*history(16, True), {"step": 16}]})
    )
    assert run_data.read([run])[0].history == []  # no whole checkpoint yet
    from endprompt.runs import checkpoint_files

    (folder / checkpoint_files.MARKER).write_text("{}")
    assert [entry["step"] for entry in run_data.read([run])[0].history] == [8, 16]


def test_results_without_a_recipe_are_a_run(tmp_path):
    run = made(tmp_path, "model", "base")
    for name in ("train.json", "recipe.yaml"):
        (run / name).unlink()
    (run / "eval").rename(run / "eval-model-0123abcd")
    found = run_data.read([run])[0]
    assert set(found.scored) == {""} and not found.settings
    assert "There is no recipe" in run_report.page([found])


def scores_of(run: Path, folder: str, score: float, fingerprint: str = "f", length: int = 64) -> None:
    path = run / folder / "passkey" / f"{length}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = result("passkey", length, score)
    file["question"]["model"]["fingerprint"] = fingerprint
    path.write_text(json.dumps(file))


def test_other_models_of_one_name_stay_apart(tmp_path):
    """The model of every run is in a folder that is called `model`."""
    run = tmp_path / "model/base"
    scores_of(run, "eval-model-dae4a2ea", 10.0)
    scores_of(run, "eval-model-4d3fe02e", 90.0)
    scores_of(run, "eval-other-01234567", 50.0)
    found = run_data.read([run])[0]
    assert set(found.scored) == {"model-4d3fe02e", "model-dae4a2ea", "other"}
    page = run_report.page([found])
    for part in ("base: model-dae4a2ea", "base: model-4d3fe02e", "<b>10.0</b>", "<b>90.0</b>"):
        assert part in page
    # A name that looks like another's with its hash is no reason to lose one of them.
    scores_of(run, "eval-model-dae4a2ea-89abcdef", 30.0)
    assert len(run_data.read([run])[0].scored) == 4


@pytest.mark.parametrize("own", ["train.json", "recipe.yaml", "model", "shards"])
def test_another_model_is_not_a_run_s_own(tmp_path, own):
    run = made(tmp_path, "one")
    shutil.rmtree(run / "eval")
    for name in {"train.json", "recipe.yaml"} - {own}:
        (run / name).unlink()
    if not (run / own).exists():
        (run / own).mkdir()
    scores_of(run, "eval-other-0123abcd", 10.0)
    found = run_data.read([run])[0]
    assert set(found.scored) == {"other"}
    assert "<th>endprompt: other</th>" in run_report.page([found])


def test_copies_of_results_take_no_place(tmp_path):
    run = made(tmp_path, "one")
    for name in ("eval-old", "eval.bak", "eval2", "eval-x-0123", "eval-x-0123abcg", "evaluation"):
        scores_of(run, name, 0.0)
    found = run_data.read([run])[0].scored
    assert set(found) == {""} and found[""].folder == run / "eval"
    shutil.rmtree(run / "eval")
    assert run_data.read([run])[0].scored == {}


def test_results_that_are_left_out_are_said(tmp_path):
    run = made(tmp_path, "one")
    scores_of(run, "eval", 0.0, "another", 128)
    text = run_report.page(run_data.read([run]))
    assert f"endprompt: 1 results of another model in {run / 'eval'} left out." in text
    assert "left out" not in run_report.page(run_data.read([made(tmp_path, "two")]))


def test_perplexity_of_other_words_is_said(tmp_path):
    run = made(tmp_path, "one")
    for length in (64, 512):
        path = run / f"eval/perplexity/{length}.json"
        file = json.loads(path.read_text())
        file["question"] |= {"longest": length, "data": str(length)}
        path.write_text(json.dumps(file))
    text = run_report.page(run_data.read([run]))
    assert "perplexity is not of the same words everywhere: endprompt at 64 (greatest length 64)" in text


def test_labels_tell_runs_apart(tmp_path):
    folders = [made(tmp_path / seed, "tiny", method) for seed in ("a", "b") for method in ("short", "pose")]
    labels = [run.label for run in run_data.read(folders)]
    assert labels == ["a/tiny/short", "a/tiny/pose", "b/tiny/short", "b/tiny/pose"]
    assert [run.label for run in run_data.read(folders[:2])] == ["short", "pose"]


def test_what_is_no_run_is_refused(runs, tmp_path):
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        code, _, error = run_main("report", tmp_path / folder, "--out", out)
        assert code == 2 and "is no run's folder" in error and error.count("\n") == 1
    code, _, error = run_main("report", runs[0], runs[0], "--out", out)
    assert code == 2 and "named twice" in error
    (runs[0] / "train.json").write_text("{")
    code, _, error = run_main("report", runs[0], "--out", out)
    assert code == 2 and "train.json" in error and not out.exists()


def test_only_a_report_is_written_over(runs, tmp_path):
    out = tmp_path / "notes.html"
    out.write_text("<p>mine</p>")
    code, _, error = run_main("report", runs[0], "--out", out)
    assert code == 2 and "is no report" in error and out.read_text() == "<p>mine</p>"
    assert run_main("report", runs[0], "--out", tmp_path)[0] == 2
    out.unlink()
    assert run_main("report", runs[0], "--out", out)[0] == 0
    assert run_main("report", *runs, "--out", out)[0] == 0 and "pose_sharp" in out.read_text()


def test_odd_names_and_values_are_shown_as_they_are(tmp_path):
    run = made(tmp_path, "a $\\frac$ <i> 名", "x$y$")
    said = json.loads((run / "train.json").read_text())
    said["history"] += [{"step": 40, "text_loss": float("inf")}, {"step": "x"}, 3, {"text_loss": None}]
    (run / "train.json").write_text(json.dumps({**said, "steps": "many", "tokens": None}))
    (run / "recipe.yaml").write_text("lengths: {physical: many, target: null}\ndata: 3\n")
    for task, cells in (("passkey", [{"depth": "low"}]), ("distance", 7)):
        path = run / "eval" / task / "64.json"
        file = json.loads(path.read_text())
        file["scores"]["cells"] = cells
        path.write_text(json.dumps(file))
    code, _, error = run_main("report", run, "--out", tmp_path / "report.html")
    assert (code, error) == (0, "")
    text = (tmp_path / "report.html").read_text()
    assert "x$y$" in text and "<i>" not in text and "multikey: keys found" in text
    assert "passkey: keys found" not in text


def test_keys_stand_at_their_distance_to_the_question(tmp_path, monkeypatch):
    """Distances that no row showed count from a query to a key, and not from where the haystack ends."""
    run = made(tmp_path, "one")
    path = run / "eval/distance/512.json"
    file = json.loads(path.read_text())
    for cell in file["scores"]["cells"]:
        cell["between"] = [cell["distance"] + 60, cell["distance"] + 100]
    drawn = {}
    monkeypatch.setattr(run_report.run_figures, "far", lambda named: drawn.update(named) or "")
    for spoil in (
        {},
        {"coverage": None},
        {"coverage": 7},
        {"coverage": {"gap": [3]}},
        {"coverage": {"gap": 3}},
    ):
        path.write_text(json.dumps(file | {"scores": file["scores"] | spoil}))
        run_report.page(run_data.read([run]))
        cells, spans = drawn.pop("endprompt")
        assert list(cells) == [80.0, 180.0, 380.0] and spans == ([] if spoil else [(200, 250)])
    # Where a key stands is not known: nothing says whether rows showed its distance.
    for cell in file["scores"]["cells"]:
        del cell["between"]
    path.write_text(json.dumps(file))
    run_report.page(run_data.read([run]))
    assert drawn["endprompt"][1] == []


def test_broken_settings_are_bad_input(runs):
    (runs[0] / "recipe.yaml").write_text("- a list\n")
    with pytest.raises(BadInput, match="is no recipe"):
        run_data.read(runs)


def opened(page: Path, folder: Path) -> tuple[str, str]:
    """(the page as the browser understood it, what it logged)"""
    out = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder}",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HOME": str(folder)},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout, "\n".join(line for line in out.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is in PATH: the page is not opened in a browser")
def test_the_page_opens_without_an_error(runs, tmp_path):
    out = tmp_path / "report.html"
    run_report.write(runs, out)
    # It says of each picture whether it was drawn, which only the browser knows.
    count = (
        "<script>document.body.dataset.drawn = [...document.images].filter(one => one.naturalWidth).length;"
    )
    drawn = out.read_text().count("<img ")
    out.write_text(
        out.read_text().replace(
            "</body>", f"<script>addEventListener('load', () => {{ {count[8:]} }})</script></body>"
        )
    )
    page, logged = opened(out, tmp_path / "profile")
    assert logged == ""
    assert int(re.search(r'data-drawn="(\d+)"', page)[1]) == drawn > 8
    # The twin: what the browser complains of is seen.
    out.write_text(out.read_text().replace("</body>", "<script>nonsense()</script></body>"))
    assert "nonsense is not defined" in opened(out, tmp_path / "profile")[1]
