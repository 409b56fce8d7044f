"""One thread for the products of a scope."""

from __future__ import annotations

from threadpoolctl import threadpool_limits


def one_thread() -> threadpool_limits:
    """Within it BLAS and OpenMP use one thread: how many threads share a sum decides its order, and so its last digits."""
    return threadpool_limits(limits=1)
