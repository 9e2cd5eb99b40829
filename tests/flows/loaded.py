"""A flow for tests that load it from this file, in processes that know nothing of it."""

from supervised import supervised_flow


@supervised_flow(retries=2, grace_seconds=7)
def double(number: int = 2) -> int:
    return 2 * number
