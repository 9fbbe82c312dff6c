"""Whole sweeps as machine code: trace, program, compose, emit, run."""
