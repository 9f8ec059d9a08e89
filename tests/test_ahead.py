"""Work that runs ahead in threads, and batches of images of one size."""

import threading
import time
from contextlib import closing

import pytest

from maskcls_hf.inference.predictor import same_size_together
from maskcls_hf.utils.ahead import ahead, in_order


class TestAhead:
    def test_gives_what_map_gives(self):
        def slow_where_even(number: int) -> int:
            time.sleep(0.01 * (number % 2 == 0))
            return number**2

        assert list(ahead(slow_where_even, range(20), threads=4, waiting=6)) == [n**2 for n in range(20)]
        assert list(ahead(slow_where_even, [], threads=4, waiting=6)) == []

    def test_runs_ahead_as_far_as_it_may(self):
        taken, goes_on = [], threading.Event()
        items = (taken.append(n) or n for n in range(100))
        with closing(ahead(lambda n: goes_on.wait(10), items, threads=2, waiting=5)) as results:
            threading.Timer(0.2, goes_on.set).start()
            next(results)
            assert len(taken) == 5
            for done in range(1, 10):
                next(results)
                assert len(taken) <= done + 5

    def test_works_in_several_threads_at_once(self):
        both = threading.Barrier(2, timeout=10)
        assert list(ahead(lambda n: both.wait() >= 0, range(4), threads=2, waiting=4)) == [True] * 4

    def test_what_is_done_does_not_wait_for_what_may_run_ahead(self):
        taken = []

        def items():
            for number in range(50):
                taken.append(number)
                yield number
                time.sleep(0.02)

        with closing(ahead(lambda n: n, items(), threads=1, waiting=50)) as results:
            assert next(results) == 0 and len(taken) < 25

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_errors_of_items_and_of_work_end_it(self, error):
        def items():
            yield 1
            raise error("of the items")

        def work(number: int) -> int:
            raise error("of the work")

        with pytest.raises(error, match="of the items"):
            list(ahead(lambda n: n, items(), threads=2, waiting=9))
        with pytest.raises(error, match="of the work"):
            list(ahead(work, [1, 2, 3], threads=2, waiting=9))

    def test_closing_begins_nothing_more_and_leaves_no_thread(self):
        begun, before = [], threading.active_count()
        with closing(
            ahead(lambda n: begun.append(n) or time.sleep(0.05), range(100), threads=1, waiting=20)
        ) as results:
            next(results)
        assert len(begun) < 20 and threading.active_count() == before


def test_in_order():
    assert list(in_order([2, 0, 1, 4, 3], lambda n: n)) == [0, 1, 2, 3, 4]
    released = []
    for number in in_order(iter([1, 0, 3, 2]), lambda n: released.append(n) or n):
        assert number in released
        if number == 0:
            assert released == [1, 0]  # not later than it can


class TestSameSizeTogether:
    def batches(self, sizes: str, number: int) -> list[str]:
        places = same_size_together(range(len(sizes)), lambda i: sizes[i], number)
        batches = [list(batch) for batch in places]
        assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
        return ["".join(sizes[i] for i in batch) for batch in batches]

    def test_one_size(self):
        assert self.batches("aaaaa", 2) == ["aa", "aa", "a"]
        assert self.batches("abc", 1) == ["a", "b", "c"] and self.batches("", 3) == []

    def test_two_sizes_in_turn(self):
        assert self.batches("abababab", 4) == ["aaaa", "bbbb"]

    def test_batches_are_filled_up_with_other_sizes(self):
        assert self.batches("abcdeaf", 3) == ["aab", "cde", "f"]

    def test_only_near_items_are_looked_at(self):
        """Of a stream, no more than four batches are held."""
        held, given = 0, 0

        def stream():
            nonlocal held
            for number in range(100):
                held += 1
                yield number

        for batch in same_size_together(stream(), lambda n: n, 3):
            assert held - given <= 12
            given += len(batch)
        assert given == 100
