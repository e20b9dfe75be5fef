"""The benchmark of predicted against measured memory: which cases there are, and that it runs."""

from __future__ import annotations

import itertools

import pytest

from .test_tables import bench


def test_there_are_enough_cases_of_every_kind() -> None:
    memory = bench("memory_gpu")
    cases = memory.cases()
    assert len(cases) >= 40 and len(set(cases)) == len(cases)
    assert {c.size for c in cases} == {"1b", "3b", "8b", "14b", "32b", "70b"}
    assert {c.policy for c in cases} == set(memory.POLICIES)
    assert {c.compute for c in cases} == {"bf16", "fp8"} and {c.embedding_away for c in cases} == {c.decoded for c in cases} == {
        True,
        False,
    }
    assert len({c.rank for c in cases}) >= 4 and {c.bits for c in cases} == {8, 32} and {c.paged for c in cases} == {True, False}
    order = [(c.size, c.rank) for c in cases]
    assert sum(a != b for a, b in itertools.pairwise(order)) + 1 == len(set(order)), "a model is made once"


@pytest.mark.cpu
def test_a_case_runs_on_a_tiny_model() -> None:
    memory = bench("memory_gpu")
    cases = [*memory.tiny()[:2], *memory.tiny()[-2:]]
    lines = list(memory.run(cases, "cpu", 60.0))
    assert [line["policy"] for line in lines[1:]] == [case.policy for case in cases]
    assert all(line["tokens_per_s"] > 0 and line["predicted_GiB"] > 0 for line in lines[1:])
    assert memory.summary(lines)["cases"] == 4
