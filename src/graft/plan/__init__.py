"""What a recipe would do: the key of every node, what is there already, and what the rest will cost."""

from graft.plan.places import OneModel, Places
from graft.plan.steps import Plan, Step, make_plan, standing
from graft.plan.table import plain, render, render_memory

__all__ = ["OneModel", "Places", "Plan", "Step", "make_plan", "plain", "render", "render_memory", "standing"]
