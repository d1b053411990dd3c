"""Which distances are supervised: counts against brute force, closed forms against counts (paper Eq. 8-9),
and the command that shows them.
"""

from collections import Counter

import numpy as np
import pytest
from conftest import run_main
from hypothesis import given
from hypothesis import strategies as st
from test_positions import TRAINED, each_trained, fitting, plan, rows

from endprompt import methods
from endprompt.positions import coverage, plans
from endprompt.positions.coverage import gap, union
from endprompt.rows import inspection, shards

GENERATOR = np.random.default_rng(0)


def brute_force(row):
    return Counter(int(query - key) for i, query in enumerate(row) for key in row[: i + 1])


def numbers(spans):
    return [number for low, high in spans for number in range(low, high + 1)]


@given(st.lists(rows(), min_size=1, max_size=4))
def test_pair_counts(many):
    """The difference arrays give what counting pair by pair gives, for one row and for several, equal ones
    too.
    """
    L = max(L for _, L in many)
    expected = sum((brute_force(row) for row, _ in many), Counter())
    parts = [plans.segments(row) for row, _ in many]
    assert coverage.pair_counts(parts, L).tolist() == [expected[distance] for distance in range(L)]
    assert coverage.pair_counts(parts * 3, L).tolist() == [3 * expected[distance] for distance in range(L)]
    assert (
        numbers(coverage.counted(coverage.pair_counts(parts, L)))
        == sorted(expected)
        == numbers(coverage.observed(parts))
    )


def test_pair_counts_of_nothing_and_of_too_much():
    assert coverage.pair_counts([], 3).tolist() == [0, 0, 0]
    assert coverage.counted(np.zeros(3, np.int64)) == []
    with pytest.raises(ValueError, match="span more than 8"):
        coverage.pair_counts([[(0, 3), (8, 8)]], 8)
    assert coverage.pair_counts([[(4, 5), (11, 11)]], 8).tolist() == [3, 1, 0, 0, 0, 0, 1, 1]


@given(rows())
def test_observed_distances_are_those_of_all_causal_pairs(row_and_length):
    assert coverage.observed_distances(row_and_length[0]).tolist() == sorted(brute_force(row_and_length[0]))


@each_trained
@given(
    sizes=fitting(largest=30).map(
        lambda sizes: (sizes[0], sizes[1], min(sizes[2], sizes[0] + sizes[1] + 200))
    ),
    chunks=st.integers(2, 4),
)
def test_closed_form_equals_counted_coverage(method, sizes, chunks):
    a, b, L = sizes
    found = [plan(method, a, b, L, chunks, seed) for seed in range(3)]
    parts = [plans.segments(row) for row in found]
    counts = coverage.pair_counts(parts, L)
    expected = sum(map(brute_force, found), Counter())
    assert counts.tolist() == [expected[distance] for distance in range(L)]
    assert coverage.observed(parts) == coverage.counted(counts)
    missing = gap(coverage.observed(parts), L)
    assert numbers(missing) == np.flatnonzero(counts == 0).tolist()
    assert union(missing) == missing


@given(fitting(largest=40).map(lambda sizes: (sizes[0], sizes[1], min(sizes[2], sizes[0] + sizes[1] + 300))))
def test_closed_form_is_the_papers_for_its_own_rows(sizes):
    a, b, L = sizes
    parts = plans.segments(plans.text_then_end_prompt(a, b, L, GENERATOR))
    assert coverage.observed([parts]) == union([(0, a - 1), (0, b - 1), (L - a - b + 1, L - 1)])
    assert gap(coverage.observed([parts]), L) == ([(max(a, b), L - a - b)] if max(a, b) <= L - a - b else [])


def test_gap_of_the_paper():
    a, b, L = 8172, 20, 65536
    parts = plans.segments(plans.text_then_end_prompt(a, b, L, GENERATOR))
    assert list(coverage.contributions(parts)) == [
        ((0, 8171), (0, 8171), (0, 8171)),
        ((65516, 65535), (0, 8171), (57345, 65535)),
        ((65516, 65535), (65516, 65535), (0, 19)),
    ]
    assert gap(coverage.observed([parts]), L) == [(8172, 57344)]
    counts = coverage.pair_counts([parts], L)
    assert round(np.mean(counts == 0), 2) == 0.75
    assert counts.sum() == (a + b) * (a + b + 1) // 2
    assert coverage.observed_distances(plans.text_then_end_prompt(a, b, L, GENERATOR)).tolist() == [
        *range(8172),
        *range(57345, 65536),
    ]


@pytest.mark.parametrize(
    "spans, expected",
    [
        ([], []),
        ([(2, 4)], [(2, 4)]),
        ([(5, 6), (2, 4)], [(2, 6)]),
        ([(0, 9), (2, 4), (11, 11)], [(0, 9), (11, 11)]),
        ([(1, 2), (1, 2)], [(1, 2)]),
    ],
)
def test_union(spans, expected):
    assert union(spans) == expected


@pytest.mark.parametrize(
    "spans, expected",
    [([], [(0, 9)]), ([(0, 9)], []), ([(0, 3), (6, 8)], [(4, 5), (9, 9)]), ([(1, 9)], [(0, 0)])],
)
def test_gap(spans, expected):
    assert gap(spans, 10) == expected


# -- the command ---------------------------------------------------------------------------------------------

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_coverage_of_sampled_and_of_prepared_rows(recipe_file, tmp_path):
    path, out = recipe_file(), tmp_path / "o"
    code, sampled, err = run_main("inspect", path, "endprompt_pose", "--coverage", "--out", out)
    assert (code, err) == (0, "")
    assert "coverage of endprompt_pose: 64 sampled rows of 64 tokens (there are no shards)" in sampled
    picture = out / "small/endprompt_pose/coverage.png"
    assert str(picture) in sampled and picture.read_bytes().startswith(SIGNATURE)
    assert [file.name for file in picture.parent.iterdir()] == ["coverage.png"]
    assert run_main("prepare", path, "endprompt_pose", "--out", out, "--workers", 1)[0] == 0
    code, prepared, err = run_main("inspect", path, "endprompt_pose", "--coverage", "--out", out)
    assert (code, err) == (0, "")
    assert f"64 prepared rows of {out / 'small/endprompt_pose/shards'}" in prepared
    # Rows cut from a stream of text are all full, so sampling finds the very positions that prepare writes.
    assert prepared.splitlines()[1:] == sampled.splitlines()[1:]


@pytest.mark.slow
def test_numbers_of_the_command(recipe_file, tmp_path, tokenizer):
    b = len(
        tokenizer("This is the end of text, please pay attention here", add_special_tokens=False)["input_ids"]
    )
    code, out, _ = run_main(
        "inspect", recipe_file(), "endprompt", "--coverage", "--out", tmp_path / "o", "--row", 63
    )
    a = 64 - b
    assert code == 0
    for telling in (
        f"never seen: {512 - 64 - a + 1} of the distances 0..511",
        f"row 63: positions 0..{a - 1}, {512 - b}..511",
        f"queries {512 - b}..511 on keys 0..{a - 1}: distances {512 - 63}..511",
    ):
        assert telling in out
    for whose in ("row 63", "all 64 rows"):
        assert (
            f"D_obs of {whose}, closed form (paper Eq. 8): 0..{a - 1}, {512 - 63}..511\nD_obs of {whose},"
            f" counted: 0..{a - 1}, {512 - 63}..511\n" in out
        )
        assert (
            f"D_gap of {whose}, closed form (paper Eq. 9): {a}..{512 - 64}\nD_gap of {whose}, counted:"
            f" {a}..{512 - 64}\n" in out
        )
    pairs = [line.split() for line in out.splitlines() if line.endswith("%") and ".." in line.split()[0]]
    assert len(pairs) == 8 and sum(int(fields[1]) for fields in pairs) == 64 * 64 * 65 // 2
    assert pairs[3] == ["192..255", "0", "0.000%", "100.0%"]


def test_all_methods_are_in_the_picture(recipe_file, tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(coverage, "picture", lambda found, title: panels.extend(found) or SIGNATURE)
    path, out = recipe_file(), tmp_path / "o"
    for method in ("short", "pose"):
        assert run_main("prepare", path, method, "--out", out, "--workers", 1)[0] == 0
    # Another method's shards that do not belong to this recipe, or are damaged, are no reason to fail.
    (out / "small/pose/shards/shard-00000.parquet").write_bytes(b"")
    assert run_main("inspect", path, "endprompt", "--coverage", "--out", out)[0] == 0
    named = {name.split(",")[0]: (name, counts, tokens) for name, counts, tokens in panels}
    assert list(named) == [method.name for method in TRAINED]
    assert (
        named["short"][0].endswith("64 prepared rows")
        and named["pose"][0].endswith("64 sampled rows")
        and named["full_length"][0].endswith("8 sampled rows")
    )
    for name, (_, counts, tokens) in named.items():
        length = 512 if methods.get(name).fills == "target" else 64
        assert (
            tokens == 4096
            and counts.sum() == (4096 // length) * length * (length + 1) // 2
            and counts[0] == 4096
        )


@pytest.mark.parametrize(
    "method, setting, left_out",
    [
        ("short", "data.packing=document", "pose_matched (data.packing"),
        ("short", "lengths.physical=50", "pose_matched (method_options.match_pieces"),
        ("endprompt", "lengths.physical=16", "pose_recall (lengths.physical"),
    ],
)
def test_methods_that_a_recipe_does_not_suit(recipe_file, tmp_path, method, setting, left_out):
    out = tmp_path / "o"
    command = ("inspect", recipe_file(), method, "--coverage", "--out", out, "--set", setting)
    code, _, err = run_main(*command)
    assert code == 0 and f"warning: the picture leaves out {left_out}" in err
    assert (out / "small" / method / "coverage.png").stat().st_size > 0
    other = left_out.partition(" ")[0]
    code, _, err = run_main("inspect", command[1], other, *command[3:])
    assert code == 2 and err.startswith(f"endprompt: {left_out.partition('(')[2]}")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_picture(count):
    counts = np.arange(20) % 3
    assert coverage.picture([(f"method {number}", counts, 100) for number in range(count)], "all").startswith(
        SIGNATURE
    )


def test_bad_input(recipe_file, tmp_path):
    path, out = recipe_file(), tmp_path / "o"
    for method, options, telling in (
        ("base", [], "--coverage: base trains nothing"),
        ("endprompt", ["--row", 64], "--row 64: there are rows 0 to 63"),
        ("endprompt", ["--row", -1], "--row -1"),
        ("none", [], "there is none named 'none'"),
        ("pose", ["--set", "data.pose_chunks=1"], "method_options.pose_chunks"),
    ):
        code, _, err = run_main("inspect", path, method, "--coverage", "--out", out, *options)
        assert code == 2 and telling in err and err.count("\n") == 1
    assert not out.exists()
    assert run_main("prepare", path, "pose", "--out", out, "--workers", 1)[0] == 0
    code, _, err = run_main(
        "inspect", path, "pose", "--coverage", "--out", out, "--set", "data.pose_chunks=3"
    )
    assert code == 2 and "pose_chunks is 2, expected 3" in err
    shard = out / "small/pose/shards/shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = run_main("inspect", path, "pose", "--coverage", "--out", out)
    assert code == 2 and "shard-00000.parquet is damaged" in err
    assert not (out / "small/pose/coverage.png").exists()


@pytest.mark.slow
def test_sampling_stops(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SAMPLED_TOKENS", 640)
    code, out, _ = run_main("inspect", recipe_file(), "pose", "--coverage", "--out", tmp_path / "o")
    assert code == 0 and "10 sampled rows" in out


def test_positions_are_read_alone(recipe_file, tmp_path):
    assert (
        run_main(
            "prepare",
            recipe_file(data={"rows_per_shard": 25}),
            "pose",
            "--out",
            tmp_path / "o",
            "--workers",
            1,
        )[0]
        == 0
    )
    folder = tmp_path / "o/small/pose/shards"
    manifest = shards.read_manifest(folder)
    assert [row.tolist() for row in shards.position_ids(folder, manifest)] == [
        row["position_ids"] for row in shards.rows(folder, manifest)
    ]
