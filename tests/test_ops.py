"""Every op, every form, every ISA, every named case, against the float64 reference."""

from __future__ import annotations

import pytest
from op_forms import EVERY, every_form

import pycircuit as pc
from pycircuit.ops import cases


@every_form
@pytest.mark.parametrize(("op", "case"), EVERY, ids=[f"{op}-{case}" for op, case in EVERY])
def test_equals_float64(op: str, case: str, form: str, isa: str | None) -> None:
    args = cases.CASES[op][case](cases.generator(1))
    truth = cases.exact(op, args)
    with pc.use(form, isa=isa):
        got = getattr(pc.ops, op)(*args)
    assert pc.last_run() == pc.ops.Ran(op, form, isa)
    # Sums of at most a few thousand float32 terms: a few hundred units in the last place at the worst.
    assert cases.error(op, got, truth, args) < 3e-6
