"""Every op, every form, every ISA, every named case, against the float64 reference."""

from __future__ import annotations

import pytest

import pycircuit as pc
from pycircuit.ops import cases
from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import OPS

FORMS = [("reference", None), *(("native", name) for name, supported in native_isas() if supported)]
EVERY = [(op, case) for op in OPS for case in cases.CASES[op]]


@pytest.mark.parametrize(("form", "isa"), FORMS, ids=[isa or form for form, isa in FORMS])
@pytest.mark.parametrize(("op", "case"), EVERY, ids=[f"{op}-{case}" for op, case in EVERY])
def test_equals_float64(op: str, case: str, form: str, isa: str | None) -> None:
    args = cases.CASES[op][case](cases.generator(1))
    truth = cases.exact(op, args)
    with pc.use(form, isa=isa):
        got = getattr(pc.ops, op)(*args)
    assert pc.last_run() == pc.ops.Ran(op, form, isa)
    # Sums of at most a few thousand float32 terms: a few hundred units in the last place at the worst.
    assert cases.error(op, got, truth, args) < 3e-6
