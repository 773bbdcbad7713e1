"""One byte of a known text, as `byte_model` takes it, over arrays: compiled by numba, called by `_walk`.

What is followed, joined, dropped and read is by the formulas of `cover`.
"""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

import math

from graft.ensemble.byte_level import _layout as lay
from graft.ensemble.byte_level._fields import (
    born_number,
    born_weight,
    child_of,
    entry_of,
    first_of,
    held,
    hold,
    new_node,
    of,
    range_of,
    real,
    set_born,
    set_born_weight,
    set_of,
    set_real,
    set_weight,
    transfer,
    weight,
)
from graft.ensemble.byte_level._rows import alike, cut_row, guessed_row, prior_row, true_of
from graft.ensemble.byte_level._shares import FAINT, LEAST, PROMOTED
from graft.pointers import F64, I64, called, doubles_at, get, inlined, ints_at, put


@called
def ask(frame, node):
    """Note a node that is to be read; whether there is room."""
    if of(frame, node, lay.ASKED) == get(frame, lay.WALK):
        return True
    count = get(frame, lay.ASK_COUNT)
    if count >= get(frame, lay.ASK_ROOM):
        return False
    set_of(frame, node, lay.ASKED, get(frame, lay.WALK))
    put(ints_at(get(frame, lay.ASKS)), count, node)
    put(frame, lay.ASK_COUNT, count + 1)
    return True


@inlined
def ask_alone(frame, token):
    """Note a token whose probability at the start of a text is to be known; each once in a walk."""
    seen = ints_at(get(frame, lay.SEEN))
    if get(seen, token) == get(frame, lay.WALK):
        return
    put(seen, token, get(frame, lay.WALK))
    count = get(frame, lay.ALONE_COUNT)
    put(ints_at(get(frame, lay.ALONE)), count, token)
    put(frame, lay.ALONE_COUNT, count + 1)


@called
def sort_born(frame, count):
    """The sequences that are complete, the likeliest first, equal ones in their order; those of no mass left out."""
    kept = I64(0)
    for number in range(count):
        node, token = born_number(frame, lay.BORN_NODE, number), born_number(frame, lay.BORN_TOKEN, number)
        true, mass = born_weight(frame, lay.BORN_TRUE, number), born_weight(frame, lay.BORN_MASS, number)
        if not mass > 0:
            continue
        place = kept
        while place > 0 and born_weight(frame, lay.BORN_MASS, place - 1) < mass:
            before = place - 1
            set_born(
                frame, place,
                born_number(frame, lay.BORN_NODE, before), born_number(frame, lay.BORN_TOKEN, before),
                born_weight(frame, lay.BORN_TRUE, before), born_weight(frame, lay.BORN_MASS, before),
            )  # fmt: skip
            place -= 1
        set_born(frame, place, node, token, true, mass)
        kept += 1
    return kept


@called
def moved_and_born(frame, before, after, total):
    """`grown`: writes hypotheses that go on into list `after` and complete sequences; returns how many of both (-1, or
    -2: no room) and adds their mass to `total`."""
    moved, born = I64(0), I64(0)
    room, open_room = get(frame, lay.BORN_ROOM), get(frame, lay.OPEN_ROOM)
    spelt, pool = ints_at(get(frame, lay.SPELT)), doubles_at(get(frame, lay.POOL))
    for number in range(get(ints_at(get(frame, lay.COUNTS)), before)):
        node, row = held(frame, before, lay.H_NODE, number), held(frame, before, lay.H_ROW, number)
        at, rough = held(frame, before, lay.H_AT, number), held(frame, before, lay.H_ROUGH, number)
        scale, true = weight(frame, before, lay.H_SCALE, number), weight(frame, before, lay.H_TRUE, number)
        if row < 0:
            continue
        entry = entry_of(frame, node)
        first, last = first_of(frame, entry), first_of(frame, entry + 1)
        if first + at >= last:
            continue
        place = first + at
        begun = range_of(frame, I64(3), first)
        for token in range(range_of(frame, I64(3), place), range_of(frame, I64(3), place + 1)):
            if born >= room:
                return I64(-2), born, total
            step = get(pool, row + last - first + token - begun)
            mass = scale * math.exp(step)
            set_born(frame, born, node, get(spelt, token), -math.inf if rough else true + step, mass)
            born += 1
            total += mass
        if range_of(frame, I64(1), place) < range_of(frame, I64(2), place):
            if moved >= open_room:
                return I64(-1), born, total
            mass = scale * get(pool, row + at)
            hold(frame, after, moved, node, row, at + 1, rough, scale, mass, true)
            moved += 1
            total += mass
    return moved, born, total


@called
def without_faint(frame, buffer, count, least):
    """Leave out hypotheses of no more than this mass."""
    kept = I64(0)
    for number in range(count):
        if weight(frame, buffer, lay.H_MASS, number) > least:
            transfer(frame, buffer, number, buffer, kept)
            kept += 1
    return kept


@called
def promote(frame, buffer, count, likely, exact, asking):
    """What has become likely of what was not read: by its own row where it is read now, else asked for. Whether all
    of it is known, -1 where there is no room."""
    sure = I64(1)
    pool = doubles_at(get(frame, lay.POOL))
    for number in range(count):
        mass = weight(frame, buffer, lay.H_MASS, number)
        if held(frame, buffer, lay.H_ROUGH, number) == 0 or not mass > likely:
            continue
        node, at = held(frame, buffer, lay.H_NODE, number), held(frame, buffer, lay.H_AT, number)
        row = of(frame, node, lay.ROW)
        if row >= 0:
            beyond = get(pool, row + at - 1)
            if beyond > 0:
                hold(frame, buffer, number, node, row, at, I64(0), mass / beyond, mass, true_of(frame, node))
        elif exact or asking:
            if (exact or of(frame, of(frame, node, lay.PARENT), lay.ROW) >= 0) and not ask(frame, node):
                return I64(-1)
            sure = I64(0)
    return sure


@called
def share_born(frame, count):
    """What each complete sequence has of the mass of all; all of it, where all that stand before them are known."""
    known, mass = True, F64(0)
    for number in range(count):
        mass += born_weight(frame, lay.BORN_MASS, number)
        known = known and born_weight(frame, lay.BORN_TRUE, number) > -math.inf
    for number in range(count):
        share = F64(1) if known else born_weight(frame, lay.BORN_MASS, number) / mass
        set_born_weight(frame, lay.BORN_SHARE, number, share)


@called
def joined(frame, count, total):
    """`chosen`: the likeliest complete sequence is given the mass of those that are not followed. Returns how many are
    left, and whether the only one stays unread."""
    if count == 0:
        return count, False
    drop, join, most = real(frame, I64(lay.DROP)), real(frame, I64(lay.JOIN)), get(frame, lay.MOST)
    kept, given = count, F64(0)
    while kept > 1:
        mass = born_weight(frame, lay.BORN_MASS, kept - 1)
        if given + mass > join * total and (most < 0 or kept <= most):
            break
        given += mass
        kept -= 1
    mass = given + born_weight(frame, lay.BORN_MASS, I64(0))
    set_born_weight(frame, lay.BORN_MASS, I64(0), mass)
    return kept, kept == 1 and mass <= drop * total


@called
def stand_in(frame, node, guessed):
    """The row that stands for that of a node until it is read: of one alike, or of its token alone (`guessed`, -1 where
    it is not known) or what the tokenizer makes of the text; -2: no room."""
    like = alike(frame, node)
    if like >= 0:
        return of(frame, like, lay.ROW)
    return prior_row(frame, node, guessed) if guessed >= 0 else cut_row(frame, node)


@called
def to_be_read(frame, node, exact, asking):
    """Whether a node that has become a part of what is followed is asked for."""
    parent = of(frame, node, lay.PARENT)
    if exact or (asking and of(frame, parent, lay.ROW) >= 0):
        return True
    # what stands for the one before it says about what that itself will
    seen = asking and of(frame, parent, lay.ASKED) == get(frame, lay.WALK)
    return seen and get(ints_at(get(frame, lay.ENDING)), of(frame, parent, lay.END)) >= 0


@called
def follow_born(frame, after, place, number, byte, rough, exact, asking):
    """The hypothesis of a complete sequence, at a place of list `after`. Returns a status and whether it is known."""
    parent, token = born_number(frame, lay.BORN_NODE, number), born_number(frame, lay.BORN_TOKEN, number)
    true, mass = born_weight(frame, lay.BORN_TRUE, number), born_weight(frame, lay.BORN_MASS, number)
    child = child_of(frame, parent, token)
    if child < 0:
        child = new_node(frame, parent, token, byte + 1)
        if child < 0:
            return lay.ROOM_NODES, False
    put(doubles_at(get(frame, lay.SHARES)), child, born_weight(frame, lay.BORN_SHARE, number))
    row = of(frame, child, lay.ROW)
    if not rough and row >= 0:
        hold(frame, after, place, child, row, I64(0), I64(0), mass, mass, max(true, true_of(frame, child)))
        return lay.DONE_ALL, True
    row = guessed_row(frame, child, token)
    if row == -2:
        return lay.ROOM_POOL, False
    if row < 0 and (rough or get(frame, lay.EVERY) != 0):
        ask_alone(frame, token)
    sure = rough and row >= 0
    if not sure:
        row = stand_in(frame, child, row)
        if row == -2:
            return lay.ROOM_POOL, False
    hold(frame, after, place, child, row, I64(0), I64(1), mass, mass, true)
    if not rough and to_be_read(frame, child, exact, asking) and not ask(frame, child):
        return lay.ROOM_ASKS, False
    return lay.DONE_ALL, sure


@called
def settled(frame, after, count):
    """List `after` has so many hypotheses; if their mass is too little to compute with, they get another measure."""
    put(ints_at(get(frame, lay.COUNTS)), after, count)
    total = F64(0)
    for number in range(count):
        total += weight(frame, after, lay.H_MASS, number)
    if not total > 0:
        return lay.STUCK
    if total < LEAST:
        for number in range(count):
            set_weight(frame, after, lay.H_SCALE, number, weight(frame, after, lay.H_SCALE, number) / total)
            set_weight(frame, after, lay.H_MASS, number, weight(frame, after, lay.H_MASS, number) / total)
        total = F64(1)
    set_real(frame, lay.TOTAL + after, total)
    return lay.DONE_ALL


@called
def one_byte(frame, before, after, byte, exact, asking):
    """Hypotheses in list `after` of those in `before` one byte on. Returns a status, whether all of it is known, and
    the byte's log-probability."""
    moved, born, total = moved_and_born(frame, before, after, F64(0))
    if moved < 0:
        return lay.ROOM_OPEN if moved == -1 else lay.ROOM_BORN, False, F64(0)
    if not total > 0:
        return lay.STUCK, False, F64(0)
    step = math.log(total / real(frame, lay.TOTAL + before))
    born = sort_born(frame, born)
    if born > 0 and (real(frame, I64(lay.DROP)) > 0 or real(frame, I64(lay.JOIN)) > 0):
        moved = without_faint(frame, after, moved, FAINT * total)
    share_born(frame, born)
    born, rough = joined(frame, born, total)
    known = promote(frame, after, moved, PROMOTED * total, exact, asking)
    if known < 0:
        return lay.ROOM_ASKS, False, step
    if moved + born > get(frame, lay.OPEN_ROOM):
        return lay.ROOM_OPEN, False, step
    sure = known == 1
    for number in range(born):
        status, known_too = follow_born(frame, after, moved + number, number, byte, rough, exact, asking)
        if status != lay.DONE_ALL:
            return status, False, step
        sure = sure and known_too
    return settled(frame, after, moved + born), sure, step
