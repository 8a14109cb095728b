"""A codec says what is stored of a layer, and what it takes to compute with it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import XorSource, xor_codec
from offload.weights.codec import identities, scratch_bytes

shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4)


def test_parameters_that_are_stored_as_they_are_need_no_scratch_and_equal_layers_share_a_codec() -> None:
    small, large = {"a": (2,)}, {"a": (300,), "b": (1,)}
    codecs = identities([small, large, small], torch.float32)
    assert codecs[0] is codecs[2] and all(codec.stored is codec.computed and codec.decode is None for codec in codecs)
    assert scratch_bytes(codecs) == 0
    assert scratch_bytes([codecs[1], xor_codec(codecs[0].computed, 0)]) == codecs[0].computed.num_bytes


@given(shapes, st.integers(0, 9))
def test_the_codec_of_the_tests_decodes_what_its_source_stores(sizes: list[tuple[int, ...]], layer: int) -> None:
    """And its stored bytes are none of the parameters'."""
    expected = {str(number): torch.randn(size) for number, size in enumerate(sizes)}

    class Noise:
        def open(self) -> "Noise":
            return self

        def fill(self, destinations: dict[str, torch.Tensor], progress: object = None) -> None:
            for name, view in destinations.items():
                view.copy_(expected[name.rpartition(".")[2]])

    raw = identities([{name: tuple(tensor.shape) for name, tensor in expected.items()}], torch.float32)
    codec = xor_codec(raw[0].computed, layer)
    assert codec.decode is not None
    stored = codec.stored.views(torch.zeros(codec.stored.num_bytes, dtype=torch.uint8))
    source = XorSource(Noise(), "layers", [codec])  # type: ignore[arg-type]
    source.open().fill({f"layers.0.{name}": view for name, view in stored.items()})
    parameters = codec.computed.views(torch.zeros(codec.computed.num_bytes, dtype=torch.uint8))
    codec.decode(stored, parameters)
    for name, tensor in expected.items():
        assert torch.equal(parameters[name], tensor)
        assert not torch.equal(stored[f"{name}.xor"], tensor.view(-1).view(torch.uint8))
