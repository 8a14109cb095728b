"""How certain `bench spec` says it is."""

import math
import statistics

import pytest

from offload.bench.spec import error_by_text


def test_the_error_of_texts_of_one_length_is_that_of_their_means() -> None:
    texts = [[1, 2, 3], [4, 4, 4], [2, 2, 5]]
    means = [statistics.fmean(text) for text in texts]
    assert error_by_text(texts) == pytest.approx(statistics.stdev(means) / math.sqrt(3))


def test_passes_of_one_text_count_for_no_more_than_their_text() -> None:
    """Ten times the same passes are no news; a plain standard error would shrink by the root of ten."""
    texts = [[1, 1], [5, 5], [3, 3]]
    assert error_by_text([text * 10 for text in texts]) == pytest.approx(error_by_text(texts))


def test_one_text_says_nothing_of_others() -> None:
    assert error_by_text([[1, 2, 3]]) is None and error_by_text([[1], []]) is None
