"""Which requests are read together: by hand, and by counting what has to be read."""

import random

import pytest

from graft.evaluate.sharing import Request, Row, common, plan


def sorted_requests(texts, wanted=1):
    made = [Request(i, tuple(map(ord, text)), (0,) * wanted) for i, text in enumerate(texts)]
    return sorted(made, key=lambda request: request.tokens)


def tokens_to_read(requests):
    alone, clusters = plan(requests)
    read = sum(len(r.tokens) for r in alone)
    rows = [row for cluster in clusters for row in cluster.rows]
    return read + sum(c.prefix for c in clusters) + sum(len(row.tokens) for row in rows)


def test_a_branch_sees_what_leads_to_it():
    # shared 5 6; branches 7 8 and 9
    row = Row.of([Request(0, (5, 6, 7, 8), (8, 1)), Request(1, (5, 6, 9), (2,))], 0)
    assert row.tokens == [5, 6, 7, 8, 9]
    assert row.positions == [0, 1, 2, 3, 2]
    assert row.places == [[2, 3], [4]]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert row.seen().int().tolist() == expected


def test_branches_branch_again():
    row = Row.of([Request(0, (1, 2, 3), (9,)), Request(1, (1, 2, 4), (9,)), Request(2, (1, 5), (9,))], 0)
    assert row.tokens == [1, 2, 3, 4, 5]
    assert row.paths == [[0, 1, 2], [0, 1, 3], [0, 4]]
    assert row.seen()[3].int().tolist() == [1, 1, 0, 1, 0]


def test_a_prefix_stays_out_of_the_row():
    row = Row.of([Request(0, (1, 2, 3), (9,)), Request(1, (1, 2, 4), (9,))], 2)
    assert (row.prefix, row.tokens, row.positions, row.paths) == (2, [3, 4], [2, 2], [[0], [1]])


def test_equal_requests_are_one_path():
    row = Row.of([Request(0, (1, 2), (9,)), Request(1, (1, 2), (8,))], 0)
    assert row.tokens == [1, 2]
    assert row.paths == [[0, 1], [0, 1]]


def test_along_every_path_stand_the_requests_own_tokens_and_nothing_else_is_seen():
    draw = random.Random(0)
    requests = sorted_requests(["".join(draw.choices("ab", k=draw.randint(1, 12))) for _ in range(30)])
    row = Row.of(requests, 0)
    seen = row.seen()
    for request, path in zip(row.requests, row.paths, strict=True):
        assert tuple(row.tokens[node] for node in path) == request.tokens
        for place, node in enumerate(path):
            assert seen[node].nonzero().flatten().tolist() == sorted(path[: place + 1])


def test_a_prompt_of_many_questions_is_read_ahead_once():
    requests = sorted_requests([f"{'p' * 800}{q:03d}{'x' * 40}{choice}" for q in range(50) for choice in "abcd"])
    alone, clusters = plan(requests)
    assert alone == []
    assert [(cluster.prefix >= 800, len(cluster.rows)) for cluster in clusters] == [(True, 50)]
    assert tokens_to_read(requests) < 800 + 50 * 50


def test_groups_with_prompts_of_their_own_behind_a_common_header_each_read_theirs_once():
    def prompt(subject):
        return "header " * 10 + f"{subject}" * 500

    requests = sorted_requests([f"{prompt(s)}{q}{'y' * 60}{c}" for s in "abc" for q in range(20, 60) for c in "kl"])
    _, clusters = plan(requests)
    assert [cluster.prefix >= 570 for cluster in clusters] == [True, True, True]


def test_what_shares_nothing_is_left_alone():
    draw = random.Random(0)
    requests = sorted_requests(["".join(draw.choices("abcdefgh", k=50)) for _ in range(20)])
    alone, clusters = plan(requests)
    assert (alone, clusters) == (requests, [])


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_planned_once_and_no_more_is_read_than_alone(seed):
    draw = random.Random(seed)
    heads = ["".join(draw.choices("ab", k=draw.randint(0, 90))) for _ in range(4)]
    texts = [draw.choice(heads) * draw.randint(0, 3) + "".join(draw.choices("ab", k=20)) for _ in range(60)]
    requests = sorted_requests(texts, wanted=draw.randint(1, 15))
    alone, clusters = plan(requests)
    planned = [*alone, *(r for c in clusters for row in c.rows for r in row.requests)]
    assert sorted(r.index for r in planned) == list(range(60))
    assert tokens_to_read(requests) <= sum(len(r.tokens) for r in requests)
    for cluster in clusters:
        for row in cluster.rows:
            assert all(r.tokens[: cluster.prefix] == row.requests[0].tokens[: cluster.prefix] for r in row.requests)
            assert all(r.usable >= cluster.prefix for r in row.requests)


def test_common_counts_equal_tokens_at_the_beginning():
    assert common((1, 2, 3), (1, 2, 4)) == 2
    assert common((1, 2), (1, 2, 4)) == 2
    assert common((), (1,)) == 0
