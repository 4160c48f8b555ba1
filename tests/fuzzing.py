"""Files with wrong bytes."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

# Hypothesis' own draws come near each other; a table is then hit and the numbers beside it not.
CHANCES = st.randoms(use_true_random=True)


def mutated(content: bytes, chance: Random) -> bytes:
    """A few bits flipped, or bytes replaced, cut or put in; often near the ends, with tables."""
    changed = bytearray(content)
    flips = chance.random() < 0.5
    for _ in range(chance.randint(1, 3)):
        last = len(changed)
        if last == 0:
            break
        place = chance.choice(
            [
                *(chance.randrange(last) for _ in range(2)),
                chance.randrange(min(last, 300)),
                chance.randrange(max(0, last - 900), last),
            ]
        )
        if flips:
            changed[place] ^= 1 << chance.randrange(8)
        else:
            length = chance.choice([0, 1, 1, 5, 50, last])
            changed[place : place + length] = chance.randbytes(chance.randrange(7))
    return bytes(changed)
