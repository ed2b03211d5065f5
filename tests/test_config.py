"""What the settings say of themselves."""

import pytest

from bsdiff_rt.config import step_count


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step"), (2, "2 steps"), (1000, "1000 steps")])
def test_steps_in_words(steps, words):
    assert step_count(steps) == words
