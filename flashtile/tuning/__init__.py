"""Tuning: tables as data, one file a device family. Tuning never changes results beyond rounding."""
