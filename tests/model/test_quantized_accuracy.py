"""What integers cost in accuracy, on stories that the built-in model was not trained on."""

import math

import pytest

from benchmarks import accuracy
from distributed_llm.common.weight_forms import INT8, WeightForm

STORIES = 6


@pytest.mark.parametrize(
    ("form", "percent"), [(INT8, 0.1), (WeightForm(4, 64), 3.0), (WeightForm(4, 128), 3.0)], ids=str
)
def test_perplexity_rises_little(form: WeightForm, percent: float) -> None:
    model, stories = accuracy.load_model(), accuracy.held_out_stories(STORIES)
    plain = accuracy.loss(model, stories)
    integers = accuracy.loss(accuracy.with_integers(model, form), stories)
    assert plain < 0.4  # the stories are those that it knows to tell
    assert integers != plain
    assert math.exp(integers - plain) <= 1 + percent / 100
