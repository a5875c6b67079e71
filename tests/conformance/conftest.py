"""No test skips unnoticed: one that skips and is not listed in the module fails, and so does one that is listed in
its `SKIPPED` and runs.
"""

import os
import re
from pathlib import Path

import pytest


MARKERS = """accelerate_tests flash_attn_3_test flash_attn_4_test flash_attn_test is_pipeline_test order
torch_compile_test"""

SKIPS_SEEN = pytest.StashKey[list[str]]()

if "TRANSFORMERS_SOURCE" in os.environ:
    os.environ["RUN_SLOW"] = "1"  # read when transformers.testing_utils is imported


def pytest_configure(config):
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: set by transformers' tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # `-m "not slow"` would drop what transformers marks slow, which is one more way to skip. All of it wants a GPU.
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.own_markers = [marker for marker in item.own_markers if marker.name != "slow"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    listed = [part for name, part in item.module.SKIPPED.items() if re.fullmatch(name, item.name)]
    seen = item.stash.setdefault(SKIPS_SEEN, [])
    if report.skipped:  # a test, or a subtest of one
        message = str(call.excinfo.value)
        seen.append(message)
        known = [] if re.search(item.module.RUNS + "$", item.nodeid) else [part for part in listed if part in message]
        known = known or re.findall(item.module.MISSING_HERE, message)
        if known:
            report.longrepr = (str(item.path), None, f"Skipped: {known[0]}")  # one line of the summary per reason
        else:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} skips, and SKIPPED does not list it with this reason: {message}"
    elif report.when == "teardown" and listed and not seen and not re.search(item.module.RUNS + "$", item.nodeid):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} does not skip, and SKIPPED lists it: {listed[0]}"
    return report
