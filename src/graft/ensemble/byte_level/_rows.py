"""What a model gives behind sequences, as rows along a known text: of its logits, or of what stands for them.

Compiled by numba, called by `walking`.
"""

# numba infers types, and what it makes of a function is called otherwise than the function
# mypy: ignore-errors

from __future__ import annotations

import math

from graft.ensemble.byte_level import _layout as lay
from graft.ensemble.byte_level._fields import entry_of, first_of, of, place_row, range_of, set_of
from graft.pointers import F64, I64, behind, bytes_at, called, doubles_at, floats_at, get, inlined, ints_at, put

CANCELLED = 1e-8
"""A difference of running totals that is less than this is summed anew, as in `cover`."""
TINY = 1e-30
"""A probability in float32 below which its logarithm says more."""
EXPECTED = 0.03
"""The probability of each token that the text is cut into, where nothing else is known."""
UNUSUAL = math.log(0.1)
"""What is added to the log-probability of a token by which the tokenizer does not go on."""


@inlined
def bound(letters, stride, low, high, depth, byte):
    """The first token of a range whose letter at a depth is not less than a byte."""
    while low < high:
        middle = (low + high) >> 1
        if I64(get(letters, middle * stride + depth)) < byte:
            low = middle + 1
        else:
            high = middle
    return low


def ranges(frame):
    """Fill the entries of the bytes from BASE on."""
    data, size, base = bytes_at(get(frame, lay.DATA)), get(frame, lay.SIZE), get(frame, lay.BASE)
    entries, found = ints_at(get(frame, lay.ENTRIES)), ints_at(get(frame, lay.RANGES))
    spelt, room = ints_at(get(frame, lay.SPELT)), get(frame, lay.RANGE_ROOM)
    used, tokens = I64(0), I64(0)
    for entry in range(get(frame, lay.SPAN) + 1):
        put(entries, entry, used)
        if entry == 0 and base > 0:
            continue
        trie = ints_at(get(frame, lay.FIRST)) if entry == 0 else ints_at(get(frame, lay.LATER))
        letters, lengths, ids = bytes_at(get(trie, 0)), ints_at(get(trie, 1)), ints_at(get(trie, 2))
        low, high, stride, depth = I64(0), get(trie, 3), get(trie, 4), I64(0)
        byte = base if entry == 0 else base + entry - 1
        mid = low
        while mid < high and get(lengths, mid) == 0:
            mid += 1
        while byte + depth < size and depth < stride:
            letter = I64(get(data, byte + depth))
            low = bound(letters, stride, mid, high, depth, letter)
            high = bound(letters, stride, low, high, depth, letter + 1)
            if low >= high:
                break
            depth += 1
            mid = low
            while mid < high and get(lengths, mid) == depth:
                mid += 1
            if used >= room or tokens + mid - low > get(frame, lay.SPELT_ROOM):
                return lay.ROOM_RANGES
            put(found, used, low)
            put(found, room + used, mid)
            put(found, 2 * room + used, high)
            put(found, 3 * room + used, tokens)
            for place in range(low, mid):
                put(spelt, tokens, get(ids, place))
                tokens += 1
            used += 1
    put(entries, get(frame, lay.SPAN) + 1, used)
    # one more range ends the tokens of the last one
    if used >= room:
        return lay.ROOM_RANGES
    put(found, 3 * room + used, tokens)
    return lay.DONE_ALL


@called
def told_row(frame, entry, logs, totals):
    """The row of what is known of all tokens, `logs` and running `totals` in their order; -1 where there is no room."""
    row = place_row(frame, entry)
    if row < 0:
        return row
    pool = behind(doubles_at(get(frame, lay.POOL)), row)
    first, last = first_of(frame, entry), first_of(frame, entry + 1)
    ends = last - first
    for place in range(first, last):
        mid, high = range_of(frame, I64(1), place), range_of(frame, I64(2), place)
        found = get(totals, high) - get(totals, mid)
        if found <= CANCELLED:
            found = F64(0)
            for token in range(mid, high):
                found += math.exp(F64(get(logs, token)))
        put(pool, place - first, found)
        for token in range(range_of(frame, I64(0), place), mid):
            put(pool, ends, F64(get(logs, token)))
            ends += 1
    return row


def begin(frame, logs, totals):
    """The start's row, of what the model gives all tokens there."""
    row = told_row(frame, I64(0), logs, totals)
    if row < 0:
        return lay.ROOM_POOL
    set_of(frame, I64(0), lay.ROW, row)
    return lay.DONE_ALL


@inlined
def chance(logits, probs, norm, token):
    """The probability of a token, from its logit where it is so small that float32 would lose it."""
    found = F64(get(probs, token))
    return found if found > TINY else math.exp(F64(get(logits, token)) - norm)


@inlined
def step_to(frame, node):
    """The log-probability of a node's token behind the one before it, by that one's row; -inf where that is unknown."""
    parent = of(frame, node, lay.PARENT)
    row = of(frame, parent, lay.ROW) if parent >= 0 else I64(-1)
    if row < 0:
        return -math.inf
    depth = of(frame, node, lay.END) - of(frame, parent, lay.END)
    if parent == 0 and of(frame, parent, lay.END) < get(frame, lay.BASE):
        return -math.inf
    entry = entry_of(frame, parent)
    first, last = first_of(frame, entry), first_of(frame, entry + 1)
    if depth < 1 or entry < 0 or first + depth > last:
        return -math.inf
    place = first + depth - 1
    begun = range_of(frame, I64(3), first)
    for at in range(range_of(frame, I64(3), place), range_of(frame, I64(3), place + 1)):
        if get(ints_at(get(frame, lay.SPELT)), at) == of(frame, node, lay.TOKEN):
            return get(doubles_at(get(frame, lay.POOL)), row + last - first + at - begun)
    return -math.inf


def reduced(frame, nodes, count, logits, probs, norms, stride):
    """The rows of nodes that were read, of logits and probabilities `[count, stride]` of all token ids, and the
    logarithms of the sums that these were divided by."""
    ids = ints_at(get(ints_at(get(frame, lay.LATER)), 2))
    for number in range(count):
        node = get(nodes, number)
        entry = entry_of(frame, node)
        row = place_row(frame, entry)
        if row < 0:
            return lay.ROOM_POOL
        own_logits, own_probs = behind(logits, number * stride), behind(probs, number * stride)
        norm = F64(get(norms, number))
        pool = behind(doubles_at(get(frame, lay.POOL)), row)
        first, last = first_of(frame, entry), first_of(frame, entry + 1)
        begun = range_of(frame, I64(3), first)
        inside, low, high = F64(0), I64(0), I64(0)
        for place in range(last - 1, first - 1, -1):
            mid, end = range_of(frame, I64(1), place), range_of(frame, I64(2), place)
            if place == last - 1:
                low, high = end, end
            beyond = inside
            for token in range(mid, low):
                beyond += chance(own_logits, own_probs, norm, get(ids, token))
            for token in range(high, end):
                beyond += chance(own_logits, own_probs, norm, get(ids, token))
            put(pool, place - first, beyond)
            inside, low, high = beyond, range_of(frame, I64(0), place), end
            at = last - first + range_of(frame, I64(3), place) - begun
            for token in range(low, mid):
                log = F64(get(own_logits, get(ids, token))) - norm
                put(pool, at, log)
                at += 1
                inside += math.exp(log)
        set_of(frame, node, lay.ROW, row)
        ending = ints_at(get(frame, lay.ENDING))
        set_of(frame, node, lay.BESIDE, get(ending, of(frame, node, lay.END)))
        put(ending, of(frame, node, lay.END), node)
    return lay.DONE_ALL


@called
def true_of(frame, node):
    """The log-probability of a node that was read; of those before it too, where they were read later."""
    trues = doubles_at(get(frame, lay.TRUES))
    while get(trues, node) == -math.inf:
        top = node
        while of(frame, top, lay.PARENT) >= 0 and get(trues, of(frame, top, lay.PARENT)) == -math.inf:
            top = of(frame, top, lay.PARENT)
        step = step_to(frame, top)
        if step == -math.inf:
            break
        put(trues, top, get(trues, of(frame, top, lay.PARENT)) + step)
    return get(trues, node)


@called
def guessed_row(frame, node, token):
    """The row of what comes behind a node's token alone, -1 where that is not known, -2 where there is no room."""
    row = of(frame, node, lay.ROUGH)
    logs = get(ints_at(get(frame, lay.LOGS)), token)
    if row < 0 and logs != 0:
        totals = get(ints_at(get(frame, lay.TOTALS)), token)
        row = told_row(frame, entry_of(frame, node), floats_at(logs), doubles_at(totals))
        if row < 0:
            return I64(-2)
        set_of(frame, node, lay.ROUGH, row)
    return row


@called
def cut_row(frame, node):
    """A row by which the text goes on behind a node as the tokenizer cuts it, or with the longest token up to where it
    does; -2 where there is no room."""
    row = of(frame, node, lay.CUTTING)
    if row >= 0:
        return row
    entry, end = entry_of(frame, node), of(frame, node, lay.END)
    row = place_row(frame, entry)
    if row < 0:
        return I64(-2)
    set_of(frame, node, lay.CUTTING, row)
    pool, spelt = behind(doubles_at(get(frame, lay.POOL)), row), ints_at(get(frame, lay.SPELT))
    first, last = first_of(frame, entry), first_of(frame, entry + 1)
    token, begun = get(ints_at(get(frame, lay.CUTS)), end), range_of(frame, I64(3), first)
    longest = I64(-1)
    for place in range(first, last):
        for at in range(range_of(frame, I64(3), place), range_of(frame, I64(3), place + 1)):
            put(pool, last - first + at - begun, -math.inf)
            if token < 0 or get(spelt, at) == token:
                longest = at
    for place in range(first, last):
        put(pool, place - first, EXPECTED if longest >= range_of(frame, I64(3), place + 1) else F64(0))
    if longest >= 0:
        put(pool, last - first + longest - begun, math.log(EXPECTED))
    return row


@called
def prior_row(frame, node, alone):
    """The row of a token alone, where tokens by which the tokenizer does not go on are less likely; -2: no room."""
    row = of(frame, node, lay.PRIOR)
    if row >= 0:
        return row
    entry = entry_of(frame, node)
    row = place_row(frame, entry)
    if row < 0:
        return I64(-2)
    set_of(frame, node, lay.PRIOR, row)
    pool, spelt = doubles_at(get(frame, lay.POOL)), ints_at(get(frame, lay.SPELT))
    first, last = first_of(frame, entry), first_of(frame, entry + 1)
    ends = last - first
    for place in range(ends):
        put(pool, row + place, get(pool, alone + place))
    token = get(ints_at(get(frame, lay.CUTS)), of(frame, node, lay.END))
    for at in range(range_of(frame, I64(3), first), range_of(frame, I64(3), last)):
        less = UNUSUAL if token >= 0 and get(spelt, at) != token else F64(0)
        put(pool, row + ends, get(pool, alone + ends) + less)
        ends += 1
    return row


@called
def alike(frame, node):
    """A node that was read and ends where another one does, if possible by the same token; -1 where there is none."""
    found = get(ints_at(get(frame, lay.ENDING)), of(frame, node, lay.END))
    first = found
    while found >= 0 and of(frame, found, lay.TOKEN) != of(frame, node, lay.TOKEN):
        found = of(frame, found, lay.BESIDE)
    return found if found >= 0 else first
