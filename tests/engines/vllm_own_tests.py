"""A pytest plug-in that runs vLLM's own tests on our functions; see run_engines.py --own.

Installs the drop-in before the tests are imported (so that what they import by name is ours), and fails the session if
a call went to vLLM or none came to us.  The tests of globalized ids skip themselves where DeepEP is not installed, yet
all they need is a module of vLLM's that imports it: an empty one stands in.
"""

from __future__ import annotations

import sys
import types

import pytest

from moealign.integrations import vllm as drop_in


def annotation(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def pytest_configure(config):
    drop_in.install()
    from vllm.utils import import_utils

    if not import_utils.has_deep_ep_v2():
        import_utils.has_deep_ep_v2 = lambda: True
        sys.modules["deep_ep"] = types.ModuleType("deep_ep")
        sys.modules["deep_ep"].__getattr__ = annotation


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    calls = drop_in.calls()
    ours, theirs = (sum(each[who] for each in calls.values()) for who in ("moealign", "vllm"))
    print(f"\ncalls that moealign took: {ours}, left to vLLM: {theirs}; {calls}")
    workers = hasattr(session.config, "workerinput") or session.config.getoption("numprocesses", None)
    if exitstatus == 0 and not workers and (theirs or not ours):
        session.exitstatus = 1
