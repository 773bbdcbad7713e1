"""Shares of the probability by which it is decided what is followed, for `cover`, `byte_model` and compiled `_step`."""

FAINT = 1e-4
"""Share of the mass below which a sequence that goes on is not followed, where anything may be left out and another one
is complete, behind which every token may come."""
PROMOTED = 0.1
"""Share of the mass from which on a sequence that was not read is."""
LEAST = 1e-60
"""A state whose hypotheses have together less than this in their measure gets a new one."""
