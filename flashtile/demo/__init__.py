"""`flashtile demo`: one small GPT trained twice on real text, by the textbook formula and by flashtile, side by side.

`model` is the GPT, `training` the two runs, `scaling` time and memory against seqlen, `show` what the user sees.
"""
