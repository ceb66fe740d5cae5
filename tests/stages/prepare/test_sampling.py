"""Sampling, and the set of ids: an even choice of rows, in memory that a million rows may take."""

from array import array

from cgd_stages.prepare import sampling
from cgd_stages.prepare.intake import Ids
from cgd_stages.prepare.sampling import Sample, nth_smallest
from cgd_stages.prepare.sources import row_id
from cgd_stages.store.rows import Row, row_schema


def rows(count: int) -> list[Row]:
    texts = [f"question {n}" for n in range(count)]
    return [{"id": row_id(text), "sample": 0, "prompt": text, "reference": None, "prompt_tokens": 3} for text in texts]


def drawn(folder, given: list[Row], size: int, seed: int = 0) -> list[Row]:
    sample = Sample(seed, size, folder, row_schema("prepare"))
    for row in given:
        sample.add(row)
    return [row for row, taken in sample.drawn() if taken]


def test_a_sample_has_the_size_asked_for_and_no_row_twice(tmp_path):
    found = drawn(tmp_path, rows(500), 50)
    assert len(found) == len({row["id"] for row in found}) == 50


def test_of_fewer_rows_than_asked_for_all_are_drawn(tmp_path):
    assert drawn(tmp_path, rows(5), 50) == rows(5)
    assert drawn(tmp_path, [], 50) == []


def test_every_row_is_as_likely_as_any_other(tmp_path):
    given, counts = rows(40), dict.fromkeys((row["id"] for row in rows(40)), 0)
    for seed in range(400):
        for row in drawn(tmp_path, given, 10, seed):
            counts[row["id"]] += 1
    # 100 are expected of each, with a standard deviation of 9.
    assert all(60 < count < 140 for count in counts.values())


def test_a_larger_sample_holds_the_smaller_one(tmp_path):
    small, large = drawn(tmp_path, rows(100), 10), drawn(tmp_path, rows(100), 30)
    assert {row["id"] for row in small} < {row["id"] for row in large}


def test_rows_that_waited_in_files_come_back_as_they_were_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "FILE_ROWS", 7)
    assert drawn(tmp_path, rows(40), 40) == rows(40)
    assert not list(tmp_path.iterdir())


def test_the_nth_smallest_key():
    keys = array("Q", (int(row_id(str(n))[:16], 16) for n in range(100)))
    assert [nth_smallest(keys, n) for n in (1, 50, 100, 101)] == [sorted(keys)[n] for n in (0, 49, 99, 99)]


def test_an_id_is_new_once_however_many_there_are():
    ids, texts = Ids(), [row_id(str(n)) for n in range(5000)]
    assert all(ids.add(text) for text in texts)
    assert not any(ids.add(text) for text in texts)


def test_ids_that_are_all_zeros_or_meet_in_one_place_are_told_apart():
    ids, alike = Ids(), [f"{n:04x}{0:016x}" for n in range(50)]
    assert [ids.add(text) for text in alike] == [True] * 50
    assert [ids.add(text) for text in alike] == [False] * 50
