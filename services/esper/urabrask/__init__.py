"""Urabrask, the evaluation engine and only promoter: leases kernels, judges them in a sandbox, signs verdicts."""
