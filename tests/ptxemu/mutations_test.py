"""What ``mutations.py`` breaks is noticed; in the gate one place of each kind.

``python -m pytest tests/ptxemu/mutations_test.py -s`` prints the lines where nothing was.
"""

from __future__ import annotations

import os

import pytest

from .mutations import FEW, MUTATIONS, missed, noticed, places

ARCH = int(os.environ["FASTVDM_EMULATE"])
KINDS = [name for name, m in MUTATIONS.items() if ARCH in m.archs]


@pytest.mark.parametrize("kind", KINDS)
def test_one_is_noticed(kind):
    mutation = MUTATIONS[kind]
    found = [p for everywhere in places(mutation, ARCH, FEW).values() for p in everywhere]
    assert any(noticed(mutation, ARCH, place) for place in found[:: max(1, len(found) // 8)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_line_is_noticed(kind):
    silent, total = missed(MUTATIONS[kind], ARCH, tries=8)
    print(f"\n{kind}: {total - len(silent)} of {total} lines", *silent, sep="\n    ")
    assert total and 1 - len(silent) / total >= MUTATIONS[kind].share
