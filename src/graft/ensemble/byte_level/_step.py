"""One byte of a known text, as `byte_model` takes it, over arrays: compiled by numba, called by `_walk`.

What is followed, joined, dropped and read is by the formulas of `cover`.
"""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

import math

from graft.ensemble.byte_level import _layout as lay
from graft.ensemble.byte_level._fields import (
    child_of,
    entry_of,
    first_of,
    held,
    hold,
    new_node,
    of,
    range_of,
    real,
    set_of,
    set_real,
    set_weight,
    weight,
)
from graft.ensemble.byte_level._rows import alike, cut_row, guessed_row, prior_row, true_of
from graft.pointers import F64, I64, called, doubles_at, get, inlined, ints_at, put

FAINT, LEAST, PROMOTED = 1e-4, 1e-60, 0.1
"""As of `cover` and `byte_model`."""


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
    room = get(frame, lay.BORN_ROOM)
    whole, reals = ints_at(get(frame, lay.BORN)), doubles_at(get(frame, lay.BORN_WEIGHTS))
    kept = I64(0)
    for number in range(count):
        node, token = get(whole, number), get(whole, room + number)
        true, mass = get(reals, number), get(reals, room + number)
        if not mass > 0:
            continue
        place = kept
        while place > 0 and get(reals, room + place - 1) < mass:
            put(whole, place, get(whole, place - 1))
            put(whole, room + place, get(whole, room + place - 1))
            put(reals, place, get(reals, place - 1))
            put(reals, room + place, get(reals, room + place - 1))
            place -= 1
        put(whole, place, node)
        put(whole, room + place, token)
        put(reals, place, true)
        put(reals, room + place, mass)
        kept += 1
    return kept


@called
def moved_and_born(frame, before, after, total):
    """`grown`: writes hypotheses that go on into list `after` and complete sequences; returns how many of both (-1, or
    -2: no room) and adds their mass to `total`."""
    moved, born = I64(0), I64(0)
    room, open_room = get(frame, lay.BORN_ROOM), get(frame, lay.OPEN_ROOM)
    whole, reals = ints_at(get(frame, lay.BORN)), doubles_at(get(frame, lay.BORN_WEIGHTS))
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
            put(whole, born, node)
            put(whole, room + born, get(spelt, token))
            put(reals, born, -math.inf if rough else true + step)
            put(reals, room + born, mass)
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
        mass = weight(frame, buffer, lay.H_MASS, number)
        if mass > least:
            hold(
                frame,
                buffer,
                kept,
                held(frame, buffer, lay.H_NODE, number),
                held(frame, buffer, lay.H_ROW, number),
                held(frame, buffer, lay.H_AT, number),
                held(frame, buffer, lay.H_ROUGH, number),
                weight(frame, buffer, lay.H_SCALE, number),
                mass,
                weight(frame, buffer, lay.H_TRUE, number),
            )
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
def one_byte(frame, before, after, byte, exact, asking):
    """Hypotheses in list `after` of those in `before` one byte on. Returns a status, whether all of it is known, and
    the byte's log-probability."""
    total_before = real(frame, lay.TOTAL + before)
    moved, born, total = moved_and_born(frame, before, after, F64(0))
    if moved == -2:
        return lay.ROOM_BORN, I64(0), F64(0)
    if moved == -1:
        return lay.ROOM_OPEN, I64(0), F64(0)
    if not total > 0:
        return lay.STUCK, I64(0), F64(0)
    step = math.log(total / total_before)
    drop, join, most = real(frame, I64(lay.DROP)), real(frame, I64(lay.JOIN)), get(frame, lay.MOST)
    room = get(frame, lay.BORN_ROOM)
    whole, reals = ints_at(get(frame, lay.BORN)), doubles_at(get(frame, lay.BORN_WEIGHTS))
    kept, rough, known, given, all_born = sort_born(frame, born), False, True, F64(0), F64(1)
    if kept > 0:
        if drop > 0 or join > 0:
            moved = without_faint(frame, after, moved, FAINT * total)
        all_born = F64(0)
        for number in range(kept):
            all_born += get(reals, room + number)
            known = known and get(reals, number) > -math.inf
        while kept > 1:
            mass = get(reals, room + kept - 1)
            if given + mass > join * total and (most < 0 or kept <= most):
                break
            given += mass
            kept -= 1
        rough = kept == 1 and given + get(reals, room) <= drop * total
        put(reals, room, get(reals, room) + given)
    sure = promote(frame, after, moved, PROMOTED * total, exact, asking)
    if sure < 0:
        return lay.ROOM_ASKS, I64(0), step
    if moved + kept > get(frame, lay.OPEN_ROOM):
        return lay.ROOM_OPEN, I64(0), step
    for number in range(kept):
        parent, token = get(whole, number), get(whole, room + number)
        true, mass = get(reals, number), get(reals, room + number)
        child = child_of(frame, parent, token)
        if child < 0:
            child = new_node(frame, parent, token, byte + 1)
            if child < 0:
                return lay.ROOM_NODES, I64(0), step
        share = F64(1) if known else (mass - given if number == 0 else mass) / all_born
        put(doubles_at(get(frame, lay.SHARES)), child, share)
        row = of(frame, child, lay.ROW)
        if not rough and row >= 0:
            true = max(true, true_of(frame, child))
            hold(frame, after, moved + number, child, row, I64(0), I64(0), mass, mass, true)
            continue
        row = guessed_row(frame, child, token)
        if row == -2:
            return lay.ROOM_POOL, I64(0), step
        if row < 0 and (rough or get(frame, lay.EVERY) != 0):
            ask_alone(frame, token)
        if not rough or row < 0:
            sure = I64(0)
            like = alike(frame, child)
            if like >= 0:
                row = of(frame, like, lay.ROW)
            elif row >= 0:
                row = prior_row(frame, child, row)
            else:
                row = cut_row(frame, child)
            if row == -2:
                return lay.ROOM_POOL, I64(0), step
        hold(frame, after, moved + number, child, row, I64(0), I64(1), mass, mass, true)
        if rough:
            continue
        wanted = exact or (asking and of(frame, parent, lay.ROW) >= 0)
        if asking and of(frame, parent, lay.ASKED) == get(frame, lay.WALK):
            # what stands for the one before it says about what that itself will
            wanted = wanted or get(ints_at(get(frame, lay.ENDING)), of(frame, parent, lay.END)) >= 0
        if wanted and not ask(frame, child):
            return lay.ROOM_ASKS, I64(0), step
    put(ints_at(get(frame, lay.COUNTS)), after, moved + kept)
    total = F64(0)
    for number in range(moved + kept):
        total += weight(frame, after, lay.H_MASS, number)
    if not total > 0:
        return lay.STUCK, I64(0), step
    if total < LEAST:
        for number in range(moved + kept):
            set_weight(frame, after, lay.H_SCALE, number, weight(frame, after, lay.H_SCALE, number) / total)
            set_weight(frame, after, lay.H_MASS, number, weight(frame, after, lay.H_MASS, number) / total)
        total = F64(1)
    set_real(frame, lay.TOTAL + after, total)
    return lay.DONE_ALL, sure, step
