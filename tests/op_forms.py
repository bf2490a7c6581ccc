"""Implementations of the ops that this machine runs, and a parametrisation over them."""

from __future__ import annotations

import pytest

from pycircuit.ops import cases
from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import OPS

ISAS = [name for name, supported in native_isas() if supported]
FORMS = [("reference", None), *(("native", isa) for isa in ISAS)]
EVERY = [(op, case) for op in OPS for case in cases.CASES[op]]
every_form = pytest.mark.parametrize(("form", "isa"), FORMS, ids=[isa or form for form, isa in FORMS])
