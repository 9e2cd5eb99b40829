"""What goes wrong between a process and the server, drawn from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import random


@attrs.define(kw_only=True)
class Faults:
    """How often what goes wrong; each is a probability from 0 to 1 unless it says otherwise.

    Args:
        refused: A request is answered with 429 or 503, and nothing has happened.
        lost_answer: A request is carried out, and its answer never arrives.
        repeated: A request is carried out twice.
        latency_seconds: What a request takes at most.
        dropped_events: An event is not delivered.
        repeated_events: An event is delivered again, up to a minute later.
        event_seconds: What an event takes at most; so they overtake each other.
        closed_streams: An event closes the stream instead of arriving.

    Example:
        ```python
        prefect = FakePrefect(seed=1, faults=Faults(refused=0.2, dropped_events=0.5))
        ```
    """

    refused: float = 0.0
    lost_answer: float = 0.0
    repeated: float = 0.0
    latency_seconds: float = 0.05
    dropped_events: float = 0.0
    repeated_events: float = 0.0
    event_seconds: float = 0.2
    closed_streams: float = 0.0


@attrs.define
class Dice:
    """Draws from one seed, so that a run of the simulation can be repeated."""

    random: random.Random
    faults: Faults

    def happens(self, probability: float) -> bool:
        """Draw whether something of this probability happens."""
        return probability > 0 and self.random.random() < probability

    def upto(self, seconds: float, *, least: float = 0.0) -> float:
        """Draw a duration."""
        return self.random.uniform(least, max(least, seconds))
