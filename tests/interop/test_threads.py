import threading

import pytest

from aquila_jax.interop.threads import each

MANY = [(number,) for number in range(1000)]


def test_results_come_in_the_order_of_the_items():
    items = [(number, number + 1) for number in range(20)]
    assert list(each(lambda a, b: a * b, items, 4)) == [a * b for a, b in items]
    assert list(each(abs, [], 4)) == []


def test_a_failure_of_the_work_is_raised_and_most_of_the_rest_is_never_begun():
    begun = []

    def work(number):
        begun.append(number)
        if number == 1:
            raise ZeroDivisionError("a defect")
        failed.wait(0.01 if number else 0)

    failed = threading.Event()
    with pytest.raises(ZeroDivisionError):
        list(each(work, MANY, 1))
    assert len(begun) < len(MANY)


def test_a_failure_of_whoever_takes_results_waits_for_what_has_begun_and_cancels_the_rest():
    begun, ended, is_taken = [], [], threading.Event()

    def work(number):
        begun.append(number)
        if number:
            is_taken.wait(10)
        ended.append(number)

    def take():
        for _ in each(work, MANY, 1):
            is_taken.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take()
    assert begun == ended
    assert 0 < len(ended) < len(MANY)
