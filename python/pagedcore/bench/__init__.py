"""Benchmarks that ship with the package: ``python -m pagedcore.bench SUITE [--quick] [--json FILE]``.

Rules: what is timed was checked against an oracle first; peers and rooflines run in the same process, interleaved with
the subject; figures are medians with 10th and 90th percentiles.
"""
