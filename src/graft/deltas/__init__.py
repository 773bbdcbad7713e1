"""What models learned away from their base, layer by layer, and what of a merge may therefore be expected."""

from graft.deltas.advice import Advice, advise, common_base, explain
from graft.deltas.measure import Deltas, Part, deltas
from graft.deltas.outcome import Outcome, merge_of, outcome

__all__ = ["Advice", "Deltas", "Outcome", "Part", "advise", "common_base", "deltas", "explain", "merge_of", "outcome"]
