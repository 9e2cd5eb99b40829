"""The model of large trees: what grows, what does not, and where it is no longer comfortable."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale
from scale import COMFORTABLE, FIGURES, Rates

RATES = Rates(
    create=0.03,
    cancel=0.02,
    read=0.0015,
    request=0.005,
    look=0.025,
    cpu=0.001,
    live=9_000,
    finished=900,
)
sizes = st.integers(1, 10**6)
names = st.sampled_from(list(FIGURES))
fan_outs = st.integers(2, 10**6)


@given(names, sizes, sizes, fan_outs)
def test_a_larger_tree_never_takes_less(name, one, other, fan_out):
    rates = attrs.evolve(RATES, fan_out=fan_out)
    small, large = sorted((one, other))
    figure = FIGURES[name]
    assert figure(rates, small).value <= figure(rates, large).value * (1 + 1e-9)


@given(sizes, fan_outs)
def test_no_parent_has_more_children_than_the_fan_out_says(size, fan_out):
    levels = [1, *scale.levels(attrs.evolve(RATES, fan_out=fan_out), size)]
    assert all(below <= above * fan_out for above, below in itertools.pairwise(levels))
    assert levels[-1] == size


FLAT, DEEP = attrs.evolve(RATES, fan_out=10**9), attrs.evolve(RATES, fan_out=1_000)


@pytest.mark.parametrize(
    ("name", "rates"), [(name, DEEP if name == "servers' time" else FLAT) for name in FIGURES]
)
def test_a_knee_is_the_last_size_that_is_comfortable(name, rates):
    found = scale.knee(rates, name)
    assert FIGURES[name](rates, found["runs"]).value <= COMFORTABLE[name]
    assert FIGURES[name](rates, found["runs"] + 1).value > COMFORTABLE[name]


def test_what_small_parents_keep_is_comfortable_at_any_size():
    assert scale.knee(DEEP, "ended") is None


def test_more_servers_do_not_help_one_parent_to_launch():
    many = attrs.evolve(RATES, servers=8)
    assert scale.launch(many, 1_000) == scale.launch(RATES, 1_000)
    assert scale.launch(attrs.evolve(many, fan_out=10), 1_000).value < 10


def test_levels_keep_the_memory_of_a_parent_small_and_not_that_of_a_teardown():
    assert scale.memory(DEEP, 10**6).value < scale.memory(RATES, 10**6).value / 500
    assert scale.held(DEEP, 10**6) == scale.held(RATES, 10**6)


def test_a_budget_of_requests_limits_what_the_servers_could_do():
    few = attrs.evolve(RATES, requests_per_minute=10)
    assert scale.teardown(few, 10**5).cause == "requests a minute"
