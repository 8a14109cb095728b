"""What torch's allocator gives out."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def working_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator had given out at a time during `work`, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert events and now == 0, "what a request allocates is gone when it ends"
    return most
