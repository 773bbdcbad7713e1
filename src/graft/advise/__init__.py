"""Which way of tuning to try first, on what evidence, and a recipe that checks it."""

from graft.advise.advice import Advice, advise
from graft.advise.candidates import Candidate
from graft.advise.evidence import Standing, evidence

__all__ = ["Advice", "Candidate", "Standing", "advise", "evidence"]
