"""Selection and shared state: undo and redo against a plain model of them, silence where nothing changes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from particle_explorer.latents import Latents
from particle_explorer.session import Session
from particle_explorer.state import UNDO_DEPTH, AppState, Opened, Selection, read

N = 11
MASKS = st.integers(0, 2**N - 1).map(lambda bits: np.array([bits >> i & 1 for i in range(N)], bool))
STEPS = st.one_of(
    st.tuples(st.sampled_from(["set", "add", "subtract", "intersect"]), MASKS),
    st.tuples(st.sampled_from(["invert", "clear", "undo", "redo"]), st.none()),
)
WHAT = {
    "set": lambda now, mask: mask,
    "add": lambda now, mask: now | mask,
    "subtract": lambda now, mask: now & ~mask,
    "intersect": lambda now, mask: now & mask,
    "invert": lambda now, mask: ~now,
    "clear": lambda now, mask: now & False,
}


@given(st.lists(STEPS, max_size=40))
def test_any_sequence_agrees_with_a_list_of_states(steps: list[tuple[str, np.ndarray | None]]) -> None:
    selection = Selection(N)
    told: list[np.ndarray] = []
    selection.changed.connect(lambda mask: told.append(mask.copy()))
    states, at, n_told = [np.zeros(N, bool)], 0, 0
    for name, mask in steps:
        getattr(selection, name)(*([] if mask is None else [mask]))
        before = at
        if name == "undo":
            at = max(at - 1, 0)
            n_told += at != before
        elif name == "redo":
            at = min(at + 1, len(states) - 1)
            n_told += at != before
        else:
            wanted = WHAT[name](states[at], mask)
            if not np.array_equal(wanted, states[at]):
                states = [*states[: at + 1], wanted]
                at += 1
                n_told += 1
        assert np.array_equal(selection.mask, states[at])
        assert selection.count == len(selection.rows) == int(states[at].sum())
        assert len(told) == n_told
        if told:
            assert np.array_equal(told[-1], selection.mask)


def test_undo_reaches_back_a_fixed_number_of_steps() -> None:
    selection = Selection(UNDO_DEPTH + 20)
    for row in range(UNDO_DEPTH + 20):
        selection.add(np.arange(UNDO_DEPTH + 20) == row)
    for _ in range(UNDO_DEPTH + 20):
        selection.undo()
    assert selection.count == 20


def test_the_mask_cannot_be_changed_from_outside() -> None:
    selection = Selection(3)
    mine = np.array([True, False, True])
    selection.set(mine)
    mine[:] = False
    assert selection.count == 2
    with pytest.raises(ValueError, match="read-only"):
        selection.mask[0] = False


def test_a_mask_of_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match="4"):
        Selection(3).set(np.ones(4, bool))


def test_active_particle_is_told_once() -> None:
    selection, told = Selection(5), []
    selection.active_changed.connect(told.append)
    for row in (2, 2, None, None, 4):
        selection.set_active(row)
    selection.reset(7)
    assert told == [2, None, 4, None]
    assert selection.mask.shape == (7,)


def test_handle_and_pose_are_silent_when_nothing_changes() -> None:
    state, handles, poses = AppState(), [], []
    state.handle_changed.connect(handles.append)
    state.pose_changed.connect(lambda angle, shift: poses.append((angle, *shift)))
    for _ in range(2):
        state.set_handle(np.array([1.0, 2.0]))
        state.set_pose(10.0, np.array([1.0, -1.0]))
    assert len(handles) == 1
    assert poses == [(10.0, 1.0, -1.0)]


def test_features_of_another_length_are_refused() -> None:
    state = AppState()
    state.selection.reset(3)
    with pytest.raises(ValueError, match="2 rows"):
        state.set_features(pd.DataFrame({"a": [1, 2]}))


def test_opening_shows_the_columns_of_session_and_run(tiny_session: Session) -> None:
    from particle_explorer.configs import ClassMapConfig, RunConfig

    state, told = AppState(), []
    for name in ("session_changed", "run_changed", "features_changed"):
        getattr(state, name).connect(lambda *_, name=name: told.append(name))
    state.open_session(tiny_session)
    n = tiny_session.n_particles
    assert state.run is None and state.selection.mask.shape == (n,) and len(state.features) == n
    run = tiny_session.new_run(RunConfig(model=ClassMapConfig(), data=tiny_session.data_spec()))
    z = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    run.save_latents(Latents(tiny_session.uid, z, angle_deg=np.full(n, 7, np.float32)))
    state.selection.set(np.arange(n) < 3)
    told.clear()
    state.show(read(tiny_session))
    assert told == ["run_changed", "features_changed"]
    assert state.selection.count == 3  # rows are the session's: another run keeps them
    assert state.handle_z.shape == (2,)
    assert (state.features["angle_deg"] == 7).all()  # the run's own wins over the file's
    assert state.features.columns.is_unique
    state.open_session(None)
    assert state.selection.mask.size == 0 and state.handle_z.size == 0


def test_a_closed_session_leaves_nothing_behind() -> None:
    state = AppState()
    state.show(Opened(None, None, pd.DataFrame()))
    assert state.session is None and state.run is None


def test_a_selection_that_was_undone_is_not_lost_by_another() -> None:
    selection = Selection(8)
    masks = [np.arange(8) < k for k in (1, 2, 3)]
    for mask in masks:
        selection.set(mask)
    selection.undo()
    selection.undo()
    selection.set(np.arange(8) > 5)
    seen = []
    while selection.can_undo:
        selection.undo()
        seen.append(int(selection.mask.sum()))
    assert seen == [1, 2, 3, 0], "first what it stood at, then what had been undone, then what was before"


def test_the_past_of_a_selection_can_be_kept_and_put_back() -> None:
    selection, other = Selection(8), Selection(8)
    for k in (1, 2, 3):
        selection.set(np.arange(8) < k)
    other.set(selection.mask)
    other.recall([*selection.past, b"of another length"])
    counts = []
    while other.can_undo:
        other.undo()
        counts.append(other.count)
    assert counts == [2, 1, 0]
