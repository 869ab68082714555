"""Who wrote which byte: segments say the same as a table with a line for every byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_surgery.runtime.hazards import Contents
from qwen_surgery.runtime.memory import Memory

PLACES = st.builds(Memory, st.integers(0, 60), st.integers(1, 25))


@given(st.lists(PLACES, max_size=40), PLACES)
def test_segments_say_of_every_byte_who_wrote_it_last(written: list[Memory], read: Memory) -> None:
    """A segment lost between two others would hide an overwritten result, or report one that is not."""
    contents, table = Contents(), {}
    for number, memory in enumerate(written):
        contents.fill(memory, number)
        table |= {memory.address + i: (number, i) for i in range(memory.size)}
    seen = {
        segment.memory.address + i: (segment.number, segment.offset + i)
        for segment in contents.read(read)
        for i in range(segment.memory.size)
    }
    assert seen == {byte: who for byte, who in table.items() if read.address <= byte < read.end}
