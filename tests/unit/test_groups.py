"""What `conftest.py` asks of pytest-xdist, which loses it silently under a version of pytest that it does not fit."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_of_a_file_stay_with_one_worker(request):
    assert request.node.nodeid.rpartition("@")[2] == "tests/unit/test_groups.py"
