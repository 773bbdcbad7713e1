"""How two checkpoints are related, and what of them may therefore be combined, and how."""

from graft.relate.relation import Relation, relate, render

__all__ = ["Relation", "relate", "render"]
