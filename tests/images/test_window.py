"""The request window, without a clock: replies in, widths out; and with threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.images.window import Reply, RequestWindow


def send(window: RequestWindow, count: int) -> list[int]:
    return [window.enter() for _ in range(count)]


def answer(window: RequestWindow, numbers: list[int], reply: Reply) -> None:
    for number in numbers:
        window.leave(number, reply)


def test_a_throttled_reply_halves_the_window_once_per_round_trip() -> None:
    window = RequestWindow(64)
    burst = send(window, 40)
    answer(window, burst[:20], "throttled")
    assert window.size == 32
    answer(window, burst[20:], "throttled")  # sent before the halving: they tell nothing new
    assert window.size == 32
    answer(window, send(window, 10), "throttled")
    assert window.size == 16


def test_a_full_window_of_good_replies_widens_it_by_one() -> None:
    window = RequestWindow(8)
    answer(window, send(window, 1), "throttled")
    sizes = []
    for _ in range(4 + 5 + 6 + 7 + 20):
        answer(window, send(window, 1), "good")
        sizes.append(window.size)
    assert sizes == [4] * 3 + [5] * 5 + [6] * 6 + [7] * 7 + [8] * 21


def test_good_replies_to_requests_from_before_the_halving_do_not_widen_it() -> None:
    window = RequestWindow(8)
    burst = send(window, 8)
    answer(window, burst[:1], "throttled")
    answer(window, burst[1:], "good")
    assert window.size == 4


def test_lost_connections_change_nothing() -> None:
    window = RequestWindow(8)
    answer(window, send(window, 1), "throttled")
    for _ in range(30):
        answer(window, send(window, 1), "none")
    assert window.size == 4


@given(
    ceiling=st.integers(1, 70),
    replies=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["good", "throttled", "none"])), max_size=300),
)
def test_the_window_stays_between_one_and_its_ceiling(ceiling: int, replies: list[tuple[int, Reply]]) -> None:
    window = RequestWindow(ceiling)
    under_way: list[int] = []
    for choice, reply in replies:  # as many requests as fit, answered in any order
        while len(under_way) < window.size:
            under_way.append(window.enter())
        before = window.size
        window.leave(under_way.pop(choice % len(under_way)), reply)
        assert 1 <= window.size <= ceiling
        assert window.size in (before, max(1, before // 2), before + 1)


@pytest.mark.parametrize("capacity", [1, 3, 10, 40])
def test_it_settles_around_what_the_store_can_bear(capacity: int) -> None:
    window = RequestWindow(64)
    sizes = []
    for _ in range(500):  # in each round trip the store serves so many requests and refuses the rest
        numbers = send(window, window.size)
        answer(window, numbers[:capacity], "good")
        answer(window, numbers[capacity:], "throttled")
        sizes.append(window.size)
    settled = sizes[-200:]
    assert max(settled) <= capacity + 1
    assert min(settled) >= (capacity + 1) // 2
    assert sum(settled) / 200 > 0.6 * capacity


def test_threads_wait_for_their_turn_and_none_is_forgotten() -> None:
    window = RequestWindow(6)
    answer(window, send(window, 1), "throttled")
    lock = threading.Lock()
    now, most = 0, 0

    def request(_: int) -> None:
        nonlocal now, most
        number = window.enter()
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.001)
        with lock:
            now -= 1
        window.leave(number, "none")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(request, range(200)))
    assert (now, most) == (0, 3)


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="1 request"):
        RequestWindow(0)
