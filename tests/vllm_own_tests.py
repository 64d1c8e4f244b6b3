"""A pytest plug-in that runs vLLM's own tests on our functions; see real_vllm.py --own.

Loads vLLM's compiled library from MOEALIGN_VLLM_LIBRARY where that is set, installs the drop-in before the tests are
imported (so that what they import by name is ours), and fails the session if a call went to vLLM or none came to us.
"""

from __future__ import annotations

import os

import pytest
import torch

from moealign.integrations import vllm as drop_in


def pytest_configure(config):
    library = os.environ.get("MOEALIGN_VLLM_LIBRARY")
    if library:
        torch.ops.load_library(library)
    drop_in.install()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    calls = drop_in.calls()
    ours, theirs = (sum(each[who] for each in calls.values()) for who in ("moealign", "vllm"))
    print(f"\ncalls that moealign took: {ours}, left to vLLM: {theirs}; {calls}")
    workers = hasattr(session.config, "workerinput") or session.config.getoption("numprocesses", None)
    if exitstatus == 0 and not workers and (theirs or not ours):
        session.exitstatus = 1
