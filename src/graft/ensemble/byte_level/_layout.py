"""Where a known text's state lies in memory, for the functions that are compiled and for those that call them.

A text's frame is one array of int64: whole numbers, and addresses of other arrays, at these places. A node is a token
sequence; its byte is where it ends. The entries of a byte are the ranges of tokens (in the order of their bytes) that
the text goes on with there, by depth. A row is what the model gives behind a node of that: for each depth the
probability of all tokens that go on beyond it, then the log-probability of each token that ends there.
"""

from __future__ import annotations

# a node: the sequence before it (-1: none), its token, the byte at which it ends, the node that it is read behind, how
# many tokens it is read behind, its column and tree in the cache (-1: not read), the first node behind it, the next
# one behind the same, its row (-1: none), that of its token alone, which stands for it until it is read, one that says
# no more than how the text is cut into tokens, the node that its followers are read behind where the model can read no
# further, and the walk that asked for it
PARENT, TOKEN, END, ABOVE, DEPTH, COLUMN, TREE, CHILD, SIBLING, ROW, ROUGH, PRIOR, CUTTING, AGAIN, ASKED, BESIDE = (
    range(16)
)
NODE = 16
"""Whole numbers of a node."""

SILENT = -2
"""Is in the place of the walk that asked, of nodes behind which nothing is to be known."""

H_NODE, H_ROW, H_AT, H_ROUGH = range(4)
"""Whole numbers of a hypothesis: its node, row, depth, and whether the row is one that stands for another."""
H_SCALE, H_MASS, H_TRUE = range(3)
HYPOTHESIS = 4
BUFFERS = 3
"""Lists of hypotheses: those behind what is sure, and two by turns."""

BORN_NODE, BORN_TOKEN = range(2)
"""Whole numbers of a sequence that a token has made: the node before it and the token."""
BORN_TRUE, BORN_MASS, BORN_SHARE = range(3)
"""Its log-probability, its mass, and its share of what is complete at the same byte."""

(
    SIZE,  # of the text, in bytes
    DATA,
    DONE,  # bytes behind which all is known
    STOP,  # byte up to which what is likeliest has been read
    PREDICTED,  # byte up to which the walk goes
    BASE,  # first byte that has entries
    SPAN,  # how many bytes have
    ENTRIES,  # [SPAN + 2] where each byte's ranges begin; the first is the start's, the next that of BASE
    RANGES,  # [4, RANGE_ROOM] low, mid, high, and where its tokens begin
    RANGE_ROOM,
    SPELT,  # [SPELT_ROOM] tokens that end in ranges
    SPELT_ROOM,
    LATER,  # letters, lengths, ids, how many, letters a token
    FIRST,
    NODES,  # [NODE, NODE_ROOM]
    TRUES,  # [NODE_ROOM] the log-probability of each
    SHARES,  # [NODE_ROOM] of what ends at the same byte, as far as it is known
    NODE_ROOM,
    NODE_COUNT,
    POOL,
    POOL_ROOM,
    POOL_USED,
    OPEN,  # [BUFFERS, HYPOTHESIS, OPEN_ROOM]
    WEIGHTS,  # [BUFFERS, 3, OPEN_ROOM]
    OPEN_ROOM,
    COUNTS,  # [BUFFERS] hypotheses in each
    BORN,  # [2, BORN_ROOM]
    BORN_WEIGHTS,  # [3, BORN_ROOM]
    BORN_ROOM,
    ASKS,  # nodes to be read
    ASK_ROOM,
    ASK_COUNT,
    ALONE,  # tokens of which it is not known what comes behind them alone
    ALONE_COUNT,
    LOGS,  # [vocabulary] addresses of what comes behind each token alone, 0 where that is not known
    TOTALS,
    SEEN,  # [vocabulary] the walk that asked for a token
    WALK,
    SIDES,  # nodes asked for behind which guessing ends
    MOST,  # -1: any number
    CUTS,  # [SIZE + 1] the token that begins at a byte where the tokenizer cuts the text, else -1
    ENDING,  # [SIZE + 1] a node that was read and ends at a byte, else -1; the others stand BESIDE it
    CHAIN,  # nodes from what is sure to the likeliest sequence's last
    EVERY,  # whether to ask what comes behind every token alone that is not read
    FRONT_BUFFER,  # the list of hypotheses with which the walk ended, sure or not
    LIMIT,  # tokens that the model reads, -1: any number
    COLUMNS,  # [2] in each of the text's trees
    LIST,  # nodes to be read, in order
    LIST_COUNT,
    REALS,
    GOLD,
    FIELDS,
) = range(52)

DROP, JOIN, LOG, SURE, TOTAL = range(5)
"""Of the reals; from TOTAL on a number for each list of hypotheses."""
REAL = TOTAL + BUFFERS

DONE_ALL, ROOM_NODES, ROOM_OPEN, ROOM_BORN, ROOM_POOL, ROOM_RANGES, ROOM_ASKS, STUCK = 0, 2, 3, 4, 5, 6, 7, 8
"""What a function gives back: all is well, what has no room left, or that no sequence writes a byte. 1 is a failure."""
