"""A flow for tests that load it from this file; as a script, it tells what Prefect knows of it."""

import json

from prefect import flow

from supervised import supervised_flow


@supervised_flow(retries=2, grace_seconds=7)
def double(number: int = 2) -> int:
    return 2 * number


if __name__ == "__main__":
    plain = flow(double.unsupervised_fn)
    versions = [
        {"version": known.version, "entrypoint": known._entrypoint}
        for known in (plain, double, double.with_options(retries=0))
    ]
    print(json.dumps(versions))
