"""Benchmarks: what flashtile costs beside its peers, in time, memory and accuracy; no part of the library imports it.

`peers` says how to call whom, `cases` what is asked, `accuracy` is the gate before any timing, `suite` runs and
records, `report` turns the records into tables and plots.
"""
