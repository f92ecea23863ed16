"""What a step's random samples are drawn by: made by the sampler, carried to a device with the step's other arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Draws:
    """What the random samples of a step are drawn by, on the host; greedy samples need nothing. M random samples, those
    without top-k and top-p first.
    """

    numbers: NDArray[np.float64]  # [5, M]: index of the sample, temperature, top_k (0: all), top_p, u in (0, 1)
    num_whole: int  # how many have neither top-k nor top-p: drawn in the order of the vocabulary, with no sorting


#: A row of `Draws.numbers` for each. All are exact in float64, so that one array holds them.
NUM_NUMBERS = 5

#: Of a step whose samples are all greedy.
NO_DRAWS = Draws(np.empty((NUM_NUMBERS, 0)), 0)
