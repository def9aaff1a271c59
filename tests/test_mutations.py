"""The faults that `mutations.py` plants: each can be planted, and the tests that should catch it are there."""

from pathlib import Path

import pytest
from faults import FAULTS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "cce_inductor"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_follows_the_code_that_it_is_planted_in(fault):
    source = (PACKAGE / fault.file).read_text()
    assert fault.planted_in(source) != source
    paths = [word.partition("::")[0] for word in fault.tests.split() if word.startswith("tests/")]
    assert paths
    assert all((TESTS.parent / path).exists() for path in paths)


def test_faults_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
