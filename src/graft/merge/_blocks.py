"""Sizes that compiled kernels and those who call them share. Light."""

BLOCK = 2048
"""Elements of a block that kernels work on at once, a multiple of DRAWN and LANES."""
LANES = 16
"""Sums that run side by side in an inner product: sum l has the elements l, l + LANES, … of a piece."""
DRAWN = 64
"""Random numbers that are drawn together."""
BUCKETS = 1
"""So many buckets an element sort a row."""
SUMMED, CUT, DROPPED, RANKED = 0, 1, 2, 3
"""What is done to deltas: nothing, small ones are cut, some are dropped, some are dropped by rank."""
