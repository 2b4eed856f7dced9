"""The list that makes Triton's interpreter quicker is the list that the interpreter would make."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl
from triton.runtime import interpreter

from tests import _interpreter

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    "owner", [tl, tl.core, tl.tensor, tl.math], ids=lambda owner: owner.__name__
)
def test_the_interpreter_patches_what_is_listed(triton_device, owner):
    """Every public function that runs in kernels is replaced, and comes back."""
    names = _interpreter.builtin_names(owner)
    assert {"tensor": "__add__", "triton.language.math": "exp"}.get(owner.__name__, "load") in names
    before = [getattr(owner, name) for name in names]
    scope = interpreter._LangPatchScope()
    interpreter._patch_builtin(owner, interpreter.interpreter_builder, scope)
    assert not any(tl.core.is_builtin(getattr(owner, name)) for name in names)
    scope.restore()
    assert [getattr(owner, name) for name in names] == before
