"""The errors of Triton for a tile that the compiler or the card refuses."""

from triton.runtime.errors import OutOfResources, PTXASError

REFUSED = (OutOfResources, PTXASError)
