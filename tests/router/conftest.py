"""The backends that route, for every test of this folder."""

from __future__ import annotations

import pytest
from cases.router import ROUTERS

import moealign


@pytest.fixture(params=ROUTERS)
def backend(request):
    reason = moealign.backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
