"""Ways to run the same steps faster; the eager engine is ``adjoint.autograd``, and every other is checked against it."""
