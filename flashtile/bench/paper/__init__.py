"""`flashtile bench paper`: the speed-ups that attention libraries are known by, each measured again on this device.

`experiment` says what a row is and how two variants are compared; `language`, `images`, `folding` and `kernels` hold
the rows, `evoformer` a model for them; `page` turns the record into a table and docs/paper.md, `drawing` into plots.
"""
