"""Help for testing supervised flows: a fake Prefect on a virtual clock, and real local servers."""

from supervised.testing._fake import FakePrefect, FakeRun
from supervised.testing._faults import Faults
from supervised.testing._local import LocalServer, local_server, running

__all__ = ["FakePrefect", "FakeRun", "Faults", "LocalServer", "local_server", "running"]
