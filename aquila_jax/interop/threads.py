"""A few tensors under way at once: while one is written, the next is read and computed."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def each(work: Callable[..., Any], items: Iterable[tuple[Any, ...]], most: int) -> Iterator[Any]:
    """What `work(*item)` gives for every item, in their order, computed in threads.

    A failure, of the work or of whoever takes its results, cancels what has not begun; what has
    is waited for.

    Args:
        work: called once for each item, from another thread.
        items: the arguments of each call.
        most: how many at once; no more than there are cores.
    """
    with ThreadPoolExecutor(min(most, os.cpu_count() or 1)) as workers:
        futures = [workers.submit(work, *item) for item in items]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
