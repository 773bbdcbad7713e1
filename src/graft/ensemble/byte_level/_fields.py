"""What of a known text lies where `_layout` says, for the functions that are compiled."""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

import math

from graft.ensemble.byte_level import _layout as lay
from graft.pointers import I64, behind, called, doubles_at, get, inlined, ints_at, put


@inlined
def of(frame, node, field):
    """A whole number of a node."""
    return get(ints_at(get(frame, lay.NODES)), field * get(frame, lay.NODE_ROOM) + node)


@inlined
def set_of(frame, node, field, value):
    """Write a whole number of a node."""
    put(ints_at(get(frame, lay.NODES)), field * get(frame, lay.NODE_ROOM) + node, value)


@inlined
def real(frame, place):
    """A real number of the text, of those that `_layout` names."""
    return get(doubles_at(get(frame, lay.REALS)), place)


@inlined
def set_real(frame, place, value):
    """Write a real number of the text."""
    put(doubles_at(get(frame, lay.REALS)), place, value)


@inlined
def held(frame, buffer, field, place):
    """A whole number of a hypothesis."""
    room = get(frame, lay.OPEN_ROOM)
    return get(ints_at(get(frame, lay.OPEN)), (buffer * lay.HYPOTHESIS + field) * room + place)


@inlined
def weight(frame, buffer, field, place):
    """A real number of a hypothesis."""
    return get(doubles_at(get(frame, lay.WEIGHTS)), (buffer * 3 + field) * get(frame, lay.OPEN_ROOM) + place)


@inlined
def set_weight(frame, buffer, field, place, value):
    """Write a real number of a hypothesis."""
    put(doubles_at(get(frame, lay.WEIGHTS)), (buffer * 3 + field) * get(frame, lay.OPEN_ROOM) + place, value)


@inlined
def born_number(frame, field, number):
    """A whole number of a complete sequence."""
    return get(ints_at(get(frame, lay.BORN)), field * get(frame, lay.BORN_ROOM) + number)


@inlined
def born_weight(frame, field, number):
    """A real number of a complete sequence."""
    return get(doubles_at(get(frame, lay.BORN_WEIGHTS)), field * get(frame, lay.BORN_ROOM) + number)


@inlined
def set_born_weight(frame, field, number, value):
    """Write a real number of a complete sequence."""
    put(doubles_at(get(frame, lay.BORN_WEIGHTS)), field * get(frame, lay.BORN_ROOM) + number, value)


@inlined
def set_born(frame, number, node, token, true, mass):
    """Write a complete sequence."""
    room = get(frame, lay.BORN_ROOM)
    whole, reals = ints_at(get(frame, lay.BORN)), doubles_at(get(frame, lay.BORN_WEIGHTS))
    put(whole, lay.BORN_NODE * room + number, node)
    put(whole, lay.BORN_TOKEN * room + number, token)
    put(reals, lay.BORN_TRUE * room + number, true)
    put(reals, lay.BORN_MASS * room + number, mass)


@called
def hold(frame, buffer, place, node, row, at, rough, scale, mass, true):
    """Write a hypothesis."""
    room = get(frame, lay.OPEN_ROOM)
    whole = behind(ints_at(get(frame, lay.OPEN)), buffer * lay.HYPOTHESIS * room + place)
    put(whole, lay.H_NODE * room, node)
    put(whole, lay.H_ROW * room, row)
    put(whole, lay.H_AT * room, at)
    put(whole, lay.H_ROUGH * room, rough)
    reals = behind(doubles_at(get(frame, lay.WEIGHTS)), buffer * 3 * room + place)
    put(reals, lay.H_SCALE * room, scale)
    put(reals, lay.H_MASS * room, mass)
    put(reals, lay.H_TRUE * room, true)


@called
def transfer(frame, start, place, to, other):
    """Write the hypothesis at a place of list `start` at another place of list `to`."""
    hold(
        frame,
        to,
        other,
        held(frame, start, lay.H_NODE, place),
        held(frame, start, lay.H_ROW, place),
        held(frame, start, lay.H_AT, place),
        held(frame, start, lay.H_ROUGH, place),
        weight(frame, start, lay.H_SCALE, place),
        weight(frame, start, lay.H_MASS, place),
        weight(frame, start, lay.H_TRUE, place),
    )


@inlined
def entry_of(frame, node):
    """The entry of the byte at which a node ends."""
    return I64(0) if node == 0 else of(frame, node, lay.END) - get(frame, lay.BASE) + 1


@inlined
def first_of(frame, entry):
    """The place of its first range."""
    return get(ints_at(get(frame, lay.ENTRIES)), entry)


@inlined
def range_of(frame, field, place):
    """Of a range of tokens where it begins (0), where those that go on begin (1) or end (2), and the place of the first
    of those that end there among all such tokens (3)."""
    return get(ints_at(get(frame, lay.RANGES)), field * get(frame, lay.RANGE_ROOM) + place)


@inlined
def child_of(frame, node, token):
    """The node of a token behind a node, -1 where there is none."""
    child = of(frame, node, lay.CHILD)
    while child >= 0 and of(frame, child, lay.TOKEN) != token:
        child = of(frame, child, lay.SIBLING)
    return child


@called
def new_node(frame, parent, token, end):
    """A node that is not read, -1 where there is no room for it."""
    node = get(frame, lay.NODE_COUNT)
    if node >= get(frame, lay.NODE_ROOM):
        return I64(-1)
    put(frame, lay.NODE_COUNT, node + 1)
    for field in range(lay.NODE):
        set_of(frame, node, I64(field), I64(-1))
    set_of(frame, node, lay.PARENT, parent)
    set_of(frame, node, lay.TOKEN, token)
    set_of(frame, node, lay.END, end)
    set_of(frame, node, lay.SIBLING, of(frame, parent, lay.CHILD))
    set_of(frame, parent, lay.CHILD, node)
    put(doubles_at(get(frame, lay.TRUES)), node, -math.inf)
    return node


@inlined
def row_room(frame, entry):
    """Numbers of a row behind a byte."""
    first, last = first_of(frame, entry), first_of(frame, entry + 1)
    return last - first + range_of(frame, I64(3), last) - range_of(frame, I64(3), first)


@inlined
def place_row(frame, entry):
    """Where a row behind a byte goes, -1 where there is no room for it."""
    row, size = get(frame, lay.POOL_USED), row_room(frame, entry)
    if row + size > get(frame, lay.POOL_ROOM):
        return I64(-1)
    put(frame, lay.POOL_USED, row + size)
    return row
