from __future__ import annotations

import math

import pytest

from lightning_sparse.metrics.timeline import SparsityTimeline


def test_a_second_record_of_a_step_replaces_the_first() -> None:
    timeline = SparsityTimeline(["layer"])
    timeline.record(3, [0.1])
    timeline.record(3, [0.2])
    assert (timeline.steps, timeline.sparsity) == ([3], [[0.2]])


def test_a_long_training_is_thinned_evenly_and_keeps_its_first_and_last_step() -> None:
    timeline = SparsityTimeline(["layer"])
    for step in range(0, 5001 * 2, 2):
        timeline.record(step, [step / 10_002])
    assert len(timeline.steps) <= 1024
    assert timeline.steps[0] == 0
    assert timeline.steps[-1] > 9_980
    assert all(column == [step / 10_002] for step, column in zip(timeline.steps, timeline.sparsity, strict=True))


def test_it_goes_on_from_its_state() -> None:
    timeline, resumed = SparsityTimeline(["layer"]), SparsityTimeline(["layer"])
    timeline.record(0, [0.5])
    resumed.load_state_dict(timeline.state_dict())
    resumed.record(1, [0.6])
    assert (timeline.steps, resumed.steps) == ([0], [0, 1])


def test_the_picture_names_layers_steps_and_the_range_of_sparsity() -> None:
    pytest.importorskip("matplotlib")
    timeline = SparsityTimeline(["encoder.weight", "decoder.weight"])
    timeline.record(0, [0.0, 0.0])
    timeline.record(40, [0.5, 0.987])
    axes, colours = timeline.draw(end=100).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["encoder.weight", "decoder.weight"]
    assert axes.get_xlim() == (0, 100)
    assert axes.get_xlabel() == "optimizer steps"
    assert colours.get_ylim() == (0, 1)


def test_a_single_record_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    timeline = SparsityTimeline(["layer"])
    timeline.record(5, [0.5])
    assert timeline.draw(end=5).axes[0].get_xlim() == (5, 6)


def test_layers_that_join_have_no_sparsity_before() -> None:
    timeline = SparsityTimeline(["head"])
    timeline.record(0, [0.5])
    timeline.add(["head", "backbone"])
    timeline.record(1, [0.5, 0.9])
    assert timeline.layers == ["head", "backbone"]
    assert timeline.sparsity[0][0] == 0.5
    assert math.isnan(timeline.sparsity[0][1])
    assert timeline.sparsity[1] == [0.5, 0.9]


def test_it_goes_on_with_the_layers_of_today() -> None:
    timeline = SparsityTimeline(["head", "neck"])
    timeline.record(0, [0.5, 0.9])
    fewer, more = SparsityTimeline(["neck"]), SparsityTimeline(["backbone", "neck", "head"])
    fewer.load_state_dict(timeline.state_dict())
    more.load_state_dict(timeline.state_dict())
    assert fewer.sparsity == [[0.9]]
    assert more.sparsity[0][1:] == [0.9, 0.5]
    assert math.isnan(more.sparsity[0][0])


def test_a_layer_that_joined_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    timeline = SparsityTimeline(["head"])
    timeline.record(0, [0.5])
    timeline.add(["backbone"])
    timeline.record(1, [0.5, 0.9])
    figure = timeline.draw(end=2)
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["head", "backbone"]
