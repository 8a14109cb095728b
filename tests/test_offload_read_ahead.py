"""Tensors are read while others are worked on, in order, and no longer than somebody asks."""

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from types import TracebackType

import pytest
import torch

from offload.weights.read_ahead import ReadAhead, Wanted


class Numbered:
    """A feed that fills tensor "n" with n, and notes what it has read. "bad" fails."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.began = threading.Condition()

    def fill(self, destinations: Mapping[str, torch.Tensor], progress: Callable[[int], None] | None = None) -> None:
        for name, tensor in destinations.items():
            with self.began:
                self.read.append(name)
                self.began.notify_all()
            if name == "bad":
                raise OSError("bad")
            tensor.fill_(int(name))

    def wait_for(self, name: str) -> None:
        with self.began:
            assert self.began.wait_for(lambda: name in self.read, timeout=30)

    def __enter__(self) -> "Numbered":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def wanted(*names: str) -> list[Wanted]:
    return [Wanted(name=name, shape=(2, 1 + len(name)), dtype=torch.int64) for name in names]


def test_each_tensor_is_itself_while_the_next_is_read() -> None:
    names, feed, seen = [str(number) for number in (3, 14, 1, 592, 6)], Numbered(), list[int]()
    with closing(ReadAhead(feed)) as ahead, closing(ahead.each(wanted(*names), seen.append)) as tensors:
        for number, (one, tensor) in enumerate(tensors):
            if number + 1 < len(names):
                feed.wait_for(names[number + 1])
            assert one.name == names[number] and tensor.shape == one.shape and tensor.eq(int(one.name)).all()
    assert seen == [one.num_bytes for one in wanted(*names)] and feed.read == names


def test_who_stops_asking_stops_the_reading() -> None:
    feed = Numbered()
    with closing(ReadAhead(feed)) as ahead:
        with closing(ahead.each(wanted(*"123456789"))) as tensors:
            next(tensors)
        assert feed.read == ["1", "2"]
        with closing(ahead.each(wanted("7"))) as tensors:
            assert [one.name for one, _ in tensors] == ["7"]
        with closing(ahead.each([])) as tensors:
            assert list(tensors) == []


def test_an_error_comes_where_its_tensor_would() -> None:
    feed = Numbered()
    with closing(ReadAhead(feed)) as ahead, closing(ahead.each(wanted("1", "bad", "2"))) as tensors:
        assert next(tensors)[0].name == "1"
        with pytest.raises(OSError, match="bad"):
            next(tensors)
