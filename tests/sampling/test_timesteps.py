from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import InputError
from lvrpo.sampling import (
    check_window,
    compressed_grid,
    decaying_window,
    fast_window,
    flow_time,
    full_window,
    random_window,
    shift_time,
    sliding_window,
    timestep_grid,
)


def test_timestep_grid_by_hand() -> None:
    assert timestep_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(timestep_grid(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    assert timestep_grid(1).tolist() == [1.0, 0.0]


@given(st.integers(1, 60), st.floats(0.1, 10))
def test_timestep_grid_falls_from_exactly_one_to_exactly_zero(num_steps: int, shift: float) -> None:
    grid = timestep_grid(num_steps, shift)
    assert grid.dtype == torch.float32
    assert (grid[0], grid[-1], len(grid)) == (1, 0, num_steps + 1)
    assert (grid.diff() < 0).all()


def test_flow_time_by_hand() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0986123])  # sigmoid 0, 1/2, 3/4
    torch.testing.assert_close(flow_time(logits), torch.tensor([0.0, 0.5, 0.75]))
    torch.testing.assert_close(flow_time(logits, 3.0), torch.tensor([0.0, 0.75, 0.9]))


@pytest.mark.parametrize("call", [lambda: timestep_grid(0), lambda: shift_time(torch.zeros(1), 0.0)])
def test_impossible_times_are_refused(call) -> None:
    with pytest.raises(InputError, match="use "):
        call()


def test_full_window_leaves_the_last_step_out() -> None:
    assert full_window(4) == (0, 1, 2)
    assert full_window(1) == ()


def test_fast_window_starts_anywhere_in_the_first_half() -> None:
    assert {fast_window(10, 3, seed) for seed in range(200)} == {tuple(range(s, s + 3)) for s in range(5)}
    assert {fast_window(4, 3, seed) for seed in range(20)} == {(0, 1, 2)}
    assert fast_window(10, 3, 7) == fast_window(10, 3, 7)


def test_sliding_window_by_hand() -> None:
    starts = [sliding_window(6, 2, i)[0] for i in range(6)]
    assert starts == [0, 1, 2, 3, 0, 1]
    assert sliding_window(6, 2, 3) == (3, 4)
    assert [sliding_window(8, 2, i, stride=2, iterations_per_stride=5)[0] for i in (0, 4, 5, 10, 15)] == [0, 0, 2, 4, 0]


def test_random_window_starts_anywhere() -> None:
    assert {random_window(6, 2, seed) for seed in range(200)} == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert random_window(6, 2, 7) == random_window(6, 2, 7)


def test_decaying_window_by_hand() -> None:
    """With a half-life of one place beyond place 1: it stays 4, 4, 2 and 1 iterations, then starts anew."""
    options = {"iterations_at_start": 4, "decay": 0.6931471805599453, "threshold": 1}
    starts = [decaying_window(6, 2, i, **options)[0] for i in range(13)]
    assert starts == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 0, 0]
    assert decaying_window(6, 2, 9, **options) == (2, 3)
    assert [decaying_window(6, 2, i, **options, stride=2)[0] for i in range(7)] == [0, 0, 0, 0, 2, 2, 0]
    # by default 25 iterations at each of 0 .. 13, then ceil(25 exp(-.1)) = 23 and ceil(25 exp(-.2)) = 21
    starts = [decaying_window(25, 4, i)[0] for i in (0, 349, 350, 372, 373, 393, 394)]
    assert starts == [0, 13, 14, 14, 15, 15, 16]


def test_without_decay_the_window_slides() -> None:
    for i in range(20):
        sliding = sliding_window(9, 3, i, iterations_per_stride=2)
        assert decaying_window(9, 3, i, iterations_at_start=2, decay=0.0) == sliding


def test_compressed_grid_by_hand() -> None:
    assert compressed_grid(4, 2, 1).tolist() == [1.0, 0.75, 0.5, 0.0]
    assert compressed_grid(8, 4, 2).tolist() == [1.0, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0]
    # tau 1, .75, .375, 0 moved by 3: 3 tau / (1 + 2 tau)
    torch.testing.assert_close(compressed_grid(4, 1, 2, 3.0), torch.tensor([1.0, 0.9, 9 / 14, 0.0]))


@given(st.integers(1, 40), st.floats(0.1, 10), st.data())
def test_compressed_grid_begins_as_the_full_one_and_falls_to_zero(num_steps: int, shift: float, data) -> None:
    window_end = data.draw(st.integers(0, num_steps - 1))
    steps_after = data.draw(st.integers(1, num_steps - window_end))
    grid = compressed_grid(num_steps, window_end, steps_after, shift)
    assert torch.equal(grid[: window_end + 1], timestep_grid(num_steps, shift)[: window_end + 1])
    assert len(grid) == window_end + steps_after + 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    if window_end + steps_after == num_steps:
        torch.testing.assert_close(grid, timestep_grid(num_steps, shift))


@given(st.integers(2, 40), st.data())
def test_windows_lie_within_the_full_window(num_steps: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_steps - 1))
    number = data.draw(st.integers(0, 1000))
    for function in (fast_window, random_window, sliding_window, decaying_window):
        window = function(num_steps, size, number)
        assert len(window) == size
        assert set(window) <= set(full_window(num_steps))
        check_window(window, num_steps, "cps")


@pytest.mark.parametrize(
    ("window", "sampler", "message"),
    [
        ((11, 12), "flow_sde", r"^sampling.num_steps=10 but window ends at 12: use 0..9$"),
        ((8, 9), "cps", r"^sampling.num_steps=10 but window ends at 9: use 0..8$"),
        ((-1, 0), "flow_sde", r"starts at -1: use 0..9$"),
        ((2, 2), "flow_sde", r"repeats or reorders"),
        ((3, 2), "dance_sde", r"repeats or reorders"),
        ((0,), "ode", r"leave the window empty"),
    ],
)
def test_check_window_says_what_to_do(window: tuple[int, ...], sampler: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_window(window, 10, sampler)


def test_check_window_lets_good_windows_pass() -> None:
    check_window((), 10, "ode")
    check_window((0, 3, 9), 10, "flow_sde")


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(InputError, match=r"^sampling.num_steps=4 but window size is 4: use 1..3$"):
        fast_window(4, 4, 0)
    with pytest.raises(InputError, match="window size is 0"):
        sliding_window(4, 0, 0)
    with pytest.raises(InputError, match="stride=0"):
        sliding_window(4, 1, 0, stride=0)
    with pytest.raises(InputError, match="iterations_per_stride=0"):
        sliding_window(4, 1, 0, iterations_per_stride=0)
    with pytest.raises(InputError, match="num_steps=0"):
        full_window(0)
    with pytest.raises(InputError, match="window size is 4"):
        random_window(4, 4, 0)
    with pytest.raises(InputError, match=r"decay=-1.0, iteration=0: use"):
        decaying_window(4, 1, 0, decay=-1.0)
    for wrong in ({"stride": 0}, {"iterations_at_start": 0}):
        with pytest.raises(InputError, match="use 1 or more for the first two"):
            decaying_window(4, 1, 0, **wrong)
    with pytest.raises(InputError, match=r"the window's end at 4 and 1 steps after it: use 0..3 and 1..1"):
        compressed_grid(4, 4, 1)
    with pytest.raises(InputError, match=r"end at 2 and 3 steps after it: use 0..3 and 1..2"):
        compressed_grid(4, 2, 3)
