"""A known text gone through, and what of it is to be read: compiled by numba, called by `walking`."""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

import math

from graft.ensemble.byte_level import _layout as lay
from graft.ensemble.byte_level._fields import (
    child_of,
    entry_of,
    held,
    new_node,
    of,
    real,
    row_room,
    set_of,
    set_real,
    transfer,
    weight,
)
from graft.ensemble.byte_level._rows import begin, ranges, reduced, true_of
from graft.ensemble.byte_level._step import one_byte
from graft.pointers import F64, I64, P8, PD, PF, PI, U8, behind, called, doubles_at, get, inlined, ints_at, put


@called
def copied(frame, start, to):
    """List `to` becomes what list `start` is."""
    count = get(ints_at(get(frame, lay.COUNTS)), start)
    put(ints_at(get(frame, lay.COUNTS)), to, count)
    set_real(frame, lay.TOTAL + to, real(frame, lay.TOTAL + start))
    for number in range(count):
        transfer(frame, start, number, to, number)


def walk(frame):
    """Go on from what is sure: as far as all is known, then with what stands for what is not, to see what else is to be
    read up to STOP, and what will be likeliest up to PREDICTED."""
    copied(frame, I64(0), I64(1))
    here, exact, byte = I64(1), True, get(frame, lay.DONE)
    size, gold = get(frame, lay.SIZE), doubles_at(get(frame, lay.GOLD))
    put(frame, lay.ASK_COUNT, I64(0))
    put(frame, lay.ALONE_COUNT, I64(0))
    status = I64(lay.DONE_ALL)
    while byte < get(frame, lay.PREDICTED) and (exact or byte < size - 1):
        asking = byte < get(frame, lay.STOP) and get(frame, lay.ASK_COUNT) <= get(frame, lay.SIDES)
        status, sure, step = one_byte(frame, here, 3 - here, byte, exact, asking)
        if exact and byte == size - 1 and status not in (lay.STUCK, lay.ROOM_OPEN, lay.ROOM_BORN):
            # behind the last byte nothing is to be known
            put(gold, byte, step)
            put(frame, lay.DONE, size)
            put(frame, lay.ASK_COUNT, I64(0))
            put(frame, lay.ALONE_COUNT, I64(0))
            return lay.DONE_ALL
        if status != lay.DONE_ALL:
            break
        here = 3 - here
        byte += 1
        exact = exact and sure
        if exact:
            copied(frame, here, I64(0))
            put(gold, byte - 1, step)
            set_real(frame, I64(lay.LOG), real(frame, I64(lay.LOG)) + step)
            put(frame, lay.DONE, byte)
    put(frame, lay.FRONT_BUFFER, here)
    # where only guesses end, what was asked for is to be read first
    return lay.DONE_ALL if status == lay.STUCK and not exact else status


@inlined
def likeliest(frame):
    """The node of the likeliest hypothesis where the walk ended."""
    buffer = get(frame, lay.FRONT_BUFFER)
    best, most = I64(0), -math.inf
    for number in range(get(ints_at(get(frame, lay.COUNTS)), buffer)):
        mass = weight(frame, buffer, lay.H_MASS, number)
        if mass > most:
            best, most = held(frame, buffer, lay.H_NODE, number), mass
    return best


@called
def list_node(frame, node, above):
    """A node that is to be read behind another one gets its column."""
    tree = of(frame, above, lay.TREE)
    columns = ints_at(get(frame, lay.COLUMNS))
    column = get(columns, tree)
    put(columns, tree, column + 1)
    set_of(frame, node, lay.ABOVE, above)
    set_of(frame, node, lay.DEPTH, of(frame, above, lay.DEPTH) + 1)
    set_of(frame, node, lay.TREE, tree)
    set_of(frame, node, lay.COLUMN, column)
    count = get(frame, lay.LIST_COUNT)
    put(ints_at(get(frame, lay.LIST)), count, node)
    put(frame, lay.LIST_COUNT, count + 1)


@called
def roomy(frame, node):
    """The node that others are read behind: itself, or where the model can read no further the same with only its
    newest tokens before it, in the other tree; -1 where there is no room."""
    limit = get(frame, lay.LIMIT)
    if limit < 0 or of(frame, node, lay.DEPTH) + 1 < limit:
        return node
    if of(frame, node, lay.AGAIN) >= 0:
        return of(frame, node, lay.AGAIN)
    left = max(I64(1), limit // 2)
    other = 1 - of(frame, node, lay.TREE)
    above = I64(1) if other == 1 else I64(2)
    while left > 0:
        # the token so many before the last
        source = node
        for _ in range(left - 1):
            source = of(frame, source, lay.ABOVE)
        token = of(frame, source, lay.TOKEN)
        found = child_of(frame, above, token)
        if found < 0:
            found = new_node(frame, above, token, of(frame, source, lay.END))
            if found < 0:
                return I64(-1)
            set_of(frame, found, lay.ASKED, I64(lay.SILENT))
        if of(frame, found, lay.COLUMN) < 0:
            list_node(frame, found, above)
        above = found
        left -= 1
    set_of(frame, node, lay.AGAIN, above)
    return above


@called
def placed(frame, node):
    """Put a node among those that are to be read, and those before it; whether there was room."""
    while of(frame, node, lay.COLUMN) < 0:
        top = node
        while of(frame, of(frame, top, lay.PARENT), lay.COLUMN) < 0:
            top = of(frame, top, lay.PARENT)
        above = roomy(frame, of(frame, top, lay.PARENT))
        if above < 0:
            return False
        list_node(frame, top, above)
    return True


def listed(frame, ahead):
    """What is to be read: what was asked for, and of the likeliest sequence as much as `ahead` tokens, those included
    that were read but are not sure yet. STOP becomes the byte at which they end."""
    asks, chain = ints_at(get(frame, lay.ASKS)), ints_at(get(frame, lay.CHAIN))
    for number in range(get(frame, lay.ASK_COUNT)):
        if not placed(frame, get(asks, number)):
            return lay.ROOM_NODES
    count, node, done = I64(0), likeliest(frame), get(frame, lay.DONE)
    while node >= 0 and of(frame, node, lay.END) > done:
        put(chain, count, node)
        node, count = of(frame, node, lay.PARENT), count + 1
    stop, sure, begun = done, F64(1), False
    while count > 0 and ahead > 0:
        count -= 1
        ahead -= 1
        sure *= get(doubles_at(get(frame, lay.SHARES)), get(chain, count))
        if sure < real(frame, lay.SURE) and (begun or get(frame, lay.LIST_COUNT) > 0):
            break
        begun = True
        if not placed(frame, get(chain, count)):
            return lay.ROOM_NODES
        stop = of(frame, get(chain, count), lay.END)
    put(frame, lay.STOP, stop)
    return lay.DONE_ALL


def needed(frame, flags):
    """Flag, beside nodes that are, those that they are read behind or will be, and follow their tokens."""
    for node in range(get(frame, lay.NODE_COUNT)):
        if get(flags, node) != 0 and of(frame, node, lay.ROW) >= 0:
            true_of(frame, node)
    for start in range(get(frame, lay.NODE_COUNT)):
        if get(flags, start) != 1:
            continue
        node = start
        while node >= 0 and get(flags, node) != 2:
            put(flags, node, I64(2))
            again = of(frame, node, lay.AGAIN)
            while again >= 0 and get(flags, again) != 2:
                put(flags, again, I64(2))
                again = of(frame, again, lay.ABOVE)
            node = of(frame, node, lay.PARENT) if of(frame, node, lay.COLUMN) < 0 else of(frame, node, lay.ABOVE)
    return lay.DONE_ALL


def moved_rows(frame, map_, pool):
    """Copy the rows of nodes that are kept (`map_`: their new numbers, else -1) into another pool; returns its size."""
    used, old = I64(0), doubles_at(get(frame, lay.POOL))
    for node in range(get(frame, lay.NODE_COUNT)):
        if get(map_, node) < 0:
            continue
        entry = entry_of(frame, node)
        size = row_room(frame, entry) if 0 <= entry <= get(frame, lay.SPAN) else I64(0)
        for field in (lay.ROW, lay.ROUGH):
            row = of(frame, node, I64(field))
            if row >= 0:
                for place in range(size):
                    put(pool, used + place, get(old, row + place))
                set_of(frame, node, I64(field), used)
                used += size
    return used


def linked(frame, roots):
    """Link nodes that have no links yet: to what is behind each, and what was read, but for roots, by where it ends."""
    for node in range(get(frame, lay.NODE_COUNT)):
        parent = of(frame, node, lay.PARENT)
        if parent >= 0:
            set_of(frame, node, lay.SIBLING, of(frame, parent, lay.CHILD))
            set_of(frame, parent, lay.CHILD, node)
        if of(frame, node, lay.ROW) >= 0 and node >= roots:
            ending = behind(ints_at(get(frame, lay.ENDING)), of(frame, node, lay.END))
            set_of(frame, node, lay.BESIDE, get(ending, 0))
            put(ending, 0, node)
    return lay.DONE_ALL


def seen(frame, nodes, count, width, columns):
    """In `columns [count, width] bool`, where nothing is seen, let each node see what leads to it."""
    for number in range(count):
        own = behind(columns, number * width)
        node = get(nodes, number)
        while node >= 0:
            put(own, of(frame, node, lay.COLUMN), U8(1))
            node = of(frame, node, lay.ABOVE)
    return lay.DONE_ALL


KERNELS = {
    "ranges": (ranges, (PI,)),
    "begin": (begin, (PI, PF, PD)),
    "reduced": (reduced, (PI, PI, I64, PF, PF, PF, I64)),
    "walk": (walk, (PI,)),
    "listed": (listed, (PI, I64)),
    "needed": (needed, (PI, PI)),
    "moved_rows": (moved_rows, (PI, PI, PD)),
    "linked": (linked, (PI, I64)),
    "seen": (seen, (PI, PI, I64, I64, P8)),
}
"""Each function and the types of its arguments."""
