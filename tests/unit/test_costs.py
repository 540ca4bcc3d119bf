"""Tables of timed rounds: what a machine that drifts, or was interrupted, leaves in them."""

from orthrus.engine.costs import BESIDE, cost_table, quiet_rounds

TRUE_MS = {
    "body 1+0": 10.0,
    "body 8+0": 12.0,
    "body 16+0": 14.0,
    "body 8+8": 16.0,
    "body 8+16": 19.0,
    "body 1+2": 11.0,
    "body 1+8": 13.0,
    "head 1": 0.75,
    "head 8": 1.0,
    "head 16": 1.25,
    "greedy choice 1": 0.25,
    "greedy choice 8": 0.5,
    "greedy choice 16": 0.75,
    "greedy draft 2": 0.75,
    "greedy draft 10": 1.25,
    "sampled choice 1": 1.25,
    "sampled choice 8": 2.0,
    "sampled choice 16": 2.75,
    "sampled draft 2": 1.5,
    "sampled draft 10": 2.5,
}


def test_a_table_holds_what_was_timed() -> None:
    table = cost_table([TRUE_MS])
    assert table.rows == (1, 8, 16)
    assert table.body_ms == (10.0, 12.0, 14.0)
    assert table.head_ms == (1.0, 1.5, 2.0)
    assert (table.block_rows, table.block_ms) == ((8, 16), (4.0, 7.0))
    assert (table.draft_rows, table.draft_pass_ms) == ((2, 8), (11.0, 13.0))
    assert [table.draft_ms(n) for n in (1, 2, 6, 10)] == [0.6875, 0.75, 1.0, 1.25]
    assert BESIDE == 8
    sampled = cost_table([TRUE_MS], greedy=False)
    assert (sampled.head_ms, sampled.draft_ms(2)) == ((2.0, 3.0, 4.0), 1.5)
    assert sampled.body_ms == table.body_ms


def test_drift_of_the_machine_cancels() -> None:
    rounds = [{name: speed * ms for name, ms in TRUE_MS.items()} for speed in (1.0, 2.0, 1.5)]
    table = cost_table(rounds)
    assert [round(ms, 6) for ms in table.body_ms] == [15.0, 18.0, 21.0]
    assert round(table.draft_ms(6), 6) == 1.5


def test_one_quiet_or_busy_moment_changes_nothing() -> None:
    quiet = TRUE_MS | {"body 1+0": 6.0}
    busy = TRUE_MS | {"body 16+0": 400.0}
    assert cost_table([TRUE_MS, quiet, busy, TRUE_MS, TRUE_MS]) == cost_table([TRUE_MS])


def test_more_rows_never_cost_less() -> None:
    table = cost_table([TRUE_MS | {"body 1+0": 13.0}])
    assert table.body_ms == (12.0, 12.0, 14.0)


def test_rounds_of_a_busy_machine_are_dropped_once_there_is_a_quiet_one() -> None:
    busy = [{name: 1.6 * ms for name, ms in TRUE_MS.items()} | {"body 16+0": 90.0}] * 5
    assert quiet_rounds(busy) == busy
    assert quiet_rounds([*busy, TRUE_MS]) == [TRUE_MS]
    drifting = [{name: slow * ms for name, ms in TRUE_MS.items()} for slow in (1.0, 1.1, 1.4)]
    assert quiet_rounds(drifting) == drifting
