"""Turns on the way up, taken by threads that wait for each other and never for time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

from lsp_ray.device.link import Link


class Counting(threading.Condition):
    """Tells how many threads have come to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.num_waiting = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.num_waiting.release()
        return super().wait(timeout)


def test_whoever_is_due_first_goes_first_and_a_delta_before_the_weights_of_its_layer() -> None:
    changed = Counting()
    link, order = Link(changed), list[tuple[int, int]]()

    def copy(due: int, kind: int) -> None:
        with link.turn(due, kind):
            order.append((due, kind))

    asked = [(9, 1), (3, 1), (4, 0), (3, 0), (12, 0)]
    with ThreadPoolExecutor(len(asked)) as threads:
        with link.turn(100):
            copies = [threads.submit(copy, *each) for each in asked]
            for _ in asked:
                assert changed.num_waiting.acquire(timeout=10)
        wait(copies, timeout=10)
    assert order == sorted(asked)


def test_a_turn_ends_however_it_ends() -> None:
    link = Link()
    try:
        with link.turn(1):
            raise KeyError
    except KeyError:
        pass
    with link.turn(2):
        pass
